"""BN-Inception (Ioffe & Szegedy 2015, arXiv 1502.03167) and SE-BN-Inception (Hu et al. 2017, arXiv 1709.01507).

This is the form of the published Caffe networks: the modules 3c and 4e halve the map, and two 3x3 convolutions replace
each 5x5.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .backbone import MAX_WIDTH, Backbone, Preprocessing, RoIHead, Trunk
from .branch_ends import squeeze_excitation
from .layers import CaffePool, init_weights, norm_layer
from .messages import check_count
from .registry import register_variants
from .weights import DEFERRED, is_published, load_weights, read_state_dict

Norm = Callable[[int], nn.Module]
FULL_WIDTH = 64
# The published Caffe weights expect BGR from 0 to 255, minus a mean.
CAFFE_INCEPTION = Preprocessing(
    mean=(104.0, 117.0, 128.0), std=(1.0, 1.0, 1.0), channel_order="bgr", scale=255.0
)

# module -> channels of four branches: the 1x1, the 3x3 (its 1x1, its 3x3), the double 3x3 (likewise) and the pool's 1x1.
# A module with 0 for the 1x1 and the pool halves the map, and its last branch is the pooled input.
MODULES = {
    "3a": (64, (64, 64), (64, 96), 32),
    "3b": (64, (64, 96), (64, 96), 64),
    "3c": (0, (128, 160), (64, 96), 0),
    "4a": (224, (64, 96), (96, 128), 128),
    "4b": (192, (96, 128), (96, 128), 128),
    "4c": (160, (128, 160), (128, 160), 128),
    "4d": (96, (128, 192), (160, 192), 128),
    "4e": (0, (128, 192), (192, 256), 0),
    "5a": (352, (192, 320), (160, 224), 128),
    "5b": (352, (192, 320), (192, 224), 128),
}
STAGES = {3: ("3a", "3b"), 4: ("3c", "4a", "4b", "4c", "4d"), 5: ("4e", "5a", "5b")}


class Inception(nn.Module):
    """Branches side by side: end(concatenation of branch(x) for every branch)."""

    def __init__(self, branches: dict[str, nn.Sequential], end: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H, W), or (N, C', ceil(H/2), ceil(W/2)) in a module that halves."""
        return self.end(torch.cat([branch(x) for branch in self.branches.values()], dim=1))


