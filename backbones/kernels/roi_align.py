"""RoIAlign (He et al. 2017, arXiv:1703.06870) as a product with a sparse matrix.

Every bin of a region is a weighted sum of a few positions of the map. RoIAlign is therefore `weights @ map`, with
the map as rows of C channels. Each weight is the product of a weight along y and a weight along x:

    output[r, py, px] = sum over y, x of  rows[r, py, y] * columns[r, px, x] * map[y, x]

The two factors are small tables (`_Axis`). The matrix of the whole grid, or of a part, is expanded from them.
At sampling ratio 2 a bin has at most 16 entries. Entries that fall on one position are added up first, which
leaves about 5 for the regions of a detector. Coordinates are computed operation by operation as in
`torchvision.ops.roi_align`, so the two agree to rounding. `embedding_bag` computes the product and, on the
transposed matrix, its gradient.

Letters: N images, C channels, H x W map, R regions, P x Q bins per region, S samples per bin and axis, E entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .transfer import send

# Bits of a non-negative int16.
_SHORT = 15


@dataclass(frozen=True, eq=False)
class SparseMatrix:
    """A sparse matrix (CSR): row i has values[k] in column columns[k] for offsets[i] <= k < offsets[i + 1].

    columns: (E,) int32. values: (E,) float. offsets: (rows + 1,) int32.
    """

    columns: Tensor
    values: Tensor
    offsets: Tensor
    num_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.offsets) - 1, self.num_columns

    def __matmul__(self, dense: Tensor) -> Tensor:
        """(rows, columns) @ (columns, C) -> (rows, C), in the dtype of `dense`."""
        values = self.values.to(dense.dtype)
        return F.embedding_bag(
            self.columns, dense, self.offsets, mode="sum", per_sample_weights=values, include_last_offset=True
        )

    @cached_property
    def transposed(self) -> SparseMatrix:
        """The transposed matrix, sorted once and kept for all maps."""
        order = _stable_argsort(self.columns, self.num_columns)
        rows = torch.repeat_interleave(self.offsets.diff(), output_size=len(order)).int()
        ends = torch.arange(self.num_columns + 1, dtype=torch.int32, device=order.device)
        return SparseMatrix(
            columns=_take(rows, order),
            values=_take(self.values, order),
            offsets=torch.searchsorted(_take(self.columns, order), ends, out_int32=True),
            num_columns=self.shape[0],
        )


@dataclass(frozen=True, eq=False)
class _Axis:
    """Weights along one axis: bin (r, p) owns the entries first[r, p] <= k < first[r, p] + count[r, p].

    positions: (E,) int32, rows or columns of the map. weights: (E,) float. first, count: (R, P) int32.
    """

    positions: Tensor
    weights: Tensor
    first: Tensor
    count: Tensor

    def select(self, bins: slice) -> _Axis:
        """The weights of a part of the bins."""
        return replace(self, first=self.first[:, bins], count=self.count[:, bins])


@dataclass(frozen=True, eq=False)
class BinWeights:
    """RoIAlign of R regions on an (N, C, H, W) map: the positions that each bin reads, and their weights.

    `bin_weights` makes it. `rows` and `columns` are the weights along y and x. `image_start` (R,) int32 is where
    each region's image begins among the N * H * W positions. One object serves every map of this size.
    """

    rows: _Axis
    columns: _Axis
    image_start: Tensor
    num_images: int
    map_size: tuple[int, int]

    @property
    def num_regions(self) -> int:
        return len(self.image_start)

    @property
    def output_size(self) -> tuple[int, int]:
        """(P, Q), bins along y and along x."""
        return self.rows.count.shape[1], self.columns.count.shape[1]

    def select(self, bins: slice) -> BinWeights:
        """The weights of a part of the grid, the same bins along y and along x.

        `weights.select(slice(None, None, 2))` keeps the even bins, the only ones that a 1x1 convolution of stride 2
        reads. `sparse_roi_align` then gives exactly `[:, :, ::2, ::2]` of the whole grid.
        """
        return replace(self, rows=self.rows.select(bins), columns=self.columns.select(bins))

    @cached_property
    def matrix(self) -> SparseMatrix:
        """The (R * P * Q, N * H * W) matrix over channels-last positions, expanded at the first use."""
        height, width = self.map_size
        bins = (self.num_regions, *self.output_size)
        y_first, y_count = (
            t[:, :, None].expand(bins).reshape(-1) for t in (self.rows.first, self.rows.count)
        )
        x_first, x_count = (
            t[:, None].expand(bins).reshape(-1) for t in (self.columns.first, self.columns.count)
        )
        offsets = _offsets(y_count * x_count)

        # A strip is one row of the map in one bin. An entry is one position of a strip.
        bin_of_strip, y = _ranges(y_first, y_count)
        x_first, x_count = _take(x_first, bin_of_strip), _take(x_count, bin_of_strip)
        strip_of_entry, x = _ranges(x_first, x_count)
        image_start = _take(self.image_start.repeat_interleave(bins[1] * bins[2]), bin_of_strip)
        strip_start = image_start + _take(self.rows.positions, y) * width
        strip_weight = _take(self.rows.weights, y)
        return SparseMatrix(
            columns=_take(strip_start, strip_of_entry) + _take(self.columns.positions, x),
            values=_take(strip_weight, strip_of_entry) * _take(self.columns.weights, x),
            offsets=offsets,
            num_columns=self.num_images * height * width,
        )


@torch.no_grad()
def bin_weights(
    boxes: Sequence[Tensor],
    map_size: tuple[int, int],
    num_images: int,
    *,
    spatial_scale: float,
    output_size: int | tuple[int, int] = 14,
    sampling_ratio: int = 2,
    aligned: bool = False,
) -> BinWeights:
    """The weights of RoIAlign, as `torchvision.ops.roi_align` defines it.

    Sizes and boxes that do not fit are a ValueError.

    Args:
        boxes: N x (R_i, 4) xyxy, in pixels. The weights are float64 if the boxes are, else float32. No gradient flows
            to the boxes.
        map_size: (H, W) of the map.
        num_images: N, the length of the map's batch.
        spatial_scale: map positions per pixel, 1/16 for a C4 detector.
        output_size: bins per region, P = Q or (P, Q).
        sampling_ratio: samples per bin along each axis; 0 or less: one per position that the bin spans, rounded up.
        aligned: shift the boxes by half a position, as Detectron2 does. Boxes smaller than one position then keep their
            size; otherwise they are enlarged to one position.
    """
    map_size, output_size = pair(map_size, "map_size"), pair(output_size, "output_size")
    if not spatial_scale > 0:
        raise ValueError(f"spatial_scale must be positive, got {spatial_scale}")
    images, boxes = flatten_boxes(boxes, num_images)

    corners = boxes * spatial_scale - (0.5 if aligned else 0.0)
    start, size = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        size = size.clamp(min=1.0)
    columns, rows = (
        _axis(start[:, i], size[:, i], output_size[1 - i], map_size[1 - i], sampling_ratio) for i in (0, 1)
    )
    return BinWeights(rows, columns, images * (map_size[0] * map_size[1]), num_images, map_size)


def sparse_roi_align(features: Tensor, weights: BinWeights) -> Tensor:
    """RoIAlign: (N, C, H, W) -> (R, C, P, Q), channels-last.

    The gradient flows to the map; a second derivative is refused. A channels-last map is read in place, any other is
    copied once. A map of another size is a ValueError, one of integers a TypeError.
    """
    expected = (weights.num_images, *weights.map_size)
    if features.dim() != 4 or (features.shape[0], *features.shape[2:]) != expected:
        n, h, w = expected
        raise ValueError(f"weights are for a map ({n}, C, {h}, {w}), got {tuple(features.shape)}")
    if not features.is_floating_point():
        raise TypeError(f"features must be floating point, got {features.dtype}")
    channels = features.shape[1]
    pooled = _SparseProduct.apply(_positions(features), weights.matrix)
    return pooled.view(weights.num_regions, *weights.output_size, channels).permute(0, 3, 1, 2)


class _SparseProduct(torch.autograd.Function):
    """matrix @ positions, (N * H * W, C) -> (R * P * Q, C).

    The gradient is the transposed product, again an `embedding_bag`: each position of the map gathers the rows of
    the output's gradient that it contributed to. It is the fastest of four ways. A product with torch's transposed
    CSR matrix takes 1.5 times as long, `embedding_bag`'s own dense backward 3 times, `index_add_` 30 times
    (500 regions, 1024 channels, 14x14, 38x50 map, two cores).
    """

    @staticmethod
    def forward(ctx, positions: Tensor, matrix: SparseMatrix) -> Tensor:
        """(N * H * W, C) -> (R * P * Q, C)"""
        ctx.matrix = matrix
        return matrix @ positions.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """(R * P * Q, C) -> (N * H * W, C)"""
        return ctx.matrix.transposed @ grad.contiguous(), None


def _positions(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N * H * W, C), a view where the map is channels-last."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]).contiguous()


def _axis(start: Tensor, size: Tensor, num_bins: int, length: int, sampling_ratio: int) -> _Axis:
    """The weights along an axis of `length` positions. Start and size of the regions are (R,), in positions."""
    return _merge(*_interpolate(*_samples(start, size, num_bins, sampling_ratio), length))


def _samples(start: Tensor, size: Tensor, num_bins: int, sampling_ratio: int) -> tuple[Tensor, Tensor]:
    """(R,) start and size -> the sample points (R, P, S), and each sample's share (R, P, S) in the mean of its bin.

    The order of operations is torchvision's. With adaptive sampling S is the largest number of samples in any
    region; the last samples of other regions have share 0.
    """
    bin_size = (size / num_bins)[:, None, None]
    num_samples = torch.full_like(bin_size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil()
    most = int(num_samples.max()) if len(size) else 0
    p = torch.arange(num_bins, dtype=size.dtype, device=size.device)[:, None]
    s = torch.arange(max(most, 1), dtype=size.dtype, device=size.device)
    divisor = num_samples.clamp(min=1)
    points = start[:, None, None] + p * bin_size + (s + 0.5) * bin_size / divisor
    return points, ((s < num_samples) / divisor).expand_as(points)


def _interpolate(points: Tensor, parts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Linear interpolation at (R, P, S) points: (R, P, 2S) positions in 0..length-1 and their weights.

    A point up to one position outside the axis reads the axis's end. A point farther out reads nothing.
    """
    inside = (points >= -1) & (points <= length)
    points = torch.where(inside, points, 0).clamp(0, length - 1)
    parts = parts * inside
    low = points.floor()
    high = (low + 1).clamp(max=length - 1)
    upper = (points - low) * parts
    lower = (1 - (points - low)) * parts
    return torch.stack((low, high), -1).flatten(2).int(), torch.stack((lower, upper), -1).flatten(2)


