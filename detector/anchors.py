"""Anchors on the one stride-16 map, and whether they fit it and the images."""

import warnings
from collections.abc import Iterable

from torchvision.models.detection.anchor_utils import AnchorGenerator

STRIDE = 16


def build_anchor_generator(
    sizes: tuple[float, ...], aspect_ratios: tuple[float, ...], min_size: int, max_size: int
) -> AnchorGenerator:
    """One level of len(sizes) x len(aspect_ratios) anchors a position.

    sizes: square roots of the areas, pixels of the resized image; aspect_ratios: height / width.
    min_size, max_size: bounds of the short and long side of the resized image, against which the sizes are checked.
    """
    sizes, aspect_ratios = _numbers("anchor_sizes", sizes), _numbers("aspect_ratios", aspect_ratios)
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
            stacklevel=3,
        )
    if too_small:
        warnings.warn(
            f"anchor sizes {too_small} are below half the stride of {STRIDE} pixels: objects between two anchor "
            "centres are missed. A larger model.min_size makes small objects larger.",
            stacklevel=3,
        )
    return AnchorGenerator(sizes=(sizes,), aspect_ratios=(aspect_ratios,))


def _numbers(name: str, values: object) -> tuple[float, ...]:
    flat = tuple(values) if isinstance(values, Iterable) else (values,)
    if any(isinstance(v, (tuple, list)) for v in flat):
        raise ValueError(
            f"{name} is {values!r}, one tuple a level; a C4 detector has one feature map, so give one flat tuple"
        )
    if not flat or not all(isinstance(v, (int, float)) and v > 0 for v in flat):
        raise ValueError(f"{name} is {values!r}; accepted: positive numbers, at least one")
    return flat
