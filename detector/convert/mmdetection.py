"""Convert MMDetection's caffe C4 detectors (a shared head `layer4` per region), of versions 2 and 3.

Their conventions are Detectron2's, with four exceptions. The order of anchors is torchvision's: for each ratio, for
each size. The resize does not antialias. A batch is padded to a multiple of 32. The RPN's losses are divided by the
number of anchors sampled.
"""

from typing import Any

from backbones.resnet import TORCHVISION_NAMES
from backbones.weights import NameTable, rename

from .converted import CAFFE_RESNET, Converted, leave_out, refuse_prefixes
from .detectron2 import AS_DETECTOR, CONVENTIONS, PREDICTOR, background_first, build_checkpoint
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
_OTHERS = {
    "neck.": "it has a neck (a feature pyramid)",
    "bbox_head.": "it has one stage, or is of MMDetection 1, whose boxes are one pixel wider; versions 2 and 3 are accepted",
}


def is_mmdetection(names: set[str]) -> bool:
    return any(name.startswith(("rpn_head.rpn_", "roi_head.", "bbox_head.")) for name in names)


def convert_mmdetection(
    file: ForeignFile, *, class_names: tuple[str, ...] | None = None, overrides: tuple[str, ...] = ()
) -> Converted:
    """Convert a C4 detector. Its config has MMDetection's conventions; overrides: key=value settings of the config.

    ValueError: another architecture, or the number of class names does not fit.
    """
    source = str(file.path)
    refuse_prefixes(file.tensors, _OTHERS, source)
    if not any(name.startswith("roi_head.shared_head.layer4.") for name in file.tensors):
        raise ValueError(f"{source} is no C4 detector: it has no roi_head.shared_head.layer4")
    state, notes = leave_out(file.tensors, _OTHER_HEADS)
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    names = (class_names, _stored_names(file.rest))
    ours = background_first(rename(state, _TO_OURS))
    checkpoint = build_checkpoint(ours, MMDETECTION_CONVENTIONS, names, overrides, source)
    assumed = f"assumed: {CAFFE_RESNET}, stride in the 1x1; model.preprocessing and model.backbone say others"
    return Converted(checkpoint, (*notes, assumed))


def _stored_names(rest: dict[str, Any]) -> list[str] | None:
    """The class names in the file, or None. Version 2 keeps them in `meta`, version 3 in `meta.dataset_meta`."""
    meta = rest.get("meta")
    places = [meta, meta.get("dataset_meta")] if isinstance(meta, dict) else []
    for place in places:
        for key in ("CLASSES", "classes"):
            names = place.get(key) if isinstance(place, dict) else None
            if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
                return list(names)
    return None
