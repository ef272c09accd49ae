"""ResNet (He et al. 2015, arXiv 1512.03385), Table 1: stages conv1, conv2_x .. conv5_x; options make the variants."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import nn

from .backbone import MAX_WIDTH, Backbone, RoIHead, Trunk
from .branch_ends import linear_rule
from .layers import CaffePool, init_weights, norm_layer
from .messages import check_choice, check_count
from .registry import backbone_options, register_variants
from .residual import FULL_PREACTIVATION, ORIGINAL, BlockOptions, basic, bottleneck, opening, residual_stage
from .weights import NameTable, is_published, load_weights

# The publishers' parameter names -> ours. `layer1` is conv2_x, which stage2 holds behind the max pool. Only timm's
# SE-ResNets have `layer0` and `se_module`.
TORCHVISION_NAMES = (
    (r"^layer0\.", ""),
    (r"^(conv1|bn1)\.", r"trunk.stage1.\1."),
    (r"^layer1\.", "trunk.stage2.blocks."),
    (r"^layer2\.", "trunk.stage3."),
    (r"^layer3\.", "trunk.stage4."),
    (r"^layer4\.", "roi_head.stage5."),
    (r"\.(\d+)\.(conv\d|bn\d)\.", r".\1.branch.\2."),
    (r"\.(\d+)\.se_module\.", r".\1.branch.se."),
    (r"\.downsample\.0\.", ".shortcut.conv."),
    (r"\.downsample\.1\.", ".shortcut.bn."),
)

# Table 1 of the paper: depth -> the block, and the number of blocks in conv2_x .. conv5_x.
LAYOUTS = {
    18: (basic, (2, 2, 2, 2)),
    34: (basic, (3, 4, 6, 3)),
    50: (bottleneck, (3, 4, 6, 3)),
    101: (bottleneck, (3, 4, 23, 3)),
    152: (bottleneck, (3, 8, 36, 3)),
}


STEM_POOLS: dict[str, Callable[[], nn.Module]] = {
    "padded": lambda: nn.MaxPool2d(3, stride=2, padding=1),
    "ceil": CaffePool,
}


def _stem(width: int, options: BlockOptions) -> nn.Sequential:
    """conv1, norm, ReLU; in full pre-activation conv1 alone, since the norm and ReLU open the first block."""
    layers = OrderedDict(conv1=nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False))
    if options.order != FULL_PREACTIVATION:
        layers |= {"bn1": options.layer(width), "relu": nn.ReLU(inplace=True)}
    return nn.Sequential(layers)


def _stage2(width: int, drops: list[float], stem_pool: str, options: BlockOptions) -> nn.Sequential:
    """Max pool and conv2_x. If conv2_x has bottlenecks, its first block changes the number of channels."""
    preactivated = options.order == FULL_PREACTIVATION
    changes = options.out_channels(width) != width
    layers = OrderedDict(maxpool=STEM_POOLS[stem_pool]())
    if preactivated and changes:
        layers["opening"] = nn.Sequential(opening(width, options))
    layers["blocks"] = residual_stage(options, width, width, 1, drops, opened=changes or not preactivated)
    return nn.Sequential(layers)


def _refuse_another_definition(name: str, weights: str, given: dict[str, object]) -> None:
    """Raise a ValueError where an option differs from the network that the published weights were trained with."""
    own = backbone_options(name)
    changed = [option for option in given if given[option] != own[option].default]
    if changed:
        trained = ", ".join(f"{option}={own[option].default!r}" for option in changed)
        got = ", ".join(f"{option}={given[option]!r}" for option in changed)
        raise ValueError(f"weights {weights!r} were trained with {trained}; got {got}")


def resnet(
    name: str,
    convs: Callable[..., list[nn.Conv2d]],
    depths: tuple[int, int, int, int],
    names: NameTable = TORCHVISION_NAMES,
    *,
    width: int = 64,
    stride_in: str = "3x3",
    norm: str = "batch",
    shortcut: str = "B",
    order: str = ORIGINAL,
    branch_end: str | None = None,
    stochastic_depth: float = 0.0,
    groups: int = 1,
    width_per_group: int = 64,
    stem_pool: str = "padded",
    gate_bias: float = -6.0,
    weights: str | None = None,
    frozen_stages: int = 0,
) -> Backbone:
    """The residual family: `depths` blocks of `basic` or `bottleneck` convolutions in conv2_x .. conv5_x.

    A value that is not accepted is a ValueError.

    names: the publisher's parameter names -> ours.
    width: channels of the stem (64); every other width is a multiple of it.
    stride_in: where a bottleneck's stride sits: "3x3" as in torchvision's weights, or "1x1" as in the paper and
        Detectron2.
    norm: "batch", "group", "sync" (batch norm over all processes, on GPUs), or "frozen" (with weights only).
    shortcut: "A", "B", "C", "none" (a plain network), "constant_scaling", "exclusive_gating", "shortcut_only_gating",
        "conv1x1", "dropout"; see `backbones.shortcuts.SHORTCUTS`.
    order: the order of norms, ReLUs and the addition (He et al. 2016, Figure 4): "original", "bn_after_addition",
        "relu_before_addition", "relu_only_preactivation", "full_preactivation".
    branch_end: None; "se"; "relu_se", with a ReLU before it as in timm's SE-ResNet-18/34; or residual shrinkage, with
        one threshold for all channels ("shrinkage_cs") or one per channel ("shrinkage_cw").
    stochastic_depth: probability of dropping the last block's branch in training. The probabilities of the earlier blocks
        rise linearly to it.
    groups, width_per_group: ResNeXt's 32x4d is 32 and 4; a network twice as wide inside is 1 and 128.
    stem_pool: "padded" as in torchvision, "ceil" as in Caffe and the SE-ResNets.
    gate_bias: initial bias of a gated shortcut's gate; -6 leaves the shortcut open.
    weights: None, a published name (`published_weights` lists them), or a file; "deferred" promises a later
        `load_state_dict`.
    frozen_stages: stages 1..frozen_stages take no gradient and keep their statistics.
    """
    options = BlockOptions(
        convs, norm, stride_in, shortcut, order, branch_end, groups, width_per_group, gate_bias
    )
    check_count("width", width, MAX_WIDTH)
    check_choice("stem_pool", stem_pool, STEM_POOLS)
    if is_published(weights):
        given = {"width": width, "stem_pool": stem_pool, **options.definition()}
        _refuse_another_definition(name, weights, given)
    norm_layer(norm, weights)

    drops = linear_rule(stochastic_depth, depths)
    c2, c3, c4, c5 = (options.out_channels(width * 2**k) for k in range(4))
    stages = [_stem(width, options), _stage2(width, drops[0], stem_pool, options)]
    for k, in_channels in enumerate((c2, c3, c4), start=1):  # conv3_x, conv4_x, conv5_x
        stages.append(residual_stage(options, in_channels, width * 2**k, 2, drops[k]))
    backbone = Backbone(name, Trunk(stages[:4], out_channels=c4), RoIHead(stages[4], out_channels=c5))
    init_weights(backbone)
    load_weights(backbone, weights, published=names)
    return backbone.freeze(frozen_stages)


# A variant is the residual family with other defaults.
plain = partial(resnet, shortcut="none")
wide = partial(resnet, width_per_group=128)

register_variants(resnet, {f"resnet{depth}": layout for depth, layout in LAYOUTS.items()})
# Networks without shortcuts, from the degradation experiment of He et al. 2015, section 4.1.
register_variants(plain, {f"plain{depth}": LAYOUTS[depth] for depth in (18, 34)})
# ResNeXt (Xie et al. 2017, arXiv 1611.05431): the 3x3 in groups.
for depth, groups, width in ((50, 32, 4), (101, 32, 8), (101, 64, 4)):
    resnext = partial(resnet, groups=groups, width_per_group=width)
    register_variants(resnext, {f"resnext{depth}_{groups}x{width}d": LAYOUTS[depth]})
# Wide ResNet (Zagoruyko & Komodakis 2016, arXiv 1605.07146): bottlenecks twice as wide inside.
register_variants(wide, {f"wide_resnet{depth}_2": LAYOUTS[depth] for depth in (50, 101)})
