"""A run of a detector: one training with its data, its state and its files in one folder."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbones import Preprocessing

from . import processes
from .build import build_batches, build_model
from .checkpoint import Checkpoint, load_checkpoint, parse_stored_config, save_checkpoint
from .config import Config
from .data.dataset import DetectionDataset
from .data.loader import Batch
from .data.sources import build_datasets
from .describe import describe, write_problems
from .doctor.check import quick_check
from .doctor.findings import format_findings
from .engine import DetectorTask
from .evaluate import Evaluation
from .evaluation.coco import evaluate_coco
from .inference import Detector
from .model.speed import apply_speed
from .resume import fingerprint
from .run_log import RunLog
from .sheets import save_found, save_sheet
from .tables import format_cell, format_duration
from .training_run import STATE, TrainingRun
from .transfer import start_from


class Run(TrainingRun):
    """A detector's training, new or resumed: `metrics = Run(config, folder, device).train()`.

    The folder receives best.safetensors, best_metrics.json, last.safetensors, training_state.pt and the one before it,
    config.yaml, metrics.jsonl, first_batch.jpg, curves.png, found.jpg, problems.txt if the data have any, tensorboard/ if
    TensorBoard is installed, and nonfinite/ if a loss is infinite or NaN.

    Args:
        resume: continue from training_state.pt where the run stopped.
        start_from_path: a checkpoint whose weights a new run starts from, as far as they fit. Not used by `resume`.
        datasets: the data of `config` to train and to validate on, where they are read already.

    ValueError: the folder holds a run already, the settings or the data changed since it stopped, or there are no
        boxes to learn.
    FileNotFoundError: there is nothing to resume from.
    """

    config: Config

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
        self._open(config, folder, device, resume)
        start = None if start_from_path is None or resume else load_checkpoint(start_from_path)
        self.train_set, self.val_set = datasets or build_datasets(config.data)
        self.class_names = self.train_set.class_names
        self.fingerprints = {"train": fingerprint(self.train_set), "val": fingerprint(self.val_set)}
        self._check_state()
        self.train_set.check_trainable()

        torch.manual_seed(config.train.seed)
        fresh = self.is_new and start is None
        model = build_model(config.model, Config.num_classes(self.class_names), load_weights=fresh).to(device)
        apply_speed(model, config.speed)
        # The preprocessing belongs to the weights, wherever they came from.
        if self.state is not None and "preprocessing" in self.state:
            model.transform.set_preprocessing(Preprocessing(**self.state["preprocessing"]))
        if start is not None:
            started = start_from(model, config.model, self.class_names, start)
            print(f"start from {start_from_path}", started.describe(), sep="\n", flush=True)

        self.augmented, batches, loader = build_batches(config, self.train_set, device)
        self.evaluation = None if self.val_set is None else Evaluation(self.val_set, config, device)
        self._start(model, DetectorTask(model), batches, loader)

    def _parse_saved(self, values: dict[str, Any], version: int) -> Config:
        return parse_stored_config(values, version, f"the config in {self.folder / STATE}")

    def _describe(self) -> None:
        config, train_set, val_set = self.config, self.train_set, self.val_set
        print(
            describe(config, self.training.model, train_set, val_set, self.batches, self.device), flush=True
        )
        findings = quick_check(train_set, val_set, config)
        if findings:
            title = "the data (tools/check_data.py looks closer):"
            print(title, format_findings(findings), sep="\n", flush=True)
        told = [f"{finding.severity}: {finding.what}" for finding in findings]
        write_problems(self.folder / "problems.txt", {"train": train_set, "val": val_set}, told)

    def _save_first_batch(self) -> None:
        self.batches.set_epoch(0)
        samples = (self.augmented[key] for key in next(iter(self.batches))[:8])
        save_sheet(self.folder / "first_batch.jpg", samples, self.class_names)

    def _save_sheet(self, path: Path, batch: Batch) -> None:
        save_sheet(path, zip(*batch, strict=True), self.class_names)

    def _pictures_of(self, batch: Batch) -> list[dict[str, Any]]:
        ids, paths = self.train_set.image_ids, self.train_set.image_paths
        return [
            {
                "file": str(paths[np.argmax(ids == target["image_id"])]),
                "image_id": target["image_id"],
                "boxes": target["boxes"].tolist(),
                "labels": target["labels"].tolist(),
            }
            for target in batch[1]
        ]

    def _watched(self, on_new: Callable[[str], object]) -> Iterator[Batch]:
        return self.unreadable.watch(self.loader, on_new)

    def _measure(self, title: str, log: RunLog) -> dict[str, Any]:
        started = time.perf_counter()
        results, losses = self.evaluation.run(self.training.evaluated_model, title)

        def score() -> dict[str, Any]:
            training, readable = self.training, self.evaluation.readable
            most = self.config.model.box_detections_per_img
            metrics = evaluate_coco(readable.to_coco(), results, detections_per_img=most)
            numbers = {name: value for name, value in metrics.items() if name != "per_class"}
            counted = {"left_out": len(readable.left_out)} if readable.left_out else {}
            log.write("val", epoch=training.epoch, step=training.step, **numbers, **losses, **counted)
            shown = ", ".join(f"{name} {format_cell(metrics[name])}" for name in ("AP", "AP50", "AP75"))
            left_out = f", {len(readable.left_out)} unreadable left out" if readable.left_out else ""
            best = f", best {most} detections of a class in each" if most > 100 else ""
            taken = (
                f"{len(readable)} images{left_out}{best}, {format_duration(time.perf_counter() - started)}"
            )
            print(f"{title}: {shown}, loss {losses['loss']:.3f} ({taken})", flush=True)
            return metrics | {"losses": losses}

        return processes.from_main(score)

    def _save_weights(self, path: Path, metrics: dict[str, Any]) -> None:
        state = self.training.evaluated_model.state_dict()
        save_checkpoint(path, Checkpoint(state, self.config, self.class_names, self.preprocessing, metrics))

    def _save_found(self) -> None:
        detector = Detector.load(self.folder / "best.safetensors", self.device)
        save_found(self.folder / "found.jpg", detector, self.val_set)
