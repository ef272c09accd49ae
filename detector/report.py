"""What a run tells: numbers in `metrics.jsonl` and TensorBoard, progress on the terminal, curves as a PNG."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

from .files import write_atomically

LOSSES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")


class RunLog:
    """The numbers of a run: a JSON object a line in `metrics.jsonl`, and TensorBoard's events when installed.

    A line is `{"kind": "train" or "val", "epoch": ..., "step": ..., <name>: <number>, ...}`, on disk when
    `write` returns. JSON has no NaN or infinity: they are written as null. An existing file is continued; the
    torn last line of a killed run is dropped.
    """

    def __init__(self, run_dir: str | Path, *, tensorboard: bool = True) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self.run_dir / "metrics.jsonl"
        self._tensorboard = tensorboard
        self._writer: Any = None
        self._purge_step: int | None = None
        if self.path.exists():
            self._rewrite(read_log(self.path))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (held for the run)

    def write(self, kind: str, *, epoch: int, step: int, **numbers: Any) -> None:
        """Append one line. Numbers may be Python's, numpy's or tensors of one element, and dicts of them."""
        line = _plain({"kind": kind, "epoch": epoch, "step": step, **numbers})
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self._write_events(kind, step, line)

    def truncate_after(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a run resumed there will write again."""
        self._file.close()
        self._rewrite([line for line in read_log(self.path) if line["step"] <= step])
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._close_events()
        self._purge_step = step + 1

    def close(self) -> None:
        self._file.close()
        self._close_events()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rewrite(self, lines: list[dict]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _write_events(self, kind: str, step: int, line: Mapping[str, Any]) -> None:
        if self._tensorboard and self._writer is None:
            self._writer = _open_tensorboard(self.run_dir, self._purge_step)
            self._tensorboard = self._writer is not None
        if self._writer is None:
            return
        for name, value in line.items():
            if name not in ("kind", "step") and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        self._writer.flush()

    def _close_events(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def read_log(path: str | Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; an incomplete last line, as a killed run leaves it, is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a JSON object: {line[:80]!r}") from error
    return records


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: tensors and numpy numbers as Python's, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _open_tensorboard(run_dir: Path, purge_step: int | None) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)


class Progress:
    """The progress of one epoch: a bar on a terminal, elsewhere a plain line every so many seconds.

    Args:
        num_images: images of the epoch.
        title: what runs, for example "epoch 3/12".
        epochs_left: whole epochs after this one, for the time left for the run.
        interval: seconds between plain lines.
        stream: where to write, standard output by default.
        enabled: False writes nothing (every process but the first), and still measures.
    """

    smoothing = 0.9
    """Weight of the past in the losses shown."""

    def __init__(
        self,
        num_images: int,
        title: str = "",
        *,
        epochs_left: int = 0,
        interval: float = 10.0,
        stream: IO[str] | None = None,
        enabled: bool = True,
    ) -> None:
        self.num_images = num_images
        self.title = title
        self.epochs_left = epochs_left
        self.interval = interval
        self.images_seen = 0
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._start = time.perf_counter()
        self._first: tuple[float, int] | None = None  # time and images after the first step, which warms up
        self._last_line = -math.inf
        self._shown: dict[str, float] = {}
        self._bar = self._open_bar() if enabled and self._stream.isatty() else None

    def update(self, num_images: int, **numbers: float) -> None:
        """Count the images of one step and show its numbers: losses as running means, others as they are."""
        self.images_seen += num_images
        now = time.perf_counter()
        if self._first is None:
            self._first = (now, self.images_seen)
        for name, value in numbers.items():
            self._shown[name] = self._smooth(name, float(value))
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._describe()), refresh=False)
            self._bar.update(num_images)
        elif self._enabled and (
            now - self._last_line >= self.interval or self.images_seen >= self.num_images
        ):
            self._last_line = now
            self._print_line()

    @property
    def images_per_second(self) -> float:
        """Images a second since the first step, or with it while there is no other; 0 before it."""
        if self._first is None:
            return 0.0
        start, images = self._first if self.images_seen > self._first[1] else (self._start, 0)
        return (self.images_seen - images) / max(time.perf_counter() - start, 1e-9)

    @property
    def seconds_left(self) -> tuple[float, float]:
        """Seconds left for the epoch and for the run, from the rate so far."""
        rate = max(self.images_per_second, 1e-9)
        epoch = max(self.num_images - self.images_seen, 0) / rate
        return epoch, epoch + self.epochs_left * self.num_images / rate

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_bar(self) -> tqdm:
        layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        return tqdm(
            total=self.num_images,
            desc=self.title,
            file=self._stream,
            dynamic_ncols=True,
            bar_format=layout,
        )

    def _smooth(self, name: str, value: float) -> float:
        past = self._shown.get(name)
        if past is None or not name.startswith("loss") or not math.isfinite(past):
            return value
        return self.smoothing * past + (1 - self.smoothing) * value

    def _describe(self) -> list[str]:
        numbers = [f"{name.removeprefix('loss_')} {value:.4g}" for name, value in self._shown.items()]
        epoch, run = self.seconds_left
        left = f"{format_duration(epoch)} left"
        if self.epochs_left:
            left += f", run {format_duration(run)}"
        return [*numbers, f"{self.images_per_second:.1f} images/s", f"{memory_mb():.0f} MB", left]

    def _print_line(self) -> None:
        counted = f"{self.title} {self.images_seen}/{self.num_images}".strip()
        print(f"{counted}: {', '.join(self._describe())}", file=self._stream, flush=True)


def memory_mb() -> float:
    """Peak GPU memory of tensors in MB where CUDA is in use, otherwise the resident memory of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, ValueError, AttributeError):  # not Linux
        return 0.0


def plot_curves(log_path: str | Path, png_path: str | Path) -> None:
    """Draw a run's `metrics.jsonl` over its steps: losses, average precision where evaluated, learning rate.

    Losses are running means with the single values faint behind the total. The picture is written whole or
    not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_log(log_path)
    train = [record for record in records if record["kind"] == "train"]
    val = [record for record in records if record["kind"] == "val"]
    panels = [("loss", lambda axes: _plot_losses(axes, train, val))]
    if any(record.get("AP") is not None or record.get("AP50") is not None for record in val):
        panels.append(("average precision", lambda axes: _plot_precision(axes, val)))
    panels.append(("learning rate", lambda axes: _plot_series(axes, train, "lr", color="0.3")))
    figure = Figure(figsize=(9, 3.2 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(panels), sharex=True)
    for axes, (title, draw) in zip(rows, panels, strict=True):
        draw(axes)
        axes.set_title(title)
        axes.grid(alpha=0.3)
    rows[-1].set_xlabel("step")
    write_atomically(png_path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _plot_losses(axes: Any, train: list[dict], val: list[dict]) -> None:
    _plot_series(axes, train, "loss", color="0.75", linewidth=0.6)
    _plot_series(axes, train, "loss", smooth=True, color="black", label="loss")
    for name in LOSSES:
        _plot_series(axes, train, name, smooth=True, label=name)
    _plot_series(axes, val, "loss", color="tab:purple", marker="o", markersize=4, label="validation loss")
    total, validation = _series(train, "loss")[1], _series(val, "loss")[1]
    if len(total) and total.max() > 0:  # one early spike must not flatten the curves
        top = min(total.max(), 2 * np.percentile(total, 95))
        axes.set_ylim(0, 1.05 * max(top, validation.max(initial=0)))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", ncols=2)


def _plot_precision(axes: Any, val: list[dict]) -> None:
    for name in ("AP", "AP50", "AP75"):
        _plot_series(axes, val, name, marker="o", markersize=4, label=name)
    axes.set_ylim(0, 1)
    axes.legend(fontsize="small")


def _plot_series(axes: Any, records: list[dict], name: str, *, smooth: bool = False, **style: Any) -> None:
    steps, values = _series(records, name)
    if len(steps):
        axes.plot(steps, _running_mean(values) if smooth else values, **style)


def _series(records: Iterable[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a number of that name."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    points = np.array(points, dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the last fiftieth of the curve at each point (of fewer values at its beginning)."""
    window = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def format_table(rows: Sequence[Sequence[Any]], header: Sequence[str] | None = None) -> str:
    """Rows as aligned text: columns of numbers to the right, others to the left; None is "-"."""
    cells = [[_format_cell(value) for value in row] for row in rows]
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


def _format_cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or cell.lstrip("+-")[:1].isdigit()


def format_count(count: float) -> str:
    """A large number for the eye: 52_950_000 -> "52.95 M"."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit * 0.999995:  # what would be shown as 1000.00 of the smaller unit
            return f"{count / limit:.2f} {unit}"
    return f"{count:g}"


def format_duration(seconds: float) -> str:
    """A duration for the eye: "45 s", "12 min 5 s", "3 h 20 min", "2 d 4 h"."""
    if not math.isfinite(seconds):
        return "unknown time"
    total = round(seconds)
    for size, unit, small_size, small_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if total >= size:
            rest = total % size // small_size
            return f"{total // size} {unit} {rest} {small_unit}" if rest else f"{total // size} {unit}"
    return f"{total} s"
