"""Convolutions, norms and a max pool that the families share, and the initialisation of weights."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from .messages import check_choice


def conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A convolution without bias, since a norm follows that would remove it. It keeps the map's size at stride 1."""
    padding = kernel_size // 2
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)


def group_norm(num_channels: int) -> nn.GroupNorm:
    """Group norm with 32 groups (Wu & He 2018), or with fewer where 32 does not divide `num_channels`."""
    return nn.GroupNorm(math.gcd(32, num_channels), num_channels)


class FrozenBatchNorm(FrozenBatchNorm2d):
    """torchvision's batch norm with fixed statistics, x * scale + shift, in one pass where `x` needs no gradient.

    The two forms agree to rounding. Detectron2 chooses between them in the same way, so its numbers come back to the
    last bit. A map in 16 bits always takes one pass and stays so: x * scale + shift would be in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)"""
        if x.requires_grad and x.dtype == self.weight.dtype:
            return super().forward(x)
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class SyncBatchNorm(nn.SyncBatchNorm, nn.BatchNorm2d):
    """torch's batch norm over the images of all processes. It trains on a GPU only."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)

        ValueError: it is trained on a CPU.
        """
        if self.training and x.device.type == "cpu":
            raise ValueError(
                "norm='sync' trains on a GPU only; accepted on a CPU: 'batch', 'group' and 'frozen'"
            )
        return super().forward(x)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "frozen": FrozenBatchNorm,
    "group": group_norm,
    "sync": SyncBatchNorm,
}


def norm_layer(norm: str, weights: object) -> Callable[[int], nn.Module]:
    """The norm layer with this name, channels -> module.

    Raises a ValueError for an unknown name, and for "frozen" without weights. Frozen batch norm uses the statistics of
    trained weights. With random weights the activations grow from block to block and the first losses are near 1e5.
    """
    check_choice("norm", norm, NORMS)
    if norm == "frozen" and weights is None:
        raise ValueError(
            "norm='frozen' needs trained weights: with random ones its statistics fit nothing and the losses start "
            "near 1e5. Give weights=... or train from scratch with norm='batch' or norm='group'."
        )
    return NORMS[norm]


class CaffePool(nn.MaxPool2d):
    """Caffe's max pooling, 3x3 with stride 2: windows begin at the first position and may run over the last.

    On a map of odd size it has one window more than Caffe, over the last row or column. The trunk's map then keeps
    ceil(H/16) x ceil(W/16). A detector pads images to multiples of 32 and never meets an odd size.
    """

    def __init__(self) -> None:
        super().__init__(3, stride=2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H/2), ceil(W/2))"""
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            # A zero never exceeds the outputs of a ReLU.
            x = nn.functional.pad(x, (0, width % 2, 0, height % 2))
        return super().forward(x)


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """He initialisation of every convolution (fan out, ReLU), as in torchvision's ResNets; biases become 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
