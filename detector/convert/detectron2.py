"""Convert Detectron2's C4 detectors: their names, their order of classes, and their conventions as our options."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.weights import NameTable, rename

from ..checkpoint import Checkpoint
from ..config import parse_config
from ..files import read_text
from ..model.anchors import MapAnchors
from ..model.conventions import DETECTRON2
from ..yaml_text import parse_yaml
from .architecture import name_resnet
from .class_names import choose_class_names
from .converted import CAFFE_RESNET, Converted, check_fits, leave_out, refuse_prefixes
from .read import ForeignFile

# Options of the config's section `model` in which Detectron2's C4 models differ from torchvision's detector.
CONVENTIONS: dict[str, Any] = {
    "conventions": {"name": "detectron2"},
    "rpn_pre_nms_top_n_train": 12000,
    "rpn_pre_nms_top_n_test": 6000,
    "rpn_post_nms_top_n_train": 2000,
    "rpn_post_nms_top_n_test": 1000,
}
BACKBONE_CONVENTIONS = {"stride_in": "1x1", "norm": "frozen", "frozen_stages": 2}

# Settings of Detectron2's config, and ours of the same meaning in the section `model`.
SETTINGS = {
    "INPUT.MIN_SIZE_TEST": "min_size",
    "INPUT.MAX_SIZE_TEST": "max_size",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": "rpn_pre_nms_top_n_test",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "rpn_post_nms_top_n_test",
    "MODEL.RPN.NMS_THRESH": "rpn_nms_thresh",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "box_score_thresh",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": "box_nms_thresh",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": "bbox_reg_weights",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": "conventions.roi_align_sampling_ratio",
    "TEST.DETECTIONS_PER_IMAGE": "box_detections_per_img",
}
# Under this key our exports hold the settings that their config needs. Detectron2 passes over it.
STORED = "fasterrcnn_c4_settings"
LICENCE = "note: Detectron2's model zoo has the licence CC BY-SA 3.0, and so have files converted from there"

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
    "roi_heads.res5.norm.": "its res5 ends with one more norm (MoCo's Res5ROIHeadsExtraNorm), which ours has not",
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
    for kind in ("weight", "bias"):
        scores, deltas = f"{PREDICTOR}.cls_score.{kind}", f"{PREDICTOR}.bbox_pred.{kind}"
        learned[scores], learned[deltas] = learned[scores].roll(-1, dims=0), learned[deltas][4:]
    return rename(rename(learned, AS_BACKBONE), _TO_THEIRS)


def background_first(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the predictor's rows into torchvision's order, in which background is label 0.

    cls_score: (K, C5), background moved from last to first. bbox_pred: (4(K-1), C5) -> (4K, C5), zeros for background.
    """
    moved = dict(state)
    for name, rows in state.items():
        if name.startswith(f"{PREDICTOR}.cls_score."):
            moved[name] = rows.roll(1, dims=0)
        if name.startswith(f"{PREDICTOR}.bbox_pred."):
            moved[name] = torch.cat([torch.zeros_like(rows[:4]), rows])
    return moved


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings of a Detectron2 config file under dotted names, over those of its `_BASE_`. No code in it runs.

    FileNotFoundError: a file is missing. ValueError: it is no such file.
    """

    def flat(values: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for key, value in values.items():
            inside = flat(value) if isinstance(value, dict) else {"": value}
            found |= {f"{key}.{name}".rstrip("."): each for name, each in inside.items()}
        return found

    try:
        settings = flat(parse_yaml(read_text(path, 2**20)))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no config of Detectron2: {error}") from None
    base = settings.pop("_BASE_", None)
    return (read_settings(Path(path).parent / str(base)) if base else {"INPUT.FORMAT": "BGR"}) | settings


def convert_detectron2(
    file: ForeignFile,
    *,
    class_names: tuple[str, ...] | None = None,
    overrides: tuple[str, ...] = (),
    settings: dict[str, Any] | None = None,
) -> Converted:
    """Convert a C4 detector. Its config has Detectron2's conventions; overrides: key=value settings of our config.

    settings: of Detectron2's config under dotted names, such as {"INPUT.FORMAT": "RGB"}. What they do not say, the file
    may say. What neither says has Detectron2's default, and a note names it.
    ValueError: another architecture, other anchors, or the number of class names does not fit.
    """
    source = str(file.path)
    state, notes = leave_out(file.tensors, _OTHER_HEADS)
    refuse_prefixes(state, _OTHERS, source)
    pixels = {
        f"MODEL.{key.upper()}": state[key].flatten() for key in ("pixel_mean", "pixel_std") if key in state
    }
    # By way of text: 103.53, not 103.52999877929688.
    stored = {name: [float(str(v)) for v in values.numpy()] for name, values in pixels.items()}
    ours = file.rest.get(STORED)
    said = {**(ours if isinstance(ours, dict) else {}), **stored, **(settings or {})}
    mean, std = said.get("MODEL.PIXEL_MEAN", CAFFE_RESNET.mean), said.get("MODEL.PIXEL_STD", CAFFE_RESNET.std)
    # ImageNet's means fall from red to blue.
    assumed = {
        "INPUT.FORMAT": "RGB" if "INPUT.FORMAT" not in said and mean[0] > mean[-1] else "BGR",
        "MODEL.PIXEL_MEAN": mean,
        "MODEL.PIXEL_STD": std,
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
    }
    told = _as_overrides(assumed | said)
    ours, anchors = detectron2_to_ours(state), tuple(v for name, v in state.items() if "cell_anchors" in name)
    checkpoint = build_checkpoint(ours, CONVENTIONS, (class_names,), (*told, *overrides), source, anchors)
    if unsaid := [f"{name} {value}" for name, value in assumed.items() if name not in said]:
        notes += (f"assumed, since the file does not say it: {', '.join(unsaid)}; see --config-file",)
    return Converted(checkpoint, (*notes, LICENCE))


def _as_overrides(said: dict[str, Any]) -> list[str]:
    """Settings of Detectron2's config as `key=value` overrides of ours."""
    pooler = said.get("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2")
    ours = {
        "preprocessing.channel_order": str(said["INPUT.FORMAT"]).lower(),
        "preprocessing.mean": said["MODEL.PIXEL_MEAN"],
        "preprocessing.std": said["MODEL.PIXEL_STD"],
        "backbone.stride_in": "1x1" if said["MODEL.RESNETS.STRIDE_IN_1X1"] else "3x3",
        "roi_pool": "max" if pooler == "ROIPool" else "align",
        "conventions.roi_align_aligned": pooler == "ROIAlignV2",
    }
    for name, key in (("SIZES", "anchor_sizes"), ("ASPECT_RATIOS", "aspect_ratios")):
        if lists := said.get(f"MODEL.ANCHOR_GENERATOR.{name}"):
            ours[key] = lists[0] if isinstance(lists, list) else lists
    ours |= {key: said[name] for name, key in SETTINGS.items() if name in said}
    return [f"model.{key}={json.dumps(value, default=str)}" for key, value in ours.items()]


