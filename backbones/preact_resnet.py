"""Pre-activation ResNet (He et al. 2016, arXiv 1603.05027): norm and ReLU before each convolution.

The stem is conv1 and max pool, as in timm's `resnetv2` weights; the norm and ReLU behind them open conv2_1.
(Facebook's and pytorchcv's networks put a norm and ReLU before the pool, which changes the number of parameters by 128.
They differ from each other, too.)
A projection starts behind the norm and ReLU of its block's branch, as in He's code. Strides sit in the 3x3, not in the
first 1x1 (`stride_in`). The norm and ReLU that open conv5_1 end stage 4.
"""

from functools import partial

from .registry import register_variants
from .residual import FULL_PREACTIVATION
from .resnet import LAYOUTS, resnet

preact = partial(resnet, order=FULL_PREACTIVATION)

# timm's parameter names (resnetv2_18 .. resnetv2_152) -> ours. The first norm of conv{k}_1 ends our stage k - 1.
TIMM_BASIC_NAMES = (
    (r"^stem\.conv\.", "trunk.stage1.conv1."),
    (r"^stages\.1\.blocks\.0\.norm1\.", "trunk.stage2.blocks.end.bn."),
    (r"^stages\.2\.blocks\.0\.norm1\.", "trunk.stage3.end.bn."),
    (r"^stages\.3\.blocks\.0\.norm1\.", "trunk.stage4.end.bn."),
    (r"^norm\.", "roi_head.stage5.end.bn."),
    (r"^stages\.0\.blocks\.", "trunk.stage2.blocks."),
    (r"^stages\.1\.blocks\.", "trunk.stage3."),
    (r"^stages\.2\.blocks\.", "trunk.stage4."),
    (r"^stages\.3\.blocks\.", "roi_head.stage5."),
    (r"\.(\d+)\.norm(\d)\.", r".\1.branch.bn\2."),
    (r"\.(\d+)\.(conv\d)\.", r".\1.branch.\2."),
    (r"\.downsample\.conv\.", ".shortcut.conv."),
)
# A bottleneck's conv2_1 has a projection, which starts from that norm too.
TIMM_NAMES = ((r"^stages\.0\.blocks\.0\.norm1\.", "trunk.stage2.opening.bn."), *TIMM_BASIC_NAMES)


for depth, layout in LAYOUTS.items():
    names = TIMM_BASIC_NAMES if depth < 50 else TIMM_NAMES
    register_variants(preact, {f"preact_resnet{depth}": (*layout, names)})
