"""Means and standard deviations over the seeds."""

from collections.abc import Sequence
from statistics import mean, stdev

from .experiment import Result


def spread(values: Sequence[float | None], digits: int = 1) -> str | None:
    """Mean and standard deviation as "12.3 ± 0.4"; the mean alone of one value; None without any.

    A value that is None is left out.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    around = f" ± {deviation(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{around}"


def deviation(values: Sequence[float]) -> float:
    """The sample's standard deviation; 0 of one value."""
    return stdev(values) if len(values) > 1 else 0.0


def errors(found: Sequence[Result]) -> list[str | None]:
    """Training and test error in percent at the end of an arm's runs."""
    return [spread([100 * r["curve"][-1][key] for r in found]) for key in ("train_error", "test_error")]
