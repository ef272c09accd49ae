"""Read Pascal VOC's folders and XML into a DetectionDataset."""

import math
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ..settings import Section
from .dataset import DetectionDataset
from .images import IMAGE_SUFFIXES, load_image_size
from .records import Annotations, Object, Picture

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, slots=True)
class _Filed:
    """One <object> as filed. `corners` is (4,) xyxy, with NaN where the file has no number."""

    name: str
    corners: tuple[float, ...]
    difficult: bool


@dataclass(frozen=True, slots=True)
class _File:
    """One XML file. `size` is (height, width), or None if the file does not say."""

    path: Path
    filename: str
    size: tuple[int, int] | None
    objects: list[_Filed]


class VocSource(Section):
    """A folder with Annotations/, ImageSets/Main/ and JPEGImages/ at `directory` below data.root."""

    format: Literal["voc"]
    split: str
    directory: str = "."
    one_based: bool = Field(
        True, description="pixels count from 1 and include the last, as in VOC; checked against the data"
    )
    limit: int | None = Field(None, gt=0)

    def load(self, root: Path, **options: Any) -> DetectionDataset:
        """The data set; options are those of `load_voc`."""
        folder = root / self.directory
        return load_voc(folder, self.split, one_based=self.one_based, limit=self.limit, **options)


def load_voc(
    root: str | Path, split: str, *, one_based: bool = True, check_pictures: bool = True, **options: Any
) -> DetectionDataset:
    """Read one split of a VOC folder: `ImageSets/Main/{split}.txt`, `Annotations/*.xml`, `JPEGImages/*`.

    Image ids are the file names if all of them are different numbers, else 1..N in the split's order.

    Args:
        one_based: pixels are counted from 1 and the last one is included, as in VOC. A box is then
            (xmin - 1, ymin - 1, xmax, ymax). If False, coordinates are taken as filed. The data is checked for both.
        check_pictures: look for the pictures; False if only the annotations are used. An XML without a size then
            still needs its picture, and otherwise has size 0 where the picture cannot be read.
        options: `class_names`, `limit`, `strict` and `use_difficult` of `Annotations.to_dataset`. Without
            `class_names`, the classes are the names found in the split, sorted.

    Raises:
        FileNotFoundError: a folder or an annotation of the split is missing.
        ValueError: the split is unknown, an XML malformed, or the coordinates contradict `one_based`.
    """
    root = Path(root)
    stems = _read_split(root, split)
    files = [_parse(path) for path in _annotation_paths(root, stems)]
    pictures = [
        Picture(path, image_id, file.size or _measure(path, check_pictures))
        for path, image_id, file in zip(
            _find_pictures(root, stems, files, check_pictures), _image_ids(stems), files, strict=True
        )
    ]

    def describe(found: Object) -> tuple[str, str]:
        corners = zip(_CORNERS, files[found.picture].objects[found.index].corners, strict=True)
        place = f"{files[found.picture].path}: object[{found.index}] ({found.name})"
        return place, ", ".join(f"{name} {value:g}" for name, value in corners)

    objects = [
        _object(filed, row, index, pictures[row].size, one_based)
        for row, file in enumerate(files)
        for index, filed in enumerate(file.objects)
    ]
    found = Annotations(f"{root}, split {split!r}", pictures, objects, describe)
    filed = np.array([o.corners for file in files for o in file.objects]).reshape(-1, 4)
    if one_based:
        _refuse_zero_based(filed, objects, found)
    elif _looks_one_based(filed, np.array([pictures[o.picture].size for o in objects]).reshape(-1, 2)):
        found.notes.append(
            "one_based is false, yet all coordinates are whole, none is 0, and some reach the image's width; "
            "they look counted from 1, as VOC's are, or clamped to 1 by their tool (as labelImg does)"
        )
    return found.to_dataset(**options)


def _object(filed: _Filed, row: int, index: int, size: tuple[int, int], one_based: bool) -> Object:
    """An object of the picture at `row` with `size` (height, width), with its box as xyxy pixels from 0."""
    xmin, ymin, xmax, ymax = filed.corners
    fault = remark = None
    if not filed.name:
        fault = "has no class name"
    elif xmax <= xmin or ymax <= ymin:
        # With both ends included, xmax = xmin is one pixel wide, but it comes from a slip of the mouse.
        fault = "has a box that has no area"
    elif any(size) and (xmax > size[1] or ymax > size[0]):
        remark = f"reaches past its image of {size[1]}x{size[0]} pixels, and is kept"
    box = (xmin - one_based, ymin - one_based, xmax, ymax)
    return Object(row, index, filed.name, box, difficult=filed.difficult, fault=fault, remark=remark)


