"""What a training of a recipe costs: sizes and counts of a step, and its time and memory where it is tried."""

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from ..build import build_model
from ..config import Config
from ..model.anchors import STRIDE
from ..model.network_input import network_sizes
from ..model.speed import apply_speed
from ..progress import memory_mb
from ..tables import format_duration
from .part import Part

_ENOUGH_SECONDS = 10


def describe_cost(parts: Sequence[Part], config: Config) -> str:
    """The numbers that decide memory and time of a training step, as one line."""
    (height, width), model = _common_size(parts, config), config.model
    cells = -(-height // STRIDE) * -(-width // STRIDE)
    anchors = cells * len(model.anchor_sizes) * len(model.aspect_ratios)
    batch = config.train.batch_size
    return (
        f"a training step: {batch} images of {height}x{width} (height x width), {anchors} anchors an image, "
        f"{batch * model.box_batch_size_per_image} regions"
    )


def time_step(parts: Sequence[Part], config: Config, device: torch.device) -> str:
    """The time and memory of one training step, tried on noise with random weights, as one line."""
    height, width = _common_size(parts, config)
    model = apply_speed(build_model(config.model, num_classes=2, load_weights=False), config.speed)
    model.to(device).train()
    batch = config.train.batch_size
    images = [torch.rand(3, height, width, device=device) for _ in range(batch)]
    box = torch.tensor([[width / 4, height / 4, width / 2, height / 2]], device=device)
    label = torch.ones(1, dtype=torch.int64, device=device)
    seconds = []
    # The first step warms up, and other programs may slow down some.
    while len(seconds) < 2 or (len(seconds) < 5 and sum(seconds) < _ENOUGH_SECONDS):
        started = time.perf_counter()
        losses = model(images, [{"boxes": box.clone(), "labels": label} for _ in images])
        sum(losses.values()).backward()
        # Reading a number waits for the device.
        sum(p.grad.sum() for p in model.parameters() if p.grad is not None).item()
        seconds.append(time.perf_counter() - started)
    num_images = sum(len(part.paths) for part in parts if part.split == "train")
    whole = min(seconds) * -(-num_images // batch) * config.train.epochs
    return (
        f"it takes {min(seconds):.2f} s and {memory_mb():.0f} MB on {device}: {config.train.epochs} epochs take about "
        f"{format_duration(whole)}, without loading and evaluation"
    )


def _common_size(parts: Sequence[Part], config: Config) -> tuple[int, int]:
    """The most frequent (height, width) of training pictures at the network's size."""
    model = config.model
    sizes = np.concatenate([part.sizes for part in parts if part.split == "train"])
    resized = network_sizes(sizes, model.min_size, model.max_size, model.conventions.resize_rounding)
    return Counter(map(tuple, resized.tolist())).most_common(1)[0][0]
