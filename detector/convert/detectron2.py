"""Convert Detectron2's C4 detectors: their names, their order of classes, and their conventions as our options."""

import re
from dataclasses import asdict
from itertools import count
from typing import Any

import torch
from torch import Tensor

from backbones import Preprocessing
from backbones.weights import NameTable, rename

from ..checkpoint import Checkpoint
from ..config import Config, parse_config
from ..model.anchors import MapAnchors
from ..model.conventions import DETECTRON2
from .architecture import name_resnet
from .class_names import choose_class_names
from .converted import CAFFE_RESNET, Converted, check_fits, leave_out, refuse_prefixes
from .read import ForeignFile

# Options of the config's section `model` in which Detectron2's C4 models differ from torchvision's detector.
CONVENTIONS: dict[str, Any] = {
    "conventions": "detectron2",
    "rpn_pre_nms_top_n_train": 12000,
    "rpn_pre_nms_top_n_test": 6000,
    "rpn_post_nms_top_n_train": 2000,
    "rpn_post_nms_top_n_test": 1000,
}
BACKBONE_CONVENTIONS = {"stride_in": "1x1", "norm": "frozen", "frozen_stages": 2}

# Detectron2's names and ours, in the order of renaming. `#` stands for a number, ^ and $ for the ends of a name.
_NAMES = (
    ("^backbone.stem.conv1.norm.", "^trunk.stage1.bn1."),
    ("^backbone.stem.conv1.", "^trunk.stage1.conv1."),
    ("^backbone.res2.", "^trunk.stage2.blocks."),
    ("^backbone.res3.", "^trunk.stage3."),
    ("^backbone.res4.", "^trunk.stage4."),
    ("^roi_heads.res5.", "^roi_head.stage5."),
    (".shortcut.norm.", ".shortcut.bn."),
    (".shortcut.weight$", ".shortcut.conv.weight$"),
    (".#.conv#.norm.", ".#.branch.bn#."),
    (".#.conv#.weight$", ".#.branch.conv#.weight$"),
    ("^proposal_generator.rpn_head.conv.", "^rpn.head.conv.0.0."),
    ("^proposal_generator.rpn_head.objectness_logits.", "^rpn.head.cls_logits."),
    ("^proposal_generator.rpn_head.anchor_deltas.", "^rpn.head.bbox_pred."),
)


def _pattern(name: str) -> str:
    return name.replace(".", r"\.").replace("#", r"(\d+)")


def _replacement(name: str) -> str:
    """The name with its n-th number taken from the pattern's n-th."""
    numbers = count(1)
    return re.sub("#", lambda _: rf"\{next(numbers)}", name.strip("^$"))


_TO_OURS: NameTable = tuple((_pattern(theirs), _replacement(ours)) for theirs, ours in _NAMES)
_TO_THEIRS: NameTable = tuple((_pattern(ours), _replacement(theirs)) for theirs, ours in _NAMES)
# A detector holds the backbone's two halves under torchvision's names.
AS_DETECTOR: NameTable = ((r"^trunk\.", "backbone."), (r"^roi_head\.", "roi_heads.box_head."))
AS_BACKBONE: NameTable = ((r"^roi_heads\.box_head\.", "roi_head."), (r"^backbone\.", "trunk."))

# Tensors that are not learned: the config gives them. Frozen norms have no use for a counter of batches.
_CONSTANTS = re.compile(r"^pixel_(mean|std)$|anchor_generator\.cell_anchors|num_batches_tracked$")
_OTHER_HEADS = ("roi_heads.mask_head.", "roi_heads.keypoint_head.")
PREDICTOR = "roi_heads.box_predictor"
# Detectron2's other architectures, and why each is refused.
_OTHERS = {
    "backbone.bottom_up.": "its backbone is a feature pyramid, where a C4 detector ends at res4",
    "roi_heads.box_head.": "its region head is fully connected, where a C4 detector's is res5",
    "backbone.res5.": "its res5 belongs to the trunk (DC5), where a C4 detector's is the region head",
    "head.": "it is a one-stage detector",
}


def is_detectron2(names: set[str]) -> bool:
    return any(
        name.startswith(("backbone.stem.", "backbone.bottom_up.", "proposal_generator.")) for name in names
    )


def detectron2_to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The learned tensors under our detector's names, background moved from the last class to the first.

    The RPN's channels keep their order, which is `anchor_order: size_major`.
    """
    learned = {name: value for name, value in state.items() if not _CONSTANTS.search(name)}
    return background_first(rename(rename(learned, _TO_OURS), AS_DETECTOR))


def ours_to_detectron2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `detectron2_to_ours`."""
    learned = {name: value for name, value in state.items() if not _CONSTANTS.search(name)}
    return rename(rename(background_last(learned), AS_BACKBONE), _TO_THEIRS)


