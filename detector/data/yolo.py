"""Read YOLO's text files, one a picture with a line for each object, into a DetectionDataset."""

import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field

from ..files import read_text
from .file_index import FileIndex, is_picture
from .file_source import FileSource
from .filed import Filed, gather, number, read_each
from .records import Annotations, Object

# The number of a line, its class number and its text. None: the first word is no class number.
_Line = tuple[int, int | None, str]


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
        None, description="data.yaml, or a text file of a class name a line; None: class_0, class_1..."
    )
    keypoints: bool | None = Field(
        None,
        description="lines hold keypoints behind the box, which are ignored; false: polygons; None: as the numbers say",
    )

    def read(self, root: Path) -> Annotations:
        """What the text files say."""
        names = read_names(root / self.names, self.max_bytes) if self.names else None
        labels = FileIndex(root / self.labels if self.labels else root)
        read, problems = read_each(self._pictures(root), partial(self._lines, labels))
        bare = [picture for picture, file, _ in read if file is None]
        if read and len(bare) == len(read):
            raise ValueError(f"{root / self.images}: no picture has a text file of its objects")
        ids = sorted({id for *_, lines in read for _, id, _ in lines} - {None})
        known = names or {id: f"class_{id}" for id in ids}
        filed, source = [], str(root / self.images)
        long = [(f, row, line) for _, f, lines in read for row, _, line in lines if len(line.split()) > 6]
        posed = self.keypoints is None and _are_keypoints(long)
        for picture, file, lines in read:
            objects = [_object(*line, known, bool(self.keypoints or posed)) for line in lines]
            filed.append(Filed(file or root / picture, os.path.join(root, picture), None, objects))
        category_ids = {name: id for id, name in sorted(known.items())}
        found = gather(source, filed, "line {}", fractions=True, category_ids=category_ids, problems=problems)
        found.unknown_ids = [id for id in ids if id not in known]
        if posed:
            found.notes.append(
                f"{source}: {len(long)} lines hold keypoints behind their box, as all of these lie inside it; "
                "if they are polygons, set keypoints: false"
            )
        if bare:
            found.notes.append(
                f"{source}: {len(bare)} pictures have no text file, so no objects, such as {bare[0]}"
            )
        return found

    def _pictures(self, root: Path) -> list[str]:
        """The paths of the pictures below root."""
        if os.path.isfile(root / self.images):
            index = FileIndex(root)
            lines = read_text(root / self.images, self.max_bytes).splitlines()
            return [os.path.relpath(index.path_of(line.strip()), root) for line in lines if line.strip()]
        found = FileIndex(root / self.images).files
        pictures = [os.path.normpath(os.path.join(self.images, file)) for file in found if is_picture(file)]
        if not pictures:
            raise FileNotFoundError(f"{root / self.images}: no such folder, or no picture in it")
        return pictures

    def _label_names(self, picture: str) -> list[str]:
        """The paths that the text file of a picture may have below the folder of text files."""
        path = f"{os.path.splitext(picture)[0]}.txt"
        if self.labels:
            return [os.path.relpath(path, self.images), os.path.basename(path)]
        return [swapped(path, "images", "labels"), path]

    def _lines(self, labels: FileIndex, picture: str) -> tuple[str, Path | None, list[_Line]]:
        """The picture, its text file and the lines of that. None: it has no file."""
        label = next(filter(None, map(labels.exact, self._label_names(picture))), None)
        if label is None:
            return picture, None, []
        file = labels.folder / label
        lines = enumerate(read_text(file, self.max_bytes).splitlines(), start=1)
        return picture, file, [(index, _class_number(line), line) for index, line in lines if line.strip()]


def _class_number(line: str) -> int | None:
    id = number(line.split(maxsplit=1)[0])
    return int(id) if id.is_integer() and 0 <= id < 2**31 else None


def _object(index: int, id: int | None, line: str, names: dict[int, str], keypoints: bool) -> Object:
    """One line. An unknown class and a wrong count of numbers are faults."""
    if id not in names:
        fault = f"has the class {line.split()[0][:20]!r}, which names lack"
        return Object(-1, index, "", (0, 0, 0, 0), fault=fault)
    values = _values(line)
    if box := parse_box(values, keypoints):
        return Object(-1, index, names[id], box)
    fault = f"has {len(values)} numbers behind the class; accepted are 4, or 6 and more for a polygon"
    return Object(-1, index, names[id], (0, 0, 0, 0), fault=fault)


def _values(line: str) -> list[float]:
    """The numbers behind the class."""
    return list(map(number, line.split()[1:]))


def _are_keypoints(lines: list[tuple[Path | None, int, str]]) -> bool:
    """Whether lines of more than five numbers, each with its file and number, are boxes with keypoints, not polygons.

    All objects of a set have the same number of keypoints, and polygons have any. ValueError: only some look so.
    """
    counts = [len(line.split()) for *_, line in lines]
    common, times = Counter(counts).most_common(1)[0] if lines else (0, 0)
    same = [each for each, count in zip(lines, counts, strict=True) if count == common]
    others = [each for each, count in zip(lines, counts, strict=True) if count != common]
    if not times or times <= len(others):
        return False
    fits = _fit_keypoints(np.array([_values(line) for *_, line in same]))
    if fits.all() if others else fits.any() and not fits.all():
        places = same[fits.argmax()], (others or [same[fits.argmin()]])[0]
        box, polygon = (f"{file}: line {index}" for file, index, _ in places)
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


def parse_box(values: list[float], keypoints: bool = False) -> tuple[float, ...] | None:
    """The xyxy box, in fractions, of the numbers behind a class: a box, perhaps with a score, or a polygon."""
    if len(values) in (4, 5) or (keypoints and len(values) > 5):
        x, y, width, height = values[:4]
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
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
