"""Read YOLO's text files, one a picture with a line for each object, into a DetectionDataset."""

import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

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
    keypoints: bool = Field(False, description="lines hold keypoints behind the box, which are ignored")

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
        filed = []
        for picture, file, lines in read:
            objects = [_object(*line, known, self.keypoints) for line in lines]
            filed.append(Filed(file or root / picture, os.path.join(root, picture), None, objects))
        category_ids = {name: id for id, name in sorted(known.items())}
        source = str(root / self.images)
        found = gather(source, filed, "line {}", fractions=True, category_ids=category_ids, problems=problems)
        found.unknown_ids = [id for id in ids if id not in known]
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
    word, *numbers = line.split()
    if id not in names:
        fault = f"has the class {word[:20]!r}, which names lack"
        return Object(-1, index, "", (0, 0, 0, 0), fault=fault)
    if box := parse_box(list(map(number, numbers)), keypoints):
        return Object(-1, index, names[id], box)
    fault = f"has {len(numbers)} numbers behind the class; accepted are 4, or 6 and more for a polygon"
    return Object(-1, index, names[id], (0, 0, 0, 0), fault=fault)


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
