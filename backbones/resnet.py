"""ResNet (He et al. 2015, arXiv 1512.03385), Table 1: stages conv1, conv2_x .. conv5_x."""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from .backbone import Backbone, Regions, RoIHead, Trunk, init_weights, nearest, register_backbone
from .layers import conv, enter, norm_layer
from .weights import is_published, load_weights

Norm = Callable[[int], nn.Module]
STRIDE_IN = ("3x3", "1x1")


class ResidualBlock(nn.Module):
    """Residual unit: relu(shortcut(x) + branch(x))."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x).add_(self.shortcut(x)))

    def enter(self, regions: Regions) -> Tensor:
        """forward(regions.crop()), the opening 1x1 convolutions run on the shared map."""
        return self.relu(enter(self.branch, regions).add_(enter(self.shortcut, regions)))


def basic_branch(in_channels: int, width: int, stride: int, norm: Norm, stride_in: str) -> nn.Sequential:
    """Two 3x3 convolutions; the stride sits in the first."""
    layers = OrderedDict(
        conv1=conv(in_channels, width, 3, stride),
        bn1=norm(width),
        relu1=nn.ReLU(inplace=True),
        conv2=conv(width, width, 3),
        bn2=norm(width),
    )
    return nn.Sequential(layers)


def bottleneck_branch(in_channels: int, width: int, stride: int, norm: Norm, stride_in: str) -> nn.Sequential:
    """1x1 to `width`, 3x3, 1x1 to four times `width`.

    The paper and Detectron2 place the stride in the first 1x1, torchvision (ResNet "v1.5") in the 3x3.
    """
    first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
    layers = OrderedDict(
        conv1=conv(in_channels, width, 1, first),
        bn1=norm(width),
        relu1=nn.ReLU(inplace=True),
        conv2=conv(width, width, 3, second),
        bn2=norm(width),
        relu2=nn.ReLU(inplace=True),
        conv3=conv(width, 4 * width, 1),
        bn3=norm(4 * width),
    )
    return nn.Sequential(layers)


EXPANSION = {basic_branch: 1, bottleneck_branch: 4}


def projection(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Sequential:
    """Shortcut option B: a 1x1 convolution where the size changes."""
    return nn.Sequential(OrderedDict(conv=conv(in_channels, out_channels, 1, stride), bn=norm(out_channels)))


def residual_stage(
    branch: Callable[..., nn.Module],
    in_channels: int,
    width: int,
    depth: int,
    stride: int,
    norm: Norm,
    **options,
) -> nn.Sequential:
    """`depth` residual blocks, the first with `stride`: (N, in_channels, H, W) -> (N, out, H/stride, W/stride)."""
    out_channels = width * EXPANSION[branch]
    blocks = []
    for _ in range(depth):
        changes = stride != 1 or in_channels != out_channels
        shortcut = projection(in_channels, out_channels, stride, norm) if changes else nn.Identity()
        blocks.append(ResidualBlock(branch(in_channels, width, stride, norm, **options), shortcut))
        in_channels, stride = out_channels, 1
    return nn.Sequential(*blocks)


# torchvision's parameter names -> ours. `layer1` is conv2_x, which stage2 holds behind the max pool.
TORCHVISION_NAMES = (
    (r"^(conv1|bn1)\.", r"trunk.stage1.\1."),
    (r"^layer1\.", "trunk.stage2.blocks."),
    (r"^layer2\.", "trunk.stage3."),
    (r"^layer3\.", "trunk.stage4."),
    (r"^layer4\.", "roi_head.stage5."),
    (r"\.(\d+)\.(conv\d|bn\d)\.", r".\1.branch.\2."),
    (r"\.downsample\.0\.", ".shortcut.conv."),
    (r"\.downsample\.1\.", ".shortcut.bn."),
)


def resnet(
    name: str,
    branch: Callable[..., nn.Module],
    depths: tuple[int, int, int, int],
    *,
    width: int = 64,
    stride_in: str = "3x3",
    norm: str = "batch",
    weights: str | None = None,
    frozen_stages: int = 0,
) -> Backbone:
    """The residual family.

    width: channels of the stem (64); every other width is a multiple of it.
    stride_in: where a bottleneck's stride sits, "3x3" as torchvision's weights or "1x1" as the paper's and Detectron2's.
    norm: "batch", "group", or "frozen" (with weights only).
    weights: None, a published name ("imagenet_v1", "imagenet_v2": torchvision's), or a file; "deferred" promises
        a later `load_state_dict`.
    frozen_stages: stages 1..frozen_stages take no gradient and keep their statistics.
    """
    if stride_in not in STRIDE_IN:
        raise ValueError(f"stride_in is {stride_in!r}; {nearest(stride_in, STRIDE_IN)}")
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width is {width!r}; accepted: a positive whole number of channels")
    if is_published(weights) and (width != 64 or (stride_in != "3x3" and branch is bottleneck_branch)):
        raise ValueError(
            f"weights {weights!r} were trained with width 64 and the stride in the 3x3; got width {width} and "
            f"stride_in {stride_in!r}"
        )
    layer = norm_layer(norm, weights)

    def stage(k: int, in_channels: int) -> nn.Sequential:
        """conv{k}_x: widths double from conv2_x on, and all but conv2_x halve the map."""
        return residual_stage(
            branch,
            in_channels,
            width * 2 ** (k - 2),
            depths[k - 2],
            1 if k == 2 else 2,
            layer,
            stride_in=stride_in,
        )

    c2, c3, c4, c5 = (width * EXPANSION[branch] * 2**k for k in range(4))
    stem = OrderedDict(
        conv1=nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        bn1=layer(width),
        relu=nn.ReLU(inplace=True),
    )
    conv2 = OrderedDict(maxpool=nn.MaxPool2d(3, stride=2, padding=1), blocks=stage(2, width))
    trunk = Trunk([nn.Sequential(stem), nn.Sequential(conv2), stage(3, c2), stage(4, c3)], out_channels=c4)
    backbone = Backbone(name, trunk, RoIHead(stage(5, c4), out_channels=c5))
    init_weights(backbone)
    load_weights(backbone, weights, published=TORCHVISION_NAMES)
    return backbone.freeze(frozen_stages)


@register_backbone(options_of=resnet)
def resnet18(**options) -> Backbone:
    return resnet("resnet18", basic_branch, (2, 2, 2, 2), **options)


@register_backbone(options_of=resnet)
def resnet34(**options) -> Backbone:
    return resnet("resnet34", basic_branch, (3, 4, 6, 3), **options)


@register_backbone(options_of=resnet)
def resnet50(**options) -> Backbone:
    return resnet("resnet50", bottleneck_branch, (3, 4, 6, 3), **options)


@register_backbone(options_of=resnet)
def resnet101(**options) -> Backbone:
    return resnet("resnet101", bottleneck_branch, (3, 4, 23, 3), **options)


@register_backbone(options_of=resnet)
def resnet152(**options) -> Backbone:
    return resnet("resnet152", bottleneck_branch, (3, 8, 36, 3), **options)
