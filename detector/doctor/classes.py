"""Check the classes: their names, their numbers of examples, and labels that are off by one."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

from .findings import Finding
from .part import Part

# With fewer training examples than this, a class is hardly learned.
FEW = 10

_BACKGROUND = {"background", "bg", "none"}
_NO_BG = "The detector has a background of its own. Remove the class and its boxes."


def check_classes(parts: Sequence[Part]) -> list[Finding]:
    """Findings about the classes of all parts together."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for part in parts:
        counts[part.split].update(dict.fromkeys(part.class_ids, 0))
        counts[part.split].update(part.names[~part.crowd].tolist())
    for of_split in counts.values():
        # An object without a name is a finding of its own.
        of_split.pop("", None)
    source_of = {part.split: part.source for part in reversed(parts)}
    names = list(dict.fromkeys(name for of_split in counts.values() for name in of_split))
    source = parts[0].source if parts else ""
    findings = [finding for part in parts for finding in [*_off_by_one(part), *_gaps(part)]]
    findings += [_alike(group, counts, source) for group in _groups_of_alike(names)]
    for name in names:
        if _plain(name) in _BACKGROUND:
            what = f"{source}: {name!r} is listed as a class"
            findings.append(Finding("warning", "background as a class", source, None, what, _NO_BG))
    if "train" in counts:
        findings += _few(counts["train"], source_of["train"])
        for split in counts.keys() - {"train"}:
            findings += _only_outside_train(split, counts[split], counts["train"], source_of[split])
    return findings


def _off_by_one(part: Part) -> list[Finding]:
    """A finding if the ids that objects use are those of the list, shifted by one."""
    if not part.class_ids or len(part.unknown_ids) != 1:
        return []
    used, listed = set(part.names.tolist()), sorted(part.class_ids, key=part.class_ids.get)
    (unknown,) = part.unknown_ids
    first, last = listed[0], listed[-1]
    if unknown == part.class_ids[last] + 1 and first not in used:
        shift, unused = "one too high", first
    elif unknown == part.class_ids[first] - 1 and last not in used:
        shift, unused = "one too low", last
    else:
        return []
    what = f"{part.source}: class id {unknown} is used but not listed, and {unused!r} has no object: all ids look {shift}"
    advice = "Shift the ids of the objects or those of the list by one."
    return [Finding("error", "labels off by one", part.source, None, what, advice)]


def _gaps(part: Part) -> list[Finding]:
    """A note if the class ids are not consecutive, as COCO's own are not."""
    ids = sorted(part.class_ids.values())
    if not ids or ids[-1] - ids[0] == len(ids) - 1:
        return []
    what = f"{part.source}: the {len(ids)} class ids have gaps between {ids[0]} and {ids[-1]}"
    advice = "Nothing: labels are counted without gaps, and results carry the file's ids."
    return [Finding("note", "gaps in class ids", part.source, None, what, advice)]


def _groups_of_alike(names: Sequence[str]) -> list[list[str]]:
    """The names that differ in case, spaces, punctuation or a plural's s only."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_plain(name).removesuffix("s")].append(name)
    return [group for key, group in groups.items() if key and len(group) > 1]


def _plain(name: str) -> str:
    """A name in lower case, its letters and digits alone."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return "".join(c for c in folded if c.isalnum())


def _alike(group: Sequence[str], counts: dict[str, Counter[str]], source: str) -> Finding:
    shown = ", ".join(f"{name!r} ({sum(c[name] for c in counts.values())})" for name in group)
    what = f"{source}: class names nearly agree: {shown} objects"
    return Finding("warning", "near-equal class names", source, None, what, "Give one class one name.")


def _few(counts: Counter[str], source: str) -> list[Finding]:
    """Findings about classes with few training examples or none."""
    findings = []
    for name, count in sorted(counts.items(), key=lambda item: item[1]):
        if count >= FEW:
            break
        kind = "class with few examples" if count else "class without examples"
        advice = "Label more examples, or remove the class: the detector hardly learns it."
        what = f"{source}: {name!r} has {count or 'no'} training object{'s' * (count != 1)}"
        findings.append(Finding("warning", kind, source, None, what, advice))
    return findings


def _only_outside_train(split: str, counts: Counter[str], train: Counter[str], source: str) -> list[Finding]:
    """Findings about classes that have objects in `split` and none in the training data."""
    kind, findings = "class that training lacks", []
    advice = "Move examples to the training split. The detector cannot learn the class."
    for name, count in counts.items():
        if count and not train[name]:
            what = f"{source}: {name!r} has {count} objects in {split} and none in train"
            findings.append(Finding("warning", kind, source, None, what, advice))
    return findings
