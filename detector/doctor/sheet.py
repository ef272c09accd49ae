"""A sheet of the pictures with the worst findings, with their boxes drawn."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..data.images import load_image
from ..data.opened import Opened
from ..names import escaped
from ..sheets import save_tiles
from ..visualize import draw_boxes, fit, load_font, tile
from .findings import Finding, sort_findings
from .part import Part

_MOST, _MOST_OF_A_KIND, _COLUMNS = 12, 3, 3
_SIDE = 420
_FONT_SIZE = 14


def save_sheet(
    path: Path, findings: Sequence[Finding], parts: Sequence[Part], opened: Mapping[str, Opened]
) -> bool:
    """Save the sheet as a JPEG. Returns False, and writes nothing, if no finding is about a readable picture."""
    chosen = _choose(findings, opened)
    if not chosen:
        return False
    save_tiles(path, [_draw(finding, parts) for finding in chosen], _COLUMNS)
    return True


def _choose(findings: Sequence[Finding], opened: Mapping[str, Opened]) -> list[Finding]:
    """The worst findings about readable pictures, a few of each kind, one a picture."""
    chosen: dict[str, Finding] = {}
    kinds: Counter[str] = Counter()
    for finding in sort_findings(findings):
        readable = finding.file in opened and opened[finding.file].size is not None
        if readable and finding.file not in chosen and kinds[finding.kind] < _MOST_OF_A_KIND:
            chosen[finding.file] = finding
            kinds[finding.kind] += 1
    return list(chosen.values())[:_MOST]


def _draw(finding: Finding, parts: Sequence[Part]) -> np.ndarray:
    """The finding's picture with its faulty box, else with all boxes; beside it the other picture; a caption above."""
    if finding.box is not None and np.isfinite(finding.box).all():
        drawn = _fit(load_image(finding.file), np.array([finding.box]), [finding.kind])
    else:
        drawn = _with_objects(finding.file, parts)
    if finding.other is not None:
        drawn = tile([drawn, _with_objects(finding.other, parts)], columns=2)
    caption = Image.new("RGB", (drawn.shape[1], 2 * _FONT_SIZE + 8), "white")
    text = f"{finding.severity}: {finding.kind}\n{escaped(Path(finding.file).name)}"
    ImageDraw.Draw(caption).text((2, 2), text, fill="black", font=load_font(text, _FONT_SIZE))
    return np.vstack([np.array(caption), drawn])


def _with_objects(path: str, parts: Sequence[Part]) -> np.ndarray:
    """A picture with all its boxes."""
    boxes, names = np.empty((0, 4)), []
    for part in parts:
        rows = np.flatnonzero((part.paths == path)[part.rows] & np.isfinite(part.boxes).all(axis=1))
        if len(rows):
            boxes, names = part.boxes[rows], [escaped(name) for name in part.names[rows]]
            break
    return _fit(load_image(path), boxes, names)


def _fit(image: np.ndarray, boxes: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The picture at the sheet's size, with boxes (M, 4) in pixels of `image` and their names."""
    resized, boxes = fit(image, boxes, _SIDE)
    class_names = list(dict.fromkeys(names))
    labels = [class_names.index(name) + 1 for name in names]
    return draw_boxes(resized, boxes, labels, class_names)
