"""Choose a whole recipe for a folder of pictures: `choose_recipe(path, folder, device)`."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config import Config, parse_config
from ..data.dataset import DetectionDataset
from ..data.file_source import read_once
from ..data.sources import build_dataset, build_datasets
from ..data.split import write_split
from ..draws import tagged
from .data import choose_data, recipe_of
from .rules import (
    Settings,
    choose_anchors,
    choose_augmentation,
    choose_network,
    choose_regions,
    choose_size,
    choose_training,
    published_network,
)
from .statistics import Machine, Objects, look_at_machine, objects_of
from .timing import choose_epochs, measure_pace
from .weights import find_weights

# With fewer epochs than these, a budget is better spent on a smaller network: see benchmarks/README.md.
_TOO_FEW_EPOCHS = 16
_SMALLER = {"model": {"backbone": {"name": "resnet18", "width": 16}, "min_size": 224}}


class Choice(NamedTuple):
    """A recipe, a sentence for each choice, and the data to train and to validate on, as the recipe has them."""

    config: Config
    reasons: list[str]
    datasets: tuple[DetectionDataset, DetectionDataset | None]


def choose_recipe(
    path: str | Path,
    folder: str | Path,
    device: torch.device,
    *,
    overrides: Sequence[str] = (),
    format: str | None = None,
    minutes: float | None = None,
    offline: bool = False,
    num_processes: int = 1,
) -> Choice:
    """Choose the recipe for the pictures at `path`. `overrides` come before any choice.

    folder: receives the lists of a split, if one has to be made. minutes: a budget of time, this choice included.
    num_processes: that will share the training.

    Raises:
        ValueError, FileNotFoundError: the data cannot be found or read, or a value is not accepted.
    """
    started = time.monotonic()
    if minutes is not None and not 0 < minutes < math.inf:
        raise ValueError(f"minutes is {minutes}; accepted: a positive number")
    read = read_once()
    data, remarks = choose_data(path, folder, read, format, overrides=overrides)
    draft = _Draft(data, overrides)
    train_set, val_set = build_datasets(draft.config.data, read=read)
    data["class_names"] = list(train_set.class_names)
    machine, objects = look_at_machine(device, num_processes), objects_of(train_set)
    weights = None, "model.backbone is given"
    if not any(override.startswith("model.backbone") for override in overrides):
        weights = find_weights(published_network(machine), offline)
    draft.add(*choose_network(machine, *weights))
    draft.add(*choose_size(objects, machine))
    _choose_rest(draft, objects, machine, weights[0] is not None, len(train_set))

    def seconds_left() -> float | None:
        """Of the budget. On a slow machine the choice takes long, and then the training still gets half of the budget."""
        return minutes and 60 * minutes - min(time.monotonic() - started, 30 * minutes)

    epochs, chosen = _time(draft, folder, train_set, val_set, machine, seconds_left)
    if epochs < _TOO_FEW_EPOCHS and minutes is not None and weights[0] is None:
        smaller, size = _Draft(data, overrides), _SMALLER["model"]["min_size"]
        longest = math.ceil(size * draft.config.model.max_size / draft.config.model.min_size)
        reason = (
            f"resnet18 of width 16, and a short side of {size}: a larger network would get fewer than {_TOO_FEW_EPOCHS} "
            f"epochs (here {epochs})"
        )
        smaller.add({"model": {**_SMALLER["model"], "max_size": longest}}, reason)
        _choose_rest(smaller, objects, machine, False, len(train_set))
        draft = smaller
        epochs, chosen = _time(draft, folder, train_set, val_set, machine, seconds_left)
    draft.add(*chosen)
    if "data" in chosen[0]:
        train_set = build_dataset(draft.config.data, "train", read=read)
    return Choice(draft.config, [*remarks, *draft.reasons], (train_set, val_set))


class _Draft:
    """A recipe in the making: what was chosen so far, under the user's overrides."""

    def __init__(self, data: dict[str, Any], overrides: Sequence[str]) -> None:
        self.recipe, self.overrides, self.reasons = recipe_of(data), overrides, []
        self.config = parse_config(self.recipe, overrides)

    def add(self, settings: Settings, reason: str) -> None:
        for section, values in settings.items():
            self.recipe[section] = {**self.recipe.get(section, {}), **values}
        self.config = parse_config(self.recipe, self.overrides)
        self.reasons.append(reason)


def _choose_rest(
    draft: _Draft, objects: Objects, machine: Machine, is_pretrained: bool, num_images: int
) -> None:
    """Choose what follows from the network and its size."""
    model = draft.config.model
    draft.add(*choose_anchors(objects, model.min_size, model.max_size))
    draft.add(*choose_regions(objects, machine))
    draft.add(*choose_augmentation(objects))
    draft.add(*choose_training(machine, is_pretrained, num_images))


def _time(
    draft: _Draft,
    folder: str | Path,
    train_set: DetectionDataset,
    val_set: DetectionDataset | None,
    machine: Machine,
    seconds_left: Callable[[], float | None],
) -> tuple[int, tuple[Settings, str]]:
    """The number of epochs, and the settings that follow from it."""
    pace = measure_pace(draft.config, train_set, machine.device).shared_by(machine.num_processes)
    epochs, used, (settings, reason) = choose_epochs(pace, len(train_set), len(val_set or ()), seconds_left())
    updates = epochs * max(1, used // (draft.config.train.batch_size * machine.num_processes))
    settings["train"]["warmup_steps"] = min(200, max(1, updates // 10))
    if used < len(train_set):
        rng = np.random.default_rng(tagged("pictures to train on", draft.config.train.seed))
        rows = np.sort(rng.permutation(len(train_set))[:used])
        listed = write_split(folder, train_set, {"drawn": rows}, draft.config.data.root)["drawn"]
        sources = draft.recipe["data"]["train"]
        settings["data"] = {"train": [{**source, "pictures": listed} for source in sources]}
        reason += f"; these pictures are drawn from {len(train_set)}, and {listed} lists them"
    return epochs, (settings, reason)
