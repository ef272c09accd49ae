"""Parts of error messages: the nearest name, another error's first line, the misfit between two state dicts."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping

from torch import Tensor

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


def shown(value: object) -> str:
    """repr(value), shortened where it is long."""
    return _REPR.repr(value)


def did_you_mean(name: object, accepted: Iterable[object]) -> str:
    """'did you mean NAME? ' with the nearest accepted name, or '' where none is near."""
    close = difflib.get_close_matches(str(name), [str(a) for a in accepted], n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def nearest(name: object, accepted: Iterable[object]) -> str:
    """The end of a message about a wrong name: the nearest accepted name, then all accepted names."""
    accepted = list(map(str, accepted))
    return f"{did_you_mean(name, accepted)}accepted: {', '.join(accepted)}"


def check_choice(name: str, value: object, accepted: Iterable[object]) -> None:
    """Raise a ValueError where the value of `name` is not an accepted one."""
    if value not in (accepted := list(accepted)):
        raise ValueError(f"{name} is {value!r}; {nearest(value, accepted)}")


def check_count(name: str, value: object, most: int) -> None:
    """Raise a ValueError where the value of `name` is not a whole number from 1 to `most`."""
    if not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} is {value!r}; accepted: a positive whole number up to {most}")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the error's type where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def misfit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """How the state dict `given` differs from `wanted` in keys and shapes; '' where it fits.

    Counters of batch norms may be missing or unknown: old versions and frozen norms have none.
    """
    counter = "num_batches_tracked"
    shapes = [
        f"{key} {tuple(given[key].shape)} for {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    kinds = {
        "missing": [key for key in wanted if key not in given and not key.endswith(counter)],
        "unknown": [key for key in given if key not in wanted and not key.endswith(counter)],
        "of another shape": shapes,
    }
    return "; ".join(
        f"{kind}: {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for kind, keys in kinds.items()
        if keys
    )
