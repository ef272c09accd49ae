"""Resize, normalise and batch images for the network, and scale its boxes back to the original images."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import clip_boxes_to_image

from backbones import Preprocessing

from .conventions import Conventions


def network_size(
    height: int, width: int, min_size: int, max_size: int, rounding: str = "floor"
) -> tuple[int, int]:
    """(height, width) in pixels at which the network sees an image: short side min_size, long side <= max_size.

    The model and the loader both take the size from this function.
    rounding: "floor" gives the numbers of torchvision's GeneralizedRCNNTransform, "nearest" those of Detectron2.
    """
    if rounding == "floor":
        scale = min(min_size / min(height, width), max_size / max(height, width))
        return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
    # Detectron2's order of operations matters where a side lies halfway between two whole pixels.
    short = min(height, width)
    scale = min_size / short
    sides = [float(min_size) if side == short else scale * side for side in (height, width)]
    if max(sides) > max_size:
        shrink = max_size / max(sides)
        sides = [side * shrink for side in sides]
    height, width = (max(1, int(side + 0.5)) for side in sides)
    return height, width


def network_sizes(sizes: np.ndarray, min_size: int, max_size: int, rounding: str = "floor") -> np.ndarray:
    """`network_size` of many images: (N, 2) heights and widths -> (N, 2). It computes equal ones once."""
    different, row = np.unique(sizes, axis=0, return_inverse=True)
    resized = [network_size(h, w, min_size, max_size, rounding) for h, w in different.tolist()]
    return np.array(resized).reshape(-1, 2)[row.reshape(-1)]


def resize_pil(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, 3) uint8 to `size` (height, width) by PIL's bilinear filter, which antialiases where it shrinks."""
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


class NetworkTransform(GeneralizedRCNNTransform):
    """torchvision's GeneralizedRCNNTransform with a backbone's preprocessing.

    An image whose target has `original_size` was resized by the loader and keeps its size.
    `Conventions` describes size_divisible, resize and resize_rounding. If its box_min_size is 0, the final boxes are
    clipped to the original image and empty boxes are then dropped, as in Detectron2.
    """

    def __init__(
        self, min_size: int, max_size: int, preprocessing: Preprocessing, conventions: Conventions
    ) -> None:
        super().__init__(min_size, max_size, [], [], size_divisible=conventions.size_divisible)
        self.set_preprocessing(preprocessing)
        self.conventions = conventions

    def set_preprocessing(self, preprocessing: Preprocessing) -> None:
        """Normalise images by `preprocessing` from now on."""
        self.preprocessing = preprocessing
        self.image_mean, self.image_std = list(preprocessing.mean), list(preprocessing.std)
        self._moments: dict[tuple, tuple[Tensor, Tensor]] = {}

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which the network sees an image of this size."""
        rounding = self.conventions.resize_rounding
        return network_size(height, width, self.min_size[-1], self.max_size, rounding)

    def by_padded_size(self, call: Callable, images: list[Tensor], targets: Any = None) -> list[Any]:
        """The results of call(images, targets) on the images of one padded size at a time, in the order of `images`.

        images: N x (3, H, W); targets: N dicts, or None; call: gives one result an image.
        Padding moves the numbers at the edges. This way, an image gives what it gives alone, up to rounding.
        """
        rows_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, (image, target) in enumerate(zip(images, targets or [{}] * len(images), strict=True)):
            size = image.shape[-2:] if "original_size" in target else self.size_of(*image.shape[-2:])
            rows_of[tuple(-(-side // self.size_divisible) for side in size)].append(row)
        found: dict[int, Any] = {}
        for rows in rows_of.values():
            own = None if targets is None else [targets[row] for row in rows]
            found |= zip(rows, call([images[row] for row in rows], own), strict=True)
        return [found[row] for row in range(len(images))]

    def normalize(self, image: Tensor) -> Tensor:
        """Apply the preprocessing to an image (3, H, W), float RGB in [0, 1]; another dtype is a TypeError.

        torchvision normalises before it resizes. PIL needs pixels, so with `resize: pil` this changes nothing and
        `resize` normalises afterwards.
        """
        if not image.is_floating_point():
            raise TypeError(f"an image is {image.dtype}; accepted: floating point in [0, 1]")
        return image if self.conventions.resize == "pil" else self._normalize(image)

    def _normalize(self, image: Tensor) -> Tensor:
        """RGB in [0, 1] -> (image * scale - mean) / std in the preprocessing's channel order, (3, H, W)."""
        if self.preprocessing.channel_order == "bgr":
            image = image.flip(0)
        if self.preprocessing.scale != 1:
            image = image * self.preprocessing.scale
        key = image.dtype, image.device
        if key not in self._moments:
            # Kept, because a copy of two small tensors makes the host wait for a GPU.
            mean, std = (torch.tensor(v, dtype=image.dtype) for v in (self.image_mean, self.image_std))
            self._moments[key] = mean[:, None, None].to(image.device), std[:, None, None].to(image.device)
        mean, std = self._moments[key]
        return (image - mean) / std

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Image (3, H, W) and its boxes (M, 4) -> image (3, h, w) and boxes at the network's size.

        If the target has `original_size`, the image and its boxes are at that size already.
        """
        if target is None or "original_size" not in target:
            old_size = tuple(image.shape[-2:])
            new_size = self.size_of(*old_size)
            image = self._resize_image(image, new_size)
            if target is not None:
                target["boxes"] = _resize_boxes(target["boxes"], old_size, new_size)
        return (self._normalize(image) if self.conventions.resize == "pil" else image), target

    def _resize_image(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """(3, H, W) float in [0, 1] -> (3, h, w) of `size` (height, width), by torch or by PIL."""
        if self.conventions.resize == "torch":
            return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        pixels = image.mul(255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
        resized = torch.from_numpy(resize_pil(pixels, size).copy()).permute(2, 0, 1)
        return resized.to(image.device, image.dtype) / 255

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Detections with boxes (M, 4) at the network's size -> the same in pixels of the original images."""
        if self.training:
            return result
        sizes = zip(image_shapes, original_image_sizes, strict=True)
        result = [
            {**d, "boxes": _resize_boxes(d["boxes"], *both)} for d, both in zip(result, sizes, strict=True)
        ]
        if self.conventions.box_min_size > 0:
            return result
        return [_drop_empty(d, size) for d, size in zip(result, original_image_sizes, strict=True)]


def _resize_boxes(boxes: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Boxes (M, 4) xyxy of an image of `old_size` (height, width) -> of `new_size`.

    The ratios are float32, as in torchvision, whose tensors for them would make the host wait for a GPU.
    """
    height, width = (
        float(np.float32(new) / np.float32(old)) for new, old in zip(new_size, old_size, strict=True)
    )
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack((x1 * width, y1 * height, x2 * width, y2 * height), dim=1)


def _drop_empty(detections: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """Clip boxes (M, 4) to an image of `size` (height, width), and drop the detections without area."""
    boxes = clip_boxes_to_image(detections["boxes"], size)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return {name: values[kept] for name, values in {**detections, "boxes": boxes}.items()}
