"""The first batch of a run as a picture: the images as the network sees them, with their boxes."""

from pathlib import Path

from PIL import Image

from .data.loader import TrainBatches, TransformedDataset
from .files import write_atomically
from .visualize import draw_boxes, tile


def save_first_batch(
    path: Path, dataset: TransformedDataset, batches: TrainBatches, class_names: tuple[str, ...]
) -> None:
    """Save a picture of the first batch, of at most 8 images, as the network sees them."""
    batches.set_epoch(0)
    pictures = []
    for key in next(iter(batches))[:8]:
        image, target = dataset[key]
        pictures.append(draw_boxes(image, target["boxes"], target["labels"], class_names))
    sheet = Image.fromarray(tile(pictures, columns=min(4, len(pictures))))
    write_atomically(path, lambda temporary: sheet.save(temporary, quality=90))
