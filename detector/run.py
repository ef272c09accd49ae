"""A run: one training with its data, its state and its files in one folder."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from backbones import Preprocessing

from . import processes
from .build import build_batches, build_model, build_training
from .checkpoint import (
    Checkpoint,
    load_checkpoint,
    newest_training_state,
    parse_stored_config,
    previous_state,
    save_checkpoint,
    save_training_state,
)
from .config import Config
from .curves import plot_curves
from .data.dataset import DetectionDataset
from .data.sources import build_datasets
from .data.unreadable import Unreadable
from .describe import describe, write_problems
from .doctor.check import quick_check
from .doctor.findings import format_findings
from .engine import AMP_DTYPES, train_one_epoch
from .evaluate import Evaluation
from .evaluation.coco import evaluate_coco
from .files import read_json, remove_temporaries, write_atomically, write_json
from .inference import Detector
from .lock import FolderLock
from .model.speed import apply_speed
from .nonfinite import NonFiniteGuard, check_weights
from .progress import Progress
from .resume import check_resumable, check_same_batches, check_same_data, fingerprint
from .run_log import RunLog, StepLog
from .sheets import save_first_batch, save_found
from .stop import Interrupted, StopSignal
from .tables import format_cell, format_duration
from .transfer import start_from

STATE = "training_state.pt"
BEST_METRICS = "best_metrics.json"


class Run:
    """A training that a configuration describes, new or resumed: `metrics = Run(config, folder, device).train()`.

    The folder receives best.safetensors, best_metrics.json, last.safetensors, training_state.pt and the one before it,
    config.yaml, metrics.jsonl, first_batch.jpg, curves.png, found.jpg, problems.txt if the data have any, tensorboard/ if
    TensorBoard is installed, and nonfinite/ if a loss is infinite or NaN. It is locked while the run trains.

    Several processes, within `processes.joined()`, train as one. The first one writes the files; the others read the
    state of a resumed run from the same folder.

    Args:
        resume: continue from training_state.pt where the run stopped.
        start_from_path: a checkpoint whose weights a new run starts from, as far as they fit. Not used by `resume`.
        datasets: the data of `config` to train and to validate on, where they are read already.

    ValueError: the folder holds a run already, the settings or the data changed since it stopped, or there are no
        boxes to learn.
    FileNotFoundError: there is nothing to resume from.
    """

    def __init__(
        self,
        config: Config,
        folder: str | Path,
        device: torch.device,
        *,
        resume: bool = False,
        start_from_path: str | Path | None = None,
        datasets: tuple[DetectionDataset, DetectionDataset | None] | None = None,
    ) -> None:
        self.config, self.folder, self.device = config, Path(folder), device
        state = newest_training_state(self.folder / STATE) if resume else refuse_old_run(self.folder)
        start = None if start_from_path is None or resume else load_checkpoint(start_from_path)
        if device.type == "cpu":
            # Activations and moments that fade out become denormal numbers, which would slow down every product.
            torch.set_flush_denormal(True)
        self.train_set, self.val_set = datasets or build_datasets(config.data)
        self._check_classes(state)
        names = self.train_set.class_names
        self.fingerprints = {"train": fingerprint(self.train_set), "val": fingerprint(self.val_set)}
        if state is not None:
            version = state.get("version", 1)
            source = f"the config in {self.folder / STATE}"
            saved = parse_stored_config(state["config"], version, source)
            check_resumable(saved, config)
            # Earlier states are of one process.
            images = config.train.batch_size * processes.world_size()
            check_same_batches(state.get("batch_images") or saved.train.batch_size, images)
            check_same_data(state.get("data", {}), self.fingerprints)

        torch.manual_seed(config.train.seed)
        fresh = state is None and start is None
        model = build_model(config.model, Config.num_classes(names), load_weights=fresh).to(device)
        apply_speed(model, config.speed)
        # The preprocessing belongs to the weights, wherever they came from.
        if state is not None and "preprocessing" in state:
            model.transform.set_preprocessing(Preprocessing(**state["preprocessing"]))
        if start is not None:
            started = start_from(model, config.model, names, start)
            print(f"start from {start_from_path}", started.describe(), sep="\n", flush=True)

        self.augmented, self.batches, self.loader = build_batches(config, self.train_set, device)
        self.unreadable = Unreadable(len(self.train_set), "replaced by another")
        self.evaluation = None if self.val_set is None else Evaluation(self.val_set, config, device)
        self.training = build_training(config, model, num_batches=len(self.batches), device=device)
        self.is_new = state is None
        if state is not None:
            try:
                self.training.load_state_dict(state)
            except ValueError as error:
                raise ValueError(f"{self.folder / STATE}: {error}") from error
        self.saved_at, self.saved_step = time.monotonic(), self.training.step
        self.guard = NonFiniteGuard(self.training, self.folder / "nonfinite", self.train_set, config.train)

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
        with FolderLock(self.folder):
            if self.is_new:
                # Another process may have trained here since this run was made.
                refuse_old_run(self.folder)
            remove_temporaries(self.folder)
            self._describe()
            owed = training.awaits_evaluation
            with (
                RunLog(self.folder, after_step=training.step, awaits_evaluation=owed) as log,
                StopSignal() as stop,
            ):
                if self.is_new:
                    names = self.train_set.class_names
                    save_first_batch(self.folder / "first_batch.jpg", self.augmented, self.batches, names)
                    self._save_state()
                self._train(log, stop)
        if training.epoch < options.epochs:
            unimproved = f"no better {options.best_metric} in {options.patience} evaluations"
            print(f"{unimproved}: stopping early", flush=True)
        best = self.folder / BEST_METRICS
        if not best.exists():
            return {}
        detector = Detector.load(self.folder / "best.safetensors", self.device)
        save_found(self.folder / "found.jpg", detector, self.val_set)
        return read_json(best)

    def _describe(self) -> None:
        """Say what the run is about to do, and write it down."""
        config, train_set, val_set = self.config, self.train_set, self.val_set
        print(
            describe(config, self.training.model, train_set, val_set, self.batches, self.device), flush=True
        )
        if findings := quick_check(train_set, val_set, config):
            title = "the data (tools/check_data.py looks closer):"
            print(title, format_findings(findings), sep="\n", flush=True)
        self._write_config()
        write_problems(self.folder / "problems.txt", {"train": train_set, "val": val_set})

    def _train(self, log: RunLog, stop: StopSignal) -> None:
        training = self.training
        # A run that stopped before or during an evaluation owes it.
        self._evaluate(log, stop)
        while not self.is_done:
            finished = self.epoch(log, stop)
            self.save()
            # All processes wait for the save here, since torchrun ends them when one of them ends.
            if stop.is_agreed() and not (finished and training.epoch == self.config.train.epochs):
                raise self._interrupted()
            self._evaluate(log, stop)
            if processes.is_main():
                plot_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")

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

    @property
    def is_evaluation_due(self) -> bool:
        epoch, options = self.training.epoch, self.config.train
        due = epoch % options.eval_every == 0 or epoch == options.epochs
        return due and self.evaluation is not None

    def epoch(self, log: RunLog, stop: StopSignal) -> bool:
        """Train on the rest of an epoch, or until `stop` is asked for. Returns whether the epoch was finished.

        Before an error ends it, the state of the last whole update is saved.
        """
        try:
            finished = self._train_epoch(log, stop)
        # A picture that cannot be read, a worker that was killed, a second Ctrl-C.
        except BaseException as error:
            self._save_last_update(error)
            if stop.asked and "DataLoader worker" in str(error):
                # The signal reached the workers too.
                raise self._interrupted() from None
            raise
        self.training.awaits_evaluation = finished and self.is_evaluation_due
        return finished

    def _train_epoch(self, log: RunLog, stop: StopSignal) -> bool:
        training, options = self.training, self.config.train
        self.batches.set_epoch(training.epoch, training.batch)
        num_left = max(1, len(self.train_set) - training.batch * self.batches.batch_size)
        title = f"epoch {training.epoch + 1}/{options.epochs}"
        epochs_left = options.epochs - training.epoch - 1

        def on_unreadable(sentence: str) -> None:
            log.write("unreadable", epoch=training.epoch + 1, step=training.step, message=sentence)

        with Progress(num_left, title, epochs_left=epochs_left) as progress:
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
                self.unreadable.watch(self.loader, on_unreadable),
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
        return finished

    def validate(self, log: RunLog) -> dict[str, Any]:
        """Evaluate on the validation data: COCO's metrics, with "losses" and "epoch"."""
        started, training = time.perf_counter(), self.training
        title = f"validate {training.epoch}/{self.config.train.epochs}"
        results, losses = self.evaluation.run(training.evaluated_model, title)
        metrics = processes.from_main(lambda: self._score(log, title, results, losses, started))
        return metrics | {"epoch": training.epoch}

    def _score(
        self,
        log: RunLog,
        title: str,
        results: list[dict[str, Any]],
        losses: dict[str, float],
        started: float,
    ) -> dict[str, Any]:
        """The metrics of detections, logged and printed."""
        training, readable = self.training, self.evaluation.readable
        metrics = evaluate_coco(readable.to_coco(), results)
        numbers = {name: value for name, value in metrics.items() if name != "per_class"}
        counted = {"left_out": len(readable.left_out)} if readable.left_out else {}
        log.write("val", epoch=training.epoch, step=training.step, **numbers, **losses, **counted)
        shown = ", ".join(f"{name} {format_cell(metrics[name])}" for name in ("AP", "AP50", "AP75"))
        left_out = f", {len(readable.left_out)} unreadable left out" if readable.left_out else ""
        taken = f"{len(readable)} images{left_out}, {format_duration(time.perf_counter() - started)}"
        print(f"{title}: {shown}, loss {losses['loss']:.3f} ({taken})", flush=True)
        return metrics | {"losses": losses}

    def keep_best(self, metrics: dict[str, Any]) -> None:
        """Save the weights as best.safetensors if `best_metric` is better than before.

        Without a box to measure by, the newest are the best. Weights whose validation loss is not finite are never.
        """
        training, metric = self.training, self.config.train.best_metric
        value, is_finite = metrics[metric], math.isfinite(metrics["losses"]["loss"])
        if value is None:
            print(
                f"{metric} is -: no box to measure it by. best.safetensors holds the newest weights",
                flush=True,
            )
        if not is_finite:
            print("the validation loss is not finite: best.safetensors stays as it is", flush=True)
        if is_finite and (value is None or value > training.best):
            training.best = training.best if value is None else value
            training.evaluations_since_best = 0
            if processes.is_main():
                save_checkpoint(self.folder / "best.safetensors", self._checkpoint(metrics))
                write_json(self.folder / BEST_METRICS, metrics, indent=2)
        else:
            training.evaluations_since_best += 1

    def save(self) -> None:
        """Write the newest weights, and the state that the run resumes from. The first process writes.

        FloatingPointError: a weight is infinite, NaN or about to overflow, and nothing is written.
        """
        if processes.is_main():
            check_weights(self.training, self.config.train)
            save_checkpoint(self.folder / "last.safetensors", self._checkpoint({}))
        self._save_state()

    def _save_state(self) -> None:
        if processes.is_main():
            state = {
                **self.training.state_dict(),
                "class_names": list(self.train_set.class_names),
                "preprocessing": asdict(self.training.model.transform.preprocessing),
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

    def _checkpoint(self, metrics: dict[str, Any]) -> Checkpoint:
        model = self.training.evaluated_model
        names, preprocessing = self.train_set.class_names, model.transform.preprocessing
        return Checkpoint(model.state_dict(), self.config, names, preprocessing, metrics)

    def _check_classes(self, state: dict[str, Any] | None) -> None:
        dataset = self.train_set
        if state is not None and tuple(state["class_names"]) != dataset.class_names:
            raise ValueError(
                f"{self.folder} was trained on classes {state['class_names']}, not {dataset.class_names}"
            )
        if not sum(dataset.box_counts().values()):
            raise ValueError("the training data have no box to learn")

    def _write_config(self) -> None:
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        write_atomically(self.folder / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))


def refuse_old_run(folder: str | Path) -> None:
    """Raise a ValueError if the folder holds a run that made an update."""
    path = Path(folder) / STATE
    # A run that failed before its first update may be started again, with other settings too.
    if (path.exists() or previous_state(path).exists()) and newest_training_state(path)["step"]:
        raise ValueError(
            f"{folder} holds a run already: continue it with --resume, or give another --output folder"
        )
