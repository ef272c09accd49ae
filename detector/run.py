"""A run: a configuration -> built objects -> the engine's loops -> files in one folder."""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from backbones import Preprocessing

from .build import build_model
from .checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_training_state,
    parse_stored_config,
    save_checkpoint,
    save_training_state,
)
from .config import Config
from .curves import plot_curves
from .data import DetectionDataset, build_dataset
from .data.loader import EvalBatches, TrainBatches, TransformedDataset, build_loader
from .data.transforms import EvalTransform, TrainTransform
from .describe import describe
from .engine import (
    AMP_DTYPES,
    Training,
    build_ema,
    build_schedule,
    evaluate,
    parameter_groups,
    train_one_epoch,
)
from .evaluation import evaluate_coco, evaluate_voc
from .files import write_atomically, write_json
from .first_batch import save_first_batch
from .model.faster_rcnn import C4FasterRCNN
from .model.losses import LOSSES
from .model.speed import apply_speed, optimize
from .progress import Progress, memory_mb
from .run_log import RunLog
from .tables import format_duration
from .transfer import start_from

STATE = "training_state.pt"
BEST_METRICS = "best_metrics.json"


class Interrupted(Exception):
    """The run was asked to stop, and saved what it resumes from."""


def train(
    config: Config,
    output_dir: str | Path,
    device: torch.device,
    *,
    resume: bool = False,
    start_from_path: str | Path | None = None,
) -> dict[str, Any]:
    """Train as the configuration says; gives the best evaluation's metrics ({} without validation data).

    `output_dir` receives best.safetensors, last.safetensors, training_state.pt, config.yaml, metrics.jsonl,
    first_batch.jpg, curves.png. With `resume`, the run continues from training_state.pt where it stopped.
    `start_from_path` names a checkpoint whose weights the run starts from, as far as they fit; a resumed run has begun.
    """
    output_dir = Path(output_dir)
    state = load_training_state(output_dir / STATE) if resume else None
    start = None if start_from_path is None or resume else load_checkpoint(start_from_path)
    if not resume and (output_dir / STATE).exists():
        raise ValueError(
            f"{output_dir} holds a run already: continue it with --resume, or give another --output folder"
        )
    options, device_is_cuda = config.train, device.type == "cuda"
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # activations and moments that fade out would slow every product down
    train_set = build_dataset(config.data, "train")
    val_set = build_dataset(config.data, "val", train_set.class_names) if config.data.val else None
    if state is not None and tuple(state["class_names"]) != train_set.class_names:
        raise ValueError(
            f"{output_dir} was trained on classes {state['class_names']}, not {train_set.class_names}"
        )
    if not sum(train_set.box_counts().values()):
        raise ValueError("the training data have no box to learn")

    torch.manual_seed(options.seed)
    num_classes = Config.num_classes(train_set.class_names)
    model = build_model(config.model, num_classes, load_weights=state is None and start is None).to(device)
    apply_speed(model, config.speed)
    if state is not None and "preprocessing" in state:  # it belongs to the weights, wherever they came from
        model.transform.set_preprocessing(Preprocessing(**state["preprocessing"]))
    if start is not None:
        started = start_from(model, config.model, train_set.class_names, start)
        print(f"start from {start_from_path}", started.describe(), sep="\n", flush=True)
    batches = TrainBatches(
        train_set.aspect_ratios(), options.batch_size, options.seed, config.loader.group_by_aspect_ratio
    )
    transform = TrainTransform(augment=config.augment, **config.model.resizing)
    augmented = TransformedDataset(train_set, transform, options.seed)
    loader = build_loader(augmented, batches, config.loader.num_workers, pin_memory=device_is_cuda)
    val_loader = None if val_set is None else build_eval_loader(val_set, config, device)

    training = build_training(config, model, num_batches=len(batches), device=device)
    if state is not None:
        version = state.get("version", 1)
        check_resumable(parse_stored_config(state["config"], version, "the saved run's config"), config)
        training.load_state_dict(state)
    print(describe(config, model, train_set, val_set, device), flush=True)

    output_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_atomically(output_dir / "config.yaml", lambda path: path.write_text(text, encoding="utf-8"))
    with RunLog(output_dir) as log, _stop_on_signal() as asked_to_stop:
        log.truncate_after(training.step)
        if state is None:
            save_first_batch(output_dir / "first_batch.jpg", augmented, batches, train_set.class_names)
        while training.epoch < options.epochs and not _out_of_patience(training, config):
            finished = _train_epoch(training, config, batches, loader, device, log, asked_to_stop)
            last = training.epoch == options.epochs
            if finished and val_loader is not None and (training.epoch % options.eval_every == 0 or last):
                metrics = _validate(training, config, val_set, val_loader, device, log)
                _keep_best(training, config, metrics, output_dir, train_set)
            _save(training, config, output_dir, train_set)
            if finished:
                plot_curves(output_dir / "metrics.jsonl", output_dir / "curves.png")
            if asked_to_stop and not (finished and (last or _out_of_patience(training, config))):
                raise Interrupted(f"stopped after update {training.step}; continue with --resume")
        if training.epoch < options.epochs:
            print(
                f"no better {options.best_metric} in {options.patience} evaluations: stopping early",
                flush=True,
            )
    best = output_dir / BEST_METRICS
    return json.loads(best.read_text(encoding="utf-8")) if best.exists() else {}


