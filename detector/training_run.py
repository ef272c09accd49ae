"""A training with its state and its files in one folder. What is trained, and on what, the subclasses say."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

from backbones import Preprocessing

from . import processes
from .build import build_training
from .checkpoint import newest_training_state, previous_state, save_training_state
from .curves import plot_curves
from .data.loader import TrainBatches
from .data.unreadable import Unreadable
from .engine import AMP_DTYPES, Task, train_one_epoch
from .files import read_json, remove_temporaries, write_atomically, write_json
from .lock import FolderLock
from .nonfinite import NonFiniteGuard, check_weights
from .progress import Progress
from .resume import check_resumable, check_same_batches, check_same_data
from .run_log import RunLog, StepLog
from .settings import Section
from .stop import Interrupted, StopSignal

STATE = "training_state.pt"
BEST_METRICS = "best_metrics.json"
# Seconds between the saves, and between the drawings of curves, at the ends of short epochs.
_SAVE_EVERY, _PLOT_EVERY = 10, 60


class TrainingRun(ABC):
    """A training that a configuration describes, new or resumed, in a folder that is locked while it trains.

    A resumed one locks the folder before it reads the state, until the end of its training.

    Several processes, within `processes.joined()`, train as one. The first one writes the files; the others read the
    state of a resumed run from the same folder.

    A subclass's constructor calls `_open`, sets the pictures of each split, class_names and the fingerprints, and calls
    `_check_state` and then `_start`. state: what the run resumes from, until `_start`. config: has a section `train`.
    epoch_seconds: what an epoch took so far, with its evaluation and its files; None before one is done.
    """

    config: Any
    folder: Path
    device: torch.device
    state: dict[str, Any] | None
    train_set: Any
    val_set: Any
    class_names: tuple[str, ...]
    fingerprints: dict[str, dict[str, Any] | None]
    epoch_seconds: float | None = None

    def _open(self, config: Section, folder: str | Path, device: torch.device, resume: bool) -> None:
        """Read the state to resume, or see that the folder is free. A resumed run holds the folder's lock from here on.

        FileNotFoundError: there is nothing to resume from. ValueError: a state is damaged, the folder holds a run, or
        another process trains in it.
        """
        self.config, self.folder, self.device = config, Path(folder), device
        self.lock = ExitStack()
        if resume and processes.is_main() and self.folder.is_dir():
            # Another process could go on from a state that is read before.
            self.lock.enter_context(FolderLock(self.folder))
        # The others wait for the lock, and then read the same state.
        processes.any_of(False)
        self.state = newest_training_state(self.folder / STATE) if resume else refuse_old_run(self.folder)
        self.is_new = self.state is None
        if device.type == "cpu":
            # Activations and moments that fade out become denormal numbers, which would slow down every product.
            torch.set_flush_denormal(True)

    def _check_state(self) -> None:
        """Check that the state is of this recipe and these data. ValueError: it is not."""
        if (state := self.state) is None:
            return
        if tuple(state["class_names"]) != self.class_names:
            raise ValueError(
                f"{self.folder} was trained on classes {state['class_names']}, not {self.class_names}"
            )
        saved = self._parse_saved(state["config"], state.get("version", 1))
        check_resumable(saved, self.config)
        # Earlier states are of one process.
        images = self.config.train.batch_size * processes.world_size()
        check_same_batches(state.get("batch_images") or saved.train.batch_size, images)
        check_same_data(state.get("data", {}), self.fingerprints)

    def _start(self, model: nn.Module, task: Task, batches: TrainBatches, loader: DataLoader) -> None:
        """Build the training of a model, and bring it to where the state was saved."""
        self.batches, self.loader = batches, loader
        self.unreadable = Unreadable(len(self.train_set), "replaced by another")
        self.training = build_training(
            self.config, model, num_batches=len(batches), device=self.device, task=task
        )
        if self.state is not None:
            try:
                self.training.load_state_dict(self.state)
            except ValueError as error:
                raise ValueError(f"{self.folder / STATE}: {error}") from error
        self.state = None
        self.saved_at, self.saved_step = time.monotonic(), self.training.step
        self.guard = NonFiniteGuard(
            self.training,
            self.folder / "nonfinite",
            self.config.train,
            self._pictures_of,
            self._save_sheet,
        )

    # What a subclass says

    @property
    def preprocessing(self) -> Preprocessing:
        """What the weights expect of a picture."""
        return self.training.model.preprocessing

    @abstractmethod
    def _parse_saved(self, values: dict[str, Any], version: int) -> Any:
        """The configuration that a state of this version holds."""

    @abstractmethod
    def _describe(self) -> None:
        """Say what the run is about to do, and write down what the data lack."""

    @abstractmethod
    def _save_first_batch(self) -> None:
        """Save a picture of the first batch."""

    @abstractmethod
    def _measure(self, title: str, log: RunLog) -> dict[str, Any]:
        """Evaluate: metrics, with "losses". They are logged and printed under `title`."""

    @abstractmethod
    def _save_weights(self, path: Path, metrics: dict[str, Any]) -> None:
        """Write the evaluated weights with all that they need."""

    @abstractmethod
    def _save_sheet(self, path: Path, batch: Any) -> None:
        """Save the pictures of a batch as one picture."""

    @abstractmethod
    def _pictures_of(self, batch: Any) -> list[dict[str, Any]]:
        """What is known of each picture of a batch, with its "file"."""

    @abstractmethod
    def _save_found(self) -> None:
        """Save pictures of what the best weights find."""

    @abstractmethod
    def _watched(self, on_new: Callable[[str], object]) -> Iterator[Any]:
        """The batches of the loader, whose unreadable pictures are counted. on_new: called with each new sentence."""

    # The run

    def train(self) -> dict[str, Any]:
        """Train the epochs that are left. Returns the best evaluation's metrics, or {} without validation data and
        in the processes after the first.

        Interrupted: the run was asked to stop, and has saved its state. ValueError: another process trains in the folder.
        FloatingPointError: losses, gradients or weights became infinite or NaN. The last good state stays.
        OSError: a file cannot be written. What was there stays.
        """
        training, options = self.training, self.config.train
        if not processes.is_main():
            with StopSignal() as stop:
                self._train(RunLog(None), stop)
            return {}
        with self.lock:
            self.lock.enter_context(FolderLock(self.folder))
            if self.is_new:
                # Another process may have trained here since this run was made.
                refuse_old_run(self.folder)
            remove_temporaries(self.folder)
            self._describe()
            text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
            write_atomically(
                self.folder / "config.yaml", lambda path: path.write_text(text, encoding="utf-8")
            )
            owed = training.awaits_evaluation
            with (
                RunLog(self.folder, after_step=training.step, awaits_evaluation=owed) as log,
                StopSignal() as stop,
            ):
                if self.is_new:
                    self._save_first_batch()
                    self._save_state()
                self._train(log, stop)
        if training.epoch < options.epochs:
            unimproved = f"no better {options.best_metric} in {options.patience} evaluations"
            print(f"{unimproved}: stopping early", flush=True)
        best = self.folder / BEST_METRICS
        if not best.exists():
            return {}
        self._save_found()
        return read_json(best)

    def _train(self, log: RunLog, stop: StopSignal) -> None:
        training, drawn_at = self.training, -math.inf

        def note_unreadable(sentence: str) -> None:
            log.write("unreadable", epoch=training.epoch + 1, step=training.step, message=sentence)

        begun, first_epoch = time.monotonic(), training.epoch
        # The loader goes on from epoch to epoch, so that none begins with a wait.
        self.batches.set_epoch(training.epoch, training.batch, until=self.config.train.epochs)
        source = self._watched(note_unreadable)
        # A run that stopped before or during an evaluation owes it.
        self._evaluate(log, stop)
        while not self.is_done:
            num_done = training.epoch - first_epoch
            self.epoch_seconds = (time.monotonic() - begun) / num_done if num_done else None
            finished = self.epoch(source, log, stop)
            is_old = time.monotonic() - self.saved_at >= _SAVE_EVERY
            if is_old or training.awaits_evaluation or self.is_done:
                self.save()
            if stop.is_agreed() and not (finished and training.epoch == self.config.train.epochs):
                if self.saved_step != training.step:
                    self.save()
                # All processes wait for the save here, since torchrun ends them when one of them ends.
                stop.is_agreed()
                raise self._interrupted()
            self._evaluate(log, stop)
            if processes.is_main() and (self.is_done or time.monotonic() - drawn_at >= _PLOT_EVERY):
                plot_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
                drawn_at = time.monotonic()

    def _evaluate(self, log: RunLog, stop: StopSignal) -> None:
        """Evaluate if the last epoch awaits it, and keep the weights if they are the best."""
        if not self.training.awaits_evaluation:
            return
        with stop.at_once():
            metrics = self.validate(log)
        self.keep_best(metrics)
        self.training.awaits_evaluation = False
        self._save_state()

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done, or the metric has not improved for as long as `patience` allows."""
        training, options = self.training, self.config.train
        is_stale = options.patience is not None and training.evaluations_since_best >= options.patience
        return is_stale or training.epoch == options.epochs

    def epoch(self, source: Iterator[Any], log: RunLog, stop: StopSignal) -> bool:
        """Train on the rest of an epoch, or until `stop` is asked for. Returns whether the epoch was finished.

        source: the batches of the rest of the run.

        Before an error ends it, the state of the last whole update is saved.
        """
        try:
            finished = self._train_epoch(source, log, stop)
        # A picture that cannot be read, a worker that was killed, a second Ctrl-C.
        except BaseException as error:
            self._save_last_update(error)
            if stop.asked and "DataLoader worker" in str(error):
                # The signal reached the workers too.
                raise self._interrupted() from None
            raise
        epoch, options = self.training.epoch, self.config.train
        is_due = epoch % options.eval_every == 0 or epoch == options.epochs
        self.training.awaits_evaluation = finished and is_due and bool(self.val_set)
        return finished

    def _train_epoch(self, source: Iterator[Any], log: RunLog, stop: StopSignal) -> bool:
        training, options = self.training, self.config.train
        num_left = max(1, len(self.train_set) - training.batch * self.batches.batch_size)
        title = f"epoch {training.epoch + 1}/{options.epochs}"
        left = {"epochs_left": options.epochs - training.epoch - 1, "epoch_seconds": self.epoch_seconds}

        with Progress(num_left, title, **left) as progress:
            steps = StepLog(log, progress, training, options.log_every)

            def on_step(losses: list[dict[str, float]], num_images: int) -> bool:
                # The last batch writes a line, so that an epoch shorter than log_every has one too.
                is_update = training.batch % options.accumulate == 0
                stops = is_update and stop.is_agreed()
                num_images *= processes.world_size()
                steps.add(losses, num_images, last=stops or training.batch == len(self.batches))
                self.guard.watch(losses)
                if is_update and time.monotonic() - self.saved_at >= options.save_every * 60:
                    self.save()
                return stops

            finished = train_one_epoch(
                training,
                islice(source, len(self.batches) - training.batch),
                self.device,
                num_batches=len(self.batches),
                seed=options.seed,
                amp_dtype=AMP_DTYPES[options.amp],
                accumulate=options.accumulate,
                clip_norm=options.clip_norm,
                read_every=options.log_every,
                on_step=on_step,
                on_nonfinite=self.guard,
            )
        self.unreadable.collect()
        self.unreadable.begin()
        return finished

    def validate(self, log: RunLog) -> dict[str, Any]:
        """Evaluate on the validation data: metrics, with "losses" and "epoch"."""
        epoch = self.training.epoch
        return self._measure(f"validate {epoch}/{self.config.train.epochs}", log) | {"epoch": epoch}

    def keep_best(self, metrics: dict[str, Any]) -> None:
        """Save the weights as best.safetensors if `best_metric` is better than before.

        Without anything to measure by, the newest are the best. Weights whose validation loss is not finite are never.
        """
        training, metric = self.training, self.config.train.best_metric
        value, is_finite = metrics[metric], math.isfinite(metrics["losses"]["loss"])
        if value is None:
            print(
                f"{metric} is -: nothing to measure it by. best.safetensors holds the newest weights",
                flush=True,
            )
        if not is_finite:
            print("the validation loss is not finite: best.safetensors stays as it is", flush=True)
        if is_finite and (value is None or value > training.best):
            training.best = training.best if value is None else value
            training.evaluations_since_best = 0
            if processes.is_main():
                self._save_weights(self.folder / "best.safetensors", metrics)
                write_json(self.folder / BEST_METRICS, metrics, indent=2)
        else:
            training.evaluations_since_best += 1

    def save(self) -> None:
        """Write the newest weights, and the state that the run resumes from. The first process writes.

        FloatingPointError: a weight is infinite, NaN or about to overflow, and nothing is written.
        """
        if processes.is_main():
            check_weights(self.training, self.config.train)
            self._save_weights(self.folder / "last.safetensors", {})
        self._save_state()

    def _save_state(self) -> None:
        if processes.is_main():
            state = {
                **self.training.state_dict(),
                "class_names": list(self.class_names),
                "preprocessing": asdict(self.preprocessing),
                "config": self.config.model_dump(mode="json"),
                "data": self.fingerprints,
                "batch_images": self.batches.batch_size,
            }
            save_training_state(self.folder / STATE, state)
        self.saved_at, self.saved_step = time.monotonic(), self.training.step

    def _save_last_update(self, error: BaseException) -> None:
        """Save the state of the last whole update, before an error ends the run."""
        training = self.training
        # Where numbers overflow, weights were far off before. The state on the disk is older.
        if isinstance(error, FloatingPointError) or not training.rewind() or training.step == self.saved_step:
            return
        try:
            self.save()
            print(f"\nsaved the state of update {training.step}; --resume goes on from there", flush=True)
        except Exception as failed:
            print(f"\nthe state of update {training.step} is not saved: {failed}", flush=True)

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"stopped after update {self.saved_step}; continue with --resume")


def refuse_old_run(folder: str | Path) -> None:
    """Raise a ValueError if the folder holds a run that made an update."""
    path = Path(folder) / STATE
    # A run that failed before its first update may be started again, with other settings too.
    if (path.exists() or previous_state(path).exists()) and newest_training_state(path)["step"]:
        raise ValueError(
            f"{folder} holds a run already: continue it with --resume, or give another --output folder"
        )
