"""Experiment 6: DenseNet beside ResNet, squeeze-excitation, stochastic depth, and shrinkage on noisy pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torchvision.ops import SqueezeExcitation

from .classifiers import ClassifierJob, MeasuredRun
from .experiment import Experiment, Result, Results, by_arm
from .scale import Scale, recipe
from .spread import deviation, errors, spread

ENDS = {"no shrinkage": None, "shrinkage_cs": "shrinkage_cs", "shrinkage_cw": "shrinkage_cw"}
WIDE = ("resnet18", "densenet121")


def families(scale: Scale) -> Experiment:
    jobs = {}
    for seed in range(scale.seeds):
        for arm, job in (arms_of_dense(scale, seed) | arms_of_blocks(scale, seed)).items():
            jobs[f"{arm}/{seed}"] = job
    return Experiment(jobs, draw, HEADER, row)


def arms_of_dense(scale: Scale, seed: int) -> dict[str, ClassifierJob]:
    """ResNet-18 and DenseNet-121 in several widths, on larger pictures: their maps have stride 32."""
    pictures = scale.large_pictures
    return {
        f"{name}, width {width}": ClassifierJob(
            recipe(scale, {"name": name, "width": width}, seed, pictures=pictures)
        )
        for name in WIDE
        for width in scale.widths
    }


def arms_of_blocks(scale: Scale, seed: int) -> dict[str, ClassifierJob]:
    """CIFAR ResNets of equal depth that differ in what ends their branches."""
    base = {"name": "cifar_resnet", "depth": scale.depth}
    arms = {
        "residual": ClassifierJob(recipe(scale, base, seed)),
        "se": ClassifierJob(recipe(scale, {**base, "branch_end": "se"}, seed), (look_at_gates,)),
        "stochastic depth": ClassifierJob(recipe(scale, {**base, "stochastic_depth": 0.5}, seed)),
    }
    shallow = base | {"depth": scale.depths[0]}
    for noise in scale.noises:
        for name, end in ENDS.items():
            config = recipe(scale, {**shallow, "branch_end": end}, seed)
            arms[f"{name}, noise {noise}"] = ClassifierJob(config, noise=noise)
    return arms


@torch.no_grad()
def look_at_gates(run: MeasuredRun) -> Result:
    """Mean of each block's gates, and the deviation of their means over the classes: a list for each, (B,)."""
    images, labels = run.some_pictures(1024)
    gates: list[torch.Tensor] = []
    network = run.training.model.network.eval()
    hooks = [
        module.scale_activation.register_forward_hook(lambda layer, inputs, output: gates.append(output))
        for module in network.modules()
        if isinstance(module, SqueezeExcitation)
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    return {
        "gate_means": [float(g.mean()) for g in gates],
        "gate_class_deviations": [class_deviation(g.flatten(1), labels) for g in gates],
    }


def class_deviation(gates: torch.Tensor, labels: torch.Tensor) -> float:
    """Deviation over the classes of each channel's mean gate, the mean of all channels. gates: (N, C)."""
    means = torch.stack([gates[labels == label].mean(0) for label in labels.unique()])
    return float(means.std(0).mean())


HEADER = ("parameters", "training error, %", "test error, %", "ms a step")


def row(found: list[Result]) -> list[Any]:
    return [found[0]["parameters"], *errors(found), step_time(found)]


def step_time(found: Sequence[Result]) -> str | None:
    seconds = [r["seconds_per_step"] for r in found]
    return spread([s and 1000 * s for s in seconds], digits=0)


def draw(figure: Figure, results: Results) -> None:
    """Error against parameters, gates of squeeze-excitation by block, and error against noise."""
    arms = by_arm(results)
    left, middle, right = figure.subplots(1, 3)
    for name in WIDE:
        plot_errors(left, arms, name, [f[0]["parameters"] for arm, f in arms.items() if arm.startswith(name)])
    left.set(xscale="log", xlabel="parameters", title="test error, %")
    # The names of minor ticks would lie over each other.
    left.xaxis.set_minor_formatter(NullFormatter())
    for key in ("gate_means", "gate_class_deviations"):
        of_seeds = [result[key] for result in arms.get("se", [])]
        middle.plot(np.mean(of_seeds, axis=0), label=key.replace("_", " "))
    middle.set(xlabel="block", title="gates of squeeze-excitation")
    for name in ENDS:
        noises = [float(arm.rpartition(" ")[2]) for arm in arms if arm.startswith(f"{name},")]
        plot_errors(right, arms, f"{name},", noises)
    right.set(xlabel="noise, grey levels", title="test error, %")
    for axes in (left, middle, right):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)


def plot_errors(axes: Any, arms: dict[str, list[Result]], start: str, x: list[float]) -> None:
    """Test errors of the arms whose names begin so, with their deviation over the seeds."""
    found = [results for arm, results in arms.items() if arm.startswith(start)]
    values = [[100 * r["curve"][-1]["test_error"] for r in results] for results in found]
    axes.errorbar(
        x, list(map(np.mean, values)), list(map(deviation, values)), marker="o", label=start.strip(",")
    )
