"""A configuration -> the detector that it describes."""

import torch
from torch import nn

from backbones import create_backbone
from backbones.weights import DEFERRED

from .config import ModelConfig
from .model.faster_rcnn import C4FasterRCNN, build_faster_rcnn


def build_model(config: ModelConfig, num_classes: int, *, load_weights: bool = True) -> C4FasterRCNN:
    """The detector that a configuration describes, in channels-last layout.

    num_classes: K, with background. load_weights: False where a checkpoint's weights follow, so that none are fetched.
    """
    options = dict(config.backbone)
    if not load_weights:
        options["weights"] = DEFERRED
    settings = {name: getattr(config, name) for name in type(config).model_fields if name != "backbone"}
    backbone = create_backbone(options.pop("name"), **options)
    model: nn.Module = build_faster_rcnn(backbone, num_classes, **settings)
    return model.to(memory_format=torch.channels_last)
