"""The growth of time with regions and with pixels."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torchvision.models.detection import FasterRCNN

from .inference import agree, build_inference, inference_call
from .models import make_images, set_case
from .settings import Settings, Size
from .timing import Seconds, Stopwatch, alternate


def measure_scaling(
    settings: Settings, size: Size, regions: Sequence[int], sizes: Sequence[Size], form: str
) -> dict[str, dict[str, Any]]:
    """Time one form at `size` for each number of regions, and at the middle number for each of `sizes`."""
    settings.apply()
    model = build_inference(settings, [form], max(regions))[form]
    middle = sorted(regions)[len(regions) // 2]
    set_case(model, size, middle)
    # This sets the score threshold.
    agree({form: model}, make_images(settings, size), settings.tf32)
    by_regions = {str(count): (size, count) for count in regions}
    by_pixels = {f"{h}x{w}": ((h, w), middle) for h, w in sizes}
    return {
        "regions": _growth(settings, model, by_regions, [float(count) for count in regions]),
        "pixels": _growth(settings, model, by_pixels, [float(h * w) for h, w in sizes]),
    }


def _growth(
    settings: Settings, model: FasterRCNN, cases: dict[str, tuple[Size, int]], x: list[float]
) -> dict[str, Any]:
    watch = Stopwatch(settings.device)

    def call(size: Size, count: int) -> Callable[[], Seconds]:
        timed = inference_call(watch, model, make_images(settings, size), settings.dtype)

        def run() -> Seconds:
            set_case(model, size, count)
            return timed()

        return run

    calls = {name: call(*case) for name, case in cases.items()}
    times = alternate(calls, settings.repeats, settings.warmup)
    return {
        "x": x,
        "times": times,
        "fit": fit_line(x, [parts["total"]["median"] for parts in times.values()]),
    }


def fit_line(x: Sequence[float], y: Sequence[float]) -> dict[str, float] | None:
    """Fit y = slope * x + intercept by least squares; None for fewer than 2 points.

    r_squared is the part of y's variance that the line explains.
    """
    if len(x) < 2:
        return None
    slope, intercept = np.polyfit(x, y, 1).tolist()
    rest = float(np.sum((np.asarray(y) - slope * np.asarray(x) - intercept) ** 2))
    spread = float(np.sum((np.asarray(y) - np.mean(y)) ** 2))
    return {"slope": slope, "intercept": intercept, "r_squared": 1 - rest / spread if spread else 1.0}
