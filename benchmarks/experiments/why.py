"""Experiment 4: gradients and responses of every layer, and what a trained network does without some of its blocks."""

from functools import partial
from itertools import combinations

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from backbones.residual import ResidualBlock
from detector.classify.classifier import build_classifier

from .classifiers import ClassifierJob, MeasuredRun
from .experiment import Experiment, Result, Results, by_arm
from .inside import (
    block_places,
    gradient_norms,
    keeps_size,
    response_deviations,
    with_blocks_swapped,
    without_blocks,
)
from .scale import Scale, recipe
from .spread import errors, spread

KINDS = {"plain": {"shortcut": "none"}, "resnet": {}, "stochastic": {"stochastic_depth": 0.5}}
DRAWS = 5
# Percent of the blocks that are dropped together.
SHARES = (10, 25, 50)


def why(scale: Scale) -> Experiment:
    """Plain, residual and stochastic-depth networks of the least and the greatest depth."""
    depths = scale.depths[0], scale.depths[-1]
    jobs = {}
    for seed in range(scale.seeds):
        for depth in depths:
            for kind, options in KINDS.items():
                backbone = {"name": "cifar_resnet", "depth": depth, **options}
                job = ClassifierJob(recipe(scale, backbone, seed), (look_at_layers, look_at_blocks))
                jobs[f"{kind}-{depth}/{seed}"] = job
    return Experiment(jobs, draw, HEADER, row)


def look_at_layers(run: MeasuredRun) -> Result:
    """Norms of the gradients of each 3x3 layer before and after training, and deviations of its responses."""
    images, labels = run.some_pictures()
    network = run.training.model.network
    return {
        "gradients_at_start": gradient_norms(untrained(run), images, labels),
        "gradients_after": gradient_norms(network, images, labels),
        "response_deviations": response_deviations(network, images),
    }


def untrained(run: MeasuredRun) -> nn.Module:
    """The run's network with its first weights."""
    config = run.config
    torch.manual_seed(config.train.seed)
    return build_classifier(config.model.backbone, len(run.class_names), run.preprocessing).network


def look_at_blocks(run: MeasuredRun) -> Result:
    """The test error with all blocks, without each one, without several, and with two exchanged."""
    network, rng = run.training.model.network, np.random.default_rng(0)
    places = block_places(network)

    def without(dropped: list[str]) -> float:
        return run.test_error(without_blocks(network, dropped))

    counts = sorted({count_of(len(places), percent) for percent in SHARES})
    several = {
        count: [without(rng.choice(places, count, replace=False).tolist()) for _ in range(DRAWS)]
        for count in counts
    }
    pairs = exchangeable(network, places)
    chosen = rng.permutation(len(pairs))[:DRAWS]
    return {
        "error": run.test_error(network),
        "without_one": [without([place]) for place in places],
        "without_several": {str(count): errors for count, errors in several.items()},
        "two_swapped": [run.test_error(with_blocks_swapped(network, *pairs[i])) for i in chosen],
    }


def exchangeable(network: nn.Module, places: list[str]) -> list[tuple[str, str]]:
    """Pairs of blocks of one stage that keep the map's size."""
    blocks: dict[str, ResidualBlock] = {place: network.get_submodule(place) for place in places}
    kept = [place for place in places if keeps_size(blocks[place])]
    return [(a, b) for a, b in combinations(kept, 2) if a.partition(".")[0] == b.partition(".")[0]]


def growth(gradients: list[float | None]) -> float | None:
    """The first 3x3 layer's gradient over the last one's, the stem's aside; None where one is 0 or not finite."""
    first, last = gradients[1], gradients[-1]
    return first / last if first and last else None


def without_share(result: Result, percent: int) -> float:
    """The mean test error without so many percent of the blocks."""
    return float(np.mean(result["without_several"][str(count_of(len(result["without_one"]), percent))]))


def count_of(blocks: int, percent: int) -> int:
    return max(1, blocks * percent // 100)


HEADER = (
    "gradient, first over last, at the start",
    "after training",
    "std of responses",
    "training error, %",
    "test error, %",
    "without one block, worst",
    "mean",
    *(f"without {share} % of the blocks" for share in SHARES),
    "two swapped",
)


def row(found: list[Result]) -> list[str | None]:
    """The cells of one arm; errors are in percent."""
    gradients = [spread([growth(r[key]) for r in found]) for key in ("gradients_at_start", "gradients_after")]
    responses = spread([float(np.mean(r["response_deviations"])) for r in found], digits=2)
    lesions = [
        spread([100 * float(measure(r)) for r in found])
        for measure in (
            lambda r: max(r["without_one"]),
            lambda r: np.mean(r["without_one"]),
            *(partial(without_share, percent=share) for share in SHARES),
            lambda r: np.mean(r["two_swapped"]),
        )
    ]
    return [*gradients, responses, *errors(found), *lesions]


def draw(figure: Figure, results: Results) -> None:
    """Gradients at the start, deviations of the responses, and the error without one block and without several: of the
    first seed.
    """
    arms = {arm: found[0] for arm, found in by_arm(results).items()}
    figure.set_size_inches(10, 8)
    (gradients, responses), (one, several) = figure.subplots(2, 2)
    for number, (arm, result) in enumerate(arms.items()):
        color = f"C{number}"
        gradients.semilogy(result["gradients_at_start"][1:], color=color, label=arm)
        responses.plot(result["response_deviations"], color=color)
        lost = 100 * np.array(result["without_one"])
        one.plot(np.linspace(0, 1, len(lost)), lost, color=color)
        dropped = [100 * result["error"], *(100 * without_share(result, share) for share in SHARES)]
        several.plot([0, *SHARES], dropped, "o-", color=color)
    gradients.set(xlabel="3x3 layer", title="gradient norm at the start")
    responses.set(xlabel="layer of a branch", title="std of responses after training")
    one.set(xlabel="place of the dropped block: 0 first, 1 last", title="test error without one block, %")
    several.set(xlabel="dropped blocks, %", title="test error without several blocks, %")
    gradients.legend(fontsize="small")
    for axes in (gradients, responses, one, several):
        axes.grid(alpha=0.3)
