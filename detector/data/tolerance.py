"""How many pictures a data set may do without."""

from collections.abc import Sequence

MAX_LEFT_OUT = 0.05
"""The share of pictures that may be left out."""
MAX_TOLD = 10
"""So many sentences are told before the others are only counted."""
_FEW = 2


def refuse_many(
    reasons: Sequence[str], total: int, max_left_out: float = MAX_LEFT_OUT, kind: str = "pictures"
) -> None:
    """Raise a ValueError that lists the first reasons, if more than a share of `total` have one.

    kind: what is counted. Two of anything but pictures never stop a run: small sets have few objects and files.
    """
    if len(reasons) > max(0 if kind == "pictures" else _FEW, max_left_out * total):
        lines = [
            f"{len(reasons)} of {total} {kind} cannot be used, and at most {max_left_out:.0%} may be left out:",
            *first_few(reasons),
        ]
        raise ValueError("\n".join(lines))


def first_few(sentences: Sequence[str], kind: str = "") -> list[str]:
    """A line for each of the first sentences, and one with the number of the others. kind: a word before each."""
    lines = [f"  {kind}: {sentence}" if kind else f"  {sentence}" for sentence in sentences[:MAX_TOLD]]
    if len(sentences) > MAX_TOLD:
        lines.append(f"  and {len(sentences) - MAX_TOLD} more {kind}".rstrip())
    return lines
