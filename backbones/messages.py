"""Parts of error messages: the nearest name, the first line of another error, where a state dict does not fit."""

import difflib
from collections.abc import Iterable, Mapping

from torch import Tensor


def did_you_mean(name: object, accepted: Iterable[object]) -> str:
    """The question after the nearest of the accepted names, or nothing where none is near."""
    close = difflib.get_close_matches(str(name), [str(a) for a in accepted], n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def nearest(name: object, accepted: Iterable[object]) -> str:
    """The end of a sentence about a wrong name: the nearest accepted one, and all of them."""
    accepted = list(map(str, accepted))
    return f"{did_you_mean(name, accepted)}accepted: {', '.join(accepted)}"


def check_choice(name: str, value: object, accepted: Iterable[object]) -> None:
    """Refuse a value of `name` that is not among the accepted ones."""
    if value not in (accepted := list(accepted)):
        raise ValueError(f"{name} is {value!r}; {nearest(value, accepted)}")


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def misfit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Where the state dict `given` does not fit one of the keys and shapes of `wanted`; nothing where it fits.

    The counters of batch norms may be absent: old versions and frozen norms have none.
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
