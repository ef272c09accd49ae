"""CIFAR ResNets for 32x32 images (He et al. 2015, arXiv 1512.03385, and 2016, arXiv 1603.05027): classification only.

They have three stages, of 16, 32 and 64 channels at strides 1, 2 and 4. They have no stride 16, so they are not in the
registry.
"""

from collections import OrderedDict

from torch import nn

from .branch_ends import linear_rule
from .folding import use_folding
from .layers import conv, init_weights, norm_layer
from .residual import ORIGINAL, BlockOptions, basic, bottleneck, residual_stage

# The depths in the papers. From 164 on the blocks are bottlenecks.
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 164, 1001)
CIFAR_WIDTHS = (16, 32, 64)
_LAYERS_PER_BLOCK = {basic: 2, bottleneck: 3}
_MOST_LAYERS = 10_000


def _depths(depth: int, convs: object) -> tuple[int, int, int]:
    """The number of blocks in each stage: n, where the depth is 6n + 2 (basic blocks) or 9n + 2 (bottlenecks)."""
    layers = 3 * _LAYERS_PER_BLOCK[convs]
    if not isinstance(depth, int) or not layers + 2 <= depth <= _MOST_LAYERS or (depth - 2) % layers:
        raise ValueError(
            f"depth is {depth!r}; accepted: {layers}n + 2 layers of {convs.__name__} blocks, up to {_MOST_LAYERS} (basic: "
            "6n + 2, as 20, 32, 44, 56, 110; bottleneck: 9n + 2, as 164, 1001)"
        )
    return ((depth - 2) // layers,) * 3


def cifar_resnet(
    depth: int,
    num_classes: int = 10,
    *,
    bottlenecks: bool | None = None,
    stride_in: str = "1x1",
    shortcut: str = "A",
    order: str = ORIGINAL,
    branch_end: str | None = None,
    stochastic_depth: float = 0.0,
    norm: str = "batch",
    gate_bias: float = -6.0,
) -> nn.Sequential:
    """A CIFAR ResNet: (N, 3, 32, 32) -> (N, num_classes) logits. A value that is not accepted is a ValueError.

    He's published networks with 164 and 1001 layers are `cifar_resnet(164, order="full_preactivation", shortcut="B")`
    and the same with 1001. In the pre-activation orders both paths of the first block start behind the stem's norm and
    ReLU.

    depth: 6n + 2 layers of basic blocks, or 9n + 2 of bottlenecks.
    bottlenecks: whether the blocks are bottlenecks; None: as in the papers, from 164 layers on.
    The other options are those of `resnet`.
    """
    deep = isinstance(depth, int) and depth >= 164
    convs = bottleneck if (deep if bottlenecks is None else bottlenecks) else basic
    options = BlockOptions(convs, norm, stride_in, shortcut, order, branch_end, gate_bias=gate_bias)
    depths = _depths(depth, convs)
    layer, channels = norm_layer(norm, None), CIFAR_WIDTHS[0]
    stem = OrderedDict(conv1=conv(3, channels, 3), bn1=layer(channels), relu=nn.ReLU(inplace=True))
    layers = OrderedDict(stem=nn.Sequential(stem))
    for k, (width, drops) in enumerate(zip(CIFAR_WIDTHS, linear_rule(stochastic_depth, depths), strict=True)):
        layers[f"stage{k + 1}"] = residual_stage(options, channels, width, 2 if k else 1, drops)
        channels = options.out_channels(width)
    layers |= {
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(channels, num_classes),
    }
    network = nn.Sequential(layers)
    init_weights(network)
    use_folding(network)
    return network