def background_first(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the predictor's rows into torchvision's order, in which background is label 0.

    cls_score: (K, C5), background moved from last to first. bbox_pred: (4(K-1), C5) -> (4K, C5), zeros for background.
    """
    moved = dict(state)
    for kind in ("weight", "bias"):
        scores, deltas = f"{PREDICTOR}.cls_score.{kind}", f"{PREDICTOR}.bbox_pred.{kind}"
        if scores in state:
            moved[scores] = state[scores].roll(1, dims=0)
        if deltas in state:
            moved[deltas] = torch.cat([torch.zeros_like(state[deltas][:4]), state[deltas]])
    return moved


def background_last(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `background_first`."""
    moved = dict(state)
    for kind in ("weight", "bias"):
        scores, deltas = f"{PREDICTOR}.cls_score.{kind}", f"{PREDICTOR}.bbox_pred.{kind}"
        moved[scores], moved[deltas] = state[scores].roll(-1, dims=0), state[deltas][4:]
    return moved


def convert_detectron2(
    file: ForeignFile, *, class_names: tuple[str, ...] | None = None, overrides: tuple[str, ...] = ()
) -> Converted:
    """Convert a C4 detector. Its config has Detectron2's conventions; overrides: key=value settings of the config.

    ValueError: another architecture, other anchors, or the number of class names does not fit.
    """
    state, notes = leave_out(file.tensors, _OTHER_HEADS)
    refuse_prefixes(state, _OTHERS, str(file.path))
    names = choose_class_names(
        count_classes(state, PREDICTOR, ("cls_score", "bbox_pred"), str(file.path)), class_names
    )
    preprocessing = _preprocessing(state)
    ours = detectron2_to_ours(state)
    checkpoint = build_checkpoint(ours, CONVENTIONS, names, preprocessing, overrides, str(file.path))
    _check_anchors(state, checkpoint.config, str(file.path))
    return Converted(checkpoint, notes)


def build_checkpoint(
    state: dict[str, Tensor],
    conventions: dict[str, Any],
    class_names: tuple[str, ...],
    preprocessing: Preprocessing,
    overrides: tuple[str, ...],
    source: str,
) -> Checkpoint:
    """A checkpoint of our weights and the config that they need. ValueError: they do not fit each other."""
    backbone = name_resnet(rename(state, AS_BACKBONE), source) | BACKBONE_CONVENTIONS
    model = {"backbone": backbone, **conventions, "preprocessing": asdict(preprocessing)}
    config = parse_config({"model": model}, overrides, source=f"the config for {source}")
    if config.model.preprocessing is not None:
        preprocessing = config.model.preprocessing
    checkpoint = Checkpoint(state, config, class_names, preprocessing)
    check_fits(checkpoint, source)
    return checkpoint


def count_classes(state: dict[str, Tensor], head: str, layers: tuple[str, str], source: str) -> int:
    """The number of foreground classes of a predictor. layers: of scores and of box deltas, both below `head`.

    ValueError: a layer is missing, or does not have four rows of deltas per class.
    """
    scores, deltas = (state.get(f"{head}.{layer}.weight") for layer in layers)
    if scores is None or deltas is None:
        raise ValueError(
            f"{source} is no C4 detector: it has no box head {head} with {layers[0]} and {layers[1]}"
        )
    num_classes = len(scores) - 1
    if len(deltas) != 4 * num_classes:
        raise ValueError(
            f"{source}: {num_classes} classes and background need {4 * num_classes} rows of box deltas, four a class; "
            f"it has {len(deltas)}"
        )
    return num_classes


def _preprocessing(state: dict[str, Tensor]) -> Preprocessing:
    """The preprocessing with the file's mean and deviation, or Caffe's if it has none.

    The order is BGR, or RGB if the first mean is larger than the last, as in ImageNet's RGB means.
    """
    if "pixel_mean" not in state or "pixel_std" not in state:
        return CAFFE_RESNET
    stored = [state[f"pixel_{name}"].flatten().float().numpy() for name in ("mean", "std")]
    # By way of text: 103.53, not 103.52999877929688.
    mean, std = (tuple(float(str(v)) for v in values) for values in stored)
    return Preprocessing(mean, std, "rgb" if mean[0] > mean[2] else "bgr", 255.0)


def _check_anchors(state: dict[str, Tensor], config: Config, source: str) -> None:
    """Compare the anchors (A, 4) that old files hold with those of the config. ValueError: they differ.

    Their order is: for each size, for each ratio h/w.
    """
    stored = [value for name, value in state.items() if "cell_anchors" in name]
    if not stored:
        return
    wanted = MapAnchors(config.model.anchor_sizes, config.model.aspect_ratios, DETECTRON2).cell_anchors[0]
    if (
        len(stored) != 1
        or stored[0].shape != wanted.shape
        or not torch.allclose(stored[0], wanted, atol=1e-3)
    ):
        raise ValueError(
            f"{source} has other anchors than sizes {config.model.anchor_sizes} and ratios "
            f"{config.model.aspect_ratios}: set model.anchor_sizes=[...] and model.aspect_ratios=[...]"
        )
