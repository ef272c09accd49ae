"""Tables, counts and durations as text for people."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .names import escaped


def format_table(rows: Sequence[Sequence[Any]], header: Sequence[str] | None = None) -> str:
    """Rows as aligned text: columns of numbers to the right, others to the left; None is "-".

    ValueError: rows of different length.
    """
    cells = [[format_cell(value) for value in row] for row in rows]
    everything = ([list(header)] if header is not None else []) + cells
    if not everything:
        return ""
    if len({len(row) for row in everything}) > 1:
        raise ValueError(f"rows of different length: {sorted({len(row) for row in everything})}")
    widths = [max(map(len, column)) for column in zip(*everything, strict=True)]
    to_right = [all(map(_is_number, column)) for column in zip(*cells, strict=True)] or [False] * len(widths)
    if header is not None:
        everything.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, to_right, strict=True)
        ).rstrip()
        for row in everything
    )


def format_cell(value: Any) -> str:
    """A value as text: a float with three digits, None as "-"."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else escaped(str(value))


def format_percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.lstrip("+-")[:1].isdigit()


def format_count(count: float) -> str:
    """A large number as short text: 52_950_000 -> "52.95 M"."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # Just below the limit, the smaller unit would show 1000.00.
        if abs(count) >= limit * 0.999995:
            return f"{count / limit:.2f} {unit}"
    return f"{count:g}"


def format_duration(seconds: float) -> str:
    """A duration as short text: "45 s", "12 min 5 s", "3 h 20 min", "2 d 4 h"."""
    if not math.isfinite(seconds):
        return "unknown time"
    total = round(seconds)
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for (size, unit), (small_size, small_unit) in pairwise(units):
        if total >= size:
            rest = total % size // small_size
            return f"{total // size} {unit} {rest} {small_unit}" if rest else f"{total // size} {unit}"
    return f"{total} s"
