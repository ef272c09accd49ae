"""From a map and boxes to regions: the pool that torchvision's RoIHeads calls, and regions that are cropped late.

Letters: N images, C channels, H x W map, R regions, P x Q bins a region.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torchvision
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from backbones.gradients import conv2d

from .roi_align import BinWeights, bin_weights, flatten_boxes, pair, sparse_roi_align

# Regions that a head takes at once without gradients. A part's largest activation is 0.4 MB a region: 64 stay below the
# 32 MB that the C allocator keeps for the next part, and faulting in fresh pages costs more than the sums in them.
CPU_REGIONS, GPU_REGIONS = 64, 1024


class RegionPool(MultiScaleRoIAlign):
    """Crops of one feature map: RoIAlign, or RoIPool with `mode="max"`.

    A `MultiScaleRoIAlign`, since `FasterRCNN` asks for one, whose scale is told. torchvision's guesses it
    from the first images and keeps it: 40 pixels, padded to 64, have 4 rows at stride 16, and 4 / 40 rounds
    to 1/8.

    Args:
        output_size: bins a region, P = Q or (P, Q).
        sampling_ratio: as in `bin_weights`; not used by `mode="max"`.
        stride: pixels of the image a position of the map.
        aligned: as in `bin_weights`; `mode="max"` has no such form.
        mode: "align" averages bilinear samples (He et al. 2017), "max" is RoIPool (Girshick 2015).
        sparse: RoIAlign as a sparse product where that is faster, equal to rounding; False: torchvision's kernel.
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
    ):
        if not stride > 0:
            raise ValueError(f"stride must be positive, got {stride}")
        if mode not in ("align", "max"):
            raise ValueError(f'mode must be "align" or "max", got {mode!r}')
        if aligned and mode == "max":
            raise ValueError('aligned=True needs mode="align": RoIPool rounds its boxes to positions')
        super().__init__(["0"], pair(output_size, "output_size"), sampling_ratio)
        self.stride, self.aligned, self.mode, self.sparse = stride, aligned, mode, sparse
        self.scales = [1 / stride]

    def forward(
        self,
        x: dict[str, Tensor] | Tensor,
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        """(N, C, H, W), alone or in a dict of one, and N (R_i, 4) boxes in pixels -> (R, C, P, Q).

        `image_shapes` is torchvision's signature; the scale does not depend on it.
        """
        return self.crop(_only_map(x), boxes)

    def is_sparse(self, features: Tensor) -> bool:
        """Whether this pool reads such a map by the sparse product."""
        return self.sparse and self.mode == "align" and _prefers_sparse(features)

    def crop(self, features: Tensor, boxes: list[Tensor]) -> Tensor:
        """(N, C, H, W) and N x (R_i, 4) boxes in pixels -> (R, C, P, Q)."""
        if self.is_sparse(features):
            return sparse_roi_align(features, self.bin_weights(features, boxes))
        return self._dense(features, boxes)

    def bin_weights(self, features: Tensor, boxes: list[Tensor]) -> BinWeights:
        """The weights by which this pool reads an (N, C, H, W) map, or any other of its N, H and W."""
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

    def _dense(self, features: Tensor, boxes: list[Tensor]) -> Tensor:
        """torchvision's kernels. They want one dtype for both, and 16 bits would move the boxes by pixels."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        images, flat = flatten_boxes(boxes, features.shape[0])
        rois = torch.cat((images[:, None], flat), dim=1).to(dtype)
        wide = features.to(dtype)
        if self.mode == "max":
            pooled = torchvision.ops.roi_pool(wide, rois, self.output_size, 1 / self.stride)
        else:
            pooled = torchvision.ops.roi_align(
                wide, rois, self.output_size, 1 / self.stride, self.sampling_ratio, self.aligned
            )
        return pooled.to(features.dtype)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(output_size={self.output_size}, sampling_ratio={self.sampling_ratio}, "
            f"stride={self.stride}, aligned={self.aligned}, mode={self.mode!r})"
        )


class MapRegions:
    """Regions of one map for a head that crops them itself (`backbones.backbone.Regions`).

    features: (N, C4, H, W); boxes: N x (R_i, 4) pixels. Maps that were projected and weights of bins that were
    expanded are kept for whoever asks next, the parts of `split` among them.
    """

    def __init__(
        self,
        pool: RegionPool,
        features: Tensor,
        boxes: list[Tensor],
        max_regions: int | None = None,
        all_regions: int | None = None,
    ) -> None:
        default = CPU_REGIONS if features.device.type == "cpu" else GPU_REGIONS
        self.pool, self.features, self.boxes = pool, features, boxes
        self.max_regions = default if max_regions is None else max_regions
        self.all_regions = len(self) if all_regions is None else all_regions
        self._projected: dict[int, tuple[Tensor, Tensor]] = {}
        self._weights: dict[int, BinWeights] = {}
        self._crops: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return sum(len(b) for b in self.boxes)

    def of(self, features: Tensor) -> MapRegions:
        return MapRegions(self.pool, features, self.boxes, self.max_regions)

    def crop(self, stride: int = 1) -> Tensor:
        if stride not in self._crops:
            self._crops[stride] = self._crop(self.features, stride)
        return self._crops[stride]

    def conv1x1(self, weight: Tensor, stride: int) -> Tensor:
        rows, columns = self.pool.output_size
        num_bins = self.all_regions * -(-rows // stride) * -(-columns // stride)
        key = id(weight)
        if self.pool.mode == "max" or num_bins < self._num_positions:
            return conv2d(self.crop(stride), weight)
        if key not in self._projected:
            self._projected[key] = weight, conv2d(self.features, weight)  # kept alive, its id stays its own
        return self._crop(self._projected[key][1], stride)

    def split(self, max_regions: int | None = None) -> Iterator[MapRegions]:
        """Parts of at most `max_regions`, one after another: what a part cropped is free when the next is made."""
        most = max_regions or self.max_regions
        if len(self) <= most:
            yield self
            return
        for image, boxes in enumerate(self.boxes):
            for chunk in boxes.split(most):
                alone = [b[:0] for b in self.boxes]
                alone[image] = chunk
                part = MapRegions(self.pool, self.features, alone, self.max_regions, all_regions=len(self))
                part._projected = self._projected
                yield part

    @property
    def _num_positions(self) -> int:
        return self.features.shape[0] * self.features.shape[2] * self.features.shape[3]

    def _crop(self, features: Tensor, stride: int) -> Tensor:
        if not self.pool.is_sparse(features):
            return self.pool.crop(features, self.boxes)[:, :, ::stride, ::stride]
        if 1 not in self._weights:
            self._weights[1] = self.pool.bin_weights(features, self.boxes)
        if stride not in self._weights:
            self._weights[stride] = self._weights[1].select(slice(None, None, stride))
        return sparse_roi_align(features, self._weights[stride])


class SharedRegionPool(RegionPool):
    """A pool that gives the map and the boxes, so that the head whose weights it needs can project the map first.

    max_regions: the most regions that the head takes at once without gradients, which bounds its memory whatever the
    number of proposals; None: 64 on a CPU, 1024 elsewhere.
    """

    def __init__(self, *args, max_regions: int | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.max_regions = max_regions

    def forward(
        self,
        x: dict[str, Tensor] | Tensor,
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]] | None = None,
    ) -> MapRegions:
        return MapRegions(self, _only_map(x), list(boxes), self.max_regions)


def _prefers_sparse(features: Tensor) -> bool:
    """The sparse product is faster on a CPU; elsewhere: to be measured. Exporters know torchvision's op."""
    return features.device.type == "cpu" and not (torch.jit.is_tracing() or torch.compiler.is_exporting())


def _only_map(x: dict[str, Tensor] | Tensor) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if len(x) != 1:
        raise ValueError(f"RegionPool reads one feature map, got {len(x)}: {list(x)}")
    return next(iter(x.values()))
