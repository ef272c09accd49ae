"""A run of a classifier: one training with its data, its state and its files in one folder."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from backbones import Preprocessing
from backbones.summary import count_parameters, multiply_accumulates
from backbones.weights import read_state_dict

from .. import processes
from ..config import parse_config
from ..data.loader import EvalBatches, TrainBatches, build_loader
from ..data.tolerance import first_few
from ..data.unreadable import Unreadable
from ..describe import training_lines
from ..engine import AMP_DTYPES
from ..files import save_tensors
from ..progress import Progress
from ..run_log import RunLog
from ..sheets import save_tiles
from ..tables import format_cell, format_count, format_duration, format_table
from ..training_run import STATE, TrainingRun
from ..visualize import draw_boxes
from .classifier import ClassifierTask, build_classifier, evaluate_classifier
from .config import ClassifierConfig
from .pictures import Pictures, measure_preprocessing
from .samples import LabelledBatch, Samples, whole_batch

FORMAT = "classifier"
_SHOWN, _COLUMNS, _SIDE = 32, 8, 144
# Mistakes are looked for among so many validation pictures.
_LOOKED_AT = 2000


class ClassifierRun(TrainingRun):
    """A classifier's training, new or resumed: `metrics = ClassifierRun(config, folder, device).train()`.

    The folder receives the files of a detector's run; found.jpg holds the surest mistakes. best.safetensors and
    last.safetensors are weights for `weights:` of a detector's recipe.

    ValueError: the folder holds a run already, or the settings or the data changed since it stopped.
    FileNotFoundError: there is nothing to resume from.
    """

    config: ClassifierConfig

    def __init__(
        self, config: ClassifierConfig, folder: str | Path, device: torch.device, *, resume: bool = False
    ) -> None:
        self._open(config, folder, device, resume)
        self.train_set = config.data.load("train")
        self.class_names = tuple(self.train_set.class_names)
        self.val_set = config.data.load("val", self.class_names)
        self.fingerprints = {"train": _fingerprint(self.train_set), "val": _fingerprint(self.val_set)}
        self._check_state()
        torch.manual_seed(config.train.seed)
        model = build_classifier(
            config.model.backbone,
            len(self.class_names),
            self._preprocessing(),
            load_weights=self.is_new,
        ).to(device)
        # The batch norms of a last map of one position need two pictures.
        batches = TrainBatches(
            np.ones(len(self.train_set)), config.train.batch_size, config.train.seed, group=False, least=2
        )
        fill = mean_color(model.preprocessing)
        samples = Samples(self.train_set, config.model.size, config.augment, config.train.seed, fill)
        self.val_loader = self._load(
            Samples(self.val_set, config.model.size),
            EvalBatches(np.ones(len(self.val_set)), config.loader.eval_batch_size),
        )
        self.unreadable_val = Unreadable(len(self.val_set), "left out")
        task = ClassifierTask(config.train.label_smoothing)
        self._start(model, task, batches, self._load(samples, batches))

    def _preprocessing(self) -> Preprocessing | None:
        """That of the saved run, or of the pictures; None where weights will bring theirs."""
        if self.is_new and self.config.model.backbone.get("weights") is not None:
            return None
        saved = None if self.state is None else self.state.get("preprocessing")
        return Preprocessing(**saved) if saved else measure_preprocessing(self.train_set)

    def _load(self, samples: Samples, batches: Any) -> DataLoader:
        pinned = self.device.type == "cuda"
        return build_loader(samples, batches, self.config.loader.num_workers, pinned, collate=whole_batch)

    def _parse_saved(self, values: dict[str, Any], version: int) -> ClassifierConfig:
        return parse_config(values, source=f"the config in {self.folder / STATE}", kind=ClassifierConfig)

    def _describe(self) -> None:
        model, sets = self.training.model, {"train": self.train_set, "val": self.val_set}
        for name, pictures in sets.items():
            print(f"{name}: {len(pictures)} pictures of {len(self.class_names)} classes")
            for line in (
                *first_few(pictures.left_out, "left out"),
                *(f"  note: {n}" for n in pictures.notes),
            ):
                print(line)
        counts = [np.bincount(p.labels, minlength=len(self.class_names)) for p in sets.values()]
        rows = list(zip(self.class_names, *(c.tolist() for c in counts), strict=True))[:_SHOWN]
        print(format_table(rows, header=("class", *sets)))
        if (more := len(self.class_names) - _SHOWN) > 0:
            print(f"and {more} classes more")
        image = self._first_pictures()[0][:1].to(self.device)
        print(
            f"parameters: {format_count(count_parameters(model))}; multiply-accumulates: "
            f"{format_count(multiply_accumulates(model, image))} a picture of {image.shape[2]}x{image.shape[3]}"
        )
        print(*training_lines(self.config.train, self.batches, self.device), sep="\n", flush=True)

    def _first_pictures(self) -> LabelledBatch:
        self.batches.set_epoch(0)
        return self.loader.dataset.__getitems__(next(iter(self.batches))[:_SHOWN])

    def _save_first_batch(self) -> None:
        self._save_sheet(self.folder / "first_batch.jpg", self._first_pictures())

    def _save_sheet(self, path: Path, batch: LabelledBatch) -> None:
        names = [(self.class_names[label],) for label in batch.labels[:_SHOWN].tolist()]
        _save_named(path, batch.images[:_SHOWN], names)

    def _pictures_of(self, batch: LabelledBatch) -> list[dict[str, Any]]:
        return [
            {"file": self.train_set.where(index), "class": self.class_names[label]}
            for index, label in zip(batch.indices.tolist(), batch.labels.tolist(), strict=True)
        ]

    def _save_found(self) -> None:
        """Save the surest mistakes, each with the class that it was taken for."""
        model = self.training.evaluated_model
        model.load_weights(read_state_dict(self.folder / "best.safetensors"))
        samples, batch = self.val_loader.dataset, self.config.loader.eval_batch_size
        found: list[tuple[float, Tensor, tuple[str, ...]]] = []
        model.eval()
        # Folders come class by class, so the pictures are spread over all of them.
        indices = np.linspace(0, len(samples) - 1, min(len(samples), _LOOKED_AT)).astype(int).tolist()
        for first in range(0, len(indices), batch):
            images, labels, *_ = samples.__getitems__(
                [(0, index) for index in indices[first : first + batch]]
            )
            if not len(labels):
                continue
            with torch.inference_mode():
                scores, taken = model(images.to(self.device)).float().softmax(1).cpu().max(1)
            for row in torch.where(taken != labels)[0].tolist():
                wrong, right = (self.class_names[int(each[row])] for each in (taken, labels))
                found.append((float(scores[row]), images[row], (wrong, f"not {right}")))
        found.sort(key=lambda each: -each[0])
        if found := found[:_SHOWN]:
            _save_named(self.folder / "found.jpg", (f[1] for f in found), [f[2] for f in found])

    def _watched(self, on_new: Callable[[str], object]) -> Iterator[LabelledBatch]:
        return watched(self.loader, self.unreadable, on_new)

    def _measure(self, title: str, log: RunLog) -> dict[str, Any]:
        started, training = time.perf_counter(), self.training
        processes.share_buffers(training.evaluated_model)
        self.unreadable_val.begin()
        with Progress(len(self.val_set), title) as progress:
            measures, loss = evaluate_classifier(
                training.evaluated_model,
                watched(self.val_loader, self.unreadable_val),
                len(self.class_names),
                self.device,
                AMP_DTYPES[self.config.train.amp],
                on_step=lambda num_images: progress.update(num_images * processes.world_size()),
            )
        self.unreadable_val.collect()
        metrics = measures.summary(self.class_names)
        numbers = {name: metrics[name] for name in ("top1", "top5", "mean_accuracy")}
        log.write("val", epoch=training.epoch, step=training.step, **numbers, loss=loss)
        shown = ", ".join(f"{name} {format_cell(value)}" for name, value in numbers.items())
        taken = f"{metrics['pictures']} pictures, {format_duration(time.perf_counter() - started)}"
        print(f"{title}: {shown}, loss {loss:.3f} ({taken})", flush=True)
        return metrics | {"losses": {"loss": loss}}

    def _save_weights(self, path: Path, metrics: dict[str, Any]) -> None:
        metadata = {
            "format": FORMAT,
            "config": self.config.model_dump_json(),
            "class_names": json.dumps(self.class_names),
            "preprocessing": json.dumps(asdict(self.preprocessing)),
        }
        save_tensors(path, self.training.evaluated_model.weights(), metadata)


def watched(
    batches: Iterable[LabelledBatch],
    unreadable: Unreadable,
    on_new: Callable[[str], object] = lambda sentence: None,
) -> Iterator[LabelledBatch]:
    """The same batches, whose unreadable pictures are counted. ValueError: they are too many."""
    for batch in batches:
        unreadable.count(dict.fromkeys(batch.unreadable), len(batch.labels), on_new)
        yield batch


def _fingerprint(pictures: Pictures) -> dict[str, Any]:
    """The number of pictures, and a hash of their labels and of what is in memory or of their files' names."""
    digest = hashlib.sha256(pictures.labels.tobytes())
    if pictures.in_memory:
        digest.update(np.ascontiguousarray(pictures.images).data)
    else:
        digest.update("\0".join(Path(path).name for path in pictures.images).encode(errors="surrogateescape"))
    return {"pictures": len(pictures), "contents": digest.hexdigest()[:16]}


def mean_color(preprocessing: Preprocessing) -> tuple[int, ...]:
    """The mean as RGB in 0..255."""
    color = [round(255 * mean / preprocessing.scale) for mean in preprocessing.mean]
    return tuple(color if preprocessing.channel_order == "rgb" else color[::-1])


def _save_named(path: Path, images: Iterable[Tensor], names: list[tuple[str, ...]]) -> None:
    """Save pictures (3, h, w) uint8 as one, each enlarged and with its names."""
    tiles = []
    for image, own in zip(images, names, strict=True):
        factor = max(1, _SIDE // min(image.shape[1:]))
        large = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        whole = [0, 0, large.shape[2], large.shape[1]]
        tiles.append(draw_boxes(large, [whole] * len(own), list(range(1, len(own) + 1)), list(own)))
    save_tiles(path, tiles, _COLUMNS)
