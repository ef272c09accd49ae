"""What a choice of a recipe needs to know of the data and of the machine."""

import os
from dataclasses import dataclass

import numpy as np
import torch

from ..data.dataset import DetectionDataset
from ..model.network_input import network_sizes


@dataclass(frozen=True)
class Objects:
    """The objects to learn in N pictures.

    boxes: (M, 4) xyxy pixels; sizes: (M, 2) height and width of each object's picture. counts: (N,) objects a picture.
    short, long: medians of the pictures' sides. class_names: foreground names.
    """

    boxes: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray
    short: int
    long: int
    class_names: tuple[str, ...]

    @property
    def roots(self) -> np.ndarray:
        """(M,) square roots of the areas, in pixels of the pictures."""
        return np.sqrt(np.prod(self.boxes[:, 2:] - self.boxes[:, :2], axis=1))

    def shapes_at(self, min_size: int, max_size: int) -> np.ndarray:
        """(M, 2) widths and heights at the network's size."""
        scales = network_sizes(self.sizes, min_size, max_size) / self.sizes
        return (self.boxes[:, 2:] - self.boxes[:, :2]) * scales[:, ::-1]


def objects_of(dataset: DetectionDataset) -> Objects:
    """Look at a data set. ValueError: it has no box to learn."""
    dataset.check_trainable()
    learned = dataset.trained()
    rows = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))[learned]
    return Objects(
        boxes=dataset.boxes[learned],
        sizes=dataset.image_sizes[rows],
        counts=np.bincount(rows, minlength=len(dataset)),
        short=int(np.median(dataset.image_sizes.min(axis=1))),
        long=int(np.median(dataset.image_sizes.max(axis=1))),
        class_names=dataset.class_names,
    )


@dataclass(frozen=True)
class Machine:
    """What trains.

    cores: that this process may use. memory: bytes of the GPU, 0 without one. num_processes: that train together.
    """

    device: torch.device
    cores: int
    memory: int
    num_processes: int = 1

    @property
    def has_gpu(self) -> bool:
        return self.device.type == "cuda"


def look_at_machine(device: torch.device, num_processes: int = 1) -> Machine:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return Machine(device, cores, memory, num_processes)
