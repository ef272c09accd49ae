"""Settings that change a detector's time and memory. They change its results only by rounding."""

import torch

from backbones.folding import set_folding
from backbones.fuse import fuse
from backbones.kernels.winograd import use_winograd
from backbones.regions import CPU_REGIONS

from ..settings import Section
from .faster_rcnn import C4FasterRCNN


class Speed(Section):
    """Speed settings. They may change when a run resumes or starts from other weights.

    shared_projection: run the 1x1 convolutions that open conv5_x once on the map, not once a region.
    sparse_roi_align: compute RoIAlign by our kernels: as a sparse product on a CPU, by Triton on a GPU.
    fold_norms: run a frozen norm as part of its convolution in training.
    activation_checkpointing: recompute activations in the backward pass: less memory for more time. With dropout or
        stochastic depth in conv5_x it saves less, since the head then takes all regions at once.
    """

    shared_projection: bool = True
    sparse_roi_align: bool = True
    fold_norms: bool = True
    activation_checkpointing: bool = False


def apply_speed(model: C4FasterRCNN, speed: Speed) -> C4FasterRCNN:
    """Apply the settings to `model` in place, and return it."""
    heads = model.roi_heads
    heads.box_roi_pool.sparse = speed.sparse_roi_align
    heads.box_head.shared_projection = speed.shared_projection
    for part in (model.backbone, heads.box_head):
        part.activation_checkpointing = speed.activation_checkpointing
        set_folding(part, speed.fold_norms)
    return model


def optimize(
    model: C4FasterRCNN, *, winograd: bool = True, dtype: torch.dtype = torch.float32
) -> C4FasterRCNN:
    """Make a faster copy for inference. Its results are equal up to rounding, and `model` does not change.

    Batch norms are folded into convolutions, and tensors are laid out channels-last. On a CPU, the RoI head's 3x3
    convolutions become Winograd products where a measurement finds these faster. The measurement may choose
    differently next time: set `winograd=False` if two evaluations must agree to the last bit.
    dtype: of trunk, RoI head and the RPN's 3x3 convolution. The layers behind them stay as they are, since 16 bits are
    too few to rank scores or to decode boxes by.
    A model that is optimised already only gets what it lacks: the same call again changes nothing.
    """
    fast: C4FasterRCNN = fuse(model)
    parameter = next(fast.parameters())
    if dtype != torch.float32:
        for part in (fast.backbone, fast.roi_heads.box_head, fast.rpn.head.conv):
            part.to(dtype)
    elif winograd and parameter.device.type == "cpu" and parameter.dtype == torch.float32:
        use_winograd(fast.roi_heads.box_head.stage5, CPU_REGIONS)
    return fast.to(memory_format=torch.channels_last)


def compile_model(model: C4FasterRCNN) -> None:
    """Run trunk and RoI head, without the first block of conv5_x, through torch.compile from now on.

    Sizes are symbolic, so one compilation serves images of all sizes. torch compiles once more for each exception
    that occurs: a batch of several images, a first image that is square, fewer than 16 regions.
    """
    model.backbone.compile(dynamic=True)
    for block in model.roi_heads.box_head.stage5[1:]:
        block.compile(dynamic=True)