# What may differ when a run is resumed; everything else would make it another run.
_FREE = ("eval_every", "patience", "log_every")


def check_resumable(saved: Config, config: Config) -> None:
    """Refuse to continue with another model or optimisation: the saved schedule and moments belong to theirs."""
    saved = saved.model_dump(mode="json")
    given = config.model_dump(mode="json")
    changed = [
        f"{section}.{key} was {saved[section].get(key)!r}, now {value!r}"
        for section in ("model", "train")
        for key, value in given[section].items()
        if key not in _FREE and saved[section].get(key) != value
    ]
    if changed:
        raise ValueError(f"--resume continues a run with its own settings; {'; '.join(changed)}")


def build_training(config: Config, model: C4FasterRCNN, num_batches: int, device: torch.device) -> Training:
    """Optimizer, schedule, scaler and averages around a model."""
    options = config.train
    groups = parameter_groups(model, options.weight_decay, options.norm_decay)
    fused = device.type in ("cpu", "cuda")
    if options.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            groups, lr=options.lr, momentum=options.momentum, fused=fused
        )
    else:
        optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=fused)
    updates = math.ceil(num_batches / options.accumulate)
    schedule = build_schedule(
        optimizer,
        updates * options.epochs,
        kind=options.schedule,
        milestones=[round(m * updates) for m in options.milestones],
        gamma=options.gamma,
        warmup_steps=options.warmup_steps,
        warmup_factor=options.warmup_factor,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    ema = None if options.ema is None else build_ema(model, options.ema)
    return Training(model, optimizer, schedule, scaler, ema)


def build_eval_loader(
    dataset: DetectionDataset, config: Config, device: torch.device
) -> torch.utils.data.DataLoader:
    transformed = TransformedDataset(dataset, EvalTransform(**config.model.resizing), seed=0)
    batches = EvalBatches(dataset.aspect_ratios(), config.loader.eval_batch_size)
    return build_loader(transformed, batches, config.loader.num_workers, pin_memory=device.type == "cuda")


def run_evaluation(
    model: C4FasterRCNN, dataset: DetectionDataset, config: Config, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Detections of a data set in COCO's results format, and mean losses, with progress."""
    loader = build_eval_loader(dataset, config, device)
    return _evaluate(model, dataset, loader, config, device, title="evaluate")


def score(dataset: DetectionDataset, results: list[dict[str, Any]]) -> dict[str, Any]:
    """COCO's twelve numbers with per-class AP, and VOC's AP of the same detections under "voc"."""
    ground_truth = dataset.to_coco()
    return {**evaluate_coco(ground_truth, results), "voc": evaluate_voc(ground_truth, results)}


def _train_epoch(
    training: Training,
    config: Config,
    batches: TrainBatches,
    loader: torch.utils.data.DataLoader,
    device: torch.device,
    log: RunLog,
    asked_to_stop: list[int],
) -> bool:
    options = config.train
    batches.set_epoch(training.epoch, training.batch)
    num_left = len(batches.tall) - training.batch * options.batch_size
    collected: list[dict[str, float]] = []
    logged = training.step
    title = f"epoch {training.epoch + 1}/{options.epochs}"
    with Progress(max(num_left, 1), title, epochs_left=options.epochs - training.epoch - 1) as progress:

        def write_line() -> None:
            nonlocal logged
            means = {name: float(np.mean([step[name] for step in collected])) for name in LOSSES}
            log.write(
                "train",
                epoch=training.epoch + 1,
                step=training.step,
                lr=training.optimizer.param_groups[0]["lr"],
                loss=sum(means.values()),
                **means,
                images_per_second=progress.images_per_second,
                memory_mb=memory_mb(),
            )
            collected.clear()
            logged = training.step

        def on_step(losses: list[dict[str, float]], num_images: int) -> bool:
            collected.extend(losses)
            lr = training.optimizer.param_groups[0]["lr"]
            newest = losses[-1] if losses else {}
            total = {"loss": sum(newest.values())} if newest else {}
            progress.update(num_images, **total, **newest, lr=lr)
            last = training.batch == len(batches) or asked_to_stop  # a short epoch has a line too
            if collected and (last or training.step - logged >= options.log_every):
                write_line()
            return bool(asked_to_stop)

        return train_one_epoch(
            training,
            loader,
            device,
            num_batches=len(batches),
            seed=options.seed,
            amp_dtype=AMP_DTYPES[options.amp],
            accumulate=options.accumulate,
            clip_norm=options.clip_norm,
            read_every=options.log_every,
            on_step=on_step,
        )


def _evaluate(
    model: C4FasterRCNN,
    dataset: DetectionDataset,
    loader: torch.utils.data.DataLoader,
    config: Config,
    device: torch.device,
    title: str,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    with Progress(len(dataset), title) as progress:
        return evaluate(
            optimize(model, winograd=False),
            loader,
            device,
            category_ids=dataset.category_ids.tolist(),
            seed=config.train.seed,
            amp_dtype=AMP_DTYPES[config.train.amp],
            on_step=progress.update,
        )


def _validate(
    training: Training,
    config: Config,
    dataset: DetectionDataset,
    loader: torch.utils.data.DataLoader,
    device: torch.device,
    log: RunLog,
) -> dict[str, Any]:
    started = time.perf_counter()
    title = f"validate {training.epoch}/{config.train.epochs}"
    results, losses = _evaluate(training.evaluated_model, dataset, loader, config, device, title)
    metrics = evaluate_coco(dataset.to_coco(), results)
    numbers = {name: value for name, value in metrics.items() if name != "per_class"}
    log.write("val", epoch=training.epoch, step=training.step, **numbers, **losses)
    shown = ", ".join(f"{name} {metrics[name] or 0:.3f}" for name in ("AP", "AP50", "AP75"))
    taken = format_duration(time.perf_counter() - started)
    print(f"{title}: {shown}, loss {losses['loss']:.3f} ({len(dataset)} images, {taken})", flush=True)
    return metrics | {"losses": losses, "epoch": training.epoch}


def _keep_best(
    training: Training, config: Config, metrics: dict[str, Any], output_dir: Path, dataset: DetectionDataset
) -> None:
    value = metrics[config.train.best_metric]
    if value is not None and value > training.best:
        training.best, training.evaluations_since_best = value, 0
        save_checkpoint(output_dir / "best.safetensors", _checkpoint(training, config, dataset, metrics))
        write_json(output_dir / BEST_METRICS, metrics, indent=2)
    else:
        training.evaluations_since_best += 1


def _out_of_patience(training: Training, config: Config) -> bool:
    patience = config.train.patience
    return patience is not None and training.evaluations_since_best >= patience


def _checkpoint(
    training: Training, config: Config, dataset: DetectionDataset, metrics: dict[str, Any] | None = None
) -> Checkpoint:
    model = training.evaluated_model
    return Checkpoint(
        model.state_dict(), config, dataset.class_names, model.transform.preprocessing, metrics or {}
    )


def _save(training: Training, config: Config, output_dir: Path, dataset: DetectionDataset) -> None:
    save_checkpoint(output_dir / "last.safetensors", _checkpoint(training, config, dataset))
    state = {
        **training.state_dict(),
        "class_names": list(dataset.class_names),
        "preprocessing": asdict(training.model.transform.preprocessing),
        "config": config.model_dump(mode="json"),
    }
    save_training_state(output_dir / STATE, state)


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """A list that fills when the user presses Ctrl-C or the process is told to end; a second Ctrl-C ends at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nstopping after this update; once more to stop at once", flush=True)

    # A signal that was ignored before, as in a background job, stays ignored.
    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