class Builder:
    """Makes the layers of one network from what they share: norm, width, biases before the norm, squeeze-excitation."""

    def __init__(self, norm: Norm, width: int, bias: bool, squeeze: bool) -> None:
        self.norm, self.width, self.bias, self.squeeze = norm, width, bias, squeeze

    def scaled(self, channels: int) -> int:
        return channels * self.width // FULL_WIDTH

    def convs(self, in_channels: int, *convs: tuple[int, int, int]) -> OrderedDict[str, nn.Module]:
        """conv, norm and ReLU for each (channels, kernel size, stride)."""
        layers = OrderedDict()
        for k, (channels, kernel, stride) in enumerate(convs, start=1):
            out = self.scaled(channels)
            layers[f"conv{k}"] = nn.Conv2d(in_channels, out, kernel, stride, kernel // 2, bias=self.bias)
            layers[f"bn{k}"] = self.norm(out)
            layers[f"relu{k}"] = nn.ReLU(inplace=True)
            in_channels = out
        return layers

    def branches(self, name: str, in_channels: int) -> dict[str, OrderedDict[str, nn.Module]]:
        """The layers of a module's branches, in the order in which their outputs are concatenated."""
        single, (reduced, out), (double_reduced, double_out), pooled = MODULES[name]
        stride = 1 if pooled else 2
        spatial = {
            "3x3": self.convs(in_channels, (reduced, 1, 1), (out, 3, stride)),
            "double_3x3": self.convs(
                in_channels, (double_reduced, 1, 1), (double_out, 3, 1), (double_out, 3, stride)
            ),
        }
        if not pooled:
            return {**spatial, "pool": OrderedDict(pool=CaffePool())}
        pool = nn.MaxPool2d(3, stride=1, padding=1) if name == "5b" else nn.AvgPool2d(3, stride=1, padding=1)
        return {
            "1x1": self.convs(in_channels, (single, 1, 1)),
            **spatial,
            "pool": OrderedDict(pool=pool) | self.convs(in_channels, (pooled, 1, 1)),
        }

    def module(self, name: str, in_channels: int) -> tuple[Inception, int]:
        """The Inception module with this name, and its number of output channels."""
        single, (_, out), (_, double_out), pooled = MODULES[name]
        channels = self.scaled(single + out + double_out + pooled) + (0 if pooled else in_channels)
        branches = {k: nn.Sequential(layers) for k, layers in self.branches(name, in_channels).items()}
        return Inception(branches, squeeze_excitation(channels) if self.squeeze else nn.Identity()), channels

    def stage(self, k: int, in_channels: int) -> tuple[nn.Sequential, int]:
        """The modules of stage `k` and its number of output channels.

        Stage 3 opens with a pool, stages 4 and 5 with a module that halves the map.
        """
        layers = OrderedDict(pool=CaffePool()) if k == 3 else OrderedDict()
        for name in STAGES[k]:
            layers[name], in_channels = self.module(name, in_channels)
        return nn.Sequential(layers), in_channels


def _caffe_names() -> tuple[tuple[str, str], ...]:
    """The names of Caffe's layers, as PyTorch ports of the weights write them -> ours."""
    stem = {"conv1_7x7_s2": (1, 1), "conv2_3x3_reduce": (2, 1), "conv2_3x3": (2, 2)}
    branches = {
        "1x1": ("1x1", 1),
        "3x3_reduce": ("3x3", 1),
        "3x3": ("3x3", 2),
        "double_3x3_reduce": ("double_3x3", 1),
        "double_3x3_1": ("double_3x3", 2),
        "double_3x3_2": ("double_3x3", 3),
        "pool_proj": ("pool", 1),
    }
    names = []
    for suffix, layer in (("_bn", "bn"), ("", "conv")):
        for theirs, (k, number) in stem.items():
            names.append((rf"^{theirs}{suffix}\.", f"trunk.stage{k}.{layer}{number}."))
        for k, modules in STAGES.items():
            place = "roi_head.stage5" if k == 5 else f"trunk.stage{k}"
            for theirs, (branch, number) in branches.items():
                pattern = rf"^inception_({'|'.join(modules)})_{theirs}{suffix}\."
                names.append((pattern, rf"{place}.\1.branches.{branch}.{layer}{number}."))
    return tuple(names)


CAFFE_NAMES = _caffe_names()


def inception(
    name: str,
    bias: bool,
    squeeze: bool,
    *,
    width: int = FULL_WIDTH,
    norm: str = "batch",
    weights: str | None = None,
    frozen_stages: int = 0,
) -> Backbone:
    """The Inception family. A value that is not accepted is a ValueError.

    bias: whether convolutions have a bias before the norm, as in the published weights.
    squeeze: whether squeeze-excitation ends each module.
    width: channels of the stem (64 in the published network); the other widths scale with it.
    norm: "batch", "group", "sync" (batch norm over all processes, on GPUs), or "frozen" (with weights only).
    weights: None or a file with our names or Caffe's (Caffe's expect BGR from 0 to 255); "deferred" promises a
        later `load_state_dict`.
    frozen_stages: stages 1..frozen_stages take no gradient and keep their statistics.
    """
    check_count("width", width, MAX_WIDTH)
    if width % 2:
        raise ValueError(f"width is {width!r}; accepted by {name}: a positive even number of channels")
    build = Builder(norm_layer(norm, weights), width, bias, squeeze)
    stem, conv2 = build.scaled(64), build.scaled(192)
    stage1 = nn.Sequential(build.convs(3, (64, 7, 2)))
    stage2 = nn.Sequential(OrderedDict(pool=CaffePool()) | build.convs(stem, (64, 1, 1), (192, 3, 1)))
    stage3, c3 = build.stage(3, conv2)
    stage4, c4 = build.stage(4, c3)
    stage5, c5 = build.stage(5, c4)
    backbone = Backbone(name, Trunk([stage1, stage2, stage3, stage4], c4), RoIHead(stage5, c5))
    init_weights(backbone)
    load_caffe_weights(backbone, weights)
    return backbone.freeze(frozen_stages)


def load_caffe_weights(backbone: Backbone, weights: str | None) -> None:
    """`load_weights`, plus Caffe's preprocessing where a file has Caffe's names."""
    load_weights(backbone, weights, published=CAFFE_NAMES)
    is_file = weights not in (None, DEFERRED) and not is_published(weights)
    if is_file and "conv1_7x7_s2.weight" in read_state_dict(weights):
        backbone.preprocessing = CAFFE_INCEPTION


register_variants(inception, {"bn_inception": (True, False), "se_bn_inception": (False, True)})
