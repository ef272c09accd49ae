"""Read YOLO's text files, one a picture with a line for each object, into a DetectionDataset."""

import math
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field

from ..files import read_head, read_text
from .file_index import FileIndex
from .file_source import FileSource
from .filed import Filed, gather, number, read_each
from .records import Annotations, Object, around, number_classes
from .tolerance import MAX_LEFT_OUT

# The number of a line, its first word, that as a class number or None, and the numbers behind it.
_Line = tuple[int, str, int | None, Sequence[float]]
# A picture, its text file and the lines of that; paths are below data.root.
_Read = tuple[str, str | None, list[_Line]]


class YoloSource(FileSource):
    """Pictures in `images`, and for each of them a text file of its objects; all below data.root.

    A line is a class number, then x and y of the centre, width and height as fractions of the picture's sides, or the
    x and y of a polygon's corners. A picture without a file has no object.
    """

    format: Literal["yolo"]
    images: str = Field(description="a folder of pictures, or a text file that lists them")
    labels: str | None = Field(
        None,
        description="the folder of the text files; None: beside the pictures, or in `labels` for pictures in `images`",
    )
    names: str | None = Field(
        None,
        description="data.yaml, or a text file of a class name a line; None: for each text the nearest classes.txt, "
        "obj.names or _darknet.labels at or above it, else class_0, class_1...",
    )
    keypoints: bool | None = Field(
        None,
        description="lines hold keypoints behind the box, which are ignored; false: polygons; None: as the numbers say",
    )

    def read(self, root: Path) -> Annotations:
        """What the text files say."""
        index = FileIndex(root)
        read, problems = read_each(self._pictures(root), partial(self._lines, index))
        texts = [text for _, text, _ in read if text]
        if read and not texts:
            raise ValueError(f"{root / self.images}: no picture has a text file of its objects")
        _refuse_shared(read, root)
        names_of, notes = self._names(index, texts)
        if not names_of:
            ids = {id for *_, lines in read for _, _, id, _ in lines} - {None}
            names_of = dict.fromkeys(texts, {id: f"class_{id}" for id in sorted(ids)})
        filed, category_ids, unknown = [], {}, set()
        placed = (
            (f"{root / text}: line {row}", values) for _, text, lines in read for row, *_, values in lines
        )
        long = [(place, values) for place, values in placed if len(values) > 5]
        posed = self.keypoints is None and _are_keypoints(long)
        for picture, text, lines in read:
            names = names_of.get(text, {})
            category_ids = category_ids or {name: id for id, name in sorted(names.items())}
            category_ids = number_classes(category_ids, names.values())
            unknown |= {id for _, _, id, _ in lines if id is not None and id not in names}
            objects = [_object(*line, names, bool(self.keypoints or posed)) for line in lines]
            filed.append(Filed(root / (text or picture), os.path.join(root, picture), None, objects))
        source = str(root / self.images)
        found = gather(source, filed, "line {}", fractions=True, category_ids=category_ids, problems=problems)
        found.unknown_ids, found.notes = sorted(unknown), notes
        if posed:
            found.notes.append(
                f"{source}: {len(long)} lines hold keypoints behind their box, as all of these lie inside it; "
                "if they are polygons, set keypoints: false"
            )
        bare = [picture for picture, text, _ in read if text is None]
        _tell_orphans(found, bare, len(read), "pictures have no text file, so no objects")
        lost = _without_picture(index, texts)
        _tell_orphans(found, lost, len(texts), "texts belong to no picture, so their objects are lost")
        return found

    def _names(self, index: FileIndex, texts: list[str]) -> tuple[dict[str, dict[int, str]], list[str]]:
        """The class names for each text, and notes. No names: there is no list of them.

        ValueError: several lists of names may be meant.
        """
        if self.names:
            return dict.fromkeys(texts, read_names(index.folder / self.names, self.max_bytes)), []
        lists = [file for file in index.files if is_class_list(file)]
        if not lists:
            return {}, ["no list of class names was found: classes are called class_0, class_1..."]
        read = cache(lambda file: read_names(index.folder / file, self.max_bytes))
        found, used = {}, {}
        for text in texts:
            above = [file for file in lists if f"{text}/".startswith(f"{os.path.dirname(file)}/".lstrip("/"))]
            depth = max((file.count("/") for file in above), default=-1)
            first, *others = [file for file in above if file.count("/") == depth] or lists
            if other := next((file for file in others if read(file) != read(first)), None):
                raise ValueError(
                    f"{index.folder / text}: the lists {first} and {other} differ, and either may have its class names; "
                    "put the right one into the folder of the texts, or name it as `names` in the recipe"
                )
            found[text] = used[first] = read(first)
        return found, [f"{file} has the names of {len(names)} classes" for file, names in used.items()]

    def _pictures(self, root: Path) -> list[str]:
        """The paths of the pictures below root."""
        if os.path.isfile(root / self.images):
            index, near = FileIndex(root), os.path.dirname(self.images)
            lines = read_text(root / self.images, self.max_bytes).splitlines()
            names = filter(None, map(str.strip, lines))
            return [os.path.relpath(index.path_of(name, near), root) for name in names]
        found = FileIndex(root / self.images).pictures
        pictures = [os.path.normpath(os.path.join(self.images, file)) for file in found]
        if not pictures:
            raise FileNotFoundError(f"{root / self.images}: no such folder, or no picture in it")
        return pictures

    def _label_names(self, picture: str) -> list[str]:
        """The paths that the text file of a picture may have."""
        path = f"{os.path.splitext(picture)[0]}.txt"
        if self.labels:
            names = os.path.relpath(path, self.images), os.path.basename(path)
            return [os.path.join(self.labels, name) for name in names]
        return [swapped(path, "images", "labels"), path]

    def _lines(self, index: FileIndex, picture: str) -> _Read:
        """The picture, its text file and the lines of that. None: it has no file."""
        text = next(filter(None, map(index.exact, self._label_names(picture))), None)
        if text is None:
            return picture, None, []
        lines = enumerate(read_text(index.folder / text, self.max_bytes).splitlines(), start=1)
        return picture, text, [_line(row, *words) for row, line in lines if (words := line.split())]


