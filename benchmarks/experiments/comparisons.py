"""Experiments 1 to 3: depth, shortcuts, and the order of norm, ReLU and addition, each with all else equal."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from matplotlib.figure import Figure

from backbones.residual import ORDERS

from .classifiers import ClassifierJob
from .experiment import Experiment, Result, Results, by_arm
from .figures import plot_bars, plot_curves
from .scale import Scale, recipe
from .spread import errors

KINDS = {"plain": {"shortcut": "none"}, "resnet": {}}
SHORTCUTS: dict[str, dict[str, Any]] = {
    "A": {},
    "B": {"shortcut": "B"},
    "constant_scaling": {"shortcut": "constant_scaling"},
    "exclusive_gating": {"shortcut": "exclusive_gating"},
    "shortcut_only_gating": {"shortcut": "shortcut_only_gating"},
    "shortcut_only_gating, bias 0": {"shortcut": "shortcut_only_gating", "gate_bias": 0.0},
    "conv1x1 (C)": {"shortcut": "conv1x1"},
    "dropout": {"shortcut": "dropout"},
}
# Test error on CIFAR-10 in percent. Plain and residual: He et al. 2015, Table 6, and its text. The others: 110 layers,
# He et al. 2016, Tables 1 and 2.
PUBLISHED_DEPTHS = {"resnet-20": "8.75", "resnet-32": "7.51", "resnet-44": "7.17", "resnet-56": "6.97"}
PUBLISHED_SHORTCUTS = {
    "A": "6.61",
    "constant_scaling": "12.35",
    "exclusive_gating": "8.70",
    "shortcut_only_gating": "6.91",
    "shortcut_only_gating, bias 0": "12.86",
    "conv1x1 (C)": "12.22",
    "dropout": "fails",
}
PUBLISHED_ORDERS = {
    "original-110": "6.61",
    "bn_after_addition-110": "8.17",
    "relu_before_addition-110": "7.84",
    "relu_only_preactivation-110": "6.71",
    "full_preactivation-110": "6.37",
}


def jobs(scale: Scale, arms: Mapping[str, dict[str, Any]]) -> dict[str, ClassifierJob]:
    """A job for each arm and seed; an arm is the options of its `cifar_resnet`."""
    base = {"name": "cifar_resnet", "depth": scale.depth}
    return {
        f"{arm}/{seed}": ClassifierJob(recipe(scale, base | options, seed))
        for seed in range(scale.seeds)
        for arm, options in arms.items()
    }


HEADER = ("parameters", "training error, %", "test error, %")


def row(found: list[Result]) -> list[Any]:
    return [found[0]["parameters"], *errors(found)]


def degradation(scale: Scale) -> Experiment:
    arms = {f"{kind}-{d}": {"depth": d, **options} for kind, options in KINDS.items() for d in scale.depths}
    return Experiment(jobs(scale, arms), draw_degradation, HEADER, row, PUBLISHED_DEPTHS)


def draw_degradation(figure: Figure, results: Results) -> None:
    """Figure 6 of He et al. 2015: plain networks on the left, residual ones on the right."""
    arms = by_arm(results)
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), KINDS, strict=True):
        plot_curves(axes, {arm: found for arm, found in arms.items() if arm.startswith(kind)})
        axes.set_title(f"{kind}: training error (dashed) and test error")


def shortcuts(scale: Scale) -> Experiment:
    return Experiment(jobs(scale, SHORTCUTS), plot_bars, HEADER, row, PUBLISHED_SHORTCUTS)


def order(scale: Scale) -> Experiment:
    """Five orders; and full pre-activation, where a norm follows the last sum, with that norm's first weights at 4."""
    arms = {
        f"{order}-{depth}": {"order": order, "depth": depth} for depth in scale.orders for order in ORDERS
    }
    found = jobs(scale, arms)
    for depth, seed in product(scale.orders, range(scale.seeds)):
        arm = f"full_preactivation-{depth}"
        found[f"{arm}, last norm x 4/{seed}"] = replace(found[f"{arm}/{seed}"], last_norm=4.0)
    return Experiment(found, plot_bars, HEADER, row, PUBLISHED_ORDERS)
