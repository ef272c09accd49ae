"""Layers at the end of a residual branch: squeeze-excitation, shrinkage and stochastic depth."""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation, StochasticDepth

from .layers import NORMS, conv

REDUCTION = 16


def squeeze_excitation(channels: int) -> SqueezeExcitation:
    """x * sigmoid(fc2(relu(fc1(mean x)))), one factor per channel, reduction 16 (Hu et al. 2018, arXiv 1709.01507).

    The squeeze keeps at least four channels, as many as the narrowest published block has. This matters to narrow test
    networks only.
    """
    return SqueezeExcitation(channels, max(channels // REDUCTION, 4))


class ThresholdNorm(nn.BatchNorm2d):
    """Batch norm of one vector per image or region.

    A single vector has no variance. In training it is normalised by the running statistics, which it does not update.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, 1, 1) -> (N, C, 1, 1)"""
        if self.training and len(x) < 2:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


# All channels are one group here: in groups of two channels at one position, a norm would leave only signs.
THRESHOLD_NORMS: dict[str, Callable[[int], nn.Module]] = {
    **NORMS,
    "batch": ThresholdNorm,
    "group": lambda channels: nn.GroupNorm(1, channels),
}


def soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """sign(x) max(|x| - t, 0), x (N, C, H, W) and t (N, C, 1, 1) or (N, 1, 1, 1) -> (N, C, H, W)."""
    return torch.sign(x) * F.relu(x.abs() - threshold)


class Shrinkage(nn.Module):
    """Soft thresholding with learned thresholds (Zhao et al., IEEE Transactions on Industrial Informatics 2020).

    t = mean|x| sigmoid(fc2(relu(norm(fc1(mean|x|))))), so 0 <= t <= mean|x|. Channel-wise, the means run over positions
    and each channel has a threshold. Channel-shared, the factor is one mean over positions and channels, and each image
    or region has one threshold.

    The paper uses batch norm. Batch norm sees one vector per image, so a trunk that is trained on one or two images per
    batch learns more with norm="group" or "frozen".
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
        """(N, C, H, W) -> (N, C, 1, 1), or (N, 1, 1, 1) where channels share a threshold."""
        mean = x.abs().mean((2, 3), keepdim=True)
        share = self.share(mean)
        return share * (mean.mean(1, keepdim=True) if self.channel_shared else mean)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)"""
        return soft_threshold(x, self.thresholds(x))


# name -> a function that makes the layers behind the last convolution, from the number of channels and the norm's name
BRANCH_ENDS: dict[str | None, Callable[[int, str], dict[str, nn.Module]]] = {
    None: lambda channels, norm: {},
    "se": lambda channels, norm: {"se": squeeze_excitation(channels)},
    "relu_se": lambda channels, norm: {"relu_end": nn.ReLU(inplace=True), "se": squeeze_excitation(channels)},
    "shrinkage_cs": lambda channels, norm: {"shrinkage": Shrinkage(channels, norm, channel_shared=True)},
    "shrinkage_cw": lambda channels, norm: {"shrinkage": Shrinkage(channels, norm, channel_shared=False)},
}


def linear_rule(last: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Drop probabilities, one list per stage: last * l / L for block l of L (Huang et al. 2016).

    `last` outside [0, 1) is a ValueError.
    """
    if not 0 <= last < 1:
        raise ValueError(f"stochastic_depth is {last!r}; accepted: 0 (none) to below 1, of the last block")
    drops = iter([last * block / sum(depths) for block in range(1, sum(depths) + 1)])
    return [[next(drops) for _ in range(depth)] for depth in depths]


def stochastic_depth(drop: float) -> dict[str, nn.Module]:
    """The layer that drops the branch of an image or region with probability `drop`; empty at 0.

    It scales the branches that stay, so that their expectation does not change.
    """
    return {"drop": StochasticDepth(drop, "row")} if drop else {}
