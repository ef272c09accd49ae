"""SE-ResNet (Hu et al. 2018, arXiv 1709.01507) and the residual shrinkage network (Zhao et al., IEEE TII 2020).

Both end the branch of a ResNet with factors or thresholds computed from its means. The SE-ResNets are those of timm's
`legacy_seresnet` weights: Caffe's stem pool, the stride of a bottleneck in its first 1x1, and in basic blocks a ReLU
before the squeeze. The shrinkage networks' authors build theirs of pre-activation units with zero-padded shortcuts
(`order="full_preactivation", shortcut="A"`); thresholds are channel-wise, or shared (`branch_end="shrinkage_cs"`).
"""

from functools import partial

from .backbone import Backbone
from .registry import register_backbone
from .resnet import LAYOUTS, resnet

se_basic = partial(resnet, branch_end="relu_se", stem_pool="ceil")
se_bottleneck = partial(resnet, branch_end="se", stem_pool="ceil", stride_in="1x1")
shrinkage = partial(resnet, branch_end="shrinkage_cw")


@register_backbone(options_of=se_basic)
def se_resnet18(**options) -> Backbone:
    return se_basic("se_resnet18", *LAYOUTS[18], **options)


@register_backbone(options_of=se_basic)
def se_resnet34(**options) -> Backbone:
    return se_basic("se_resnet34", *LAYOUTS[34], **options)


@register_backbone(options_of=se_bottleneck)
def se_resnet50(**options) -> Backbone:
    return se_bottleneck("se_resnet50", *LAYOUTS[50], **options)


@register_backbone(options_of=se_bottleneck)
def se_resnet101(**options) -> Backbone:
    return se_bottleneck("se_resnet101", *LAYOUTS[101], **options)


@register_backbone(options_of=se_bottleneck)
def se_resnet152(**options) -> Backbone:
    return se_bottleneck("se_resnet152", *LAYOUTS[152], **options)


@register_backbone(options_of=shrinkage)
def shrinkage_resnet18(**options) -> Backbone:
    return shrinkage("shrinkage_resnet18", *LAYOUTS[18], **options)


@register_backbone(options_of=shrinkage)
def shrinkage_resnet34(**options) -> Backbone:
    return shrinkage("shrinkage_resnet34", *LAYOUTS[34], **options)


@register_backbone(options_of=shrinkage)
def shrinkage_resnet50(**options) -> Backbone:
    return shrinkage("shrinkage_resnet50", *LAYOUTS[50], **options)
