"""Build the detector that a configuration describes, its batches and its training."""

import math
import os
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from backbones import create_backbone
from backbones.weights import DEFERRED

from .config import Config, ModelConfig
from .data.dataset import DetectionDataset
from .data.loader import TrainBatches, TransformedDataset, build_loader
from .data.transforms import TrainTransform
from .engine import DetectorTask, Task, Training, WeightAverage, build_schedule, parameter_groups
from .model.faster_rcnn import C4FasterRCNN, build_faster_rcnn

# oneDNN keeps what it compiled for the last images' sizes, 1,024 pieces by default, and so does torch's wrapper of it.
# They pin the heap, which then grows for hours where sizes vary. A network needs about 60 for a size.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")


def build_model(config: ModelConfig, num_classes: int, *, load_weights: bool = True) -> C4FasterRCNN:
    """The detector that a configuration describes, in channels-last layout.

    num_classes: K, with background. load_weights: False fetches no weights, for a model that gets a checkpoint's.
    """
    options = dict(config.backbone)
    if not load_weights:
        options["weights"] = DEFERRED
    settings = {name: getattr(config, name) for name in type(config).model_fields if name != "backbone"}
    backbone = create_backbone(options.pop("name"), **options)
    model: nn.Module = build_faster_rcnn(backbone, num_classes, **settings)
    return model.to(memory_format=torch.channels_last)


def build_batches(
    config: Config, dataset: DetectionDataset, device: torch.device
) -> tuple[TransformedDataset, TrainBatches, DataLoader]:
    """The training pictures as augmented samples, the batches of an epoch, and the loader that reads them."""
    options, loading = config.train, config.loader
    ratios = dataset.aspect_ratios()
    batches = TrainBatches(ratios, options.batch_size, options.seed, loading.group_by_aspect_ratio)
    transform = TrainTransform(augment=config.augment, **config.model.resizing)
    unreadable = "raise" if config.data.strict else "replace"
    augmented = TransformedDataset(dataset, transform, options.seed, unreadable)
    loader = build_loader(augmented, batches, loading.num_workers, pin_memory=device.type == "cuda")
    return augmented, batches, loader


def build_training(
    config: Any, model: nn.Module, num_batches: int, device: torch.device, task: Task | None = None
) -> Training:
    """Build the optimizer, schedule, gradient scaler and weight averages of a model.

    config: with a section `train`. num_batches: of an epoch. task: None: that of a detector.

    ValueError: the schedule is a cosine, and milestones are given.
    """
    options = config.train
    if options.amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        print("note: this GPU only emulates bf16, which is slow: train.amp=fp16 is faster here", flush=True)
    if options.schedule == "cosine" and options.milestones:
        raise ValueError(
            f"train.milestones is {list(options.milestones)}, and train.schedule is 'cosine', which has none; "
            "set train.milestones=[]"
        )
    groups = parameter_groups(model, options.weight_decay, options.norm_decay)
    fused = device.type in ("cpu", "cuda")
    if options.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, fused=fused)
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
    ema = None if options.ema is None else WeightAverage(model, options.ema)
    return Training(model, task or DetectorTask(model), optimizer, schedule, scaler, ema)
