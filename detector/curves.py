"""The curves of a run as a picture, drawn from its `metrics.jsonl`."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .files import write_atomically
from .model.losses import LOSSES
from .run_log import read_log

_SCORES = {"average precision": ("AP", "AP50", "AP75"), "accuracy": ("top1", "top5", "mean_accuracy")}


def plot_curves(log_path: str | Path, png_path: str | Path) -> None:
    """Draw a run's `metrics.jsonl` over its steps: losses, scores where evaluated, learning rate.

    Losses are running means; the single values of the total are drawn faintly behind it. The picture is written
    whole or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_log(log_path)
    train = [record for record in records if record["kind"] == "train"]
    val = [record for record in records if record["kind"] == "val"]
    panels = [("loss", lambda axes: _plot_losses(axes, train, val))]
    for title, names in _SCORES.items():
        if any(record.get(name) is not None for record in val for name in names):
            panels.append((title, partial(_plot_scores, val=val, names=names)))
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
    # One early spike must not flatten the curves.
    if len(total) and total.max() > 0:
        top = min(total.max(), 2 * np.percentile(total, 95))
        axes.set_ylim(0, 1.05 * max(top, validation.max(initial=0)))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", ncols=2)


def _plot_scores(axes: Any, val: list[dict], names: tuple[str, ...]) -> None:
    for name in names:
        _plot_series(axes, val, name, marker="o", markersize=4, label=name)
    axes.set_ylim(0, 1)
    axes.legend(fontsize="small")


def _plot_series(axes: Any, records: list[dict], name: str, *, smooth: bool = False, **style: Any) -> None:
    steps, values = _series(records, name)
    if len(steps):
        axes.plot(steps, _running_mean(values) if smooth else values, **style)


def _series(records: Iterable[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n,) and values (n,) of the n records that have a number of that name."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    points = np.array(points, dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """(n,) values -> (n,) means, each over the last n // 50 values, or over fewer at the beginning."""
    window = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)
