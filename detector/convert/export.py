"""Export a C4 detector to Detectron2: tensors under its names, and the settings that its config needs."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.weights import rename

from ..checkpoint import Checkpoint
from ..files import write_atomically
from ..model.conventions import DETECTRON2
from .architecture import name_resnet
from .detectron2 import AS_BACKBONE, ours_to_detectron2

AUTHOR = "fasterrcnn-c4"


def export_detectron2(checkpoint: Checkpoint, source: str) -> dict[str, Tensor]:
    """The tensors under Detectron2's names, with the RPN's channels in its order: for each size, for each ratio.

    ValueError: the backbone is not a ResNet.
    """
    # Detectron2 builds ResNets only; this raises an error for other networks.
    name_resnet(rename(checkpoint.state_dict, AS_BACKBONE), source)
    state = checkpoint.state_dict
    if checkpoint.config.model.conventions.anchor_order != "size_major":
        state = _size_major(state, checkpoint)
    return ours_to_detectron2(state)


def _size_major(state: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Reorder the RPN's output channels from "ratio_major" to "size_major"."""
    model = checkpoint.config.model
    shape = (len(model.aspect_ratios), len(model.anchor_sizes))
    order = torch.arange(shape[0] * shape[1]).view(shape).T.flatten()
    moved = dict(state)
    for layer, rows in (("cls_logits", 1), ("bbox_pred", 4)):
        for kind in ("weight", "bias"):
            name = f"rpn.head.{layer}.{kind}"
            moved[name] = state[name].unflatten(0, (-1, rows))[order].flatten(0, 1)
    return moved


def save_detectron2(path: str | Path, state: dict[str, Tensor]) -> None:
    """Write a .pkl as in Detectron2's model zoo, or a .pth. ValueError: another suffix."""
    path = Path(path)
    if path.suffix not in (".pkl", ".pth"):
        raise ValueError(f"{path}: Detectron2 reads .pkl and .pth")

    def write(temporary: Path) -> None:
        if path.suffix == ".pth":
            torch.save({"model": state}, temporary)
            return
        arrays = {name: value.cpu().contiguous().numpy() for name, value in state.items()}
        with open(temporary, "wb") as file:
            pickle.dump({"model": arrays, "__author__": AUTHOR}, file, protocol=2)

    write_atomically(path, write)


def detectron2_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of Detectron2's config that these weights need. All others are as in its C4 recipes."""
    model, image = checkpoint.config.model, checkpoint.preprocessing
    # Detectron2's images are in 0..255.
    to_bytes = 255 / image.scale
    backbone = name_resnet(rename(checkpoint.state_dict, AS_BACKBONE), "the checkpoint")
    width = backbone.get("width", 64)
    is_basic = backbone["name"] in ("resnet18", "resnet34")
    settings = {
        "INPUT.FORMAT": image.channel_order.upper(),
        "INPUT.MIN_SIZE_TEST": model.min_size,
        "INPUT.MAX_SIZE_TEST": model.max_size,
        "MODEL.PIXEL_MEAN": [round(v * to_bytes, 4) for v in image.mean],
        "MODEL.PIXEL_STD": [round(v * to_bytes, 4) for v in image.std],
        "MODEL.RESNETS.DEPTH": int(backbone["name"].removeprefix("resnet")),
        "MODEL.RESNETS.STRIDE_IN_1X1": model.backbone.get("stride_in", "3x3") == "1x1",
        "MODEL.ANCHOR_GENERATOR.SIZES": [list(model.anchor_sizes)],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [list(model.aspect_ratios)],
        "MODEL.ROI_HEADS.NUM_CLASSES": len(checkpoint.class_names),
    }
    if is_basic or width != 64:
        settings |= {"MODEL.RESNETS.STEM_OUT_CHANNELS": width, "MODEL.RESNETS.WIDTH_PER_GROUP": width}
        settings |= {"MODEL.RESNETS.RES2_OUT_CHANNELS": width * (1 if is_basic else 4)}
    return settings


def other_conventions(checkpoint: Checkpoint) -> list[str]:
    """A text for each convention in which the detector differs from Detectron2.

    anchor_order is not among them, because the export changes it.
    """
    ours = checkpoint.config.model.conventions
    return [
        f"{name} {getattr(ours, name)!r} (Detectron2: {value!r})"
        for name, value in DETECTRON2
        if getattr(ours, name) != value and name != "anchor_order"
    ]


def write_detectron2(checkpoint: Checkpoint, source: str, output: str) -> list[str]:
    """Write a detector for Detectron2. Returns lines to print: settings of its config, and what will differ there."""
    state = export_detectron2(checkpoint, source)
    save_detectron2(output, state)
    lines = [f"{output}: {len(state)} tensors, for a C4 config of Detectron2 with"]
    lines += [f"  {name} {value}" for name, value in detectron2_settings(checkpoint).items()]
    if differing := other_conventions(checkpoint):
        lines.append(f"its numbers there will differ, since it was trained with {', '.join(differing)}")
    return lines


# The choices of `--to`. Each function writes the checkpoint read from `source` to `output`, and returns lines to print.
EXPORTS: dict[str, Callable[[Checkpoint, str, str], list[str]]] = {"detectron2": write_detectron2}
