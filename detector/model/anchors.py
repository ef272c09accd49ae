"""Anchors on the one stride-16 map, and a check of their sizes. Letters: A anchors a position."""

import math
import warnings
from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import BeforeValidator
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from backbones.messages import shown

from ..settings import Positive
from .conventions import Conventions

STRIDE = 16


class MapAnchors(AnchorGenerator):
    """torchvision's AnchorGenerator for one map, with Detectron2's stride, rounding and order as options.

    `Conventions` describes these three options. `sizes` and `aspect_ratios` are those of `build_faster_rcnn`.
    """

    def __init__(
        self,
        sizes: tuple[float, ...],
        aspect_ratios: tuple[float, ...],
        conventions: Conventions,
    ) -> None:
        super().__init__((sizes,), (aspect_ratios,))
        self.stride = conventions.anchor_stride
        # (A, 4), ratio-major
        cells = self.cell_anchors[0] if conventions.anchor_rounding else _exact_cells(sizes, aspect_ratios)
        if conventions.anchor_order == "size_major":
            cells = cells.view(len(aspect_ratios), len(sizes), 4).transpose(0, 1).reshape(-1, 4)
        self.cell_anchors = [cells]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """One map (N, C4, H, W) -> N x (H * W * A, 4) anchors, xyxy in pixels, in the order (y, x, anchor).

        They are float32 at least. In bfloat16 they would be off by pixels.
        """
        features = feature_maps[0]
        dtype = torch.promote_types(features.dtype, torch.float32)
        (height, width), (rows, columns) = image_list.tensors.shape[-2:], features.shape[-2:]
        stride = [height // rows, width // columns] if self.stride == "grid" else [STRIDE, STRIDE]
        self.set_cell_anchors(dtype, features.device)
        anchors = self.grid_anchors([(rows, columns)], [stride])[0]
        return [anchors for _ in image_list.image_sizes]


def _exact_cells(sizes: tuple[float, ...], aspect_ratios: tuple[float, ...]) -> Tensor:
    """(A, 4) unrounded anchors around the origin, all sizes of a ratio first.

    width^2 = size^2 / ratio, height = ratio * width.
    """
    widths = [(ratio, math.sqrt(size**2 / ratio)) for ratio in aspect_ratios for size in sizes]
    return torch.tensor([[-w / 2, -ratio * w / 2, w / 2, ratio * w / 2] for ratio, w in widths])


def check_anchor_sizes(sizes: tuple[float, ...], min_size: int, max_size: int) -> None:
    """Raise a ValueError if all sizes are too large for the images; warn of each size that is too large or too small.

    sizes: square roots of the areas, in pixels of the resized image.
    min_size, max_size: the short side and the bound of the long side after resizing, in pixels.
    """
    # Messages show 32, not 32.0.
    sizes = tuple(int(s) if s == int(s) else s for s in sizes)
    if min_size > max_size:
        raise ValueError(f"min_size {min_size} and max_size {max_size}: accepted: min_size <= max_size")
    too_large = [s for s in sizes if s**2 > 2 * min_size * max_size]
    too_small = [s for s in sizes if s < STRIDE / 2]
    if len(too_large) == len(sizes):
        raise ValueError(
            f"anchor_sizes {sizes} are all larger than the images (at most {min_size} x {max_size} pixels after "
            "resizing): no object could be learned. Give sizes of your objects in pixels of the resized image."
        )
    if too_large:
        warnings.warn(
            f"anchor sizes {too_large} cover more than twice an image of {min_size} x {max_size} pixels: "
            "they match no object and only cost time",
            stacklevel=4,
        )
    if too_small:
        warnings.warn(
            f"anchor sizes {too_small} are below half the stride of {STRIDE} pixels: objects between two anchor "
            "centres are missed. A larger model.min_size makes small objects larger.",
            stacklevel=4,
        )


def _flat_numbers(values: object) -> object:
    """One number or a flat sequence of numbers, as a tuple. A nested sequence is a ValueError."""
    flat = tuple(values) if isinstance(values, Iterable) and not isinstance(values, str) else (values,)
    if any(isinstance(v, (tuple, list)) for v in flat):
        raise ValueError(
            f"is {shown(values)}, one tuple a level; a C4 detector has one feature map, so give one flat tuple"
        )
    if not flat or not all(isinstance(v, (int, float)) and 0.01 <= v <= 1e5 for v in flat):
        raise ValueError(f"is {shown(values)}; accepted: positive numbers, at least one, from 0.01 to 100000")
    return flat


Numbers = Annotated[tuple[Positive, ...], BeforeValidator(_flat_numbers)]
