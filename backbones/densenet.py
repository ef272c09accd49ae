"""DenseNet (Huang et al. 2016, arXiv 1608.06993), Table 1: four dense blocks, cut before the last transition's pool."""

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .backbone import MAX_WIDTH, Backbone, RoIHead, Trunk
from .layers import conv, init_weights, norm_layer
from .messages import check_count
from .registry import register_variants
from .weights import is_published, load_weights

Norm = Callable[[int], nn.Module]
# Channels of a layer's 1x1 convolution, in growth rates (DenseNet-B).
BOTTLENECK = 4
FULL_WIDTH = 64


class DenseLayer(nn.Module):
    """[x, f(x)]: a dense layer appends `growth` channels to its input."""

    def __init__(self, in_channels: int, growth: int, norm: Norm) -> None:
        super().__init__()
        layers = OrderedDict(
            norm1=norm(in_channels),
            relu1=nn.ReLU(inplace=True),
            conv1=conv(in_channels, BOTTLENECK * growth, 1),
            norm2=norm(BOTTLENECK * growth),
            relu2=nn.ReLU(inplace=True),
            conv2=conv(BOTTLENECK * growth, growth, 3),
        )
        self.branch = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + growth, H, W)"""
        return torch.cat((x, self.branch(x)), dim=1)


def dense_block(in_channels: int, depth: int, growth: int, norm: Norm) -> nn.Sequential:
    """(N, C, H, W) -> (N, C + depth * growth, H, W)"""
    return nn.Sequential(*(DenseLayer(in_channels + k * growth, growth, norm) for k in range(depth)))


def transition(in_channels: int, norm: Norm) -> nn.Sequential:
    """The layers between two blocks, without the pool: (N, C, H, W) -> (N, C // 2, H, W) (DenseNet-C)."""
    layers = OrderedDict(
        norm=norm(in_channels), relu=nn.ReLU(inplace=True), conv=conv(in_channels, in_channels // 2, 1)
    )
    return nn.Sequential(layers)


def halve() -> nn.AvgPool2d:
    """(N, C, H, W) -> (N, C, floor(H/2), floor(W/2)), as in the published network."""
    return nn.AvgPool2d(2, stride=2)


def dense_stages(
    growth: int, depths: tuple[int, int, int, int], norm: Norm
) -> tuple[list[nn.Sequential], int, int]:
    """The five stages, C4 and C5. The last transition ends stage 4, and its pool opens stage 5."""
    stem = 2 * growth
    out1 = stem + depths[0] * growth
    out2 = out1 // 2 + depths[1] * growth
    out3 = out2 // 2 + depths[2] * growth
    c4, c5 = out3 // 2, out3 // 2 + depths[3] * growth
    stages = (
        OrderedDict(
            conv0=nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False),
            norm0=norm(stem),
            relu0=nn.ReLU(inplace=True),
        ),
        OrderedDict(
            pool=nn.MaxPool2d(3, stride=2, padding=1),
            block=dense_block(stem, depths[0], growth, norm),
        ),
        OrderedDict(
            transition=transition(out1, norm),
            pool=halve(),
            block=dense_block(out1 // 2, depths[1], growth, norm),
        ),
        OrderedDict(
            transition=transition(out2, norm),
            pool=halve(),
            block=dense_block(out2 // 2, depths[2], growth, norm),
            last_transition=transition(out3, norm),
        ),
        OrderedDict(
            pool=halve(),
            block=dense_block(c4, depths[3], growth, norm),
            norm=norm(c5),
            relu=nn.ReLU(inplace=True),
        ),
    )
    return [nn.Sequential(layers) for layers in stages], c4, c5


# torchvision's parameter names -> ours. The published files write "norm.1" in place of "norm1".
TORCHVISION_NAMES = (
    (r"\.(norm|relu|conv)\.([12])\.", r".\1\2."),
    (r"^features\.(conv0|norm0)\.", r"trunk.stage1.\1."),
    (r"^features\.denseblock1\.", "trunk.stage2.block."),
    (r"^features\.transition1\.", "trunk.stage3.transition."),
    (r"^features\.denseblock2\.", "trunk.stage3.block."),
    (r"^features\.transition2\.", "trunk.stage4.transition."),
    (r"^features\.denseblock3\.", "trunk.stage4.block."),
    (r"^features\.transition3\.", "trunk.stage4.last_transition."),
    (r"^features\.denseblock4\.", "roi_head.stage5.block."),
    (r"^features\.norm5\.", "roi_head.stage5.norm."),
)
# torchvision counts layers from 1, we count from 0.
TORCHVISION_NAMES += tuple((rf"\.block\.denselayer{k + 1}\.", f".block.{k}.branch.") for k in range(48))


def densenet(
    name: str,
    growth: int,
    depths: tuple[int, int, int, int],
    *,
    width: int = FULL_WIDTH,
    norm: str = "batch",
    weights: str | None = None,
    frozen_stages: int = 0,
) -> Backbone:
    """DenseNet-BC: a stem with 2 * growth channels, and blocks of `depths` layers.

    trunk: (N, 3, H, W) -> (N, C4, h, w) with h = floor(floor(ceil(H/4) / 2) / 2), and w likewise. The published
    network's average pools drop an odd last row, where other families round up. At a multiple of 16, h = H/16;
    detectors pad to such sizes.

    A value that is not accepted is a ValueError.

    growth: channels that each layer adds.
    width: 64 is the published network; every number of channels is multiplied by width / 64.
    norm: "batch", "group", "sync" (batch norm over all processes, on GPUs), or "frozen" (with weights only).
    weights: None, a published name ("imagenet_v1": torchvision's), or a file; "deferred" promises a later
        `load_state_dict`.
    frozen_stages: stages 1..frozen_stages take no gradient and keep their statistics.
    """
    step = FULL_WIDTH // math.gcd(growth, FULL_WIDTH)
    check_count("width", width, MAX_WIDTH)
    if width % step:
        raise ValueError(f"width is {width!r}; accepted by {name}: a positive multiple of {step}")
    if is_published(weights) and width != FULL_WIDTH:
        raise ValueError(f"weights {weights!r} were trained with width {FULL_WIDTH}; got width {width}")
    stages, c4, c5 = dense_stages(growth * width // FULL_WIDTH, depths, norm_layer(norm, weights))
    backbone = Backbone(name, Trunk(stages[:4], out_channels=c4), RoIHead(stages[4], out_channels=c5))
    init_weights(backbone)
    load_weights(backbone, weights, published=TORCHVISION_NAMES)
    return backbone.freeze(frozen_stages)


DEPTHS = {
    121: (32, (6, 12, 24, 16)),
    161: (48, (6, 12, 36, 24)),
    169: (32, (6, 12, 32, 32)),
    201: (32, (6, 12, 48, 32)),
}
register_variants(densenet, {f"densenet{depth}": layout for depth, layout in DEPTHS.items()})
