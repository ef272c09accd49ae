"""The result of a conversion: a detector's checkpoint, or the weights of a backbone."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones import IMAGENET, Preprocessing
from backbones.messages import misfit

from ..build import build_model
from ..checkpoint import Checkpoint, save_checkpoint
from ..config import Config
from ..files import save_tensors

# The preprocessing of Caffe's networks, and of Detectron2's and MMDetection's "caffe" ones: BGR in 0..255.
CAFFE_RESNET = Preprocessing((103.530, 116.280, 123.675), (1.0, 1.0, 1.0), "bgr", 255.0)


@dataclass(frozen=True)
class BackboneWeights:
    """Weights for `create_backbone(weights=FILE)`, and the name and options of the network that they fit."""

    state_dict: dict[str, Tensor]
    backbone: dict[str, Any]
    preprocessing: Preprocessing = IMAGENET


@dataclass(frozen=True)
class Converted:
    """The result of a conversion. notes: sentences for the user, such as which tensors were left out."""

    result: Checkpoint | BackboneWeights
    notes: tuple[str, ...] = ()


def save_converted(path: str | Path, result: Checkpoint | BackboneWeights) -> None:
    """Write a .safetensors file, whole or not at all. Its metadata holds everything except the tensors."""
    if isinstance(result, Checkpoint):
        return save_checkpoint(path, result)
    metadata = {
        "format": "fasterrcnn-c4-backbone",
        "backbone": json.dumps(result.backbone),
        "preprocessing": json.dumps(dataclasses.asdict(result.preprocessing)),
    }
    save_tensors(path, result.state_dict, metadata)


def leave_out(
    tensors: dict[str, Tensor], heads: tuple[str, ...]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors whose names do not begin with one of `heads`, and a note for each head that was left out."""
    found = sorted({head for head in heads for name in tensors if name.startswith(head)})
    kept = {name: value for name, value in tensors.items() if not name.startswith(heads)}
    return kept, tuple(f"left out: {head}*, which boxes do not need" for head in found)


def refuse_prefixes(tensors: dict[str, Tensor], reasons: dict[str, str], source: str) -> None:
    """Raise a ValueError if a tensor's name begins with one of the prefixes, with the reason for that prefix."""
    for prefix, reason in reasons.items():
        if any(name.startswith(prefix) for name in tensors):
            raise ValueError(f"{source} is no C4 detector: {reason} ({prefix}*)")


def check_fits(checkpoint: Checkpoint, source: str) -> None:
    """Raise a ValueError if the weights do not fit the detector of their config. It names the first that differ."""
    # Names and shapes are enough.
    with torch.device("meta"):
        num_classes = Config.num_classes(checkpoint.class_names)
        wanted = build_model(checkpoint.config.model, num_classes, load_weights=False).state_dict()
    if differences := misfit(wanted, checkpoint.state_dict):
        raise ValueError(f"{source} is another architecture: {differences}")
