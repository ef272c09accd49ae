"""The training of a small classifier as a job of an experiment."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from backbones.recompute import run_blocks
from backbones.summary import count_parameters
from backbones.weights import read_state_dict
from detector.classify.classifier import Classifier, evaluate_classifier
from detector.classify.config import ClassifierConfig
from detector.classify.run import ClassifierRun
from detector.classify.samples import Samples
from detector.data.loader import EvalBatches
from detector.run_log import RunLog, read_log
from detector.training_run import TrainingRun

from ..memory import forget_peak, peak_mb
from .experiment import Result

CPU = torch.device("cpu")
# The training error is that of so many pictures.
MEASURED = 2000
TIMED_STEPS = 3
# Evaluation and the files of a run take this share of the steps' time.
OVERHEAD = 0.25
# A run writes nothing before it trains, so no run has this folder.
UNTRAINED = Path("untrained")


class MeasuredRun(ClassifierRun):
    """A classifier's run that logs the training pictures' top-1 too, without augmentation, as `train_top1`."""

    def _measure(self, title: str, log: RunLog) -> dict[str, Any]:
        count = min(len(self.train_set), MEASURED)
        batches = EvalBatches(np.ones(count), self.config.loader.eval_batch_size)
        top1 = self.top1(
            self.training.evaluated_model,
            self._load(Samples(self.train_set, self.config.model.size), batches),
        )
        log.write("val", epoch=self.training.epoch, step=self.training.step, train_top1=top1)
        return super()._measure(title, log)

    def top1(self, model: Classifier, loader: Any) -> float:
        measures, _ = evaluate_classifier(model, loader, len(self.class_names), self.device)
        return measures.summary(self.class_names)["top1"]

    def test_error(self, network: nn.Module) -> float:
        """The error of a network in place of the trained one."""
        model = Classifier(network, len(self.class_names), self.preprocessing)
        return 1 - self.top1(model, self.val_loader)

    def some_pictures(self, count: int = 32) -> tuple[Tensor, Tensor]:
        """Normalised training pictures (count, 3, h, w) and their labels (count,), always the same ones."""
        chosen = np.random.default_rng(0).permutation(len(self.train_set))[:count]
        images, labels = (torch.from_numpy(a[chosen]) for a in (self.train_set.images, self.train_set.labels))
        return self.training.model.normalize(images), labels


@dataclass(frozen=True)
class ClassifierJob:
    """Train a classifier on pictures in memory, and look into it.

    looks: called with the finished run, whose network has its last weights; each adds its findings to the result.
    noise: standard deviation of the noise that is added to all pictures, in grey levels.
    last_norm: the first weights of the network's last batch norm.
    """

    config: ClassifierConfig
    looks: tuple[Callable[[MeasuredRun], Result], ...] = ()
    checkpointing: bool = False
    noise: float = 0.0
    last_norm: float = 1.0

    def __call__(self, folder: Path) -> Result:
        forget_peak("cpu")
        run = self.open(folder)
        seconds = train_timed(run)
        if self.checkpointing:
            del run.training.model.network.forward
        run.training.model.load_weights(read_state_dict(folder / "last.safetensors"))
        found = {
            "parameters": count_parameters(run.training.model),
            "seconds_per_step": seconds,
            "peak_mb": None if seconds is None else peak_mb("cpu"),
            "curve": read_curve(folder),
        }
        for look in self.looks:
            found |= look(run)
        return found

    def open(self, folder: Path) -> MeasuredRun:
        resume = has_state(folder)
        run = MeasuredRun(self.config, folder, CPU, resume=resume)
        network = run.training.model.network
        if self.checkpointing:
            network.forward = lambda images: run_blocks(network, images, True)
        if self.noise:
            for seed, pictures in enumerate((run.train_set, run.val_set)):
                add_noise(pictures.images, self.noise, seed)
        if self.last_norm != 1 and not resume:
            norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
            nn.init.constant_(norms[-1].weight, self.last_norm)
        return run

    def seconds(self) -> float:
        run = self.open(UNTRAINED)
        return (1 + OVERHEAD) * seconds_per_step(run) * len(run.batches) * self.config.train.epochs


def has_state(folder: Path) -> bool:
    return any(folder.glob("training_state*.pt"))


def train_timed(run: TrainingRun) -> float | None:
    """Train to the end. Returns the CPU seconds a step, of the steps that were left; None where there were none."""
    step, began = run.training.step, time.process_time()
    train_in_silence(run)
    steps = run.training.step - step
    return (time.process_time() - began) / steps if steps else None


def train_in_silence(run: TrainingRun) -> dict[str, Any]:
    """Train to the end, without the picture of the curves, which takes longer than a short epoch."""
    with patch("detector.training_run.plot_curves"):
        return run.train()


def seconds_per_step(run: TrainingRun) -> float:
    """CPU seconds of a training step: the mean of some after the first, or the first where an epoch has no other."""
    training, began = run.training, time.process_time()
    run.batches.set_epoch(0)
    for number, batch in enumerate(islice(run.loader, 1 + TIMED_STEPS)):
        if number == 1:
            began = time.process_time()
        sum(training.task(training.model, batch, run.device, (0, 0, number)).values()).backward()
    return (time.process_time() - began) / max(1, number)


def add_noise(images: np.ndarray, deviation: float, seed: int) -> None:
    """Add normal noise to uint8 pictures in place."""
    rng = np.random.default_rng(seed)
    for image in images:
        noisy = image + rng.normal(0, deviation, image.shape)
        image[...] = np.clip(np.round(noisy), 0, 255)


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Training and test error at each evaluation of a run: step, train_error, test_error."""
    points: dict[int, dict[str, float]] = {}
    for line in read_log(folder / "metrics.jsonl"):
        for key, name in (("train_top1", "train_error"), ("top1", "test_error")):
            if key in line:
                points.setdefault(line["step"], {"step": line["step"]})[name] = 1 - line[key]
    return list(points.values())
