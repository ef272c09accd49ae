"""RoI pooling that crops late: `RegionPool` gives `Regions`, whose crops are computed when something reads them.

RoIAlign is linear, and so is a 1x1 convolution at each position: the two commute. A head that opens with 1x1
convolutions runs them once on the map, not once per region, with the same result.

Letters: N images, C channels, H x W map, R regions, P x Q bins per region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from .kernels.gradients import conv2d
from .kernels.roi_align import (
    BinWeights,
    bin_weights,
    flatten_boxes,
    is_exporting,
    pair,
    sparse_roi_align,
)
from .messages import check_choice, first_line

# The most regions that a head takes at once without gradients. The largest activation has 0.4 MB per region. 64 regions
# stay below the 32 MB that the C allocator keeps for the next part: fresh pages cost more time than the sums in them.
CPU_REGIONS, GPU_REGIONS = 64, 1024
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RegionPool(MultiScaleRoIAlign):
    """Pool the regions of one feature map: RoIAlign, or RoIPool with `mode="max"`.

    It is a `MultiScaleRoIAlign`, since `FasterRCNN` asks for one, but its stride is an argument. torchvision's
    guesses the scale from the first images and keeps it. The guess can be wrong: 40 pixels, padded to 64, have
    4 rows at stride 16, and 4 / 40 rounds to 1/8.

    Args:
        output_size: bins per region, P = Q or (P, Q).
        sampling_ratio: as in `bin_weights`; not used by `mode="max"`.
        stride: image pixels per map position.
        aligned: as in `bin_weights`; a ValueError with `mode="max"`.
        mode: "align" averages bilinear samples (He et al. 2017), "max" is RoIPool (Girshick 2015).
        sparse: compute RoIAlign by our kernels, equal to rounding: as a sparse product on a CPU, by Triton on a GPU.
            False: torchvision's kernel.
        max_regions: the most regions that a head takes at once without gradients. It bounds the head's memory for
            any number of proposals. None: 64 on a CPU, 1024 elsewhere.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int] = 14,
        sampling_ratio: int = 2,
        *,
        stride: int = 16,
        aligned: bool = False,
        mode: str = "align",
        sparse: bool = True,
        max_regions: int | None = None,
    ):
        if not stride > 0:
            raise ValueError(f"stride must be positive, got {stride}")
        check_choice("mode", mode, ("align", "max"))
        if aligned and mode == "max":
            raise ValueError('aligned=True needs mode="align": RoIPool rounds its boxes to positions')
        super().__init__(["0"], pair(output_size, "output_size"), sampling_ratio)
        self.stride, self.aligned, self.mode, self.sparse = stride, aligned, mode, sparse
        self.scales, self.max_regions = [1 / stride], max_regions

    def forward(
        self,
        x: dict[str, Tensor] | Tensor,
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]] | None = None,
    ) -> Regions:
        """(N, C, H, W), alone or in a dict of one, and N x (R_i, 4) boxes in pixels -> (R, C, P, Q), cropped late.

        `image_shapes` is there for torchvision's signature and is not used.
        """
        maps = [x] if isinstance(x, Tensor) else list(x.values())
        if len(maps) != 1:
            raise ValueError(f"RegionPool reads one feature map, got {len(maps)}: {list(x)}")
        return Regions.of_map(self, maps[0], list(boxes))

    def is_sparse(self, features: Tensor) -> bool:
        """Whether this pool reads this (N, C, H, W) map by the sparse product."""
        return self.sparse and self.mode == "align" and _prefers_sparse(features)

    def crop(self, features: Tensor, boxes: list[Tensor], stride: int = 1) -> Tensor:
        """(N, C, H, W) and N x (R_i, 4) boxes in pixels -> every `stride`-th bin of (R, C, P, Q), cropped at once."""
        if self.is_sparse(features):
            weights = self.bin_weights(features, boxes)
            return sparse_roi_align(features, weights.select(slice(None, None, stride)))
        images, flat = flatten_boxes(boxes, features.shape[0])
        rois = torch.cat((images[:, None], flat), dim=1)
        if self.sparse and self.mode == "align" and _prefers_triton(features):
            from .kernels.triton_roi_align import triton_roi_align

            return triton_roi_align(
                features,
                rois.float(),
                self.output_size,
                spatial_scale=1 / self.stride,
                sampling_ratio=self.sampling_ratio,
                aligned=self.aligned,
                stride=stride,
            )
        return self._dense(features, rois)[:, :, ::stride, ::stride]

    def bin_weights(self, features: Tensor, boxes: list[Tensor]) -> BinWeights:
        """The weights by which this pool reads any map of the same N, H and W as `features` (N, C, H, W).

        boxes: N x (R_i, 4) xyxy, in pixels. Raises a ValueError with `mode="max"`.
        """
        if self.mode != "align":
            raise ValueError(f'only mode="align" is a weighted sum, this pool has mode={self.mode!r}')
        return bin_weights(
            boxes,
            features.shape[-2:],
            features.shape[0],
            spatial_scale=1 / self.stride,
            output_size=self.output_size,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
        )

    def _dense(self, features: Tensor, rois: Tensor) -> Tensor:
        """`crop` by torchvision's kernels, (N, C, H, W) and (R, 5) image and box -> (R, C, P, Q).

        The kernels want one dtype for map and boxes. It is float32 at least: 16 bits would move the boxes by pixels.
        """
        dtype = torch.promote_types(features.dtype, torch.float32)
        wide, scale = features.to(dtype), 1 / self.stride
        pooled = []
        for part in rois.to(dtype).split(max_kernel_regions(features.shape[1], self.output_size)):
            if self.mode == "max":
                pooled.append(torchvision.ops.roi_pool(wide, part, self.output_size, scale))
            else:
                options = (self.output_size, scale, self.sampling_ratio, self.aligned)
                pooled.append(torchvision.ops.roi_align(wide, part, *options))
        return (pooled[0] if len(pooled) == 1 else torch.cat(pooled)).to(features.dtype)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(output_size={self.output_size}, sampling_ratio={self.sampling_ratio}, "
            f"stride={self.stride}, aligned={self.aligned}, mode={self.mode!r})"
        )


