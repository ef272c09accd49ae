"""The pictures of a classifier as the network gets them: whole batches of one size."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.loader import first_readable
from .augment import BatchAugment, ClassifierAugment, PictureAugment, center_crop
from .pictures import Pictures

Keys = Sequence[tuple[int, int]]  # (epoch, index) of each picture


class LabelledBatch(NamedTuple):
    """Pictures with their labels and places in the data, and a sentence for each that could not be decoded."""

    images: Tensor  # (N, 3, h, w) uint8
    labels: Tensor  # (N,) int64
    indices: Tensor  # (N,) int64
    unreadable: tuple[str, ...] = ()


class Samples(Dataset):
    """Pictures at the network's size. The keys of a batch are (epoch, index), as in `TransformedDataset`.

    A batch is made at once: give `collate_fn=whole_batch` to a `DataLoader`. In training, another picture stands for one
    that cannot be decoded, with its own label; in evaluation it is left out. `pictures.strict` raises its ValueError.

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
        if size is None and not pictures.in_memory:
            raise ValueError("size is None; accepted for pictures in files: the side of the network's input")
        self.pictures = pictures
        self.size = size
        self.seed = seed
        if size is None:
            self.augment = augment and BatchAugment(augment, len(pictures), seed, fill)
        else:
            self.augment = augment and PictureAugment(augment, size, seed)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, keys: Keys) -> LabelledBatch:
        return self._array(keys) if self.size is None else self._resized(keys)

    def _array(self, keys: Keys) -> LabelledBatch:
        indices = np.array([index for _, index in keys], np.int64)
        images = self.pictures.images[indices]
        if self.augment is not None:
            images = self.augment(images, keys[0][0], indices)
        return self._batch(images, indices)

    def _resized(self, keys: Keys) -> LabelledBatch:
        images, indices, unreadable = [], [], []
        for epoch, index in keys:
            try:
                image = self._resized_picture(epoch, index)
            except (ValueError, OSError) as error:
                if self.pictures.strict:
                    raise
                unreadable.append(str(error))
                if self.augment is None:
                    continue
                read = partial(self._resized_picture, epoch)
                index, image = first_readable((self.seed, epoch, index), len(self), read, error)
            images.append(image)
            indices.append(index)
        stacked = np.stack(images) if images else np.empty((0, self.size, self.size, 3), np.uint8)
        images = np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))
        return self._batch(images, np.array(indices, np.int64), tuple(unreadable))

    def _batch(
        self, images: np.ndarray, indices: np.ndarray, unreadable: tuple[str, ...] = ()
    ) -> LabelledBatch:
        labels = self.pictures.labels[indices]
        return LabelledBatch(*map(torch.from_numpy, (images, labels, indices)), unreadable)

    def _resized_picture(self, epoch: int, index: int) -> np.ndarray:
        image = self.pictures.image(index)
        return center_crop(image, self.size) if self.augment is None else self.augment(image, epoch, index)


def whole_batch(batch: LabelledBatch) -> LabelledBatch:
    """The batch as `Samples` made it."""
    return batch