def build_checkpoint(
    state: dict[str, Tensor],
    conventions: dict[str, Any],
    class_names: tuple[Sequence[str] | None, ...],
    overrides: tuple[str, ...],
    source: str,
    anchors: tuple[Tensor, ...] = (),
) -> Checkpoint:
    """A checkpoint of our weights and the config that they need. ValueError: they do not fit each other.

    state: under our detector's names. class_names: candidates, of which `choose_class_names` takes the first.
    anchors: those that the file holds, each (A, 4). Their order is: for each size, for each ratio h/w.
    """
    names = choose_class_names(_count_classes(state, source), *class_names)
    backbone = name_resnet(rename(state, AS_BACKBONE), source) | BACKBONE_CONVENTIONS
    model = {"backbone": backbone, **conventions, "preprocessing": asdict(CAFFE_RESNET)}
    config = parse_config({"model": model}, overrides, source=f"the config for {source}")
    sizes, ratios = config.model.anchor_sizes, config.model.aspect_ratios
    wanted = MapAnchors(sizes, ratios, DETECTRON2).cell_anchors[0]
    fit = all(a.shape == wanted.shape and torch.allclose(a, wanted, atol=1e-3) for a in anchors)
    if not fit or len(state.get("rpn.head.cls_logits.bias", wanted)) != len(wanted):
        raise ValueError(
            f"{source} has other anchors than sizes {sizes} and ratios {ratios}: "
            "set model.anchor_sizes=[...] and model.aspect_ratios=[...]"
        )
    checkpoint = Checkpoint(state, config, names, config.model.preprocessing or CAFFE_RESNET)
    check_fits(checkpoint, source)
    return checkpoint


def _count_classes(state: dict[str, Tensor], source: str) -> int:
    """The number of foreground classes of a predictor, cls_score (K, C5) and bbox_pred (4K, C5).

    ValueError: a layer is missing, or the file does not have four rows of deltas per class.
    """
    scores, deltas = (state.get(f"{PREDICTOR}.{layer}.weight") for layer in ("cls_score", "bbox_pred"))
    if scores is None or deltas is None:
        raise ValueError(
            f"{source} is no C4 detector: it has no box head {PREDICTOR}, of scores and of boxes"
        )
    # The background's rows of deltas are ours.
    num_classes, rows = len(scores) - 1, len(deltas) - 4
    if rows != 4 * num_classes:
        raise ValueError(
            f"{source}: {num_classes} classes and background need {4 * num_classes} rows of box deltas, four a class; "
            f"it has {rows}"
        )
    return num_classes
