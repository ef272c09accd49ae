"""Check each box: faults for which training leaves it out, and what is odd about the others."""

import numpy as np

from ..data.records import box_faults, in_order
from .findings import Finding
from .part import Part

# A box this near to the whole picture's width and height is a finding.
_WHOLE = 0.99

_DRAW = "Draw the box again, or remove it. Training leaves it out."
_CLIPPED = "Training clips it to the picture. Check that the size in the annotations is the picture's."
# kind -> (severity, what is said of the box, advice), in the order of precedence
_KINDS = {
    "box that is not four numbers": ("error", "has a box that is not four finite numbers", _DRAW),
    "box without area": ("error", "has a box without area", _DRAW),
    "box outside the picture": ("error", "lies outside its picture", _DRAW),
    "box past the edge": ("warning", "reaches past its picture", _CLIPPED),
    "box a pixel past the edge": ("note", "reaches up to a pixel past its picture", _CLIPPED),
    "duplicate box": (
        "warning",
        "has the same box and class as an object before it",
        "Remove one of the two.",
    ),
    "one box, two classes": ("warning", "has the box of an object of another class", "Remove the wrong one."),
    "box of the whole picture": ("note", "covers the whole picture", "Check that this is meant."),
}


def check_boxes(part: Part) -> list[Finding]:
    """A finding for each faulty or odd box. A box has one finding, its worst. Crowds are not checked."""
    masks = _masks(part)
    # The reader's own faults come first: they say why a box is not what it should be.
    told = part.crowd | part.refused
    findings = []
    for kind, mask in masks.items():
        severity, fault, advice = _KINDS[kind]
        findings += [part.find(row, severity, kind, fault, advice) for row in np.flatnonzero(mask & ~told)]
        told |= mask
    return findings + _other_faults(part, told)


def usable(part: Part) -> np.ndarray:
    """(M,) bool: the boxes that a clean set keeps. Faulty boxes and second copies are left out."""
    masks = _masks(part)
    left_out = [mask for kind, mask in masks.items() if _KINDS[kind][0] == "error" or kind == "duplicate box"]
    return ~np.any([*left_out, part.refused, part.names == ""], axis=0)


def _masks(part: Part) -> dict[str, np.ndarray]:
    """(M,) bool for each kind of `_KINDS`."""
    boxes, sizes, rows = part.boxes, part.sizes[part.rows], part.rows
    code_of = {name: code for code, name in enumerate(dict.fromkeys(part.names))}
    codes = np.array([code_of[name] for name in part.names], np.int64)
    # A training puts corners in order too, and its notes say so.
    faults = box_faults(in_order(boxes), sizes)
    x1, y1, x2, y2 = in_order(boxes).T
    height, width = np.where(sizes > 0, sizes, np.inf).T
    with np.errstate(invalid="ignore"):
        past = np.max([-x1, -y1, x2 - width, y2 - height], axis=0)
        filled = np.minimum(np.minimum(x2, width) - np.maximum(x1, 0), width) / width
        filled = np.minimum(filled, (np.minimum(y2, height) - np.maximum(y1, 0)) / height)
        # Boxes that agree to a tenth of a pixel are the same.
        corners = np.round(np.nan_to_num(boxes, posinf=0, neginf=0), 1)
        return {
            "box that is not four numbers": faults["is not four finite numbers"],
            "box without area": faults["has no area"],
            "box outside the picture": faults["lies outside the image"],
            "box past the edge": past > 1,
            "duplicate box": _repeats(np.column_stack([rows, codes, corners])),
            "one box, two classes": _repeats(np.column_stack([rows, corners])),
            "box of the whole picture": filled >= _WHOLE,
            "box a pixel past the edge": past > 0,
        }


def _repeats(keys: np.ndarray) -> np.ndarray:
    """(M,) bool: the rows of `keys`, (M, C), that an earlier row equals."""
    order = np.lexsort(keys.T[::-1])
    equal = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    repeats = np.zeros(len(keys), bool)
    # lexsort is stable, so of equal rows the first of the file comes first.
    repeats[order[1:][equal]] = True
    return repeats


def _other_faults(part: Part, told: np.ndarray) -> list[Finding]:
    """Findings about what the reader itself noticed: objects it cannot use, and entries that it skipped."""
    findings, meant = [], "Check that this is meant."
    mend = "Mend it. Training leaves it out."
    for row, o in enumerate(part.objects):
        if o.fault:
            findings.append(part.find(row, "error", "object that cannot be used", o.fault, mend))
        elif o.remark and not told[row]:
            findings.append(part.find(row, "note", "odd object", o.remark, meant))
    skipped = "The list of pictures or of classes is not complete. Complete it, or remove the entry."
    findings += [
        Finding("error", "entry that cannot be used", part.source, None, problem, skipped)
        for problem in part.problems
    ]
    return findings + [
        Finding(severity, "remark", part.source, None, f"{part.split}: {told}", meant)
        for severity, sentences in (("warning", part.warnings), ("note", part.notes))
        for told in sentences
    ]
