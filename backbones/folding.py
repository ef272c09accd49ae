"""Fold a batch norm with fixed statistics into the convolution before it, in training and for inference."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from .kernels.cudnn import conv_relu, fuses
from .kernels.gradients import conv2d

# A frozen norm -> its four tensors with their versions, and the scale and shift made of them. Five small kernels a norm
# and step would cost a GPU more time than some convolutions do.
_KNOWN: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


class FoldingSequential(nn.Sequential):
    """An `nn.Sequential` that computes the same with less work while gradients are enabled.

    A convolution and the frozen norm behind it run as conv(x, w * scale) + shift. That saves the norm's pass over the
    map and the copies it would keep. `fold_norms = False` leaves the norm apart. Without gradients the layers run as
    in any `nn.Sequential`.
    On a GPU, a convolution and the ReLU behind it run in one pass, with and without gradients.
    """

    fold_norms = True

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')"""
        for step in self._steps() if torch.is_grad_enabled() or x.device.type == "cuda" else self:
            x = step(x)
        return x

    def joined(self, x: Tensor, addend: Tensor) -> Tensor:
        """relu(self(x) + addend), in one pass with the last convolution where the device can."""
        *steps, last = self._steps()
        for step in steps:
            x = step(x)
        if isinstance(last, _Convolution) and not last.has_relu and last.fuses(x):
            return replace(last, has_relu=True)(x, addend)
        return torch.relu_(last(x).add_(addend))

    def _steps(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The calls that run the layers."""
        if torch.compiler.is_compiling():
            # torch.compile makes its own kernels of the plain layers.
            yield from self
            return
        layers = deque(self)
        while layers:
            layer = layers.popleft()
            if not _is_plain(layer):
                yield layer
                continue
            weight, bias, after = layer.weight, layer.bias, layers[0] if layers else None
            if torch.is_grad_enabled() and self.fold_norms and _is_frozen_norm(layer, after):
                weight, bias = fold(layer, layers.popleft())
            has_relu = bool(layers) and type(layers[0]) is nn.ReLU and not has_hooks(layers[0])
            if has_relu:
                layers.popleft()
            yield _Convolution(layer, weight, bias, has_relu)


@dataclass(frozen=True)
class _Convolution:
    """A call of `conv` with another weight and bias, and a ReLU behind it if `has_relu`."""

    conv: nn.Conv2d
    weight: Tensor
    bias: Tensor | None
    has_relu: bool

    def __call__(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'). An addend needs `has_relu`, and a map that fuses."""
        conv = self.conv
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        if self.has_relu and self.fuses(x):
            return conv_relu(x, self.weight, self.bias, geometry, addend)
        y = conv2d(x, self.weight, self.bias, *geometry)
        return torch.relu_(y) if self.has_relu else y

    def fuses(self, x: Tensor) -> bool:
        """Whether this convolution of the map (N, C, H, W) takes an addition and a ReLU into its pass."""
        return self.conv.groups == 1 and fuses(x, self.conv.out_channels)


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
        and not (has_hooks(conv) or has_hooks(norm))
    )


def fold(conv: nn.Conv2d, norm: nn.Module, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Weight (C', C, kh, kw) and bias (C',) of the convolution that equals norm(conv(x)).

    They are computed in `dtype` (None: the weights' own). Gradients flow to the weights of conv and norm.
    """
    weight, bias = (t if t is None else t.to(dtype or t.dtype) for t in (conv.weight, conv.bias))
    scale, shift = _scale_and_shift(norm, dtype)
    return weight * scale[:, None, None, None], shift if bias is None else shift + bias * scale


def _scale_and_shift(norm: nn.Module, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The (C',) scale and shift of norm(x) = x * scale + shift. Those of a frozen norm are kept until it changes."""
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if dtype is not None or not isinstance(norm, FrozenBatchNorm2d):
        return _compute(norm, *(t if t is None else t.to(dtype or t.dtype) for t in tensors))
    state = [(t, t._version) for t in tensors]
    known = _KNOWN.get(norm)
    if known is None or any(t is not u or v != w for (t, v), (u, w) in zip(state, known[0], strict=True)):
        known = _KNOWN[norm] = state, _compute(norm, *tensors)
    return known[1]


def _compute(
    norm: nn.Module, mean: Tensor, variance: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    scale = (variance + norm.eps).rsqrt() * (1 if scale is None else scale)
    return scale, (0 if shift is None else shift) - mean * scale


def _is_plain(layer: nn.Module | None) -> bool:
    """Whether our `conv2d` may replace the call of this layer."""
    return (
        type(layer) is nn.Conv2d
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and not has_hooks(layer)
    )


def _is_frozen_norm(layer: nn.Module, after: nn.Module | None) -> bool:
    return isinstance(after, FrozenBatchNorm2d) and is_foldable(layer, after)


def has_hooks(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )
