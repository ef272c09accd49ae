"""The pictures of a classifier as the network gets them: whole batches of one size."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import BatchAugment, ClassifierAugment, PictureAugment, center_crop
from .pictures import ArrayPictures, Pictures

Keys = Sequence[tuple[int, int]]  # (epoch, index) of each picture


class Samples(Dataset):
    """Pictures at the network's size. The keys of a batch are (epoch, index), as in `TransformedDataset`.

    A batch is made at once: give `collate_fn=whole_batch` to a `DataLoader`.

    size: side of the network's input in pixels; None: the pictures' own, which must be an array's.
    augment: of training pictures; None: evaluation.
    fill: RGB of the padding.
    """

    def __init__(
        self,
        pictures: Pictures,
        size: int | None = None,
        augment: ClassifierAugment | None = None,
        seed: int = 0,
        fill: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        if size is None and not isinstance(pictures, ArrayPictures):
            raise ValueError("size is None; accepted for pictures in files: the side of the network's input")
        self.pictures = pictures
        self.size = size
        if size is None:
            self.augment = augment and BatchAugment(augment, len(pictures), seed, fill)
        else:
            self.augment = augment and PictureAugment(augment, size, seed)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """The image (3, h, w) uint8 and the label."""
        images, labels = self.__getitems__([key])
        return images[0], int(labels[0])

    def __getitems__(self, keys: Keys) -> tuple[Tensor, Tensor]:
        """The images (N, 3, h, w) uint8 and the labels (N,) int64. A picture that cannot be decoded is a ValueError."""
        indices = np.array([index for _, index in keys])
        images = self._array(keys, indices) if self.size is None else self._resized(keys)
        return torch.from_numpy(images), torch.from_numpy(self.pictures.labels[indices])

    def _array(self, keys: Keys, indices: np.ndarray) -> np.ndarray:
        images = self.pictures.images[indices]
        return images if self.augment is None else self.augment(images, keys[0][0], indices)

    def _resized(self, keys: Keys) -> np.ndarray:
        images = [self._resized_picture(epoch, index) for epoch, index in keys]
        return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))

    def _resized_picture(self, epoch: int, index: int) -> np.ndarray:
        image = self.pictures.image(index)
        return center_crop(image, self.size) if self.augment is None else self.augment(image, epoch, index)


def whole_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The batch as `Samples` made it."""
    return batch
