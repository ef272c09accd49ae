"""Find a wrong format of boxes by statistics: another reading of the same numbers fits the pictures better."""

import numpy as np

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
    "centre, width, height, read as x, y, width, height": lambda a, b, c, d: (
        a - (c - a) / 2,
        b - (d - b) / 2,
        a + (c - a) / 2,
        b + (d - b) / 2,
    ),
    "centre, width, height, read as corners": lambda a, b, c, d: (
        a - c / 2,
        b - d / 2,
        a + c / 2,
        b + d / 2,
    ),
    "y before x": lambda a, b, c, d: (b, a, d, c),
}


def check_box_format(part: Part) -> list[Finding]:
    """One finding if the boxes look filed in another format than they were read in, else none."""
    boxes, sizes = part.boxes[~part.crowd], part.sizes[part.rows][~part.crowd]
    sound = np.isfinite(boxes).all(axis=1)
    filed = guess_format(boxes[sound], sizes[sound])
    if filed is None:
        return []
    what = f"{part.source} ({part.split}): the boxes look like {filed}"
    advice = "Read the file with the right format, or file the boxes in the format that its readers expect."
    return [Finding("error", "wrong box format", part.source, None, what, advice)]


def guess_format(boxes: np.ndarray, sizes: np.ndarray) -> str | None:
    """What the numbers of boxes (M, 4), read as xyxy, look like; None: they look right.

    sizes: (M, 2) height, width of each box's picture.
    """
    if len(boxes) < _MIN_BOXES:
        return None
    if np.abs(boxes).max() <= 2 and sizes.min() > 2:
        return "shares of the picture's width and height (0 to 1), read as pixels"
    if _share_fitting(boxes, sizes) >= _MISREAD:
        return None
    shares = {
        filed: _share_fitting(np.stack(read(*boxes.T), axis=1), sizes) for filed, read in READINGS.items()
    }
    best = max(shares, key=shares.get)
    return best if shares[best] >= _FITTING else None


def _share_fitting(boxes: np.ndarray, sizes: np.ndarray) -> float:
    """The share of boxes (M, 4) xyxy that lie in their pictures and have an area."""
    inside = (boxes[:, :2] >= -_TOLERANCE).all(axis=1) & (boxes[:, 2:] <= sizes[:, ::-1] + _TOLERANCE).all(
        axis=1
    )
    return float((inside & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)).mean())
