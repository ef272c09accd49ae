"""The measurements of tools/benchmark.py: our detector and torchvision's of one network, in turn in one process."""

from .classifier import compare_cifar_loader, compare_rates
from .detectron2 import has_detectron2
from .growth import measure_scaling
from .inference import compare_inference
from .memory import peak_memory
from .models import INFERENCE_FORMS
from .pipeline import coco_backends, measure_evaluation, measure_loader
from .settings import DTYPES, Settings, describe_machine
from .stream import measure_stream
from .tables import format_limit, format_times, plot_growth, plot_parts
from .training import compare_training
from .training_profile import profile_training

__all__ = [
    "DTYPES",
    "INFERENCE_FORMS",
    "Settings",
    "coco_backends",
    "compare_cifar_loader",
    "compare_inference",
    "compare_rates",
    "compare_training",
    "describe_machine",
    "format_limit",
    "format_times",
    "has_detectron2",
    "measure_evaluation",
    "measure_loader",
    "measure_scaling",
    "measure_stream",
    "peak_memory",
    "plot_growth",
    "plot_parts",
    "profile_training",
]
