"""Figures of the experiments."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from detector.files import write_atomically

from .experiment import Experiment, Result, Results, by_arm, finished
from .spread import deviation


def save_figure(experiment: Experiment, results: Results, path: Path) -> None:
    """Draw an experiment's figure as a PNG, once every arm has a result. Trainings that failed are not in it."""
    if by_arm(results).keys() != by_arm(experiment.jobs).keys():
        return
    figure = Figure(figsize=(10, 4.2), dpi=90, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    experiment.draw(figure, finished(results))
    canvas.draw()
    # 64 colours make a third of the file.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", optimize=True))


def plot_curves(axes: Any, arms: Mapping[str, Sequence[Result]]) -> None:
    """Mean error against steps: training dashed, test solid. The runs of an arm have the same steps."""
    for number, (arm, found) in enumerate(arms.items()):
        steps = [point["step"] for point in found[0]["curve"]]
        for key, style in (("train_error", "--"), ("test_error", "-")):
            mean = np.mean([[point[key] for point in result["curve"]] for result in found], axis=0)
            label = arm if style == "-" else None
            axes.plot(steps, 100 * mean, style, color=f"C{number}", label=label)
    axes.set(xlabel="step", ylabel="error, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def plot_bars(figure: Figure, results: Results) -> None:
    """Training and test error of each arm at the end, with the standard deviation over the seeds."""
    axes, arms = figure.subplots(), by_arm(results)
    places = np.arange(len(arms))
    for shift, key in ((-0.2, "train_error"), (0.2, "test_error")):
        ends = [[100 * result["curve"][-1][key] for result in found] for found in arms.values()]
        means, spreads = [np.mean(e) for e in ends], [deviation(e) for e in ends]
        axes.barh(places + shift, means, 0.4, xerr=spreads, label=key.replace("_", " "))
    axes.set_yticks(places, list(arms))
    axes.invert_yaxis()
    axes.set_xlabel("error, %")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize="small")
