"""Fold a batch norm with fixed statistics into the convolution before it, in training and for inference."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from .kernels.gradients import conv2d


class FoldingSequential(nn.Sequential):
    """An `nn.Sequential` that computes the same with less work while gradients are enabled.

    A convolution and the frozen norm behind it run as conv(x, w * scale) + shift. That saves the norm's pass over the
    map and the copies it would keep. `fold_norms = False` leaves the norm apart. Without gradients the layers run as
    in any `nn.Sequential`.
    """

    fold_norms = True

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')"""
        for step in self._steps() if torch.is_grad_enabled() else self:
            x = step(x)
        return x

    def _steps(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The calls that run the layers."""
        layers, folded = list(self), None
        for layer, after in pairwise([*layers, None]):
            if layer is folded:
                folded = None
            elif not _is_plain(layer):
                yield layer
            elif self.fold_norms and isinstance(after, FrozenBatchNorm2d) and is_foldable(layer, after):
                folded = after
                yield partial(_convolve, layer, *fold(layer, after))
            else:
                yield partial(_convolve, layer, layer.weight, layer.bias)


def use_folding(module: nn.Module) -> None:
    """Turn every plain `nn.Sequential` in `module` into a `FoldingSequential`; layers, names and hooks stay.

    Only the class of the object changes, as in torch's lazy modules.
    """
    for layers in module.modules():
        if type(layers) is nn.Sequential:
            layers.__class__ = FoldingSequential


def set_folding(module: nn.Module, fold_norms: bool) -> None:
    """Turn the folding of frozen norms in training on or off in every sequence of `module`."""
    for layers in module.modules():
        if isinstance(layers, FoldingSequential):
            layers.fold_norms = fold_norms


def is_foldable(conv: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether norm(conv(x)) can run as one convolution once the norm's statistics are fixed; hooks forbid it.

    timm's norms that hold an activation are not folded, nor are its convolutions that standardise their weights.
    """
    return (
        type(conv) is nn.Conv2d
        and isinstance(norm, (nn.BatchNorm2d, FrozenBatchNorm2d))
        and norm.running_mean is not None
        and not hasattr(norm, "act")
        and not (_has_hooks(conv) or _has_hooks(norm))
    )


def fold(conv: nn.Conv2d, norm: nn.Module, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Weight (C', C, kh, kw) and bias (C',) of the convolution that equals norm(conv(x)).

    They are computed in `dtype` (None: the weights' own). Gradients flow to the weights of conv and norm.
    """
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weight, bias, mean, variance, scale, shift = (t if t is None else t.to(dtype or t.dtype) for t in tensors)
    scale = (variance + norm.eps).rsqrt() * (1 if scale is None else scale)
    shift = (0 if shift is None else shift) - mean * scale
    return weight * scale[:, None, None, None], shift if bias is None else shift + bias * scale


def _is_plain(layer: nn.Module | None) -> bool:
    """Whether our `conv2d` may replace the call of this layer."""
    return (
        type(layer) is nn.Conv2d
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and not _has_hooks(layer)
    )


def _has_hooks(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )


def _convolve(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """conv(x) with another weight and bias, (N, C, H, W) -> (N, C', H', W')."""
    return conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
