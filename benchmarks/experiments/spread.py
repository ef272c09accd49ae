"""Means and standard deviations over the seeds."""

from collections.abc import Sequence
from statistics import mean, stdev

from .experiment import Result


def spread(values: Sequence[float], digits: int = 1) -> str | None:
    """Mean and standard deviation as "12.3 ± 0.4"; the mean alone of one value; None without any."""
    if not values:
        return None
    around = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{around}"


def errors(found: Sequence[Result]) -> list[str | None]:
    """Training and test error in percent at the end of an arm's runs."""
    return [spread([100 * r["curve"][-1][key] for r in found]) for key in ("train_error", "test_error")]
