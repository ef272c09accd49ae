"""MMDetection's caffe C4 detectors (a shared head `layer4` per region), of its versions 2 and 3.

Detectron2's conventions, apart from: anchors for each ratio, for each size, as torchvision has them; the resize does not
smooth; a batch is padded to a multiple of 32; and the RPN's losses are divided by the anchors sampled.
"""

from typing import Any

from backbones.resnet import TORCHVISION_NAMES
from backbones.weights import NameTable, rename

from .class_names import choose_class_names
from .converted import CAFFE_RESNET, Converted
from .detectron2 import (
    AS_DETECTOR,
    CONVENTIONS,
    PREDICTOR,
    background_first,
    build_checkpoint,
    check_delta_rows,
)
from .read import ForeignFile

MMDETECTION_CONVENTIONS: dict[str, Any] = {
    **CONVENTIONS,
    "conventions": {
        "name": "detectron2",
        "anchor_order": "ratio_major",
        "resize": "torch",
        "rpn_loss_normalizer": "sampled",
        "size_divisible": 32,
    },
}

_TO_OURS: NameTable = (
    (r"^backbone\.", ""),
    (r"^roi_head\.shared_head\.", ""),
    (r"^roi_head\.bbox_head\.fc_cls\.", f"{PREDICTOR}.cls_score."),
    (r"^roi_head\.bbox_head\.fc_reg\.", f"{PREDICTOR}.bbox_pred."),
    *TORCHVISION_NAMES,
    *AS_DETECTOR,
    (r"^rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"^rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"^rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
)
_OTHER_HEADS = ("roi_head.mask_head.",)


def is_mmdetection(names: set[str]) -> bool:
    return any(name.startswith(("rpn_head.rpn_", "roi_head.", "bbox_head.", "neck.")) for name in names)


def convert_mmdetection(
    file: ForeignFile, *, class_names: tuple[str, ...] | None = None, overrides: tuple[str, ...] = ()
) -> Converted:
    source = str(file.path)
    _refuse_others(file)
    other_heads = {head for head in _OTHER_HEADS for name in file.tensors if name.startswith(head)}
    state = {
        name: value
        for name, value in file.tensors.items()
        if not name.startswith(_OTHER_HEADS) and not name.endswith("num_batches_tracked")
    }
    num_classes = len(state["roi_head.bbox_head.fc_cls.weight"]) - 1
    names = choose_class_names(num_classes, class_names, _stored_names(file.rest))
    ours = background_first(rename(state, _TO_OURS))
    checkpoint = build_checkpoint(ours, MMDETECTION_CONVENTIONS, names, CAFFE_RESNET, overrides, source)
    return Converted(checkpoint, tuple(f"left out: {head}*, which boxes do not need" for head in other_heads))


def _stored_names(rest: dict[str, Any]) -> list[str] | None:
    """The class names that version 2 keeps in `meta` and version 3 in `meta.dataset_meta`, where they are plain."""
    meta = rest.get("meta")
    places = [meta, meta.get("dataset_meta")] if isinstance(meta, dict) else []
    for place in places:
        for key in ("CLASSES", "classes"):
            names = place.get(key) if isinstance(place, dict) else None
            if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
                return list(names)
    return None


def _refuse_others(file: ForeignFile) -> None:
    names = set(file.tensors)
    if any(name.startswith("neck.") for name in names):
        raise ValueError(f"{file.path} is no C4 detector of MMDetection: it has a neck (a feature pyramid)")
    if any(name.startswith("bbox_head.") for name in names):
        raise ValueError(
            f"{file.path} is a one-stage detector, or one of MMDetection 1, whose boxes are one pixel wider; accepted: "
            "a C4 detector of MMDetection 2 or 3"
        )
    if not any(name.startswith("roi_head.shared_head.layer4.") for name in names):
        raise ValueError(
            f"{file.path} is no C4 detector of MMDetection: it has no roi_head.shared_head.layer4"
        )
    layers = [file.tensors.get(f"roi_head.bbox_head.fc_{name}.weight") for name in ("cls", "reg")]
    if any(layer is None for layer in layers):
        raise ValueError(f"{file.path} has no box head roi_head.bbox_head.fc_cls and fc_reg")
    check_delta_rows(*layers, str(file.path))
