"""Read a table of objects, a CSV file, into a DetectionDataset."""

import csv
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ..files import read_text
from .file_index import FileIndex
from .file_source import MAX_BYTES, FileSource
from .filed import Filed, gather, number, read_each, size_or_none
from .records import Annotations, Object

# The names that columns have, without case and signs.
_COLUMNS = {
    "path": ("filename", "path", "file", "image", "imagename", "imagepath", "imageid", "img"),
    "name": ("class", "label", "classname", "labelname", "category", "name"),
    "xmin": ("xmin", "x1", "left"),
    "ymin": ("ymin", "y1", "top"),
    "xmax": ("xmax", "x2", "right"),
    "ymax": ("ymax", "y2", "bottom"),
    "width": ("width", "imagewidth", "imgwidth"),
    "height": ("height", "imageheight", "imgheight"),
}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_RETINANET = ("path", *_CORNERS, "name")
_TENSORFLOW = ("path", "width", "height", "name", *_CORNERS)


class CsvSource(FileSource):
    """A CSV file of one object a row, and pictures in `images`; both below data.root.

    The first line names the columns: filename, class, xmin, ymin, xmax, ymax, and width and height if there are any.
    Without such a line the columns are RetinaNet's: path, x1, y1, x2, y2, class. A row with a path alone is a picture
    without objects.
    """

    format: Literal["csv"]
    annotations: str
    images: str = "."

    def read(self, root: Path) -> Annotations:
        """What the rows say, by picture."""
        path = root / self.annotations
        rows = defaultdict(list)
        for index, row in read_rows(path, self.max_bytes):
            rows[row["path"]].append((index, row))
        images = FileIndex(root / self.images, root)
        filed, problems = read_each(rows, lambda name: _filed(path, name, images, rows[name]))
        found = gather(str(path), filed, "line {}", problems=problems)
        fractions = _are_fractions([o.box for o in found.objects])
        if fractions:
            found = gather(str(path), filed, "line {}", fractions=True, problems=problems)
            found.notes.append(f"{path}: boxes are taken as fractions of the pictures, as none is above 1")
        return found


def read_rows(path: Path, max_bytes: int = MAX_BYTES) -> Iterator[tuple[int, dict[str, str]]]:
    """The number of each line and its cells by the name of their column: a key of `_COLUMNS`.

    ValueError: the columns are not known, or the file is no CSV.
    """
    lines = read_text(path, max_bytes).splitlines()
    first = next(filter(None, map(str.strip, lines)), "")
    delimiter = max(",;\t|", key=first.count)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    columns: list[str | None] = []
    try:
        for row in reader:
            if not any(row):
                continue
            if not columns:
                columns, is_header = _columns(row, path)
                if is_header:
                    continue
            cells = dict(zip(columns, map(str.strip, row), strict=False))
            if delimiter == ";":
                # Where the semicolon divides cells, the comma divides numbers.
                cells |= {corner: cells.get(corner, "").replace(",", ".") for corner in _CORNERS}
            yield reader.line_num, {name: cells.get(name, "") for name in _COLUMNS}
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: not CSV ({error})") from None
    if not columns:
        raise ValueError(f"{path}: the file is empty")


def _columns(row: list[str], path: Path) -> tuple[list[str | None], bool]:
    """What the columns hold, judged by the first row, and whether that row is a header."""
    named = [re.sub(r"[^a-z0-9]", "", cell.lower()) for cell in row]
    columns = [next((k for k, names in _COLUMNS.items() if name in names), None) for name in named]
    if set(_RETINANET) <= set(columns):
        return columns, True
    for form in (_RETINANET, _TENSORFLOW):
        corners = [cell for cell, name in zip(row, form, strict=False) if name in _CORNERS]
        if len(row) == len(form) and all(not cell.strip() or math.isfinite(number(cell)) for cell in corners):
            return list(form), False
    shown = ",".join(row)[:100]
    raise ValueError(
        f"{path}: its first line is {shown!r}; accepted are a header with filename, class, xmin, ymin, xmax and ymax, "
        "or RetinaNet's path,x1,y1,x2,y2,class"
    )


def _filed(path: Path, name: str, images: FileIndex, rows: list[tuple[int, dict[str, str]]]) -> Filed:
    """What the rows of one picture say."""
    try:
        picture = images.path_of(name)
    except ValueError as error:
        raise ValueError(f"{path}: line {rows[0][0]}: {error}") from None
    first = rows[0][1]
    objects = [
        Object(-1, index, row["name"], tuple(number(row[corner]) for corner in _CORNERS))
        for index, row in rows
        if row["name"] or any(row[corner] for corner in _CORNERS)
    ]
    return Filed(path, picture, size_or_none(number(first["height"]), number(first["width"])), objects)


def _are_fractions(boxes: list[tuple[float, ...]]) -> bool:
    """Whether all coordinates are at most 1, and some are no whole numbers."""
    values = [value for box in boxes for value in box if math.isfinite(value)]
    return bool(values) and all(0 <= value <= 1 for value in values) and any(value % 1 for value in values)
