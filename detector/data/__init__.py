"""Data sets of images and boxes: read, augmented and batched."""

from .coco import load_coco
from .dataset import DetectionDataset, concatenate
from .images import list_images, load_image
from .shapes import generate_shapes
from .sources import build_dataset
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