class Regions(Tensor):
    """The crops (R, C, P, Q) of a map's regions, computed when something reads them.

    Networks take it as a tensor. A 1x1 convolution of it runs on the map where that is less work, and the result is
    cropped. Every other operation reads the crops. Its own elements are NaN, which shows code that reads them without
    torch's functions.

    features: the map, (N, C, H, W).
    boxes: N x (R_i, 4) xyxy, in pixels.
    projected: the id of a weight -> that weight and the map that its convolution made. Keeping the weight keeps its id
        from being used again.
    """

    @classmethod
    def of_map(cls, pool: RegionPool, features: Tensor, boxes: list[Tensor]) -> Regions:
        """(N, C, H, W) and N x (R_i, 4) boxes in pixels -> the regions (R, C, P, Q) of `pool`."""
        size = (sum(len(b) for b in boxes), features.shape[1], *pool.output_size)
        regions = features.detach().new_full((), float("nan")).expand(size).as_subclass(cls)
        regions.pool, regions.features, regions.boxes = pool, features, boxes
        regions._all_regions = size[0]
        regions.projected: dict[int, tuple[Tensor, Tensor]] = {}
        regions._weights: dict[int, BinWeights] = {}
        regions._crops: dict[int, Tensor] = {}
        return regions

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer sizes without crops, send convolutions to `_conv2d`, and give the crops to every other function."""
        if func in _SIZES:
            return super().__torch_function__(func, types, args, kwargs)
        if func is torch.conv2d and args and isinstance(args[0], cls):
            return args[0]._conv2d(*args[1:], **(kwargs or {}))
        return func(*_cropped(args), **_cropped(kwargs or {}))

    def of(self, features: Tensor) -> Regions:
        """The same boxes on another map (N, C, H, W), or on this map with nothing computed yet."""
        return Regions.of_map(self.pool, features, self.boxes)

    def crop(self, stride: int = 1) -> Tensor:
        """Every `stride`-th bin of the regions, a plain tensor (R, C, ceil(P/stride), ceil(Q/stride))."""
        if stride not in self._crops:
            whole, gradients = self._crops.get(1), torch.is_grad_enabled()
            # `_is_changed` needs a version counter, which tensors made in inference mode lack.
            with torch.inference_mode(False), torch.set_grad_enabled(gradients):
                made = self._read(self.features, stride) if whole is None else whole[:, :, ::stride, ::stride]
            self._crops[stride] = made
            if stride == 1:
                self._first_version = made._version
        return self._crops[stride]

    def parts(self, max_regions: int | None = None) -> Iterator[Regions]:
        """Yield parts of at most `max_regions` regions (None: the pool's bound), which share the projected maps.

        A loop that drops each part before it reads the next holds the crops of one part only.
        """
        default = CPU_REGIONS if self.features.device.type == "cpu" else GPU_REGIONS
        most = max_regions or self.pool.max_regions or default
        if len(self) <= most:
            yield self
            return
        for image, boxes in enumerate(self.boxes):
            for chunk in boxes.split(most):
                alone = [b[:0] for b in self.boxes]
                alone[image] = chunk
                part = Regions.of_map(self.pool, self.features, alone)
                part._all_regions, part.projected = self._all_regions, self.projected
                yield part

    def by_image(self) -> list[Regions]:
        """The regions of each image, on a map of its own."""
        maps = self.features.split(1)
        return [
            Regions.of_map(self.pool, each, [boxes]) for each, boxes in zip(maps, self.boxes, strict=True)
        ]

    def _conv2d(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
    ) -> Tensor:
        """`torch.nn.functional.conv2d` of the crops, weight (C', C, kh, kw) -> (R, C', P', Q')."""
        down, right = (stride, stride) if isinstance(stride, int) else stride
        commutes = weight.shape[2:] == (1, 1) and padding in (0, (0, 0), "valid", "same") and groups == 1
        if not commutes or down != right or self._is_changed():
            return F.conv2d(self.crop(), weight, bias, stride, padding, dilation, groups)
        projected = self._project(weight, down)
        # A bias does not commute with RoIAlign, whose bins outside the map are 0.
        return projected if bias is None else projected + bias.to(projected.dtype)[:, None, None]

    def _project(self, weight: Tensor, stride: int) -> Tensor:
        """The 1x1 convolution of the regions, weight (C', C, 1, 1) -> (R, C', ceil(P/stride), ceil(Q/stride)).

        It runs on the map or on the crops, whichever has fewer positions; with RoIPool on the crops, since a maximum
        does not commute.
        """
        rows, columns = self.pool.output_size
        num_bins = self._all_regions * -(-rows // stride) * -(-columns // stride)
        num_positions = self.features.shape[0] * self.features.shape[2] * self.features.shape[3]
        if self.pool.mode == "max" or num_bins < num_positions:
            return conv2d(self.crop(stride), weight)
        if id(weight) not in self.projected:
            self.projected[id(weight)] = weight, conv2d(self.features, weight)
        return self._read(self.projected[id(weight)][1], stride)

    def _is_changed(self) -> bool:
        """Whether somebody wrote into the crops. From then on the crops are the regions, and not the map."""
        return 1 in self._crops and self._crops[1]._version != self._first_version

    def _read(self, features: Tensor, stride: int) -> Tensor:
        """Every `stride`-th bin of the regions, (N, C', H, W) -> (R, C', ceil(P/stride), ceil(Q/stride))."""
        if not self.pool.is_sparse(features):
            return self.pool.crop(features, self.boxes, stride)
        if 1 not in self._weights:
            self._weights[1] = self.pool.bin_weights(features, self.boxes)
        if stride not in self._weights:
            self._weights[stride] = self._weights[1].select(slice(None, None, stride))
        return sparse_roi_align(features, self._weights[stride])


# Attributes and methods that read no elements, so they need no crops.
_SIZES = {
    *(Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.dtype.__get__, Tensor.device.__get__),
    *(Tensor.size, Tensor.dim, Tensor.__len__),
}


def _cropped(value: Any) -> Any:
    """The arguments of a function with crops in place of `Regions`."""
    if isinstance(value, Regions):
        return value.crop()
    if isinstance(value, dict):
        return {key: _cropped(v) for key, v in value.items()}
    return type(value)(map(_cropped, value)) if type(value) in (list, tuple) else value


def _prefers_sparse(features: Tensor) -> bool:
    """Whether to read this (N, C, H, W) map by the sparse product.

    It is faster on a CPU, and is used only there. Exporters get torchvision's operator, which they know.
    """
    return features.device.type == "cpu" and not is_exporting()


def _prefers_triton(features: Tensor) -> bool:
    """Whether to read this (N, C, H, W) map by the Triton kernel."""
    return features.is_cuda and features.dtype in _TRITON_DTYPES and not is_exporting() and _has_triton()


@cache
def _has_triton() -> bool:
    """Whether Triton works here. It may lack a C compiler, which its first kernel needs."""
    try:
        from .kernels.triton_roi_align import triton_roi_align

        features, rois = (torch.zeros(size, device="cuda") for size in ((1, 1, 1, 1), (1, 5)))
        triton_roi_align(features, rois, (1, 1), spatial_scale=1.0)
    except Exception as error:
        print(f"note: torchvision's RoIAlign serves, since Triton fails: {first_line(error)}", flush=True)
        return False
    return True


def max_kernel_regions(channels: int, output_size: tuple[int, int]) -> int:
    """The most regions that torchvision's CUDA kernels take.

    They count the R * C * P * Q outputs in 32 bits, and their loop adds its stride, up to 2**21, before it compares.
    Beyond that they read outside their memory, or return zeros.
    """
    return max(1, (2**31 - 2**21 - 1) // (channels * output_size[0] * output_size[1]))
