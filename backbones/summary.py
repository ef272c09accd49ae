"""Facts about a backbone: its channels, its costs, and the weights and norms that it accepts."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from .backbone import CROP, Preprocessing
from .cut.libraries import CUT_NORMS
from .layers import NORMS
from .registry import backbone_options, create_backbone
from .weights import published_weights, timm_tags


@dataclass(frozen=True)
class Summary:
    """One row of the table of backbones.

    parameters: the number in trunk and head, without a classifier.
    trunk_macs: multiply-accumulates per image.
    head_macs: multiply-accumulates per (C4, 14, 14) region, with nothing shared between regions.
    weights: names that `weights=` takes.
    norms: names that `norm=` takes.
    preprocessing: that of the network when it is built without weights.
    """

    name: str
    c4: int
    c5: int
    parameters: int
    trunk_macs: int
    head_macs: int
    weights: tuple[str, ...]
    norms: tuple[str, ...]
    preprocessing: Preprocessing


def summarize(name: str, image_size: tuple[int, int] = (800, 1216)) -> Summary:
    """The facts about a named backbone, for an image of (height, width) pixels.

    The backbone runs on the meta device, which computes no numbers.
    """
    with torch.device("meta"):
        backbone = create_backbone(name).eval()
        trunk, head = backbone.trunk, backbone.roi_head
        image, region = torch.zeros(1, 3, *image_size), torch.zeros(1, trunk.out_channels, CROP, CROP)
        trunk_macs, head_macs = multiply_accumulates(trunk, image), multiply_accumulates(head, region)
    library, _, network = name.rpartition("/")
    weights = timm_tags(network) if library == "timm" else published_weights(network)
    norms = CUT_NORMS if library else tuple(NORMS)
    return Summary(
        name,
        trunk.out_channels,
        head.out_channels,
        count_parameters(backbone),
        trunk_macs,
        head_macs,
        tuple(weights),
        norms if "norm" in backbone_options(name) else (),
        backbone.preprocessing,
    )


def count_parameters(module: nn.Module) -> int:
    """The number of parameters. Factors and statistics of a frozen norm are buffers, so they do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def _fused_flop(image: list[int], weight: list[int], *_: object, out_shape: list[int]) -> int:
    """FLOP of a convolution with a ReLU in it, from the shapes of its arguments."""
    return conv_flop_count(image, weight, out_shape)


# torch's counter does not know these operations of cuDNN.
_FUSED = dict.fromkeys(
    (torch.ops.aten.cudnn_convolution_relu, torch.ops.aten.cudnn_convolution_add_relu), _fused_flop
)


def multiply_accumulates(module: nn.Module, *inputs: object) -> int:
    """Multiply-accumulates of convolutions and matrix products in one forward pass, in evaluation mode.

    torch's flop counter counts them; a multiply-accumulate is two FLOP. The meta device works, too.
    """
    was_training = module.training
    module.eval()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_FUSED) as counter:
        module(*inputs)
    module.train(was_training)
    return counter.get_total_flops() // 2
