"""SE-ResNet (Hu et al. 2018, arXiv 1709.01507) and the residual shrinkage network (Zhao et al., IEEE TII 2020).

Both end the branch of a ResNet with factors or thresholds computed from its means. The SE-ResNets are those of timm's
`legacy_seresnet` weights: Caffe's stem pool, the stride of a bottleneck in its first 1x1, and in basic blocks a ReLU
before the squeeze. The shrinkage networks' authors build theirs of pre-activation units with zero-padded shortcuts
(`order="full_preactivation", shortcut="A"`); thresholds are channel-wise, or shared (`branch_end="shrinkage_cs"`).
"""

from functools import partial

from .registry import register_variants
from .resnet import LAYOUTS, resnet

se_basic = partial(resnet, branch_end="relu_se", stem_pool="ceil")
se_bottleneck = partial(resnet, branch_end="se", stem_pool="ceil", stride_in="1x1")
shrinkage = partial(resnet, branch_end="shrinkage_cw")


register_variants(se_basic, {f"se_resnet{depth}": LAYOUTS[depth] for depth in (18, 34)})
register_variants(se_bottleneck, {f"se_resnet{depth}": LAYOUTS[depth] for depth in (50, 101, 152)})
register_variants(shrinkage, {f"shrinkage_resnet{depth}": LAYOUTS[depth] for depth in (18, 34, 50)})
