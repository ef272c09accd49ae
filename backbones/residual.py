"""Residual blocks in each activation order (He et al. 2016, arXiv 1603.05027, Figure 4), and stages built from them."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .backbone import MAX_WIDTH
from .branch_ends import BRANCH_ENDS, stochastic_depth
from .folding import FoldingSequential, has_hooks
from .layers import NORMS, conv
from .messages import check_choice, check_count
from .shortcuts import GATED, SCALE, SHORTCUTS, Scale, gate, shortcut

ORIGINAL = "original"
BN_AFTER_ADDITION = "bn_after_addition"
RELU_BEFORE_ADDITION = "relu_before_addition"
RELU_ONLY_PREACTIVATION = "relu_only_preactivation"
FULL_PREACTIVATION = "full_preactivation"
ORDERS = (ORIGINAL, BN_AFTER_ADDITION, RELU_BEFORE_ADDITION, RELU_ONLY_PREACTIVATION, FULL_PREACTIVATION)
PREACTIVATIONS = (RELU_ONLY_PREACTIVATION, FULL_PREACTIVATION)
STRIDE_IN = ("3x3", "1x1")


class ResidualBlock(nn.Module):
    """Residual block: closing(branch(x) + shortcut(x)); without a shortcut closing(branch(x)), as in a plain network."""

    def __init__(
        self, branch: nn.Module, shortcut: nn.Module | None, closing: nn.Module, in_place: bool = True
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.closing = closing
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H/stride), ceil(W/stride))"""
        if x.device.type == "cuda" and self._adds_before_relu():
            return self.branch.joined(x, self.shortcut(x))
        return self.closing(self.join(x))

    def _adds_before_relu(self) -> bool:
        """Whether the block is relu(branch(x) + shortcut(x)), which a GPU computes in fewer passes over the map."""
        parts = (self.branch, self.closing)
        return (
            type(self) is ResidualBlock
            and self.shortcut is not None
            and isinstance(self.branch, FoldingSequential)
            and type(self.closing) is nn.ReLU
            and not any(map(has_hooks, parts))
        )

    def join(self, x: Tensor) -> Tensor:
        """branch(x) + shortcut(x), (N, C, H, W) -> (N, C', ceil(H/stride), ceil(W/stride))"""
        branch = self.branch(x)
        if self.shortcut is None:
            return branch
        shortcut = self.shortcut(x)
        return branch.add_(shortcut) if self.in_place else branch + shortcut


class GatedBlock(ResidualBlock):
    """Residual block with a gate g: closing(branch(x) + (1 - g(x)) shortcut(x)).

    An exclusive gate also multiplies the branch: g(x) branch(x).
    """

    def __init__(
        self, branch: nn.Module, shortcut: nn.Module, closing: nn.Module, gate: nn.Module, exclusive: bool
    ) -> None:
        super().__init__(branch, shortcut, closing)
        self.gate = gate
        self.exclusive = exclusive

    def join(self, x: Tensor) -> Tensor:
        """The gated sum, (N, C, H, W) -> (N, C', ceil(H/stride), ceil(W/stride))."""
        branch, shortcut, gate = self.branch(x), self.shortcut(x), self.gate(x)
        return (gate * branch if self.exclusive else branch) + (1 - gate) * shortcut


@dataclass(frozen=True)
class BlockOptions:
    """The options that all blocks of a network share; `backbones.resnet.resnet` explains each.

    A value that is not accepted is a ValueError.
    """

    convs: Callable[..., list[nn.Conv2d]]
    norm: str = "batch"
    stride_in: str = "3x3"
    shortcut: str = "B"
    order: str = ORIGINAL
    branch_end: str | None = None
    groups: int = 1
    width_per_group: int = 64
    gate_bias: float = -6.0

    def __post_init__(self) -> None:
        for option, accepted in (
            ("stride_in", STRIDE_IN),
            ("shortcut", tuple(SHORTCUTS)),
            ("order", ORDERS),
            ("branch_end", tuple(BRANCH_ENDS)),
        ):
            check_choice(option, getattr(self, option), accepted)
        for option in ("groups", "width_per_group"):
            check_count(option, getattr(self, option), MAX_WIDTH)
        if self.convs is basic and (self.groups, self.width_per_group) != (1, 64):
            raise ValueError(
                f"groups={self.groups} and width_per_group={self.width_per_group} are options of bottlenecks; "
                "basic blocks take 1 and 64"
            )

    def definition(self) -> dict[str, object]:
        """The options that change what trained weights compute; basic blocks have fewer of them than bottlenecks."""
        options = ("shortcut", "order", "branch_end")
        if self.convs is bottleneck:
            options += ("stride_in", "groups", "width_per_group")
        return {option: getattr(self, option) for option in options}

    def out_channels(self, width: int) -> int:
        return width * EXPANSION[self.convs]

    def layer(self, channels: int) -> nn.Module:
        return NORMS[self.norm](channels)


def basic(in_channels: int, width: int, stride: int, options: BlockOptions) -> list[nn.Conv2d]:
    """Two 3x3 convolutions; the stride sits in the first."""
    return [conv(in_channels, width, 3, stride), conv(width, width, 3)]


