"""The receptive field of any network's maps, found by watching the operations of a forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


@dataclass(frozen=True)
class Reach:
    """What row i of a map reads: rows i * stride + first to i * stride + last of the image, both included.

    layers: convolutions and matrix products with weights, on the longest path from the image.
    pooled: whether the map is one value per channel, made of the whole image. first and last say nothing then.
    """

    first: float = 0
    last: float = 0
    stride: int = 1
    layers: int = 0
    pooled: bool = False

    @property
    def rows(self) -> int | None:
        """The receptive field in pixels of the image; None: the whole image."""
        return None if self.pooled or self.last == inf else int(self.last - self.first) + 1

    def shifted(self, rows: int) -> "Reach":
        """The reach where row i of the map is what row i + rows was."""
        return replace(self, first=self.first + rows * self.stride, last=self.last + rows * self.stride)

    def windowed(self, kernel: int, stride: int, padding: int, dilation: int = 1, layers: int = 0) -> "Reach":
        """The reach behind a convolution or pool with this window."""
        start = self.shifted(-padding)
        last = start.last + dilation * (kernel - 1) * self.stride
        return replace(start, last=last, stride=self.stride * stride, layers=self.layers + layers)


def joined(reaches: Sequence[Reach]) -> Reach:
    """The reach of a sum, product or concatenation.

    Pooled maps count only where all are pooled: a gate that sees the whole image does not widen the field by the
    usual convention.
    """
    maps = [reach for reach in reaches if not reach.pooled] or reaches
    return Reach(
        min(reach.first for reach in maps),
        max(reach.last for reach in maps),
        max(reach.stride for reach in maps),
        max(reach.layers for reach in maps),
        maps[0].pooled,
    )


class ReachMode(TorchDispatchMode):
    """Keeps the reach of each tensor that is computed from `image`, as its attribute `reach`."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        image.reach = Reach()

    def __torch_dispatch__(
        self, operation: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = operation(*args, **(kwargs or {}))
        reaches = [t.reach for t in tree_leaves((args, kwargs)) if hasattr(t, "reach")]
        if reaches:
            reach = _behind(operation.overloadpacket, args, joined(reaches))
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    tensor.reach = reach
        return result


def _behind(operation: Callable, args: tuple, reach: Reach) -> Reach:
    """The reach behind an operation on maps with this reach. Operations that are not listed work on each position."""
    if operation is aten.convolution:
        stride, padding, dilation = (numbers[0] for numbers in args[3:6])
        return reach.windowed(args[1].shape[2], stride, padding, dilation, layers=1)
    if operation in (aten.max_pool2d_with_indices, aten.avg_pool2d):
        return reach.windowed(*_pool_window(*args[1:]))
    if operation in (aten.mean, aten._adaptive_avg_pool2d, aten.amax):
        return replace(reach, pooled=True)
    if operation in (aten.addmm, aten.mm):
        return replace(reach, layers=reach.layers + 1)
    # Attention reads every position.
    if operation is aten.bmm:
        return replace(reach, first=-inf, last=inf)
    if operation is aten.constant_pad_nd and len(args[1]) > 2:
        return reach.shifted(-args[1][2])
    if operation is aten.slice and args[0].ndim == 4:
        return _sliced(reach, *args[1:])
    return reach


def _pool_window(
    kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,), *_: object
) -> tuple[int, int, int]:
    """Kernel, stride and padding of a pool along the height, from its arguments behind the map."""
    return kernel[0], (stride or kernel)[0], padding[0]


def _sliced(
    reach: Reach, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Reach:
    """The reach of a map's slice; only slices of rows change it."""
    return reach.shifted(start or 0).windowed(1, step, 0) if dim == 2 else reach
