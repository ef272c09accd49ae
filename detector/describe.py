"""A summary of a run, printed before it starts."""

from collections import Counter
from pathlib import Path

import torch

from backbones.summary import multiply_accumulates

from . import processes
from .config import Config, TrainConfig
from .data.dataset import DetectionDataset
from .data.loader import TrainBatches
from .data.tolerance import first_few
from .files import write_atomically
from .model.faster_rcnn import C4FasterRCNN
from .model.network_input import network_sizes
from .tables import format_count, format_table


def describe(
    config: Config,
    model: C4FasterRCNN,
    train_set: DetectionDataset,
    val_set: DetectionDataset | None,
    batches: TrainBatches,
    device: torch.device,
) -> str:
    """Describe what a run is about to do: its data, image sizes, parameters and cost."""
    lines = []
    for name, dataset in (("train", train_set), ("val", val_set)):
        if dataset is None:
            continue
        lines.append(f"{name}: {len(dataset)} images, {sum(dataset.box_counts().values())} boxes")
        lines += problem_lines(dataset)
    counts = {"train": train_set.box_counts()} | ({} if val_set is None else {"val": val_set.box_counts()})
    rows = [(name, *(c[name] for c in counts.values())) for name in train_set.class_names]
    lines.append(format_table(rows, header=("class", *counts)))
    size = (config.model.min_size, config.model.max_size, config.model.conventions.resize_rounding)
    seen = Counter(map(tuple, network_sizes(train_set.image_sizes, *size).tolist()))
    common = ", ".join(f"{h}x{w} ({count})" for (h, w), count in seen.most_common(3))
    more = f" and {len(seen) - 3} other sizes" if len(seen) > 3 else ""
    lines.append(f"input after resizing, height x width: {common}{more}")
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines.append(
        f"parameters: {format_count(parameters)}, trainable {format_count(trainable)}, "
        f"frozen {format_count(parameters - trainable)}"
    )
    (height, width), _ = seen.most_common(1)[0]
    trunk, head = model.backbone, model.roi_heads.box_head
    trunk_macs = multiply_accumulates(trunk, torch.zeros(1, 3, height, width, device=device))
    head_macs = multiply_accumulates(head, torch.zeros(1, trunk.out_channels, 14, 14, device=device))
    lines.append(
        f"multiply-accumulates: trunk {format_count(trunk_macs)} an image of {height}x{width}, "
        f"head {format_count(head_macs)} a region"
    )
    return "\n".join([*lines, *training_lines(config.train, batches, device)])


def training_lines(options: TrainConfig, batches: TrainBatches, device: torch.device) -> list[str]:
    """The epochs and batches, and what an update has where it is more than one batch."""
    count = processes.world_size()
    each = f" in each of {count} processes" if count > 1 else ""
    lines = [
        f"{options.epochs} epochs of {len(batches)} batches of {options.batch_size}{each}, "
        f"{options.optimizer} at {options.lr:g}, {options.schedule}, on {device}"
    ]
    if (images := batches.batch_size * options.accumulate) > options.batch_size:
        lines.append(f"an update has {images} images; the rate is that of an update")
    if batches.num_repeated:
        lines.append(f"each epoch sees its first {batches.num_repeated} images again, to fill its last batch")
    return lines


def problem_lines(dataset: DetectionDataset) -> list[str]:
    """What was left out of a data set and why: the first few sentences of each kind, and all notes."""
    return [
        *first_few(dataset.problems, "skipped"),
        *first_few(dataset.left_out, "left out"),
        *(f"  warning: {warning}" for warning in dataset.warnings),
        *(f"  note: {note}" for note in dataset.notes),
    ]


def write_problems(path: Path, datasets: dict[str, DetectionDataset | None], findings: list[str]) -> None:
    """Write a line for everything that was left out, found or noted in the data sets; no file if nothing was."""
    lines = [f"{finding}\n" for finding in findings] + [
        f"{name}: {sentence}\n"
        for name, dataset in datasets.items()
        if dataset is not None
        for sentence in (*dataset.problems, *dataset.left_out, *dataset.warnings, *dataset.notes)
    ]
    path.unlink(missing_ok=True)
    if lines:
        # A file's name may hold what UTF-8 cannot.
        data = "".join(lines).encode(errors="backslashreplace")
        write_atomically(path, lambda temporary: temporary.write_bytes(data))
