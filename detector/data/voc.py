"""Pascal VOC's folders and XML into a DetectionDataset."""

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
from .dataset import DetectionDataset, find_faulty_boxes, offsets_of, refuse_problems
from .images import IMAGE_SUFFIXES, load_image_size

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, slots=True)
class _Object:
    """One <object> as filed; `image` is the row of its image, `index` counts the file's objects from 0."""

    image: int
    index: int
    name: str
    corners: tuple[float, ...]  # xmin, ymin, xmax, ymax; NaN where there is no number
    difficult: bool


@dataclass(frozen=True, slots=True)
class _Annotation:
    """One XML file; `size` is (height, width), None where the file does not say."""

    path: Path
    filename: str
    size: tuple[int, int] | None
    objects: list[_Object]


class VocSource(Section):
    """A folder with Annotations/, ImageSets/Main/ and JPEGImages/ at `directory` below data.root."""

    format: Literal["voc"]
    split: str
    directory: str = "."
    one_based: bool = Field(True, description="VOC's own pixels start at 1 and include the last; checked")
    limit: int | None = Field(None, gt=0)

    def load(self, root: Path, check_pictures: bool = True, **options: Any) -> DetectionDataset:
        """The data set; options are those of `load_voc`, which always looks for the pictures."""
        folder = root / self.directory
        return load_voc(folder, self.split, one_based=self.one_based, limit=self.limit, **options)


def load_voc(
    root: str | Path,
    split: str,
    *,
    one_based: bool = True,
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
    strict: bool = False,
    use_difficult: bool = True,
) -> DetectionDataset:
    """Read one split of a VOC folder: `ImageSets/Main/{split}.txt`, `Annotations/*.xml`, `JPEGImages/*`.

    Image ids are the file names where all are numbers, else 1..N in the split's order.

    Args:
        one_based: coordinates are VOC's, pixels counted from 1 with the last one included, so that a box is
            (xmin - 1, ymin - 1, xmax, ymax); otherwise they are taken as filed. Checked against the data.
        class_names: the classes to keep, in this order; by default the names found in the split, sorted.
        limit: only the first `limit` images with a box to learn.
        strict: refuse objects that are odd or cannot be used, in place of a line in `problems`.
        use_difficult: learn objects marked `difficult`.

    Raises:
        FileNotFoundError: a folder, an annotation or a picture of the split is missing.
        ValueError: the split is unknown, an XML malformed, or the coordinates contradict `one_based`.
    """
    root = Path(root)
    stems = _read_split(root, split)
    annotations = [_parse(path, row) for row, path in enumerate(_annotation_paths(root, stems))]
    image_paths = _find_pictures(root, stems, annotations)
    sizes = [
        annotation.size or load_image_size(path)
        for annotation, path in zip(annotations, image_paths, strict=True)
    ]
    names, objects, notes = _select_classes(annotations, class_names, split)
    columns, problems, remarks = _read_objects(objects, annotations, sizes, names, one_based)
    if strict:
        refuse_problems(problems, f"{root}, split {split!r}")
    return DetectionDataset(
        class_names=names,
        category_ids=np.arange(1, len(names) + 1),
        image_paths=image_paths,
        image_ids=_image_ids(stems),
        image_sizes=sizes,
        use_difficult=use_difficult,
        problems=problems,
        notes=notes + remarks,
        **columns,
    ).first_annotated(limit)


def _read_split(root: Path, split: str) -> list[str]:
    """The file stems of a split: the first word of each line."""
    splits_dir = root / "ImageSets" / "Main"
    if not splits_dir.is_dir():
        raise FileNotFoundError(f"{splits_dir}: no such folder; {root} should be a VOC folder, which has one")
    path = splits_dir / f"{split}.txt"
    if not path.is_file():
        # VOC has a file for each class and split too, such as cat_train.txt: after the plain ones.
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


def _list_folder(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; a VOC folder has one")
    return set(os.listdir(folder))


def _annotation_paths(root: Path, stems: list[str]) -> list[Path]:
    folder = root / "Annotations"
    present = _list_folder(folder)
    missing = [f"{stem}.xml" for stem in stems if f"{stem}.xml" not in present]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of the split's {len(stems)} annotations are missing: "
            f"{_first_few(missing)}"
        )
    return [folder / f"{stem}.xml" for stem in stems]


def _parse(path: Path, row: int) -> _Annotation:
    try:
        tree = ElementTree.fromstring(path.read_bytes())
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not valid XML ({error})") from None
    height, width = (_number(tree.find(f"size/{side}")) for side in ("height", "width"))
    return _Annotation(
        path=path,
        filename=_text(tree.find("filename")),
        size=(int(height), int(width)) if height >= 1 and width >= 1 else None,
        objects=[_parse_object(element, row, index) for index, element in enumerate(tree.findall("object"))],
    )


def _parse_object(element: ElementTree.Element, row: int, index: int) -> _Object:
    box = element.find("bndbox")
    return _Object(
        image=row,
        index=index,
        name=_text(element.find("name")),
        corners=tuple(_number(None if box is None else box.find(corner)) for corner in _CORNERS),
        difficult=_text(element.find("difficult")).lower() in ("1", "true"),
    )


def _text(element: ElementTree.Element | None) -> str:
    return "" if element is None or element.text is None else element.text.strip()


def _number(element: ElementTree.Element | None) -> float:
    """The number in an element; NaN where there is none."""
    try:
        return float(_text(element))
    except ValueError:
        return math.nan


