"""Shortcuts of a residual block: options A, B, C of He et al. 2015, and section 3 of He et al. 2016 (arXiv 1603.05027).

Scaling, gates and dropout use option B's projection where the size changes.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import conv

SHORTCUTS = {
    "A": "identity; subsampled and padded with zero channels where the size changes",
    "B": "identity; a 1x1 convolution where the size changes",
    "C": "a 1x1 convolution everywhere",
    "conv1x1": "the same under the name of He et al. 2016",
    "none": "no shortcut: the plain network",
    "constant_scaling": "half the shortcut plus half the branch",
    "exclusive_gating": "1 - g of the shortcut plus g of the branch",
    "shortcut_only_gating": "1 - g of the shortcut plus the branch",
    "dropout": "half of the shortcut's values dropped in training, the others doubled",
}
GATED = ("exclusive_gating", "shortcut_only_gating")
# The factor of both terms in constant scaling.
SCALE = 0.5
DROPOUT = 0.5


class ZeroPadding(nn.Module):
    """Option A: every `stride`-th position, with zero channels behind the last one; it has no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H/stride), ceil(W/stride))"""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))


class Scale(nn.Module):
    """Multiply by a constant factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)"""
        return x * self.factor


class Bias(nn.Module):
    """A bias per channel, apart from its convolution: only a convolution without bias commutes with RoIAlign."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((channels,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)"""
        return x + self.bias[:, None, None]


def gate(in_channels: int, out_channels: int, stride: int, bias: float) -> nn.Sequential:
    """g(x) = sigmoid(W x + b), with W a 1x1 convolution and b a bias that starts at `bias`."""
    layers = OrderedDict(
        conv=conv(in_channels, out_channels, 1, stride), bias=Bias(out_channels, bias), sigmoid=nn.Sigmoid()
    )
    return nn.Sequential(layers)


def shortcut(
    kind: str, in_channels: int, out_channels: int, stride: int, norm: Callable[[int], nn.Module] | None
) -> nn.Module | None:
    """The shortcut of one block, or None for the kind "none".

    norm: makes the norm behind a projection; None: no norm, as the branch has none behind its last convolution.
    """
    changes = stride != 1 or in_channels != out_channels
    if kind == "none":
        return None
    if kind == "A":
        return ZeroPadding(in_channels, out_channels, stride) if changes else nn.Identity()
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if changes or kind in ("C", "conv1x1"):
        layers["conv"] = conv(in_channels, out_channels, 1, stride)
        if norm is not None:
            layers["bn"] = norm(out_channels)
    if kind == "constant_scaling":
        layers["scale"] = Scale(SCALE)
    if kind == "dropout":
        layers["dropout"] = nn.Dropout(DROPOUT)
    return nn.Sequential(layers) if layers else nn.Identity()
