"""Read a folder of class folders: root/train/CLASS/* and root/val/CLASS/*, or root/CLASS/* alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ..data.images import dead_links, list_images, read_sizes
from ..data.tolerance import refuse_many
from ..files import is_output
from ..settings import Section
from .pictures import Pictures, check_classes

# Where the folder has no splits, every fifth picture of a class is for validation.
_FIFTH = 5
_SPLITS = ("train", "training", "val", "valid", "validation", "test")


class FolderSource(Section):
    """A folder of class folders."""

    format: Literal["folder"]
    root: Path
    strict: bool = False

    def load(self, split: str, class_names: tuple[str, ...] | None = None) -> Pictures:
        return load_folder(self.root, split, class_names, strict=self.strict)


def load_folder(
    root: str | Path, split: str, class_names: Sequence[str] | None = None, *, strict: bool = False
) -> Pictures:
    """The pictures of a split, with the folders' names as classes in sorted order.

    Where root/train is absent, root holds the class folders. A fifth of each class's pictures, or one of two to four,
    chosen at random but always the same, is then "val"; the others are "train".

    class_names: those of the training pictures; a folder of another name is refused.
    strict: refuse the first unreadable picture instead of leaving it out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are fewer than two classes, a class has no picture, a folder's name is not a class, or more
            than a twentieth of the pictures cannot be read.
    """
    root = Path(root)
    has_splits = (root / "train").is_dir()
    folder = root / split if has_splits else root
    if not folder.is_dir():
        parts = (
            "train/ and val/, each with a folder for each class" if has_splits else "a folder for each class"
        )
        raise FileNotFoundError(f"{folder}: no such folder; accepted: {root} with {parts}")
    folders = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    names = sorted(p.name for p in folders if not is_output(p))
    if not has_splits and (splits := [name for name in names if name.lower() in _SPLITS]):
        raise ValueError(
            f"{root / splits[0]}: the name of a split; accepted: {root} with train/ and val/, or with a folder for each class"
        )
    class_names = tuple(class_names or names)
    check_classes(class_names, str(folder))
    if unknown := [name for name in names if name not in class_names]:
        raise ValueError(
            f"{folder / unknown[0]}: is no class of the training pictures: {', '.join(class_names)}"
        )
    problems = dead_links(sorted(folder.iterdir()))
    paths = {name: np.array(list_images(folder / name, problems), dtype=str) for name in names}
    if not has_splits:
        paths = {name: _part(found, split) for name, found in paths.items()}
    labels = np.repeat([class_names.index(name) for name in names], list(map(len, paths.values())))
    whole = np.concatenate(list(paths.values()))
    _, reasons = read_sizes(whole.tolist())
    left_out = tuple(reasons.values())
    if strict and left_out:
        raise ValueError(f"{left_out[0]} (strict refuses any; {len(left_out)} cannot be read)")
    refuse_many(left_out, len(whole))
    whole, labels = np.delete(whole, list(reasons)), np.delete(labels, list(reasons)).astype(np.int64)
    if split == "train" and (empty := set(range(len(class_names))) - set(labels.tolist())):
        raise ValueError(f"{folder / class_names[min(empty)]}: no picture can be read")
    return Pictures(whole, labels, class_names, tuple(problems), left_out, strict)


def _part(paths: np.ndarray, split: str) -> np.ndarray:
    """The pictures of a class that are for this split, of all pictures of the class in sorted order."""
    order = np.random.default_rng(len(paths)).permutation(len(paths))
    is_val = order % _FIFTH == _FIFTH - 1
    if 1 < len(paths) < _FIFTH:
        is_val = order == 0
    return paths[~is_val if split == "train" else is_val]
