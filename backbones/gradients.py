"""A convolution whose weight gradient takes the faster of several routes on a CPU."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_MAP_POSITIONS = 256  # outputs of an image from which a map is a map, and not the crop of a region
# Channels from which products of a map's, and of a crop's, beat oneDNN (the border makes a 7x7 crop a third larger).
_WIDE, _WIDE_CROP = 32, 512


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d`; where its weight gradient would be slow, with one that is not."""
    if _is_slow(x, weight, groups):
        return _Conv2d.apply(x, weight, bias, stride, padding, dilation)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _is_slow(x: Tensor, weight: Tensor, groups: int) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and groups == 1
        and torch.is_grad_enabled()
        and weight.requires_grad
        and not torch.is_autocast_enabled("cpu")
        and x.is_contiguous(memory_format=torch.channels_last)
    )


class _Conv2d(torch.autograd.Function):
    """conv2d of a channels-last map.

    oneDNN's weight gradient in that layout runs at 0.6-0.7 of the machine's matrix rate for 1x1 convolutions, and at
    0.3-0.6 for 3x3 ones on a whole map (two cores, AVX2). A matrix product reaches 0.9-1.0 for the former, nine of them
    0.6-0.9 for the latter, their copies counted.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = (stride, padding, dilation)
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_x = _input_grad(grad, x, weight, *ctx.geometry) if of_x else None
        grad_weight = _weight_grad(grad, x, weight, *ctx.geometry) if of_weight else None
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if of_bias else None, None, None, None


def _input_grad(grad: Tensor, x: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
    return _backward(grad, x, weight, stride, padding, dilation, (True, False, False))[0]


def _weight_grad(grad: Tensor, x: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
    if weight.shape[2:] == (1, 1) and padding == (0, 0):
        seen = x[:, :, :: stride[0], :: stride[1]]
        product = _rows(grad).t() @ _rows(seen)
        return product.view_as(weight)
    out_size = tuple(-(-size // step) for size, step in zip(x.shape[2:], stride, strict=True))
    is_map = grad.shape[2] * grad.shape[3] > _MAP_POSITIONS
    if grad.shape[2:] == out_size and x.shape[1] >= (_WIDE if is_map else _WIDE_CROP):
        return _weight_grad_by_shifts(grad, x, weight, stride, padding, dilation)
    return _backward(grad, x, weight, stride, padding, dilation, (False, True, False))[1]


def _weight_grad_by_shifts(grad: Tensor, x: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
    """A matrix product for each place of the kernel, over all positions of the maps at once.

    Under a place of the kernel, output r sees row r + q of phase a, which is every s-th row from row a on. With a border
    of zeros behind each row and each image of a phase, which serves the next one too, its shift by q is one of its
    flat rows (positions, C): a view.
    """
    (height, width), kernel = grad.shape[2:], weight.shape[2:]
    across, along = (
        [divmod(place * d - p, s) for place in range(k)]
        for k, s, p, d in zip(kernel, stride, padding, dilation, strict=True)
    )
    down, right = (max(abs(q) for q, _ in places) for places in (across, along))
    rows, columns = height + down, width + right
    positions, border = len(x) * rows * columns, down * columns + right

    def flatten(features: Tensor) -> Tensor:
        flat = features.new_zeros(positions + 2 * border, features.shape[1])
        bordered = flat[border : border + positions].view(len(x), rows, columns, -1)
        bordered[:, : features.shape[2], : features.shape[3]] = features.permute(0, 2, 3, 1)
        return flat

    phases = {
        (a, b): flatten(x[:, :, a :: stride[0], b :: stride[1]])
        for a, b in itertools.product({a for _, a in across}, {b for _, b in along})
    }
    wanted = flatten(grad)[border : border + positions].t()
    product = weight.new_empty(weight.shape[0], *kernel, weight.shape[1])
    for (i, (q, a)), (j, (r, b)) in itertools.product(enumerate(across), enumerate(along)):
        start = border + q * columns + r
        torch.mm(wanted, phases[a, b][start : start + positions], out=product[:, i, j])
    return product.permute(0, 3, 1, 2)


def _rows(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N * H * W, C), a view of a channels-last map."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def _backward(grad, x, weight, stride, padding, dilation, wanted) -> tuple[Tensor, Tensor, Tensor]:
    geometry = (stride, padding, dilation, False, (0, 0), 1)
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, wanted)
