"""Sequences that train faster: frozen norms as part of the convolution before them."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from .gradients import conv2d


class Layers(nn.Sequential):
    """A sequence that computes the same with less work while gradients are taken.

    A convolution and the frozen norm behind it run as conv(x, w * scale) + shift: no pass of the norm over the map, no
    copies of it kept. `fold_norms = False` leaves the norm apart. Without gradients it is an `nn.Sequential`.
    """

    fold_norms = True

    def forward(self, x: Tensor) -> Tensor:
        for step in steps(self, list(self)):
            x = step(x)
        return x


def set_folding(module: nn.Module, fold_norms: bool) -> None:
    """Turn the folding of frozen norms on or off in every sequence of `module`."""
    for layers in module.modules():
        if isinstance(layers, Layers):
            layers.fold_norms = fold_norms


def steps(owner: nn.Sequential, layers: list[nn.Module]) -> Iterator[Callable[[Tensor], Tensor]]:
    """The calls that run `layers`, all or the last ones of `owner`, as their owner would."""
    if not (isinstance(owner, Layers) and torch.is_grad_enabled()):
        yield from layers
        return
    for before, layer, after in zip([None, *layers], layers, [*layers[1:], None], strict=False):
        if folds(owner, layer, after):
            yield partial(convolve, layer, *fold(layer, after))
        elif _is_plain(layer):
            yield partial(convolve, layer, layer.weight, layer.bias)
        elif not folds(owner, before, layer):
            yield layer


def folds(owner: nn.Sequential, layer: nn.Module | None, after: nn.Module | None) -> bool:
    """Whether `owner` runs these two of its layers as one convolution."""
    folding = isinstance(owner, Layers) and owner.fold_norms and torch.is_grad_enabled()
    return folding and _is_plain(layer) and isinstance(after, FrozenBatchNorm2d)


def _is_plain(layer: nn.Module | None) -> bool:
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros"


def fold(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that is norm(conv(x)); gradients flow to conv's own."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return conv.weight * scale[:, None, None, None], shift


def convolve(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """conv(x) with other weights."""
    return conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