def _read_split(root: Path, split: str) -> list[str]:
    """The file stems of a split: the first word of each line."""
    splits_dir = root / "ImageSets" / "Main"
    if not splits_dir.is_dir():
        raise FileNotFoundError(f"{splits_dir}: no such folder; {root} should be a VOC folder, which has one")
    path = splits_dir / f"{split}.txt"
    if not path.is_file():
        # VOC also has a file for each class and split, such as cat_train.txt. The message lists these last.
        known = sorted((file.stem for file in splits_dir.glob("*.txt")), key=lambda stem: ("_" in stem, stem))
        raise ValueError(f"{splits_dir}: has no split {split!r}; there are {', '.join(known[:10]) or 'none'}")
    stems = [line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not stems:
        raise ValueError(f"{path}: the split is empty")
    repeated = [stem for stem, count in Counter(stems).items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: lists {len(repeated)} image(s) more than once: {_first_few(repeated)}")
    return stems


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _refuse_missing(folder: Path, what: str, missing: list[str], stems: list[str]) -> None:
    """Raise a FileNotFoundError if any file of the split is missing."""
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of the split's {len(stems)} {what} are missing: {_first_few(missing)}"
        )


def _list_folder(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; a VOC folder has one")
    return set(os.listdir(folder))


def _annotation_paths(root: Path, stems: list[str]) -> list[Path]:
    """The XML file of each stem. A missing one is a FileNotFoundError."""
    folder = root / "Annotations"
    present = _list_folder(folder)
    missing = [f"{stem}.xml" for stem in stems if f"{stem}.xml" not in present]
    _refuse_missing(folder, "annotations", missing, stems)
    return [folder / f"{stem}.xml" for stem in stems]


def _parse(path: Path) -> _File:
    """Read one XML file. Malformed XML is a ValueError."""
    try:
        tree = ElementTree.fromstring(path.read_bytes())
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not valid XML ({error})") from None
    height, width = (_number(tree.find(f"size/{side}")) for side in ("height", "width"))
    return _File(
        path=path,
        filename=_text(tree.find("filename")),
        size=(int(height), int(width)) if height >= 1 and width >= 1 else None,
        objects=[_parse_object(element) for element in tree.findall("object")],
    )


def _parse_object(element: ElementTree.Element) -> _Filed:
    box = element.find("bndbox")
    return _Filed(
        name=_text(element.find("name")),
        corners=tuple(_number(None if box is None else box.find(corner)) for corner in _CORNERS),
        difficult=_text(element.find("difficult")).lower() in ("1", "true"),
    )


def _text(element: ElementTree.Element | None) -> str:
    return "" if element is None or element.text is None else element.text.strip()


def _number(element: ElementTree.Element | None) -> float:
    """The number in an element, or NaN."""
    try:
        return float(_text(element))
    except ValueError:
        return math.nan


def _find_pictures(root: Path, stems: list[str], files: list[_File], check: bool) -> list[str]:
    """The picture of each annotation: its <filename> if that exists, else the stem with a picture's suffix.

    A missing picture is named STEM.jpg. check: a missing folder is a FileNotFoundError.
    """
    folder = root / "JPEGImages"
    present = _list_folder(folder) if check or folder.is_dir() else set()
    by_stem = {
        os.path.splitext(name)[0]: name
        for name in sorted(present, reverse=True)
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    }
    names = [
        file.filename if file.filename in present else by_stem.get(stem, f"{stem}.jpg")
        for stem, file in zip(stems, files, strict=True)
    ]
    return [os.path.join(folder, name) for name in names]


def _measure(path: str, tolerant: bool) -> tuple[int, int]:
    """The (height, width) of a picture; 0, 0 if it cannot be read and that is tolerated."""
    try:
        return load_image_size(path)
    except (ValueError, OSError):
        if tolerant:
            return 0, 0
        raise


def _image_ids(stems: list[str]) -> list[int]:
    """The stems as numbers if all are different numbers, else 1..N."""
    ids = [int(stem) for stem in stems if stem.isascii() and stem.isdigit() and len(stem) <= 18]
    return ids if len(set(ids)) == len(stems) else list(range(1, len(stems) + 1))


def _refuse_zero_based(filed: np.ndarray, objects: list[Object], found: Annotations) -> None:
    """Raise a ValueError if a coordinate of (M, 4) as filed is below 1: pixels counted from 1 have none."""
    rows = np.flatnonzero((filed < 1).any(axis=1))
    if len(rows):
        place, _ = found.describe(objects[rows[0]])
        corner = int(np.argmax(filed[rows[0]] < 1))
        raise ValueError(
            f"{place} has {_CORNERS[corner]} {filed[rows[0], corner]:g}, below 1, as have "
            f"{len(rows) - 1} other objects: the pixels are not counted from 1; set one_based: false"
        )


def _looks_one_based(filed: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether (M, 4) coordinates as filed look counted from 1. `sizes` is (M, 2) height, width of the images."""
    sound = np.isfinite(filed).all(axis=1) & (sizes[:, 1] > 0)
    filed, sizes = filed[sound], sizes[sound]
    whole = len(filed) > 0 and bool((filed == np.round(filed)).all())
    return whole and filed.min() >= 1 and bool((filed[:, 2] >= sizes[:, 1]).any())
