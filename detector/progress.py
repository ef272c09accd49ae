"""The progress of long work: a bar on a terminal, plain lines elsewhere."""

import math
import os
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm

from .tables import format_duration

_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


class Progress(AbstractContextManager):
    """The progress of one epoch: a bar on a terminal, elsewhere a plain line every `interval` seconds.

    Args:
        num_images: images of the epoch.
        title: the name of the work, for example "epoch 3/12".
        epochs_left: whole epochs after this one; they count in the time left for the run.
        epoch_seconds: what an earlier epoch took with all that belongs to it; None: this one's rate says it.
        interval: seconds between plain lines.
        stream: where to write, standard output by default.
        enabled: False writes nothing but still measures, for every process except the first.
    """

    smoothing = 0.9
    """Weight of the past in the losses shown."""

    def __init__(
        self,
        num_images: int,
        title: str = "",
        *,
        epochs_left: int = 0,
        epoch_seconds: float | None = None,
        interval: float = 10.0,
        stream: IO[str] | None = None,
        enabled: bool = True,
    ) -> None:
        self.num_images = num_images
        self.title = title
        self.epochs_left = epochs_left
        self.epoch_seconds = epoch_seconds
        self.interval = interval
        self.images_seen = 0
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._start = time.perf_counter()
        # Time and images after the first step, which warms up.
        self._first: tuple[float, int] | None = None
        self._last_line = -math.inf
        self._shown: dict[str, float] = {}
        shape = {"dynamic_ncols": True, "bar_format": _BAR}
        on_terminal = enabled and self._stream.isatty()
        self._bar = tqdm(total=num_images, desc=title, file=self._stream, **shape) if on_terminal else None

    def update(self, num_images: int, **numbers: float) -> None:
        """Count the images of one step, and show its numbers: losses as running means, others as they are."""
        # Several processes may share out more than there are.
        num_images = min(num_images, max(self.num_images - self.images_seen, 0))
        self.images_seen += num_images
        now = time.perf_counter()
        if self._first is None:
            self._first = (now, self.images_seen)
        for name, value in numbers.items():
            past = self._shown.get(name)
            if past is not None and name.startswith("loss") and math.isfinite(past):
                value = self.smoothing * past + (1 - self.smoothing) * value
            self._shown[name] = float(value)
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._describe()), refresh=False)
            self._bar.update(num_images)
        elif self._enabled and (
            now - self._last_line >= self.interval or self.images_seen >= self.num_images
        ):
            self._last_line = now
            counted = f"{self.title} {self.images_seen}/{self.num_images}".strip()
            print(f"{counted}: {', '.join(self._describe())}", file=self._stream, flush=True)

    @property
    def images_per_second(self) -> float:
        """Images per second without the first step, which warms up. Until a second step, with it; 0 before any."""
        if self._first is None:
            return 0.0
        start, images = self._first if self.images_seen > self._first[1] else (self._start, 0)
        return (self.images_seen - images) / max(time.perf_counter() - start, 1e-9)

    @property
    def seconds_left(self) -> tuple[float, float]:
        """Seconds left for the epoch, from the rate so far, and for the run."""
        rate = max(self.images_per_second, 1e-9)
        epoch = max(self.num_images - self.images_seen, 0) / rate
        return epoch, epoch + self.epochs_left * (self.epoch_seconds or self.num_images / rate)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _describe(self) -> list[str]:
        numbers = [f"{name.removeprefix('loss_')} {value:.4g}" for name, value in self._shown.items()]
        epoch, run = self.seconds_left
        left = f"{format_duration(epoch)} left"
        if self.epochs_left:
            left += f", run {format_duration(run)}"
        return [*numbers, f"{self.images_per_second:.1f} images/s", f"{memory_mb():.0f} MB", left]


def memory_mb() -> float:
    """Peak memory of tensors on the GPU in MB if CUDA is in use, else the resident memory of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, ValueError, AttributeError):  # not Linux
        return 0.0
