"""Read a table of objects, a CSV file, into a DetectionDataset."""

import csv
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

from ..files import read_text
from .csv_columns import COLUMNS, box_of, find_columns, is_sized
from .file_index import FileIndex
from .file_source import MAX_BYTES, FileSource
from .filed import Filed, gather, is_set, read_each, size_or_none
from .records import Annotations, Object

# The class of all objects where a table has no column for it.
_ONE_CLASS = "object"


class CsvSource(FileSource):
    """A CSV file of one object a row, and pictures in `images`; both below data.root.

    The first line names the columns: filename, class, xmin, ymin, xmax, ymax, and width and height if there are any.
    x, y, w and h, or a column bbox that holds these four, may stand for the corners. Without such a line the columns
    are RetinaNet's: path, x1, y1, x2, y2, class. A row without coordinates is a picture without objects.
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
        fractions = _are_fractions([found.box for each in filed for found in each.objects])
        found = gather(str(path), filed, "line {}", fractions=fractions, problems=problems)
        columns = next((row.keys() for (_, row), *_ in rows.values()), COLUMNS)
        found.notes += [f"{path}: {note}" for note in _notes(columns, fractions)]
        return found


def read_rows(path: Path, max_bytes: int = MAX_BYTES) -> Iterator[tuple[int, dict[str, str]]]:
    """The number of each line and its cells by what they hold: a key of `COLUMNS`.

    ValueError: the columns are not known, or the file is no CSV.
    """
    lines = read_text(path, max_bytes).splitlines()
    first = next(filter(None, map(str.strip, lines)), "")
    delimiter = max(",;\t|", key=first.count)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    columns: dict[str, int] = {}
    try:
        for row in reader:
            if not any(row):
                continue
            if delimiter == ";":
                # Where the semicolon divides cells, the comma divides numbers.
                row = [re.sub(r"^(-?\d+),(\d+)$", r"\1.\2", cell.strip()) for cell in row]
            if not columns:
                columns, is_header = find_columns(row, path)
                if is_header:
                    continue
            cells = dict(enumerate(map(str.strip, row)))
            yield reader.line_num, {name: cells.get(column, "") for name, column in columns.items()}
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: not CSV ({error})") from None
    if not columns:
        raise ValueError(f"{path}: the file is empty")


def _filed(path: Path, name: str, images: FileIndex, rows: list[tuple[int, dict[str, str]]]) -> Filed:
    """What the rows of one picture say."""
    try:
        picture = images.path_of(name)
    except ValueError as error:
        raise ValueError(f"{path}: line {rows[0][0]}: {error}") from None
    objects = [
        Object(-1, index, row.get("name", _ONE_CLASS), box, is_set(row.get("crowd")))
        for index, row in rows
        if (box := box_of(row))
    ]
    first = rows[0][1]
    return Filed(path, picture, size_or_none(first.get("height"), first.get("width")), objects)


def _notes(columns: Collection[str], fractions: bool) -> Iterator[str]:
    """What was taken for granted."""
    if fractions:
        yield "boxes are taken as fractions of the pictures, as none is above 1"
    if is_sized(columns):
        yield "boxes are taken as the left top corner, width and height"
    if "name" not in columns:
        known = ", ".join(COLUMNS["name"])
        yield f"no column has the class, so each object is called {_ONE_CLASS!r}; such a column is called one of {known}"


def _are_fractions(boxes: list[tuple[float, ...]]) -> bool:
    """Whether all coordinates are at most 1, and some are no whole numbers."""
    values = [value for box in boxes for value in box if math.isfinite(value)]
    return bool(values) and all(0 <= value <= 1 for value in values) and any(value % 1 for value in values)
