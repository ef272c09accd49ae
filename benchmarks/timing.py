"""Time the parts of a call, run calls in turn, and summarise their seconds."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch

# Seconds of a call: "total" and each part.
Seconds = dict[str, float]
# The quartiles of a part, and its seconds in each round.
Summary = dict[str, Any]
# (owner, attribute, part): each call of owner.attribute counts as that part.
Parts = list[tuple[Any, str, str]]
# Summaries by form, then by part.
Times = dict[str, dict[str, Summary]]


class Stopwatch:
    """Measures the seconds of a call by part. Each moment counts once: a part within another is taken out of it."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._marks: list[tuple[str, Any]] = []
        self._open: list[str] = []

    def time(self, call: Callable[[], object]) -> Seconds:
        """Run `call`; return seconds of "total", "other" and each part. On CUDA, the device's clock times the parts."""
        self._marks, self._open = [], []
        self._synchronize()
        started = time.perf_counter()
        with self.part("other"):
            call()
        self._synchronize()
        seconds: dict[str, float] = defaultdict(float, total=time.perf_counter() - started)
        for (part, begin), (_, end) in pairwise(self._marks):
            seconds[part] += begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin
        return dict(seconds)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context that counts as the part `name`."""
        self._open.append(name)
        self._mark(name)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1] if self._open else "")

    @contextmanager
    def watch(self, parts: Parts) -> Iterator[None]:
        """A context in which every call of `owner.attribute` counts as its part."""
        with ExitStack() as stack:
            for owner, attribute, part in parts:
                stack.enter_context(_replaced(owner, attribute, self._timed(getattr(owner, attribute), part)))
            yield

    def _timed(self, call: Callable, part: str) -> Callable:
        def timed(*args: object, **kwargs: object) -> object:
            with self.part(part):
                return call(*args, **kwargs)

        return timed

    def _mark(self, part: str) -> None:
        """Note that `part` runs from now on."""
        if self.device.type != "cuda":
            self._marks.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self._marks.append((part, event))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def _replaced(owner: Any, attribute: str, value: object) -> Iterator[None]:
    own, before = attribute in vars(owner), getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before) if own else delattr(owner, attribute)


def alternate(calls: dict[str, Callable[[], Seconds]], repeats: int, warmup: int) -> Times:
    """Run all calls in turn, and summarise the parts of each over `repeats` rounds.

    Every second round runs backwards. `warmup` rounds come first and do not count.
    """
    samples: dict[str, list[Seconds]] = {name: [] for name in calls}
    for number in range(-warmup, repeats):
        for name in list(calls) if number % 2 == 0 else reversed(calls):
            sample = calls[name]()
            if number >= 0:
                samples[name].append(sample)
    return {
        name: {part: summarize([s[part] for s in parts]) for part in parts[0]}
        for name, parts in samples.items()
    }


def summarize(seconds: Sequence[float]) -> Summary:
    quartiles = np.percentile(seconds, (0, 25, 50, 75, 100)).tolist()
    names = ("min", "quartile1", "median", "quartile3", "max")
    return {**dict(zip(names, quartiles, strict=True)), "seconds": list(seconds)}


def per_second(times: Times, num_images: int) -> dict[str, float]:
    """Images per second of each form, from the median of its total."""
    return {form: num_images / parts["total"]["median"] for form, parts in times.items()}


def ratios(times: Times, reference: str = "stock") -> dict[str, dict[str, float]]:
    """Each form's medians divided by the reference's, for the parts that both have; {} without a reference."""
    if reference not in times:
        return {}
    base = {part: summary["median"] for part, summary in times[reference].items() if summary["median"] > 0}
    return {
        form: {part: summary["median"] / base[part] for part, summary in parts.items() if part in base}
        for form, parts in times.items()
        if form != reference
    }
