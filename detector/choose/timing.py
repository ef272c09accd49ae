"""How long training and evaluation take on this machine, from a few batches, and the epochs that a budget allows."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from ..build import build_batches, build_model, build_training
from ..config import Config
from ..data.dataset import DetectionDataset
from ..engine import AMP_DTYPES, evaluate, train_one_epoch
from ..evaluate import Evaluation
from ..model.speed import apply_speed, optimize
from .rules import Rule

# Seconds of training to look at. The first half does not count: layers set themselves up for each new size of image.
_SECONDS, _MOST_UPDATES = 15, 200
# Without a budget a training sees so many pictures, and each of them within these bounds.
_PICTURES, _FEWEST, _MOST = 25_000, 12, 100
_MOST_IN_BUDGET = 200
# The part of a budget that start, evaluations' scores and drawings take.
_RESERVE = 0.05
_EVALUATIONS = 4


@dataclass(frozen=True)
class Pace:
    """Seconds an image of training, loading included, and of evaluation."""

    training: float
    evaluation: float

    def shared_by(self, num_processes: int) -> "Pace":
        return Pace(self.training / num_processes, self.evaluation / num_processes)


def measure_pace(config: Config, train_set: DetectionDataset, device: torch.device) -> Pace:
    """Train for some seconds and evaluate two batches, with random numbers of its own. Medians, since machines have other work."""
    options = config.train
    if config.model.backbone.get("norm") == "sync":
        # It would wait for the other processes, and one alone measures.
        alone = {"backbone": {**config.model.backbone, "norm": "batch"}}
        config = config.model_copy(update={"model": config.model.model_copy(update=alone)})
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = build_model(config.model, Config.num_classes(train_set.class_names)).to(device)
        apply_speed(model, config.speed)
        if device.type == "cpu":
            # As in a run.
            torch.set_flush_denormal(True)
        sample = train_set.subset(range(min(len(train_set), options.batch_size * _MOST_UPDATES)))
        _, batches, loader = build_batches(config, sample, device)
        marks: list[float] = []

        def on_step(losses: list[dict[str, float]], num_images: int) -> bool:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            marks.append(time.perf_counter())
            return marks[-1] - started > _SECONDS

        training = build_training(config, model, num_batches=len(batches), device=device)
        started = time.perf_counter()
        train_one_epoch(
            training,
            loader,
            device,
            num_batches=len(batches),
            seed=0,
            amp_dtype=AMP_DTYPES[options.amp],
            clip_norm=options.clip_norm,
            on_step=on_step,
            on_nonfinite=lambda error: None,
        )
        seconds = np.median(np.diff([started, *marks])[len(marks) // 2 :])
        return Pace(float(seconds) / options.batch_size, _time_evaluation(config, model, sample, device))


def _time_evaluation(
    config: Config, model: torch.nn.Module, sample: DetectionDataset, device: torch.device
) -> float:
    few = sample.subset(range(min(len(sample), 2 * config.train.batch_size)))
    loader, fast = Evaluation(few, config, device).loader, optimize(model, winograd=False)
    # The first run starts the workers.
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        evaluate(fast, loader, device, category_ids=few.category_ids, amp_dtype=AMP_DTYPES[config.train.amp])
        seconds.append((time.perf_counter() - started) / len(few))
    return min(seconds)


def choose_epochs(pace: Pace, num_train: int, num_val: int, seconds: float | None) -> tuple[int, int, Rule]:
    """The whole epochs that fit into `seconds` (None: no budget), the pictures of one, and the rule with both."""
    epoch, evaluation = num_train * pace.training, num_val * pace.evaluation
    if seconds is None:
        epochs = min(max(round(_PICTURES / num_train), _FEWEST), _MOST)
        left = epochs * epoch + _EVALUATIONS * evaluation
    else:
        left = (1 - _RESERVE) * seconds
        epochs = min(int((left - _EVALUATIONS * evaluation) / epoch), _MOST_IN_BUDGET)
    used = num_train
    if epochs < 1:
        # Not even one epoch: learn from a part of the pictures.
        epochs, used = 1, max(1, int((left - evaluation) / pace.training))
    every = max(1, -(-epochs // _EVALUATIONS))
    reason = (
        f"{epochs} epoch{'s' * (epochs != 1)} of {min(used, num_train)} pictures, at {1 / pace.training:.1f} images/s, take about "
        f"{(epochs * min(epoch, used * pace.training) + -(-epochs // every) * evaluation) / 60:.0f} minutes"
    )
    return epochs, min(used, num_train), ({"train": {"epochs": epochs, "eval_every": every}}, reason)