def _find_pictures(root: Path, stems: list[str], annotations: list[_Annotation]) -> list[str]:
    """Each annotation's picture: its <filename> where that exists, else the stem with a picture's suffix."""
    folder = root / "JPEGImages"
    present = _list_folder(folder)
    by_stem = {
        os.path.splitext(name)[0]: name
        for name in sorted(present, reverse=True)
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    }
    names = [
        annotation.filename if annotation.filename in present else by_stem.get(stem)
        for stem, annotation in zip(stems, annotations, strict=True)
    ]
    missing = [stem for stem, name in zip(stems, names, strict=True) if name is None]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of the split's {len(stems)} images are missing: {_first_few(missing)}"
        )
    return [os.path.join(folder, name) for name in names]


def _image_ids(stems: list[str]) -> list[int]:
    ids = [int(stem) for stem in stems if stem.isascii() and stem.isdigit() and len(stem) <= 18]
    return ids if len(set(ids)) == len(stems) else list(range(1, len(stems) + 1))


def _select_classes(
    annotations: list[_Annotation], class_names: Sequence[str] | None, split: str
) -> tuple[tuple[str, ...], list[_Object], list[str]]:
    """The names, the objects of these, and notes on objects of other names."""
    objects = [found for annotation in annotations for found in annotation.objects]
    counts = Counter(found.name for found in objects if found.name)
    if class_names is None:
        if not counts:
            raise ValueError(
                f"{annotations[0].path.parent}: split {split!r} has no object, so no class names"
            )
        return tuple(sorted(counts)), objects, []
    names = tuple(class_names)
    if len(set(names)) < len(names):
        raise ValueError(f"class_names holds a name twice: {list(names)}")
    if not names:
        raise ValueError("class_names is empty: name at least one class")
    others = [f"{count} {name}" for name, count in counts.most_common() if name not in names]
    absent = [name for name in names if not counts[name]]
    notes = []
    if others:
        notes.append(f"split {split!r}: left out, as class_names does not name them: {', '.join(others)}")
    if absent:
        notes.append(f"split {split!r}: has no object of {', '.join(absent)}")
    return names, [found for found in objects if found.name in names or not found.name], notes


def _read_objects(
    objects: list[_Object],
    annotations: list[_Annotation],
    sizes: list[tuple[int, int]],
    names: tuple[str, ...],
    one_based: bool,
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """The columns of the boxes, image after image, with problems and notes."""
    filed = np.array([found.corners for found in objects], np.float64).reshape(-1, 4)
    image_rows = np.array([found.image for found in objects], np.int64)
    object_sizes = np.array(sizes).reshape(-1, 2)[image_rows]
    places = [f"{annotations[found.image].path}: object[{found.index}] ({found.name})" for found in objects]
    if one_based:
        _refuse_zero_based(filed, places)
    # As filed: with both ends counted, xmax = xmin would be one pixel wide, but is a slip of the mouse.
    faults = {
        row: f"has a box that {reason}"
        for row, reason in find_faulty_boxes(filed - one_based, object_sizes).items()
    }
    faults |= {row: "has no class name" for row, found in enumerate(objects) if not found.name}
    oddities = _boxes_past_the_edge(filed, object_sizes)
    oddities |= {row: f"{reason}, and is skipped" for row, reason in faults.items()}
    problems = [f"{places[row]} {oddities[row]}: {_show(filed[row])}" for row in sorted(oddities)]

    sound = np.ones(len(objects), bool)
    sound[list(faults)] = False
    boxes = (filed - np.array([one_based, one_based, 0, 0]))[sound]
    label_of = {name: label for label, name in enumerate(names, start=1)}
    columns = {
        "boxes": boxes,
        "labels": np.array([label_of.get(found.name, 0) for found in objects], np.int64)[sound],
        "areas": np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
        "crowd": np.zeros(len(boxes), bool),
        "difficult": np.array([found.difficult for found in objects], bool)[sound],
        "offsets": offsets_of(np.bincount(image_rows[sound], minlength=len(annotations))),
    }
    notes = [] if one_based else _suspect_one_based(filed[sound], object_sizes[sound])
    return columns, problems, notes


def _show(corners: np.ndarray) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in zip(_CORNERS, corners.tolist(), strict=True))


def _refuse_zero_based(filed: np.ndarray, places: list[str]) -> None:
    """Pixels counted from 1 have no coordinate below 1."""
    rows = np.flatnonzero((filed < 1).any(axis=1))
    if len(rows):
        corner = int(np.argmax(filed[rows[0]] < 1))
        raise ValueError(
            f"{places[rows[0]]} has {_CORNERS[corner]} {filed[rows[0], corner]:g}, below 1, as have "
            f"{len(rows) - 1} other objects: the pixels are not counted from 1; set one_based: false"
        )


def _boxes_past_the_edge(filed: np.ndarray, sizes: np.ndarray) -> dict[int, str]:
    """Boxes that end past the last pixel, in either convention: {row: sentence}. They are kept."""
    past = (filed[:, 2] > sizes[:, 1]) | (filed[:, 3] > sizes[:, 0])
    return {
        int(row): f"reaches past its image of {sizes[row, 1]}x{sizes[row, 0]} pixels, and is kept"
        for row in np.flatnonzero(past)
    }


def _suspect_one_based(filed: np.ndarray, sizes: np.ndarray) -> list[str]:
    """A note where coordinates taken as filed look counted from 1."""
    whole = len(filed) > 0 and bool((filed == np.round(filed)).all())
    if whole and filed.min() >= 1 and bool((filed[:, 2] >= sizes[:, 1]).any()):
        return [
            "one_based is false, yet all coordinates are whole, none is 0, and some reach the image's width; "
            "they look counted from 1, as VOC's are, or clamped to 1 by their tool (as labelImg does)"
        ]
    return []
