"""Detectron2's C4 detector of the same network, where it is installed."""

import importlib.util
from typing import Any

import torch
from torch import nn

from .models import random_boxes
from .settings import Settings, Size
from .timing import Parts


def has_detectron2(backbone: str) -> bool:
    """Whether Detectron2 is installed and has a C4 recipe of that network."""
    return backbone in ("resnet50", "resnet101") and importlib.util.find_spec("detectron2") is not None


def build_detectron2(settings: Settings, size: Size, count: int) -> nn.Module:
    """Detectron2's C4 detector of the same depth, with random weights and `count` forced proposals per image."""
    from detectron2 import model_zoo
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances

    depth = settings.backbone.removeprefix("resnet")
    config = model_zoo.get_config(f"COCO-Detection/faster_rcnn_R_{depth}_C4_3x.yaml", trained=False)
    config.MODEL.WEIGHTS, config.MODEL.DEVICE = "", settings.device
    config.MODEL.RPN.PRE_NMS_TOPK_TEST = config.MODEL.RPN.POST_NMS_TOPK_TEST = max(1000, count)
    model = build_model(config).eval()
    rpn = model.proposal_generator
    predict = rpn.predict_proposals

    def forced(anchors: object, logits: object, deltas: object, image_sizes: list[Size]) -> list[Any]:
        predict(anchors, logits, deltas, image_sizes)
        boxes = [random_boxes(count, size, seed=i).to(settings.device) for i in range(len(image_sizes))]
        scores = torch.zeros(count, device=settings.device)
        return [Instances(size, proposal_boxes=Boxes(b), objectness_logits=scores) for b in boxes]

    rpn.predict_proposals = forced
    return model


def detectron2_parts(model: nn.Module) -> Parts:
    """The parts of Detectron2's detector, under the names of ours."""
    heads = model.roi_heads
    return [
        (model.backbone, "forward", "trunk"),
        (model.proposal_generator, "forward", "rpn"),
        (heads.pooler, "forward", "roi_align"),
        (heads.res5, "forward", "head"),
        (heads.box_predictor, "forward", "predictor"),
        (heads.box_predictor, "inference", "postprocessing"),
    ]
