"""Augment pictures for classification. Every draw is a function of (seed, epoch, index of the picture).

Letters: N pictures of h x w pixels.
"""

import os

# Without this, albumentations looks on the internet for a newer version when it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import Field, ValidationInfo, field_validator

from ..draws import tagged
from ..settings import Probability, Section

# A picture that is evaluated is resized so, and its middle cut out: 256 for 224 pixels, as is usual for ImageNet.
_MARGIN = 256 / 224


class ClassifierAugment(Section):
    """Augmentation of a classifier's training pictures.

    `padding` is for pictures of the network's size; `scale` and `ratio` are for pictures that are resized to it.
    """

    padding: int = Field(
        0, ge=0, le=256, description="pixels around a picture, before a crop of its own size"
    )
    horizontal_flip: Probability = 0.5
    vertical_flip: Probability = 0.0
    scale: tuple[float, float] = Field((0.08, 1.0), description="share of the picture's area that a crop has")
    ratio: tuple[float, float] = Field((0.75, 4 / 3), description="width over height of a crop")

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        most = 1 if info.field_name == "scale" else 10
        if not 0 < value[0] <= value[1] <= most:
            raise ValueError(f"is {value}; accepted: two positive numbers up to {most}, the smaller first")
        return value


class BatchAugment:
    """Pad, crop and flip whole batches of pictures that have the network's size.

    num_pictures: of the data set. fill: RGB of the padding, the data's mean in the papers.
    """

    def __init__(
        self, augment: ClassifierAugment, num_pictures: int, seed: int, fill: tuple[int, int, int] = (0, 0, 0)
    ) -> None:
        self.augment = augment
        self.num_pictures = num_pictures
        self.seed = seed
        self.fill = np.array(fill, np.uint8)[:, None, None]
        self.epoch: int | None = None

    def __call__(self, images: np.ndarray, epoch: int, indices: np.ndarray) -> np.ndarray:
        """(N, 3, h, w) uint8 -> the same shape, augmented. indices: (N,) of these pictures in the data set."""
        draws, augment = self._draws(epoch)[indices], self.augment
        images = self._crop(images, draws[:, 0], draws[:, 1]) if augment.padding else images.copy()
        for axis, draw, share in ((3, 2, augment.horizontal_flip), (2, 3, augment.vertical_flip)):
            flipped = draws[:, draw] < share
            images[flipped] = np.flip(images[flipped], axis)
        return images

    def _draws(self, epoch: int) -> np.ndarray:
        """(pictures, 4) uniform in [0, 1): a row for each picture, whatever batch it is in."""
        if epoch != self.epoch:
            rng = np.random.default_rng(tagged("array", self.seed, epoch))
            self.epoch, self._table = epoch, rng.random((self.num_pictures, 4), np.float32)
        return self._table

    def _crop(self, images: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Cut pictures (N, 3, h, w) out of padded ones, at places y and x (N,) in [0, 1) of the room."""
        pad, (count, channels, height, width) = self.augment.padding, images.shape
        padded = np.empty((count, channels, height + 2 * pad, width + 2 * pad), np.uint8)
        padded[:] = self.fill
        padded[:, :, pad:-pad, pad:-pad] = images
        windows = sliding_window_view(padded, (height, width), axis=(2, 3))
        tops, lefts = ((place * (2 * pad + 1)).astype(np.int64) for place in (y, x))
        return np.ascontiguousarray(windows[np.arange(count), :, tops, lefts])


class PictureAugment:
    """Cut a random part out of a picture of any size, resize it to `size` pixels and flip it, by albumentations."""

    def __init__(self, augment: ClassifierAugment, size: int, seed: int) -> None:
        self.seed = seed
        self.compose = A.Compose(
            [
                A.RandomResizedCrop((size, size), scale=augment.scale, ratio=augment.ratio),
                A.HorizontalFlip(p=augment.horizontal_flip),
                A.VerticalFlip(p=augment.vertical_flip),
            ]
        )

    def __call__(self, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """(h, w, 3) uint8 -> (size, size, 3) uint8."""
        draw = np.random.default_rng(tagged("file", self.seed, epoch, index)).integers(2**31)
        # Every worker has its own copy of Compose's generators. With a seed for each picture, the worker does not matter.
        self.compose.set_random_seed(int(draw))
        return self.compose(image=image)["image"]


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The middle of a picture for evaluation: (h, w, 3) uint8 -> (size, size, 3) uint8.

    The short side is first resized to 256/224 of `size`.
    """
    # What a long picture loses is not resized.
    side, large = min(image.shape[:2]), round(size * _MARGIN)
    method = cv2.INTER_AREA if large < side else cv2.INTER_LINEAR
    return _middle(cv2.resize(_middle(image, side), (large, large), interpolation=method), size)


def _middle(image: np.ndarray, side: int) -> np.ndarray:
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return image[top : top + side, left : left + side]
