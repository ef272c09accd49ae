"""Convolutions, norms and a pool that the families share, and their first weights."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from .messages import check_choice


def conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A convolution without bias that keeps the map's size at stride 1 (a norm follows, so a bias would be lost)."""
    padding = kernel_size // 2
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)


def group_norm(num_channels: int) -> nn.GroupNorm:
    """Group norm of 32 groups, or as many as divide `num_channels` (Wu & He 2018)."""
    return nn.GroupNorm(math.gcd(32, num_channels), num_channels)


class FrozenBatchNorm(FrozenBatchNorm2d):
    """torchvision's batch norm of fixed statistics: x * scale + shift, and one pass over a map without gradient.

    The same to rounding; the two operations are Detectron2's, whose numbers come back to the last bit.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            return super().forward(x)
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "frozen": FrozenBatchNorm,
    "group": group_norm,
}


def norm_layer(norm: str, weights: object) -> Callable[[int], nn.Module]:
    """The norm layer of that name, channels -> module.

    Frozen batch norm keeps the statistics of its weights; with random weights there are none to keep, the
    activations grow from block to block and the first losses are near 1e5, so that is refused.
    """
    check_choice("norm", norm, NORMS)
    if norm == "frozen" and weights is None:
        raise ValueError(
            "norm='frozen' needs trained weights: with random ones its statistics fit nothing and the losses start "
            "near 1e5. Give weights=... or train from scratch with norm='batch' or norm='group'."
        )
    return NORMS[norm]


class CaffePool(nn.MaxPool2d):
    """Max pooling 3x3 / 2 whose windows begin at the first position and run over the last: Caffe's.

    A map of odd size has one window more than Caffe's, over its last row or column, so that the trunk's map keeps
    ceil(H/16) x ceil(W/16); sizes that a detector pads to multiples of 32 never meet one.
    """

    def __init__(self) -> None:
        super().__init__(3, stride=2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            x = nn.functional.pad(x, (0, width % 2, 0, height % 2))  # after a ReLU zeros are never the larger
        return super().forward(x)


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """He initialisation of every convolution (fan out, ReLU), as torchvision's ResNets draw theirs."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
