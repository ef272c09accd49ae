"""Read CIFAR-10 and CIFAR-100 in their published binary form; nothing in it is unpickled.

CIFAR-10: root/data_batch_1.bin ... data_batch_5.bin, test_batch.bin, batches.meta.txt. A record is a byte for the label
and 3 x 1024 bytes: the red, green and blue planes of 32x32 pixels, row by row.
CIFAR-100: root/train.bin, test.bin, coarse_label_names.txt, fine_label_names.txt. A record begins with two labels,
the coarse and the fine one.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from ..files import read_text
from ..settings import Section
from .pictures import Pictures, check_classes

NAMES_FILE = "batches.meta.txt"
_PIXELS = 3 * 32 * 32
_MAX_NAMES = 2**16
_SIZES = {"train": 50_000, "test": 10_000}


class CifarSource(Section):
    """CIFAR-10 or CIFAR-100, whichever `root` holds."""

    format: Literal["cifar"]
    root: Path
    labels: Literal["fine", "coarse"] = "fine"

    def load(self, split: str, class_names: tuple[str, ...] | None = None) -> Pictures:
        return load_cifar(self.root, split, self.labels, class_names)


def load_cifar(
    root: str | Path, split: str, labels: str = "fine", class_names: tuple[str, ...] | None = None
) -> Pictures:
    """The "train" pictures, or the "test" pictures, which "val" names too.

    labels: of CIFAR-100, "fine" (100 classes) or "coarse" (20).
    class_names: those of the training pictures, which must be the same.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut short, a label is beyond the classes, or there are fewer than two classes.
    """
    root, split = Path(root), "train" if split == "train" else "test"
    is_100 = (root / f"{split}.bin").is_file()
    if is_100:
        paths, num_labels, names_file = [root / f"{split}.bin"], 2, f"{labels}_label_names.txt"
    else:
        pattern = "data_batch_*.bin" if split == "train" else "test_batch.bin"
        paths, num_labels, names_file = sorted(root.glob(pattern)), 1, NAMES_FILE
    if not paths:
        raise FileNotFoundError(
            f"{root}: has no {pattern} of CIFAR-10 and no {split}.bin of CIFAR-100 in binary form"
        )
    lines = map(str.strip, read_text(root / names_file, _MAX_NAMES).splitlines())
    names = tuple(line for line in lines if line)
    check_classes(names, str(root / names_file))
    if class_names not in (None, names):
        raise ValueError(f"{root / names_file}: the classes are not those of the training pictures")
    column = 1 if is_100 and labels == "fine" else 0
    records = np.concatenate([_records(path, num_labels, column, names) for path in paths])
    images = records[:, num_labels:].reshape(-1, 3, 32, 32)
    expected = _SIZES[split]
    notes = () if len(images) == expected else (f"{root}: {len(images)} pictures; CIFAR has {expected}",)
    return Pictures(images, records[:, column].astype(np.int64), names, notes)


def _records(path: Path, num_labels: int, column: int, names: tuple[str, ...]) -> np.ndarray:
    """The records of a file, (N, labels and pixels) uint8, with labels in `column` that `names` has."""
    length = num_labels + _PIXELS
    data = np.fromfile(path, np.uint8)
    if not len(data) or len(data) % length:
        raise ValueError(
            f"{path}: the file is cut short: {len(data)} bytes are {len(data) // length} records of {length} bytes "
            f"and {len(data) % length} bytes more"
        )
    records = data.reshape(-1, length)
    wrong = np.flatnonzero(records[:, column] >= len(names))
    if len(wrong):
        raise ValueError(
            f"{path}: record {wrong[0]} has label {records[wrong[0], column]}; accepted: 0 to {len(names) - 1}"
        )
    return records
