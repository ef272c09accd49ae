"""RoIAlign (He et al. 2017, arXiv:1703.06870) of a channels-last map on a GPU, as Triton kernels.

torchvision's kernel reads a contiguous float32 map and computes every bin. These read the map as the convolutions leave
it, channels-last and in 16 bits where it is so, add up in float32, and compute every `stride`-th bin alone. They read
nothing back from the device.

Letters: N images, C channels, H x W map, R regions, P x Q bins per region, P' x Q' bins computed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 128  # channels of a program


@triton.jit
def _corner(start, bin_size, bins, i, samples, length):
    """The i-th sample of each bin along an axis: two positions of the map, and their weights (0 far outside it)."""
    point = start + bins * bin_size + (i + 0.5) * bin_size / samples
    inside = (point >= -1.0) & (point <= length)
    point = tl.minimum(tl.maximum(point, 0.0), length - 1.0)
    low = tl.floor(point)
    high = tl.minimum(low + 1.0, length - 1.0)
    upper = tl.where(inside, point - low, 0.0)
    lower = tl.where(inside, 1.0 - (point - low), 0.0)
    return low.to(tl.int32), high.to(tl.int32), lower, upper


@triton.jit
def _extent(rois, r, axis: tl.constexpr, scale, shift, num_bins, aligned: tl.constexpr, ratio: tl.constexpr):
    """Start and bin size of region r along an axis (0: x, 1: y), in positions, and the samples of a bin."""
    start = tl.load(rois + r * 5 + 1 + axis) * scale - shift
    size = tl.load(rois + r * 5 + 3 + axis) * scale - shift - start
    if not aligned:
        size = tl.maximum(size, 1.0)
    bin_size = size / num_bins
    samples = tl.full((), ratio, tl.float32) if ratio > 0 else tl.ceil(bin_size)
    return start, bin_size, samples


@triton.jit
def _pool(
    features, rois, pooled, channels, height, width, scale, shift, num_rows, num_columns, rows, columns,
    stride: tl.constexpr, aligned: tl.constexpr, ratio: tl.constexpr, block_q: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """One row of bins of a region, `block_c` channels: features (N, H, W, C) -> pooled (R, P', Q', C)."""
    r, p = (tl.program_id(0) // rows).to(tl.int64), tl.program_id(0) % rows
    c = tl.program_id(1) * block_c + tl.arange(0, block_c)
    q = tl.arange(0, block_q)
    y_start, bin_height, y_samples = _extent(rois, r, 1, scale, shift, num_rows, aligned, ratio)
    x_start, bin_width, x_samples = _extent(rois, r, 0, scale, shift, num_columns, aligned, ratio)
    image = tl.load(rois + r * 5).to(tl.int64) * height * width
    total = tl.zeros((block_q, block_c), tl.float32)
    mask = (q < columns)[:, None] & (c < channels)[None, :]
    for i in range(y_samples.to(tl.int32)):
        y0, y1, wy0, wy1 = _corner(y_start, bin_height, p * stride, i, y_samples, height)
        for j in range(x_samples.to(tl.int32)):
            x0, x1, wx0, wx1 = _corner(x_start, bin_width, q * stride, j, x_samples, width)
            upper, lower = (
                features + (image + y0 * width) * channels,
                features + (image + y1 * width) * channels,
            )
            left, right = (x0 * channels)[:, None] + c[None, :], (x1 * channels)[:, None] + c[None, :]
            total += (wy0 * wx0)[:, None] * tl.load(upper + left, mask=mask, other=0.0).to(tl.float32)
            total += (wy0 * wx1)[:, None] * tl.load(upper + right, mask=mask, other=0.0).to(tl.float32)
            total += (wy1 * wx0)[:, None] * tl.load(lower + left, mask=mask, other=0.0).to(tl.float32)
            total += (wy1 * wx1)[:, None] * tl.load(lower + right, mask=mask, other=0.0).to(tl.float32)
    total = total / tl.maximum(y_samples * x_samples, 1.0)
    out = pooled + ((r * rows + p) * columns + q)[:, None] * channels + c[None, :]
    tl.store(out, total.to(pooled.dtype.element_ty), mask=mask)


@triton.jit
def _share(start, bin_size, bins, samples, length, position):
    """The weight that each bin gives to a position along an axis, for `bins` and `position` of shapes that broadcast."""
    total = (bins + position) * 0.0
    for i in range(samples.to(tl.int32)):
        low, high, lower, upper = _corner(start, bin_size, bins, i, samples, length)
        total += tl.where(low == position, lower, 0.0) + tl.where(high == position, upper, 0.0)
    return total / tl.maximum(samples, 1.0)


@triton.jit
def _support(start, bin_size, num_bins, samples, length):
    """The first and the last position of the map that a region reads along an axis."""
    half = 0.5 * bin_size / tl.maximum(samples, 1.0)
    first = tl.minimum(tl.maximum(start + half, 0.0), length - 1.0)
    last = tl.minimum(tl.maximum(start + num_bins * bin_size - half, 0.0), length - 1.0)
    return tl.floor(first).to(tl.int32), tl.minimum(tl.floor(last).to(tl.int32) + 1, length - 1)


@triton.jit
def _spread(
    grad, rois, grad_map, channels, height, width, scale, shift, num_rows, num_columns, rows, columns,
    stride: tl.constexpr, aligned: tl.constexpr, ratio: tl.constexpr, block_q: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """The gradient of `_pool`, a region and `block_c` channels: grad (R, P', Q', C) is added to grad_map (N, H, W, C).

    The bins are added up in the two axes, one after the other, before anything is written. A region writes each
    position of the map once, not once for each sample: that is 30 times less for most objects.
    """
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * block_c + tl.arange(0, block_c)
    q, ahead = tl.arange(0, block_q), tl.arange(0, 16)
    y_start, bin_height, y_samples = _extent(rois, r, 1, scale, shift, num_rows, aligned, ratio)
    x_start, bin_width, x_samples = _extent(rois, r, 0, scale, shift, num_columns, aligned, ratio)
    y_first, y_last = _support(y_start, bin_height, num_rows, y_samples, height)
    x_first, x_last = _support(x_start, bin_width, num_columns, x_samples, width)
    image = tl.load(rois + r * 5).to(tl.int64) * height * width
    mask = (q < columns)[:, None] & (c < channels)[None, :]
    given = grad + r * rows * columns * channels + q[:, None] * channels + c[None, :]
    for y in range(y_first, y_last + 1):
        along = tl.zeros((block_q, block_c), tl.float32)
        for p in range(rows):
            weight = _share(y_start, bin_height, p * stride, y_samples, height, y)
            if weight != 0.0:
                row = given + p * columns * channels
                along += weight * tl.load(row, mask=mask, other=0.0).to(tl.float32)
        for x_block in range(x_first, x_last + 1, 16):
            x = x_block + ahead
            weights = _share(x_start, bin_width, (q * stride)[None, :], x_samples, width, x[:, None])
            total = tl.dot(weights, along, input_precision="ieee")
            target = grad_map + (image + y * width + x)[:, None] * channels + c[None, :]
            inside = (x <= x_last)[:, None] & (c < channels)[None, :]
            tl.atomic_add(target, total, mask=inside, sem="relaxed")


def triton_roi_align(
    features: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    *,
    spatial_scale: float,
    sampling_ratio: int = 2,
    aligned: bool = False,
    stride: int = 1,
) -> Tensor:
    """Every `stride`-th bin of `torchvision.ops.roi_align`: (N, C, H, W) -> (R, C, P', Q'), channels-last.

    rois: (R, 5) float32, the image's number and xyxy in pixels. The other arguments are those of `bin_weights`.
    The gradient flows to the map. It is added up in float32 in no fixed order, as in torchvision's kernel.
    """
    options = (output_size, spatial_scale, sampling_ratio, aligned, stride)
    return _RoIAlign.apply(features, rois.contiguous(), options)


class _RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, rois: Tensor, options: tuple) -> Tensor:
        """(N, C, H, W) and (R, 5) -> (R, C, P', Q')"""
        ctx.save_for_backward(rois)
        ctx.shape, ctx.dtype, ctx.options = features.shape, features.dtype, options
        positions = features.detach().permute(0, 2, 3, 1).contiguous()
        rows, columns = _bins(options)
        pooled = positions.new_empty(len(rois), rows, columns, features.shape[1])
        _launch(_pool, positions, rois, pooled, features.shape, options, rows, 1)
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        """(R, C, P', Q') -> (N, C, H, W)"""
        n, channels, height, width = ctx.shape
        grad_map = grad.new_zeros(n, height, width, channels, dtype=torch.float32)
        given = grad.permute(0, 2, 3, 1).contiguous()
        _launch(_spread, given, *ctx.saved_tensors, grad_map, ctx.shape, ctx.options, 1, 16)
        return grad_map.permute(0, 3, 1, 2).to(ctx.dtype), None, None


def _bins(options: tuple) -> tuple[int, int]:
    """(P', Q')"""
    (rows, columns), stride = options[0], options[4]
    return -(-rows // stride), -(-columns // stride)


def _launch(
    kernel,
    source: Tensor,
    rois: Tensor,
    target: Tensor,
    shape: torch.Size,
    options: tuple,
    programs: int,
    least_q: int,
) -> None:
    """Run `kernel` with `programs` programs for each region and block of channels, and blocks of `least_q` bins."""
    (num_rows, num_columns), scale, ratio, aligned, stride = options
    (rows, columns), (_, channels, height, width) = _bins(options), shape
    if not len(rois):
        return
    # Triton runs on the current device, whichever has the tensors.
    with torch.cuda.device_of(source):
        kernel[(len(rois) * programs, triton.cdiv(channels, _BLOCK))](
            source, rois, target, channels, height, width, scale, 0.5 if aligned else 0.0,
            num_rows, num_columns, rows, columns,
            stride=stride, aligned=aligned, ratio=max(ratio, 0),
            block_q=max(least_q, triton.next_power_of_2(columns)), block_c=_BLOCK,
        )  # fmt: skip
