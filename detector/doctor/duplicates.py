"""Tell of pictures that are the same or nearly the same, in one split or in two."""

from collections.abc import Mapping, Sequence

from ..data.likeness import equal_pictures, near_pictures
from ..data.opened import Opened
from .findings import Finding
from .part import Part

_SEPARATE = "Keep it in one split: else its validation measures what was learned by heart."
# kind -> (severity, advice)
_KINDS = {
    "in two splits": ("error", _SEPARATE),
    "the same, in two splits": ("error", _SEPARATE),
    "the same, in one split": ("warning", "Keep one of the two, with all boxes."),
    "nearly the same, in two splits": (
        "warning",
        "Keep frames of one scene in one split. Else AP is too good.",
    ),
    "nearly the same, in one split": ("note", "Frames of one scene teach little more than one of them."),
}


def check_duplicates(parts: Sequence[Part], opened: Mapping[str, Opened]) -> list[Finding]:
    """Findings about pictures that a split repeats, and about pictures that two splits share.

    If only headers were read, equal bytes are found and nearly equal pictures are not.
    """
    splits = splits_of(parts)
    findings = [
        _finding("in two splits", path, f"{path} is in {' and '.join(found)}", None)
        for path, found in splits.items()
        if len(found) > 1
    ]
    same = equal_pictures(opened)
    pairs = [(path, first, "the same") for path, first in same.items() if path != first]
    firsts = {path: picture for path, picture in opened.items() if same.get(path, path) == path}
    pairs += [(second, first, "nearly the same") for first, second in near_pictures(firsts)]
    told: set[tuple[str, str]] = set()
    for path, other, likeness in pairs:
        kind = f"{likeness}, in two splits" if splits[path] != splits[other] else f"{likeness}, in one split"
        # One finding a picture is enough, however many others resemble it.
        if (path, kind) not in told:
            told.add((path, kind))
            what = f"{path} ({splits[path][0]}) shows {likeness} as {other} ({splits[other][0]})"
            findings.append(_finding(kind, path, what, other))
    return findings


def _finding(kind: str, path: str, what: str, other: str | None) -> Finding:
    severity, advice = _KINDS[kind]
    return Finding(severity, f"picture {kind}", path, None, what, advice, other=other)


def splits_of(parts: Sequence[Part]) -> dict[str, list[str]]:
    """path -> the splits that name the picture."""
    found: dict[str, dict[str, None]] = {}
    for part in parts:
        for path in part.paths:
            found.setdefault(path, {})[part.split] = None
    return {path: list(splits) for path, splits in found.items()}