def bottleneck(in_channels: int, width: int, stride: int, options: BlockOptions) -> list[nn.Conv2d]:
    """1x1 to the inner width, 3x3 in groups, 1x1 to four times `width`.

    The paper and Detectron2 place the stride in the first 1x1, torchvision (ResNet "v1.5") in the 3x3.
    The inner width is groups * width * width_per_group / 64. That is `width` in a ResNet. ResNeXt has many narrow
    groups, a wide network has one group with a `width_per_group` above 64.
    """
    first, second = (stride, 1) if options.stride_in == "1x1" else (1, stride)
    inner = max(1, width * options.width_per_group // 64) * options.groups
    return [
        conv(in_channels, inner, 1, first),
        conv(inner, inner, 3, second, groups=options.groups),
        conv(inner, 4 * width, 1),
    ]


EXPANSION = {basic: 1, bottleneck: 4}


def arrange(convs: list[nn.Conv2d], options: BlockOptions, opened: bool) -> OrderedDict[str, nn.Module]:
    """The layers of a branch: its convolutions, with norms and ReLUs where the order places them.

    opened: in a pre-activation order, whether the first convolution's norm and ReLU stand before the block.
    """
    order, last = options.order, len(convs)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, layer in enumerate(convs, start=1):
        opens = order in PREACTIVATIONS and not (opened and i == 1)
        if opens and order == FULL_PREACTIVATION:
            layers[f"bn{i}"] = options.layer(layer.in_channels)
        if opens:
            # A first ReLU without a norm before it would overwrite the input, which the shortcut reads.
            layers[f"relu{i}"] = nn.ReLU(inplace=i > 1 or order == FULL_PREACTIVATION)
        layers[f"conv{i}"] = layer
        if order != FULL_PREACTIVATION and not (order == BN_AFTER_ADDITION and i == last):
            layers[f"bn{i}"] = options.layer(layer.out_channels)
        if order not in PREACTIVATIONS and (i < last or order == RELU_BEFORE_ADDITION):
            layers[f"relu{i}"] = nn.ReLU(inplace=True)
    return layers


def opening(channels: int, options: BlockOptions) -> OrderedDict[str, nn.Module]:
    """The norm and ReLU that a pre-activation order puts before a block that changes the size.

    Branch and shortcut both read their output. The ReLU-only order has no norm, the other orders have neither.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if options.order == FULL_PREACTIVATION:
        layers["bn"] = options.layer(channels)
    if options.order in PREACTIVATIONS:
        layers["relu"] = nn.ReLU(inplace=True)
    return layers


def closing(channels: int, options: BlockOptions) -> nn.Module:
    """The layers that the order puts after the addition."""
    if options.order == ORIGINAL:
        return nn.ReLU(inplace=True)
    if options.order == BN_AFTER_ADDITION:
        return nn.Sequential(OrderedDict(bn=options.layer(channels), relu=nn.ReLU(inplace=True)))
    return nn.Identity()


def residual_block(
    options: BlockOptions, in_channels: int, width: int, stride: int, drop: float = 0.0, opened: bool = False
) -> ResidualBlock:
    """One block: (N, in_channels, H, W) -> (N, out_channels, ceil(H/stride), ceil(W/stride)).

    drop: the probability of dropping the branch. opened: as in `arrange`.
    """
    out_channels, order = options.out_channels(width), options.order
    # A projection has a norm only where the branch ends with one.
    norm = None if order in (BN_AFTER_ADDITION, FULL_PREACTIVATION) else options.layer
    layers = arrange(options.convs(in_channels, width, stride, options), options, opened)
    layers |= BRANCH_ENDS[options.branch_end](out_channels, options.norm)
    if options.shortcut == "constant_scaling":
        layers["scale"] = Scale(SCALE)
    layers |= stochastic_depth(drop)
    parts = (
        nn.Sequential(layers),
        shortcut(options.shortcut, in_channels, out_channels, stride, norm),
        closing(out_channels, options),
    )
    if options.shortcut in GATED:
        exclusive = options.shortcut == "exclusive_gating"
        return GatedBlock(*parts, gate(in_channels, out_channels, stride, options.gate_bias), exclusive)
    # The gradient of a ReLU reads the ReLU's output, so the addition must not overwrite it.
    return ResidualBlock(*parts, in_place=order != RELU_BEFORE_ADDITION)


def residual_stage(
    options: BlockOptions,
    in_channels: int,
    width: int,
    stride: int,
    drops: list[float],
    *,
    opened: bool = True,
) -> nn.Sequential:
    """Residual blocks, the first with `stride`: (N, in_channels, H, W) -> (N, out, ceil(H/stride), ceil(W/stride)).

    In a pre-activation order the stage ends with the norm and ReLU that open the next stage. Both paths of the next
    stage's first block start there. The last stage thus ends with the activation that Figure 5 of the paper asks for.

    drops: the probability of dropping each block's branch.
    opened: whether the norm and ReLU that open the first block stand before the stage.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, drop in enumerate(drops):
        layers[str(i)] = residual_block(options, in_channels, width, stride, drop, opened and i == 0)
        in_channels, stride = options.out_channels(width), 1
    end = opening(in_channels, options)
    if end:
        layers["end"] = nn.Sequential(end)
    return nn.Sequential(layers)
