"""Find out what the columns of a table of objects hold, and the box that a row describes."""

import math
import re
from collections.abc import Collection
from pathlib import Path

from .file_index import is_picture
from .filed import number

# The names that columns have, without case and signs. Where a table has several of them, the first one counts.
COLUMNS = {
    "path": (
        *("filename", "path", "filepath", "file", "imagename", "imagepath", "imagefile", "image", "imageid"),
        *("imgname", "imgpath", "imgfile", "img", "frame"),
    ),
    "name": (
        *("class", "classname", "label", "labelname", "category", "categoryname", "name", "annotationtag"),
        *("celltype", "type", "classid", "labelid", "categoryid"),
    ),
    "xmin": ("xmin", "x1", "left", "x", "bboxx", "roix1", "upperleftcornerx"),
    "ymin": ("ymin", "y1", "top", "y", "bboxy", "roiy1", "upperleftcornery"),
    "xmax": ("xmax", "x2", "right", "roix2", "lowerrightcornerx"),
    "ymax": ("ymax", "y2", "bottom", "roiy2", "lowerrightcornery"),
    "box": ("bbox",),
    "box_width": ("bboxwidth", "boxwidth", "w"),
    "box_height": ("bboxheight", "boxheight", "h"),
    "width": ("width", "imagewidth", "imgwidth"),
    "height": ("height", "imageheight", "imgheight"),
    "crowd": ("isgroupof", "iscrowd"),
}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_SIZED = ("xmin", "ymin", "box_width", "box_height")
_RETINANET = ("path", *_CORNERS, "name")
# Tables without a header: RetinaNet's, TensorFlow's, SKU-110K's and makesense.ai's.
_FORMS = (
    _RETINANET,
    ("path", "width", "height", "name", *_CORNERS),
    (*_RETINANET, "width", "height"),
    ("name", *_SIZED, "path", "width", "height"),
)


def find_columns(row: list[str], path: Path) -> tuple[dict[str, int], bool]:
    """The columns by what they hold, a key of `COLUMNS`, judged by the first row; and whether that row is a header.

    ValueError: they are not known.
    """
    columns = _named_columns([re.sub(r"[^a-z0-9]", "", cell.lower()) for cell in row])
    if "path" in columns and any(columns.keys() >= set(box) for box in (_CORNERS, _SIZED, ["box"])):
        return columns, True
    for form in _FORMS:
        if len(row) == len(form) and _fits(form, row):
            return {name: column for column, name in enumerate(form)}, False
    shown = ",".join(row)[:100]
    raise ValueError(
        f"{path}: its first line is {shown!r}; accepted are a header with filename, class, xmin, ymin, xmax and ymax, "
        "or with x, y, width and height for the corners, or RetinaNet's path,x1,y1,x2,y2,class"
    )


def _named_columns(names: list[str]) -> dict[str, int]:
    columns = {
        key: names.index(name) for key, known in COLUMNS.items() for name in reversed(known) if name in names
    }
    if not columns.keys() & {"xmax", "box", "box_width"}:
        # Beside the left top corner alone, width and height are those of the box.
        columns |= {f"box_{side}": columns.pop(side) for side in ("width", "height") if side in columns}
    return columns


def _fits(form: tuple[str, ...], row: list[str]) -> bool:
    """Whether the cells are numbers or empty, but for the text. RetinaNet's paths may lack a suffix."""
    cells = dict(zip(form, map(str.strip, row), strict=True))
    numbers = [cell for name, cell in cells.items() if name not in ("path", "name")]
    is_path = form is _RETINANET or is_picture(cells["path"])
    return is_path and all(not cell or math.isfinite(number(cell)) for cell in numbers)


def is_sized(columns: Collection[str]) -> bool:
    """Whether boxes are x, y, width and height, because a corner is missing."""
    return not set(_CORNERS) <= set(columns)


def box_of(row: dict[str, str]) -> tuple[float, ...] | None:
    """The xyxy box of a row's cells by their column, NaN where there is no number; None: it has no coordinates."""
    sized = is_sized(row)
    if sized and "box" in row:
        cells = re.split(r"[,\s]+", row["box"].strip("[]() "))
    else:
        cells = [row[name] for name in (_SIZED if sized else _CORNERS)]
    if not any(cells):
        return None
    x, y, *others = map(number, cells) if len(cells) == 4 else (math.nan,) * 4
    return (x, y, x + others[0], y + others[1]) if sized else (x, y, *others)
