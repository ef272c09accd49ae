"""SE-ResNet (Hu et al. 2018, arXiv 1709.01507) and the residual shrinkage network (Zhao et al., IEEE TII 2020).

Both end a ResNet's branch with factors or thresholds that are computed from the branch's means.

The SE-ResNets fit timm's `legacy_seresnet` weights. They have Caffe's stem pool. A bottleneck has its stride in the
first 1x1, and a basic block has a ReLU before the squeeze.

The shrinkage networks have channel-wise thresholds; `branch_end="shrinkage_cs"` shares one between the channels. Their
authors build them from pre-activation blocks with zero-padded shortcuts (`order="full_preactivation", shortcut="A"`).
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
