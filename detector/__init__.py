"""Faster R-CNN around a classification backbone cut at conv4_x: data, training, evaluation, inference."""

# First, because it raises a clear error if torchvision's operators do not fit the installed torch.
import backbones  # noqa: F401

from .build import build_model
from .config import Config, load_config
from .inference import Detections, Detector
from .model.conventions import Conventions
from .model.faster_rcnn import build_faster_rcnn

__all__ = [
    "Config",
    "Conventions",
    "Detections",
    "Detector",
    "build_faster_rcnn",
    "build_model",
    "load_config",
]
