"""Export a C4 detector to Detectron2: tensors under its names, and the settings that its config needs."""

import pickle
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.registry import backbone_options
from backbones.weights import rename

from ..checkpoint import Checkpoint
from ..files import write_atomically
from ..model.conventions import DETECTRON2
from .architecture import name_resnet
from .detectron2 import AS_BACKBONE, SETTINGS, STORED, ours_to_detectron2

# The options of our ResNets that Detectron2 has no setting for. It computes their defaults.
_FIXED = ("shortcut", "order", "branch_end", "stem_pool")
_NORMS = {"frozen": "FrozenBN", "batch": "BN", "sync": "SyncBN", "group": "GN"}


def resnet_options(checkpoint: Checkpoint, source: str) -> dict[str, Any]:
    """All options of the checkpoint's ResNet, as `backbones.resnet.resnet` explains them; `name`: "resnet" and its depth.

    ValueError: Detectron2 cannot compute this network.
    """
    given = checkpoint.config.model.backbone
    name = name_resnet(rename(checkpoint.state_dict, AS_BACKBONE), source)["name"]
    plain, own = ({o: p.default for o, p in backbone_options(n).items()} for n in (name, given["name"]))
    options = {**plain, **own, **given, "name": name}
    wrong = [option for option in _FIXED if options[option] != plain[option]]
    if wrong:
        got, accepted = (", ".join(f"{o}={v[o]!r}" for o in wrong) for v in (options, plain))
        raise ValueError(
            f"{source}: Detectron2 cannot compute {given['name']} with {got}; accepted: a ResNet with {accepted}"
        )
    return options


def export_detectron2(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors under Detectron2's names, with the RPN's channels in its order: for each size, for each ratio."""
    state, model, image = dict(checkpoint.state_dict), checkpoint.config.model, checkpoint.preprocessing
    if model.conventions.anchor_order != "size_major":
        shape = (len(model.aspect_ratios), len(model.anchor_sizes))
        order = torch.arange(shape[0] * shape[1]).view(shape).T.flatten()
        for layer, rows in (("cls_logits", 1), ("bbox_pred", 4)):
            for kind in ("weight", "bias"):
                name = f"rpn.head.{layer}.{kind}"
                state[name] = state[name].unflatten(0, (-1, rows))[order].flatten(0, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 / image.scale for values in (image.mean, image.std))
    return {**ours_to_detectron2(state), "pixel_mean": mean, "pixel_std": std}


def save_detectron2(path: str | Path, state: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Write a .pkl as in Detectron2's model zoo, or a .pth, with the settings beside the tensors.

    ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix not in (".pkl", ".pth"):
        raise ValueError(f"{path}: Detectron2 reads .pkl and .pth")

    def write(temporary: Path) -> None:
        if path.suffix == ".pth":
            torch.save({"model": state, STORED: settings}, temporary)
            return
        arrays = {name: value.cpu().contiguous().numpy() for name, value in state.items()}
        with open(temporary, "wb") as file:
            pickle.dump({"model": arrays, "__author__": "fasterrcnn-c4", STORED: settings}, file, protocol=2)

    write_atomically(path, write)


def detectron2_settings(checkpoint: Checkpoint, source: str) -> dict[str, Any]:
    """The settings of Detectron2's config that these weights need to detect. All others are as in its C4 recipes.

    ValueError: Detectron2 cannot compute the backbone.
    """
    model, image = checkpoint.config.model, checkpoint.preprocessing
    backbone = resnet_options(checkpoint, source)
    # Detectron2's images are in 0..255.
    to_bytes, width = 255 / image.scale, backbone["width"]
    is_bottleneck = backbone["name"] not in ("resnet18", "resnet34")
    pooler = "ROIPool" if model.roi_pool == "max" else "ROIAlign" + "V2" * model.conventions.roi_align_aligned
    return {
        "INPUT.FORMAT": image.channel_order.upper(),
        "MODEL.PIXEL_MEAN": [round(v * to_bytes, 4) for v in image.mean],
        "MODEL.PIXEL_STD": [round(v * to_bytes, 4) for v in image.std],
        "MODEL.RESNETS.DEPTH": int(backbone["name"].removeprefix("resnet")),
        "MODEL.RESNETS.NORM": _NORMS[backbone["norm"]],
        "MODEL.RESNETS.STRIDE_IN_1X1": backbone["stride_in"] == "1x1",
        "MODEL.RESNETS.NUM_GROUPS": backbone["groups"],
        "MODEL.RESNETS.WIDTH_PER_GROUP": width * backbone["width_per_group"] // 64,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": width,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": width * 4 if is_bottleneck else width,
        "MODEL.ANCHOR_GENERATOR.SIZES": [list(model.anchor_sizes)],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [list(model.aspect_ratios)],
        "MODEL.ROI_HEADS.NUM_CLASSES": len(checkpoint.class_names),
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": pooler,
        **{name: attrgetter(ours)(model) for name, ours in SETTINGS.items()},
    }


def differences(checkpoint: Checkpoint) -> list[str]:
    """A text for each setting in which the detector differs from Detectron2, and that its config cannot say."""
    model = checkpoint.config.model
    settled = ("anchor_order", "roi_align_aligned", "roi_align_sampling_ratio")
    ours = [(name, getattr(model.conventions, name), v) for name, v in DETECTRON2 if name not in settled]
    ours += [(name, getattr(model, name), 0) for name in ("rpn_score_thresh", "class_agnostic_nms")]
    return [f"{name} {value!r} (Detectron2: {theirs!r})" for name, value, theirs in ours if value != theirs]


def write_detectron2(checkpoint: Checkpoint, source: str, output: str) -> list[str]:
    """Write a detector for Detectron2. Returns lines to print: settings of its config, and what will differ there.

    source: the checkpoint's file, in errors. ValueError: Detectron2 cannot compute the backbone.
    """
    state, settings = export_detectron2(checkpoint), detectron2_settings(checkpoint, source)
    save_detectron2(output, state, settings)
    lines = [f"{output}: {len(state)} tensors, for a C4 config of Detectron2 with"]
    lines += [f"  {name} {value}" for name, value in settings.items()]
    if settings["MODEL.RESNETS.DEPTH"] < 50:
        lines.append(
            "a config's res5 has bottlenecks: build this network in Python, with ResNet.make_stage(BasicBlock, ...)"
        )
    if differing := differences(checkpoint):
        lines.append(f"its numbers there will differ, since it was trained with {', '.join(differing)}")
    return lines


# The choices of `--to`. Each function writes the checkpoint read from `source` to `output`, and returns lines to print.
EXPORTS = {"detectron2": write_detectron2}
