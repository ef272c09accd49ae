"""Experiment 5: networks of a thousand layers, whose activations are computed again in the backward pass."""

from itertools import product
from typing import Any

from matplotlib.figure import Figure

from .classifiers import ClassifierJob
from .experiment import Experiment, Result, Results, by_arm
from .figures import plot_curves
from .scale import Scale, recipe
from .spread import errors, spread
from .why import growth, look_at_layers

ORDERS = ("original", "full_preactivation")


def thousand(scale: Scale) -> Experiment:
    """Each depth in the original order and in full pre-activation."""
    jobs = {}
    for seed, (depth, bottlenecks), order in product(range(scale.thousand_seeds), scale.thousand, ORDERS):
        backbone = {"name": "cifar_resnet", "depth": depth, "bottlenecks": bottlenecks, "order": order}
        config = recipe(scale, backbone, seed, epochs=scale.thousand_epochs)
        jobs[f"{depth} {order}/{seed}"] = ClassifierJob(config, (look_at_layers,), checkpointing=True)
    return Experiment(jobs, draw, HEADER, row, PUBLISHED)


# Test error on CIFAR-10 in percent: He et al. 2016, Table 3; 1202 layers, He et al. 2015, Table 6.
PUBLISHED = {"1001 original": "7.61", "1001 full_preactivation": "4.92", "1202 original": "7.93"}


HEADER = (
    "parameters",
    "steps",
    "seconds a step",
    "peak memory, MB",
    "gradient, first over last, at the start",
    "training error, %",
    "test error, %",
)


def row(found: list[Result]) -> list[Any]:
    measures = [
        spread([r["seconds_per_step"] for r in found], digits=2),
        spread([r["peak_mb"] for r in found], digits=0),
        spread([growth(r["gradients_at_start"]) for r in found]),
    ]
    return [found[0]["parameters"], found[0]["curve"][-1]["step"], *measures, *errors(found)]


def draw(figure: Figure, results: Results) -> None:
    """Gradients of every layer at the start, and errors against steps."""
    left, right = figure.subplots(1, 2)
    arms = by_arm(results)
    for number, (arm, (result, *_)) in enumerate(arms.items()):
        left.semilogy(result["gradients_at_start"][1:], color=f"C{number}", label=arm)
    left.set(xlabel="3x3 layer", title="gradient norm at the start")
    left.legend(fontsize="small")
    plot_curves(right, arms)
    right.set_title("training error (dashed) and test error")
