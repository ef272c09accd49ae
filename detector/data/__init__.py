"""Data sets of images and boxes: read, augmented and batched."""

from pathlib import Path

from ..config import CocoSource, DataConfig, ShapesSource, Source
from .coco import load_coco
from .dataset import DetectionDataset, concatenate
from .images import list_images, load_image
from .shapes import generate_shapes
from .voc import load_voc

__all__ = [
    "DetectionDataset",
    "build_dataset",
    "concatenate",
    "generate_shapes",
    "list_images",
    "load_coco",
    "load_image",
    "load_voc",
]


def build_dataset(
    data: DataConfig, split: str, class_names: tuple[str, ...] | None = None
) -> DetectionDataset:
    """The "train", "val" or "test" data of a configuration.

    class_names: foreground names in the order of their labels, so that all splits agree with the first one read.
    """
    sources = getattr(data, split)
    if not sources:
        raise ValueError(f"the config has no data.{split}")
    return concatenate([_read(source, data, class_names or data.class_names) for source in sources])


def _read(source: Source, data: DataConfig, class_names: tuple[str, ...] | None) -> DetectionDataset:
    common = (
        {"class_names": class_names, "limit": source.limit} if not isinstance(source, ShapesSource) else {}
    )
    common |= {"strict": data.strict, "use_difficult": data.difficult}
    root = Path(data.root)
    if isinstance(source, CocoSource):
        return load_coco(root / source.images, root / source.annotations, **common)
    if isinstance(source, ShapesSource):
        settings = source.model_dump(exclude={"format", "split"})
        generate_shapes(root, **settings)
        return load_coco(root / source.split, root / "annotations" / f"{source.split}.json", **common)
    return load_voc(root / source.directory, source.split, one_based=source.one_based, **common)