def _refuse_shared(read: list[_Read], root: Path) -> None:
    """Raise a ValueError if a text file is that of two pictures."""
    first: dict[str, str] = {}
    for picture, text, _ in read:
        if text and first.setdefault(text, picture) != picture:
            raise ValueError(
                f"{root / text} would be the text file of both {root / first[text]} and {root / picture}; "
                "give each picture a text of its own, with the same folders below labels as below images"
            )


def _tell_orphans(found: Annotations, orphans: list[str], total: int, what: str) -> None:
    """Tell of files that lack their partner: a note, or a warning that asks where there are many."""
    if orphans:
        told = f"{found.source}: {len(orphans)} {what}, such as {', '.join(orphans[:3])}"
        few = len(orphans) <= MAX_LEFT_OUT * total
        (found.notes if few else found.warnings).append(told if few else f"{told}. Is that meant?")


def _without_picture(index: FileIndex, texts: list[str]) -> list[str]:
    """The texts of objects that lie beside those of pictures, and belong to no picture anywhere."""
    folders, used = {os.path.dirname(text) for text in texts}, set(texts)
    unused = [file for file in index.files if file.lower().endswith(".txt") and file not in used]
    beside = [file for file in unused if os.path.dirname(file) in folders]
    lost = [file for file in beside if not index.find(swapped(file[:-4], "labels", "images"))]
    return [file for file in lost if is_object_text(index.folder / file)]


def is_object_text(path: Path) -> bool | None:
    """Whether the first line of a text file is a YOLO object; None for an empty file."""
    first = read_head(path).decode("utf-8-sig", "replace").strip().partition("\n")[0]
    values = [number(word) for word in first.split()]
    return all(map(math.isfinite, values)) and parse_box(values[1:]) is not None if values else None


def is_class_list(file: str) -> bool:
    """Whether a file is a list of class names; labelImg's predefined_classes.txt is that of no picture."""
    name = os.path.basename(file).lower()
    return name.endswith(("classes.txt", "_darknet.labels", ".names")) and name != "predefined_classes.txt"


def _line(row: int, word: str, *others: str) -> _Line:
    id = number(word)
    # An array takes a quarter of a list's memory.
    values = array("d", map(number, others))
    return row, word, int(id) if id.is_integer() and 0 <= id < 2**31 else None, values


def _object(
    index: int, word: str, id: int | None, values: Sequence[float], names: dict[int, str], keypoints: bool
) -> Object:
    """One line. An unknown class and a wrong count of numbers are faults."""
    if id not in names:
        fault = f"has the class {word[:20]!r}, which names lack"
        return Object(-1, index, "", (0, 0, 0, 0), fault=fault)
    if box := parse_box(values, keypoints):
        return Object(-1, index, names[id], box)
    fault = f"has {len(values)} numbers behind the class; accepted are 4, or 6 and more for a polygon"
    return Object(-1, index, names[id], (0, 0, 0, 0), fault=fault)


