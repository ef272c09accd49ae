"""What may end a residual branch: squeeze-excitation, shrinkage; and stochastic depth."""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation, StochasticDepth

from .layers import NORMS, conv

REDUCTION = 16


def squeeze_excitation(channels: int) -> SqueezeExcitation:
    """x * sigmoid(fc2(relu(fc1(mean x)))), a factor a channel (Hu et al. 2018, arXiv 1709.01507), reduction 16.

    At least four channels are squeezed into, as the narrowest published unit has: a narrower test network keeps them.
    """
    return SqueezeExcitation(channels, max(channels // REDUCTION, 4))


class ThresholdNorm(nn.BatchNorm2d):
    """Batch norm of one vector an image or region.

    A single vector has no variance: in training it is normalised by the running statistics, and these stay.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) < 2:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


# Group norm of two channels at one position would leave only signs: all channels are one group there.
THRESHOLD_NORMS: dict[str, Callable[[int], nn.Module]] = {
    **NORMS,
    "batch": ThresholdNorm,
    "group": lambda channels: nn.GroupNorm(1, channels),
}


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """sign(x) max(|x| - t, 0)"""
    return torch.sign(x) * F.relu(x.abs() - threshold)


class Shrinkage(nn.Module):
    """Soft thresholding with learned thresholds (Zhao et al., IEEE Transactions on Industrial Informatics 2020).

    t = mean|x| sigmoid(fc2(relu(norm(fc1(mean|x|))))), so 0 <= t <= mean|x|. Channel-wise: means over positions, a
    threshold a channel; channel-shared: the mean over positions and channels, one threshold an image or region.

    Batch norm is published. It sees one vector an image, so a trunk trained on one or two images a batch learns more
    with norm="group" or "frozen".
    """

    def __init__(self, channels: int, norm: str, channel_shared: bool) -> None:
        super().__init__()
        self.channel_shared = channel_shared
        layers = OrderedDict(
            fc1=conv(channels, channels, 1),
            bn=THRESHOLD_NORMS[norm](channels),
            relu=nn.ReLU(inplace=True),
            fc2=nn.Conv2d(channels, 1 if channel_shared else channels, 1),
            sigmoid=nn.Sigmoid(),
        )
        self.share = nn.Sequential(layers)

    def thresholds(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1), or (N, 1, 1, 1) where channels share one."""
        mean = x.abs().mean((2, 3), keepdim=True)
        share = self.share(mean)
        return share * (mean.mean(1, keepdim=True) if self.channel_shared else mean)

    def forward(self, x: Tensor) -> Tensor:
        return soft_threshold(x, self.thresholds(x))


# name -> layers that follow the branch's last convolution, from its channels and the norm's name
BRANCH_ENDS: dict[str | None, Callable[[int, str], dict[str, nn.Module]]] = {
    None: lambda channels, norm: {},
    "se": lambda channels, norm: {"se": squeeze_excitation(channels)},
    "relu_se": lambda channels, norm: {"relu_end": nn.ReLU(inplace=True), "se": squeeze_excitation(channels)},
    "shrinkage_cs": lambda channels, norm: {"shrinkage": Shrinkage(channels, norm, channel_shared=True)},
    "shrinkage_cw": lambda channels, norm: {"shrinkage": Shrinkage(channels, norm, channel_shared=False)},
}


def linear_rule(last: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Probabilities of dropping, stage by stage: l / L of the last block's for block l of L (Huang et al. 2016)."""
    if not 0 <= last < 1:
        raise ValueError(f"stochastic_depth is {last!r}; accepted: 0 (none) to below 1, of the last unit")
    drops = iter([last * block / sum(depths) for block in range(1, sum(depths) + 1)])
    return [[next(drops) for _ in range(depth)] for depth in depths]


def stochastic_depth(drop: float) -> dict[str, nn.Module]:
    """The branch dropped with that probability, an image or region at a time, and scaled to keep its expectation."""
    return {"drop": StochasticDepth(drop, "row")} if drop else {}
