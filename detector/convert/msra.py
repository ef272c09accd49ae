"""MSRA's ImageNet ResNets as Caffe2 and Detectron publish them: R-50.pkl, R-101.pkl, R-152.pkl.

Their batch norms are folded to y = s * x + b. Ours compute (x - mean) * weight / sqrt(var + eps) + bias. So weight = s,
bias = b, mean = 0 and var = 1 - eps, which makes the square root 1. ResNet-50's stem also has a convolution bias c:
s * (x + c) + b has mean = -c.
"""

import torch

from backbones.weights import NameTable, rename

from .architecture import name_resnet
from .converted import CAFFE_RESNET, BackboneWeights, Converted
from .read import ForeignFile

# The epsilon of our batch norms, frozen or not.
EPS = 1e-5

_BLOCK = r"^res(\d)_(\d+)_branch"
_TO_OURS: NameTable = (
    (r"^conv1_w$", "trunk.stage1.conv1.weight"),
    (r"^res_conv1_bn_", "trunk.stage1.bn1."),
    (_BLOCK + "1_w$", r"stage\1.\2.shortcut.conv.weight"),
    (_BLOCK + "1_bn_", r"stage\1.\2.shortcut.bn."),
    (_BLOCK + "2a_w$", r"stage\1.\2.branch.conv1.weight"),
    (_BLOCK + "2a_bn_", r"stage\1.\2.branch.bn1."),
    (_BLOCK + "2b_w$", r"stage\1.\2.branch.conv2.weight"),
    (_BLOCK + "2b_bn_", r"stage\1.\2.branch.bn2."),
    (_BLOCK + "2c_w$", r"stage\1.\2.branch.conv3.weight"),
    (_BLOCK + "2c_bn_", r"stage\1.\2.branch.bn3."),
    (r"^stage2\.", "trunk.stage2.blocks."),
    (r"^stage([34])\.", r"trunk.stage\1."),
    (r"^stage5\.", "roi_head.stage5."),
    (r"\.s$", ".weight"),
    (r"\.b$", ".bias"),
)
# Prefixes of the layers that a detector of the first Detectron has after the network's.
_DETECTOR = ("conv_rpn", "rpn_", "bbox_pred", "cls_score", "fpn_")


def is_msra(names: set[str]) -> bool:
    return {"conv1_w", "res2_0_branch2a_w"} <= names


def convert_msra(file: ForeignFile) -> Converted:
    """Convert to weights of a ResNet with its stride in the 1x1 convolutions, which expects BGR in 0..255.

    ValueError: the file is a detector, or holds no ResNet of a known depth.
    """
    if any(name.startswith(_DETECTOR) for name in file.tensors):
        raise ValueError(
            f"{file.path} is a detector of the first Detectron, whose conventions (boxes one pixel wider, rounded anchors) "
            "this program does not have; accepted: ImageNet's R-50.pkl, R-101.pkl, R-152.pkl"
        )
    used = ("conv1_", "res_conv1_", "res2_", "res3_", "res4_", "res5_")
    blobs = {name: value for name, value in file.tensors.items() if name.startswith(used)}
    stem_bias = blobs.pop("conv1_b", None)
    state = rename(blobs, _TO_OURS)
    for name, value in list(state.items()):
        if name.endswith(".bias"):
            norm = name.removesuffix("bias")
            state[f"{norm}running_mean"] = torch.zeros_like(value)
            state[f"{norm}running_var"] = torch.full_like(value, 1 - EPS)
    if stem_bias is not None:
        state["trunk.stage1.bn1.running_mean"] = -stem_bias
    backbone = name_resnet(state, str(file.path)) | {"stride_in": "1x1"}
    return Converted(BackboneWeights(state, backbone, CAFFE_RESNET))
