"""Sheets of pictures: the first batch as the network sees it, and what a detector found."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from .data.dataset import DetectionDataset
from .data.images import load_or_reason
from .files import write_atomically
from .inference import Detector
from .visualize import draw_boxes, fit, tile

_MOST, _COLUMNS, _SIDE = 12, 4, 360


def save_sheet(
    path: Path, samples: Iterable[tuple[Tensor, dict[str, Any]]], class_names: tuple[str, ...]
) -> None:
    """Save pairs (image, target) of the loader as one picture."""
    pictures = [draw_boxes(image, each["boxes"], each["labels"], class_names) for image, each in samples]
    save_tiles(path, pictures)


def save_tiles(path: Path, pictures: Sequence[np.ndarray], columns: int = _COLUMNS) -> None:
    """Save (H, W, 3) uint8 pictures as one JPEG, `columns` in a row."""
    sheet = Image.fromarray(tile(pictures, columns))
    write_atomically(path, lambda temporary: sheet.save(temporary, quality=90))


def save_found(path: Path, detector: Detector, dataset: DetectionDataset, score_thresh: float = 0.5) -> None:
    """Save a sheet of at most 12 pictures of a data set, evenly spaced, with what the detector finds in them.

    Where some have objects, only those are shown. A picture that cannot be read is passed over.
    """
    rows = np.flatnonzero(np.diff(dataset.offsets)) if len(dataset.boxes) else np.arange(len(dataset))
    pictures = []
    for row in rows[np.linspace(0, len(rows) - 1, min(len(rows), _MOST)).astype(int)]:
        image = load_or_reason(str(dataset.image_paths[row]))
        if isinstance(image, str):
            continue
        found = detector(image, score_thresh=score_thresh)
        shown, boxes = fit(image, found.boxes.numpy(), _SIDE)
        pictures.append(draw_boxes(shown, boxes, found.labels, found.class_names, found.scores))
    if pictures:
        save_tiles(path, pictures)
