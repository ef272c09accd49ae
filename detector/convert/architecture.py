"""Which of our ResNets a state dict belongs to, read from its names and shapes."""

import re
from typing import Any

from torch import Tensor

from backbones.residual import bottleneck
from backbones.resnet import LAYOUTS

# (whether blocks have three convolutions, blocks of conv2_x .. conv5_x) -> name
_RESNETS = {(block is bottleneck, depths): f"resnet{depth}" for depth, (block, depths) in LAYOUTS.items()}
_WIDTH = 64


def name_resnet(state: dict[str, Tensor], source: str) -> dict[str, Any]:
    """The options of `create_backbone` for a state dict's ResNet: `name`, and `width` if it is not 64.

    state: tensors under a backbone's names (trunk., roi_head.). source: the name of the file in errors.
    ValueError: it holds no ResNet, or one of an unknown depth.
    """
    stem = state.get("trunk.stage1.conv1.weight")
    if stem is None:
        raise ValueError(f"{source} holds no ResNet: a stem convolution is missing")
    blocks: dict[int, set[int]] = {stage: set() for stage in (2, 3, 4, 5)}
    for name in state:
        found = re.match(r"(?:trunk|roi_head)\.stage(\d)(?:\.blocks)?\.(\d+)\.branch\.", name)
        if found:
            blocks[int(found[1])].add(int(found[2]))
    depths = tuple(len(indices) for indices in blocks.values())
    is_bottleneck = "trunk.stage2.blocks.0.branch.conv3.weight" in state
    name = _RESNETS.get((is_bottleneck, depths))
    if name is None:
        kind = "three" if is_bottleneck else "two"
        raise ValueError(
            f"{source} holds no ResNet of a known depth: stages of {', '.join(map(str, depths))} blocks of {kind} "
            f"convolutions; accepted: {', '.join(_RESNETS.values())}"
        )
    width = stem.shape[0]
    return {"name": name} if width == _WIDTH else {"name": name, "width": width}
