"""Findings: what the doctor says, as text and as JSON."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..names import escaped

Severity = Literal["error", "warning", "note"]
# From the worst to the mildest.
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault or remark.

    severity: an "error" is left out of training, or makes its results wrong; a "warning" is probably a mistake; a
        "note" is good to know.
    kind: a few words that group findings. file: the picture; the annotations, if no picture is concerned.
    index: the object's number in its annotation file. what: a sentence that names the place. advice: what to do.
    box: xyxy pixels of the object in its picture. other: the second picture, if two are compared.
    """

    severity: Severity
    kind: str
    file: str
    index: int | None
    what: str
    advice: str
    box: Box | None = None
    other: str | None = None


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """The findings with the worst first; equally bad ones keep their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def exit_status_of(findings: Iterable[Finding]) -> int:
    """2 if there is an error, 1 if there is a warning, else 0."""
    found = {finding.severity for finding in findings}
    return 2 if "error" in found else 1 if "warning" in found else 0


def format_findings(findings: Sequence[Finding], shown: int = 3) -> str:
    """Text for people: the number of findings of each kind, the first `shown` of them, and what to do."""
    groups: dict[tuple[Severity, str], list[Finding]] = defaultdict(list)
    for finding in sort_findings(findings):
        groups[finding.severity, finding.kind].append(finding)
    counts = Counter(finding.severity for finding in findings)
    lines = [", ".join(f"{counts[severity]} {severity}s" for severity in SEVERITIES)]
    for (severity, kind), members in groups.items():
        lines.append(f"\n{severity}: {kind} ({len(members)})")
        lines += [f"  {escaped(member.what)}" for member in members[:shown]]
        if len(members) > shown:
            lines.append(f"  and {len(members) - shown} more")
        lines.append(f"  -> {members[0].advice}")
    return "\n".join(lines)