def _are_keypoints(lines: list[tuple[str, Sequence[float]]]) -> bool:
    """Whether more than five numbers behind a class, each with their place, are boxes with keypoints, not polygons.

    All objects of a set have the same number of keypoints, and polygons have any. ValueError: only some look so.
    """
    if not lines:
        return False
    common = Counter(len(values) for _, values in lines).most_common(1)[0][0]
    same = [each for each in lines if len(each[1]) == common]
    others = [each for each in lines if len(each[1]) != common]
    if len(same) <= len(others):
        return False
    fits = _fit_keypoints(np.array([values for _, values in same]))
    if fits.all() if others else fits.any() and not fits.all():
        (box, _), (polygon, _) = same[fits.argmax()], (others or [same[fits.argmin()]])[0]
        raise ValueError(
            f"{box} looks like a box with keypoints, and {polygon} does not; set keypoints: true or keypoints: false in "
            "the recipe's data, or kpt_shape in data.yaml for keypoints"
        )
    return bool(fits.all())


def _fit_keypoints(values: np.ndarray) -> np.ndarray:
    """(M, C) numbers behind a class -> (M,) bool: a box in its picture, and points x, y or x, y, visibility inside it.

    A point of 0, 0 is one that nobody marked. The four corners of a rectangle are not taken for a box and two points.
    """
    centre, size, rest = values[:, None, :2], values[:, None, 2:4], values[:, 4:]
    found = np.zeros(len(values), bool)
    for step in (2, 3):
        if rest.shape[1] % step == 0:
            points = rest.reshape(len(values), -1, step)
            unmarked = (points[..., :2] == 0).all(axis=2, keepdims=True)
            # An odd count is no polygon.
            is_free = unmarked | (rest.shape[1] % 2 == 1)
            inside = (np.abs(points[..., :2] - centre) <= size / 2 + 0.01) | is_free
            found |= inside.all(axis=(1, 2)) & np.isin(points[..., 2:], (0, 1, 2)).all(axis=(1, 2))
    if rest.shape[1] == 4:
        found &= (np.abs(values[:, :2] + rest[:, :2] - values[:, 2:4] - rest[:, 2:]) > 0.01).any(axis=1)
    return found & (np.abs(centre - 0.5) + size / 2 <= 0.51).all(axis=(1, 2))


def parse_box(values: Sequence[float], keypoints: bool = False) -> tuple[float, ...] | None:
    """The xyxy box, in fractions, of the numbers behind a class: a box, perhaps with a score, or a polygon."""
    if len(values) in (4, 5) or (keypoints and len(values) > 5):
        return around(*values[:4])
    if len(values) < 6 or len(values) % 2:
        return None
    x, y = values[::2], values[1::2]
    return min(x), min(y), max(x), max(y)


def swapped(path: str, old: str, new: str) -> str:
    """The path with the last folder `old` named `new`."""
    parts = path.split("/")
    where = [row for row, part in enumerate(parts[:-1]) if part.lower() == old]
    if where:
        parts[where[-1]] = new
    return "/".join(parts)


def read_names(path: Path, max_bytes: int) -> dict[int, str]:
    """Class names by their numbers, from YOLO's data.yaml or a text file of one a line. ValueError: two are equal."""
    if path.suffix.lower() in (".yaml", ".yml"):
        names = read_yaml(path, max_bytes).get("names")
    else:
        names = read_text(path, max_bytes).rstrip().splitlines()
    pairs = names.items() if isinstance(names, dict) else enumerate(names if isinstance(names, list) else [])
    found = {number(str(id)): name for id, name in pairs}
    if not found or not all(id.is_integer() and isinstance(name, str) for id, name in found.items()):
        raise ValueError(f"{path}: names are no list of texts, and no table of numbers and texts")
    found = {int(id): name if name.strip() else f"class_{int(id)}" for id, name in found.items()}
    if len({name.strip() for name in found.values()}) < len(found):
        raise ValueError(f"{path}: two classes have the same name")
    return found


def read_yaml(path: Path, max_bytes: int) -> dict[str, Any]:
    """A YAML file of one table, with every value as text, so that a class may be called no. ValueError: it is none."""
    text = read_text(path, max_bytes)
    try:
        values = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not YAML ({str(error)[:100] or type(error).__name__})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a table of train, val and names")
    return values
