"""Pictures of one class each, as an array or as files.

Letters: N pictures of h x w pixels, K classes. Labels are 0..K-1: a classifier has no background of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backbones import Preprocessing

from ..data.images import load_image

# Mean and standard deviation of so many pictures differ little from those of all.
_MEASURED = 5000


@dataclass(eq=False, repr=False)
class Pictures:
    """Pictures of one size in memory, or of any size in files, which are decoded when they are asked for."""

    images: np.ndarray  # (N, 3, h, w) uint8 RGB, or (N,) paths
    labels: np.ndarray  # (N,) int64 in 0..K-1
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # a sentence for each picture that is left out, with its file
    strict: bool = False  # a picture that cannot be decoded ends a run

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        return self.images.ndim > 1

    def image(self, index: int) -> np.ndarray:
        """(h, w, 3) uint8 RGB. A picture that cannot be decoded is a ValueError with its path."""
        return self.images[index].transpose(1, 2, 0) if self.in_memory else load_image(self.where(index))

    def where(self, index: int) -> str:
        """The picture's path, or its number."""
        return f"picture {index}" if self.in_memory else str(self.images[index])


def check_classes(class_names: Sequence[str], source: str) -> None:
    """Raise a ValueError where there are fewer than two classes, or two of one name."""
    if len(class_names) < 2:
        found = f"one class, {class_names[0]!r}" if class_names else "no class"
        raise ValueError(f"{source} has {found}; a classifier needs two or more")
    if twice := [name for name in class_names if class_names.count(name) > 1]:
        raise ValueError(f"{source} has the class {twice[0]!r} twice; accepted: a name for each class")


def measure_preprocessing(pictures: Pictures) -> Preprocessing:
    """Mean and standard deviation per channel, of at most 5000 of the pictures, as a backbone's preprocessing.

    ValueError: none of them can be decoded, or one where the pictures are `strict`.
    """
    counts, failed = np.zeros((3, 256)), None
    for index in np.linspace(0, len(pictures) - 1, min(_MEASURED, len(pictures))).astype(int):
        try:
            image = pictures.image(index)
        except (ValueError, OSError) as error:
            if pictures.strict:
                raise
            failed = error
            continue
        counts += [np.bincount(image[..., k].ravel(), minlength=256) / image[..., k].size for k in range(3)]
    if failed is not None and not counts.any():
        raise failed
    values, shares = np.arange(256) / 255, counts / counts.sum(1, keepdims=True)
    mean = shares @ values
    std = np.sqrt(np.maximum(shares @ values**2 - mean**2, 0))
    # A constant channel keeps its scale.
    return Preprocessing(*(tuple(np.round(m, 4).tolist()) for m in (mean, np.where(std < 1e-3, 1, std))))
