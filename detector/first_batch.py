"""Batches as a picture: the images as the network sees them, with their boxes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from .data.loader import TrainBatches, TransformedDataset
from .files import write_atomically
from .visualize import draw_boxes, tile


def save_first_batch(
    path: Path, dataset: TransformedDataset, batches: TrainBatches, class_names: tuple[str, ...]
) -> None:
    """Save a picture of a run's first batch, of at most 8 images."""
    batches.set_epoch(0)
    save_sheet(path, (dataset[key] for key in next(iter(batches))[:8]), class_names)


def save_sheet(
    path: Path, samples: Iterable[tuple[Tensor, dict[str, Any]]], class_names: tuple[str, ...]
) -> None:
    """Save pairs (image, target) of the loader as one picture."""
    pictures = [draw_boxes(image, each["boxes"], each["labels"], class_names) for image, each in samples]
    sheet = Image.fromarray(tile(pictures, columns=min(4, len(pictures))))
    write_atomically(path, lambda temporary: sheet.save(temporary, quality=90))
