"""Find a wrong format of boxes by statistics: another reading of the same numbers fits the pictures better."""

from dataclasses import replace

import numpy as np

from ..data.records import around
from .findings import Finding
from .part import Part

# Boxes may reach this many pixels past the edge.
_TOLERANCE = 1.5
_MIN_BOXES = 5
# As read, fewer boxes than this share fit into their pictures; in the other format, at least the second share does.
_MISREAD, _FITTING = 0.8, 0.98

# What was filed -> the boxes (M, 4) xyxy that the numbers mean, from columns x1, y1, x2, y2 as read.
READINGS = {
    "corners (x1, y1, x2, y2), read as x, y, width, height": lambda a, b, c, d: (a, b, c - a, d - b),
    "x, y, width, height, read as corners": lambda a, b, c, d: (a, b, a + c, b + d),
    "centre, width, height, read as x, y, width, height": lambda a, b, c, d: around(a, b, c - a, d - b),
    "centre, width, height, read as corners": around,
    "y before x": lambda a, b, c, d: (b, a, d, c),
}


_SHARES = "shares of the picture's width and height (0 to 1), read as pixels"


def check_box_format(part: Part) -> list[Finding]:
    """One finding if the boxes look filed in another format than they were read in, else none."""
    filed = _guess(part)
    if not filed:
        return []
    what = f"{part.source} ({part.split}): the boxes look like {' or '.join(filed)}"
    advice = (
        "Read the file with the right format, or file the boxes in the format that its readers expect. "
        "--fix writes them converted where only one format fits."
    )
    return [Finding("error", "wrong box format", part.source, None, what, advice)]


def convert(part: Part) -> tuple[Part, list[str]]:
    """The part with the boxes that its numbers mean, and a sentence for each conversion; none if they look right.

    ValueError: no format fits, or several do.
    """
    fixed, told = part, []
    # Shares may be in another format too.
    for _ in range(2):
        if len(filed := _guess(fixed)) == 1:
            fixed = _read_as(filed[0], fixed)
            told.append(f"{part.split}: boxes are converted, as they looked like {filed[0]}")
    fits = not told or _share_fitting(fixed.boxes, fixed.sizes[fixed.rows]) >= _MISREAD
    if _guess(fixed) or not fits:
        raise ValueError(
            f"{part.source} ({part.split}): the boxes look like {' or '.join(_guess(part))}, and no one format "
            "fits them all: give the right format first, there is nothing to clean before"
        )
    return fixed, told


def _read_as(filed: str, part: Part) -> Part:
    """The part with the boxes that were filed in another format."""
    if filed == _SHARES:
        boxes = part.boxes * part.sizes[part.rows][:, [1, 0, 1, 0]]
    else:
        boxes = np.stack(READINGS[filed](*part.boxes.T), axis=1)
    # The file's areas, and faults of boxes without area, are of the numbers as they were read.
    flat = (part.boxes[:, 2:] - part.boxes[:, :2] <= (0 if filed == _SHARES else 1)).any(axis=1).tolist()
    objects = [
        replace(o, area=None, fault=None if is_flat else o.fault)
        for o, is_flat in zip(part.objects, flat, strict=True)
    ]
    return replace(part, boxes=boxes, objects=tuple(objects))


def _guess(part: Part) -> list[str]:
    boxes, sizes = part.boxes[~part.crowd], part.sizes[part.rows][~part.crowd]
    sound = np.isfinite(boxes).all(axis=1)
    return guess_format(boxes[sound], sizes[sound])


def guess_format(boxes: np.ndarray, sizes: np.ndarray) -> list[str]:
    """What the numbers of boxes (M, 4), read as xyxy, may be; nothing: they look right, or like no known format.

    sizes: (M, 2) height, width of each box's picture.
    """
    if len(boxes) < _MIN_BOXES:
        return []
    if np.abs(boxes).max() <= 2 and sizes.min() > 2:
        return [_SHARES]
    if _share_fitting(boxes, sizes) >= _MISREAD:
        return []
    shares = {
        filed: _share_fitting(np.stack(read(*boxes.T), axis=1), sizes) for filed, read in READINGS.items()
    }
    return [filed for filed, share in shares.items() if share >= _FITTING]


def _share_fitting(boxes: np.ndarray, sizes: np.ndarray) -> float:
    """The share of boxes (M, 4) xyxy that lie in their pictures and have an area."""
    inside = (boxes[:, :2] >= -_TOLERANCE).all(axis=1) & (boxes[:, 2:] <= sizes[:, ::-1] + _TOLERANCE).all(
        axis=1
    )
    return float((inside & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)).mean())