def _merge(positions: Tensor, weights: Tensor) -> _Axis:
    """Add up the weights of each bin that fall on one position, and drop zeros. Both arguments are (R, P, 2S)."""
    positions, order = positions.sort(-1)
    group = (positions.diff(dim=-1, prepend=positions[..., :1]) != 0).cumsum(-1)
    merged = torch.zeros_like(weights).scatter_add_(-1, group, weights.gather(-1, order))
    positions = torch.zeros_like(positions).scatter_(-1, group, positions)
    kept = merged != 0
    count = kept.sum(-1)
    first = _offsets(count.flatten())[:-1].view_as(count)
    return _Axis(positions[kept], merged[kept], first, count.int())


def _ranges(first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Two (n,) -> two (E,): for each i in turn, i repeated count[i] times, and first[i] .. first[i] + count[i] - 1."""
    owner = torch.repeat_interleave(count)
    shift = first - _offsets(count)[:-1]
    return owner, torch.arange(len(owner), dtype=torch.int32, device=count.device) + _take(shift, owner)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values[index], (n,) and (E,) -> (E,), in half the time."""
    return values.index_select(0, index)


def _offsets(count: Tensor) -> Tensor:
    """(n,) counts -> (n + 1,) int32: 0, count[0], count[0] + count[1], ..."""
    return F.pad(count.cumsum(0), (1, 0)).int()


def _stable_argsort(keys: Tensor, limit: int) -> Tensor:
    """`argsort` of (E,) int32 keys in 0..limit-1, 15 bits per pass: torch sorts int16 thirty times faster."""
    order = torch.argsort((keys & (2**_SHORT - 1)).short(), stable=True)
    if limit > 2**_SHORT:
        order = order[torch.argsort((keys >> _SHORT)[order].short(), stable=True)]
    return order


def is_exporting() -> bool:
    """Whether torch records the operations, to trace or to export them."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def flatten_boxes(boxes: Sequence[Tensor], num_images: int) -> tuple[Tensor, Tensor]:
    """N x (R_i, 4) boxes -> the image of each box (R,) int32, and all boxes (R, 4) in float32 or float64."""
    if len(boxes) != num_images or not boxes:
        raise ValueError(f"one tensor of boxes for each image: got {len(boxes)} for {num_images} images")
    for i, b in enumerate(boxes):
        if b.dim() != 2 or b.shape[1] != 4:
            raise ValueError(f"boxes of image {i} must be (R, 4): x1, y1, x2, y2; got {tuple(b.shape)}")
    flat = torch.cat(list(boxes))
    if is_exporting():
        # The record must show that the counts follow from the boxes.
        images = torch.cat([torch.full_like(b[:, 0], i, dtype=torch.int32) for i, b in enumerate(boxes)])
    else:
        counts = [len(b) for b in boxes]
        images = send(torch.from_numpy(np.arange(num_images, dtype=np.int32).repeat(counts)), flat.device)
    return images, flat.to(torch.promote_types(flat.dtype, torch.float32))


def pair(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    """(height, width) from one size or two; a ValueError that names the argument where it is neither."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"{name} must be a positive integer or two (height, width), got {size!r}")
    return pair
