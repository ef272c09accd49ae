"""Read Pascal VOC's XML, in VOC's folders or any others, into a DetectionDataset."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ..files import read_bytes, read_text
from .dataset import DetectionDataset
from .file_index import FileIndex, stem
from .file_source import MAX_BYTES, FileSource
from .filed import Filed, gather, is_set, number, read_each, size_or_none
from .records import Annotations, Object

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
Counting = bool | Literal["auto"]


class VocSource(FileSource):
    """XML files in `annotations` and pictures in `images`, both at `directory` below data.root."""

    format: Literal["voc"]
    split: str | None = Field(
        None, description="a list in ImageSets/Main; None: every XML below `annotations`"
    )
    directory: str = "."
    annotations: str = "Annotations"
    images: str = "JPEGImages"
    one_based: Counting = Field(
        True,
        description="pixels count from 1 and include the last, as in VOC; checked against the data. auto: as VOC's own files do, and others do not",
    )

    def read(self, root: Path) -> Annotations:
        """What the XML files say."""
        options = self.model_dump(include={"split", "annotations", "images", "one_based", "max_bytes"})
        return read_voc(root / self.directory, root, **options)


def load_voc(
    root: str | Path,
    split: str | None = None,
    *,
    one_based: Counting = True,
    check_pictures: bool = True,
    **options: Any,
) -> DetectionDataset:
    """Read one split of a VOC folder: `ImageSets/Main/{split}.txt`, `Annotations/*.xml`, `JPEGImages/*`.

    Image ids are the file names if all of them are different numbers, else 1..N in the split's order.

    Args:
        split: None: every XML below `Annotations`.
        one_based: pixels are counted from 1 and the last one is included, as in VOC. A box is then
            (xmin - 1, ymin - 1, xmax, ymax). If False, coordinates are taken as filed. The data is checked for both.
            "auto": True for files that name VOC as their source, unless a coordinate is below 1.
        check_pictures: check that the folder of pictures exists. A picture that cannot be read has size 0 if its XML
            does not say one.
        options: `class_names`, `limit`, `strict` and `use_difficult` of `Annotations.to_dataset`. Without
            `class_names`, the classes are the names found in the split, sorted.

    Raises:
        FileNotFoundError: a folder or an annotation of the split is missing.
        ValueError: the split is unknown, no XML can be read, or the coordinates contradict `one_based`.
    """
    if check_pictures and not (images := Path(root, "JPEGImages")).is_dir():
        raise FileNotFoundError(f"{images}: no such folder; {root} should be a VOC folder, which has one")
    found = read_voc(Path(root), split=split, one_based=one_based)
    return found.to_dataset(**options)


def read_voc(
    folder: Path,
    root: Path | None = None,
    *,
    split: str | None = None,
    annotations: str = "Annotations",
    images: str = "JPEGImages",
    one_based: Counting = True,
    max_bytes: int = MAX_BYTES,
) -> Annotations:
    """What XML files below `folder` say of pictures that lie below it or below `root`."""
    files = _annotation_paths(folder, folder / annotations, split)
    parse = partial(_parse, folder, FileIndex(folder / images, root), max_bytes)
    filed, problems = read_each(files, parse)
    source = str(folder) if split is None else f"{folder}, split {split!r}"
    found = gather(source, filed, "object[{}]", problems=problems)
    origins = Counter(each.origin for each in filed).most_common(1)
    return _count_from_zero(found, one_based, origins[0][0] if origins else "")


def _count_from_zero(found: Annotations, one_based: Counting, origin: str) -> Annotations:
    """The same with boxes as xyxy pixels from 0, checked against what `one_based` claims.

    origin: the data set that most of the files name as their source.
    """
    filed = np.array([o.box for o in found.objects], np.float64).reshape(-1, 4)
    sizes = [found.pictures[o.picture].size for o in found.objects]
    below = np.flatnonzero(((filed < 1) & np.isfinite(filed)).any(axis=1))
    looks_one_based = "voc" in origin.lower() and not len(below)
    if one_based == "auto":
        one_based = looks_one_based
        found.notes.append(f"{found.source}: {_reason(one_based, origin, len(below))}")
    elif one_based and len(below):
        _refuse_zero_based(filed, below, found)
    elif looks_one_based and not one_based:
        found.notes.append(
            f"one_based is false, yet the files name {origin!r}, which counts pixels from 1, and no coordinate is below 1"
        )
    describe = found.describe
    found.describe = lambda shown: describe(replace(shown, box=_shifted(shown.box, one_based)))
    found.objects = [_object(o, size, one_based) for o, size in zip(found.objects, sizes, strict=True)]
    return found


def _reason(one_based: bool, origin: str, num_below: int) -> str:
    """Why "auto" counts pixels as it does."""
    if one_based:
        return f"pixels are counted from 1, as the files name {origin!r} and no coordinate is below 1"
    if num_below:
        return f"pixels are counted from 0, as {num_below} objects have a coordinate below 1"
    # labelImg counts from 0, but writes 1 for 0. Its numbers cannot be told from VOC's.
    return (
        "pixels are taken as counted from 0, as the files do not name VOC. "
        "If they are counted from 1, boxes lack a pixel at the left and the top: set one_based: true"
    )


def _shifted(box: tuple[float, ...], pixels: int) -> tuple[float, ...]:
    """The box with its left and its upper end moved, which are the second ones of a box drawn from right to left."""
    moved = [axis + 2 * (box[axis + 2] < box[axis]) for axis in (0, 1)]
    return tuple(value + pixels * (column in moved) for column, value in enumerate(box))


def _object(filed: Object, size: tuple[int, int], one_based: bool) -> Object:
    """An object of a picture with `size` (height, width), with its box as xyxy pixels from 0."""
    xmin, ymin, xmax, ymax = filed.box
    fault, remark = filed.fault, None
    if one_based and -1 < min(xmax - xmin, ymax - ymin) <= 0:
        # With both ends included, xmax = xmin is one pixel wide, but it comes from a slip of the mouse.
        fault = "has a box that has no area"
    elif any(size) and (xmax > size[1] or ymax > size[0]):
        remark = f"reaches past its image of {size[1]}x{size[0]} pixels, and is kept"
    return replace(filed, box=_shifted(filed.box, -one_based), fault=fault, remark=remark)


def _annotation_paths(folder: Path, annotations: Path, split: str | None) -> list[Path]:
    """The XML files of a split, or all of them. A missing one is a FileNotFoundError."""
    if not annotations.is_dir():
        raise FileNotFoundError(
            f"{annotations}: no such folder; {folder} should be a VOC folder, which has one"
        )
    files = FileIndex(annotations)
    every = [file for file in files.files if file.lower().endswith(".xml")]
    if split is None:
        return [annotations / file for file in every]
    lines = _read_split(folder, split)
    found = [_xml_of(line, files) for line in lines]
    if missing := [line for line, file in zip(lines, found, strict=True) if file is None]:
        raise FileNotFoundError(
            f"{annotations}: {len(missing)} of the split's {len(lines)} annotations are missing: {_first_few(missing)}"
        )
    if repeated := [file for file, count in Counter(found).items() if count > 1]:
        raise ValueError(
            f"{annotations}: split {split!r} lists {len(repeated)} image(s) more than once: {_first_few(repeated)}"
        )
    return [annotations / file for file in found]


def _xml_of(line: str, files: FileIndex) -> str | None:
    """The XML file that a line of a list means by a stem, a picture, an XML, or a picture and its XML.

    VOC may put 1 or -1 behind a stem.
    """
    pair = re.match(r".*?\.\w+[\s,]+(.+)\.xml$", line, re.IGNORECASE)
    plain = re.sub(r"\s+-?\d+$|\.xml$", "", line, flags=re.IGNORECASE)
    meant = (line, plain, stem(line), pair[1] if pair else "")
    return next(filter(None, (files.find(f"{each}.xml") for each in meant)), None)


def _read_split(folder: Path, split: str) -> list[str]:
    """The lines of a split's list."""
    splits_dir = folder / "ImageSets" / "Main"
    if not splits_dir.is_dir():
        raise FileNotFoundError(
            f"{splits_dir}: no such folder; {folder} should be a VOC folder, which has one"
        )
    path = splits_dir / f"{split}.txt"
    if not path.is_file():
        # VOC also has a file for each class and split, such as cat_train.txt. The message lists these last.
        splits = sorted(
            (file.stem for file in splits_dir.glob("*.txt")), key=lambda stem: ("_" in stem, stem)
        )
        raise ValueError(
            f"{splits_dir}: has no split {split!r}; there are {', '.join(splits[:10]) or 'none'}"
        )
    lines = [line.strip() for line in read_text(path, MAX_BYTES).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path}: the split is empty")
    return lines


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _parse(folder: Path, images: FileIndex, max_bytes: int, path: Path) -> Filed:
    """Read one XML file. Malformed XML is a ValueError."""
    tree = parse_xml(path, max_bytes)
    try:
        picture = images.picture_of(path.relative_to(folder), _text(tree.find("filename")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    objects = [_parse_object(index, element) for index, element in enumerate(tree.findall("object"))]
    size = size_or_none(tree.findtext("size/height"), tree.findtext("size/width"))
    return Filed(path, picture, size, objects, _text(tree.find("source/database")))


def parse_xml(path: Path, max_bytes: int = MAX_BYTES) -> ElementTree.Element:
    """The XML of a file. ElementTree reads no external entity, and expat bounds the internal ones."""
    data = read_bytes(path, max_bytes)
    try:
        return ElementTree.fromstring(data)
    # An encoding that expat lacks is one of the last two.
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: not valid XML ({error})") from None


def _parse_object(index: int, element: ElementTree.Element) -> Object:
    """One <object>, with its box as filed: NaN where the file has no number."""
    box = tuple(number(_text(element.find(f"bndbox/{corner}"))) for corner in _CORNERS)
    difficult = is_set(_text(element.find("difficult")))
    fault = "has no bndbox" if element.find("bndbox") is None else None
    return Object(-1, index, _text(element.find("name")), box, difficult=difficult, fault=fault)


def _text(element: ElementTree.Element | None) -> str:
    return "" if element is None or element.text is None else element.text.strip()


def _refuse_zero_based(filed: np.ndarray, below: np.ndarray, found: Annotations) -> None:
    """Raise a ValueError for the rows `below` of (M, 4) as filed: pixels counted from 1 have none below 1."""
    place, _ = found.describe(found.objects[below[0]])
    corner = int(np.argmax(filed[below[0]] < 1))
    raise ValueError(
        f"{place} has {_CORNERS[corner]} {filed[below[0], corner]:g}, below 1, as have "
        f"{len(below) - 1} other objects: the pixels are not counted from 1; set one_based: false"
    )
