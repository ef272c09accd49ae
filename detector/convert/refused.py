"""Detectors that are recognised but not converted, with the reasons."""

from .read import ForeignFile

JWYANG = (
    "a detector of jwyang/faster-rcnn.pytorch is not converted: its widths count one pixel more (x2 - x1 + 1) in anchors, "
    "decoding and losses, its anchors are rounded around 7.5, its RPN has 512 channels and a two-way softmax, and its "
    "regions are 7x7 before layer4. This detector has none of these, so it would give other numbers"
)
TORCHVISION = (
    "it is a torchvision detector with a feature pyramid (backbone.body, backbone.fpn); a C4 detector has one feature "
    "map, so only its ResNet's names agree, not what follows it"
)
# How the names of their tensors begin.
REASONS = {("RCNN_base.", "RCNN_top.", "RCNN_rpn."): JWYANG, ("backbone.body.", "backbone.fpn."): TORCHVISION}


def refuse_jwyang(file: ForeignFile) -> None:
    """Raise a ValueError with the reason."""
    raise ValueError(f"{file.path}: {JWYANG}")
