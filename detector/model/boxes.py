"""Boxes: check those that callers give, and code them as deltas."""

from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder
from torchvision.models.detection._utils import encode_boxes

from backbones.kernels.transfer import send


class BoxCoder(TorchvisionBoxCoder):
    """torchvision's box coder, with the same numbers, that copies no constants to the device on each call."""

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """Boxes (M, 4) and proposals (M, 4) -> deltas (M, 4)."""
        weights = proposals.new_empty(4)
        for i, weight in enumerate(self.weights):
            weights[i].fill_(weight)
        return encode_boxes(reference_boxes, proposals, weights)

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Deltas (M, 4K) and boxes (M, 4) -> boxes (M, 4K)."""
        boxes = boxes.to(rel_codes.dtype)
        sides = boxes[:, 2:] - boxes[:, :2]
        # (M, 1, 2) and (M, K, 4)
        sides, centers = sides[:, None], (boxes[:, :2] + 0.5 * sides)[:, None]
        deltas = rel_codes.reshape(len(rel_codes), rel_codes.shape[1] // 4, 4)
        wx, wy, ww, wh = self.weights
        moved = torch.stack((deltas[..., 0] / wx, deltas[..., 1] / wy), -1) * sides + centers
        grown = torch.stack((deltas[..., 2] / ww, deltas[..., 3] / wh), -1).clamp(max=self.bbox_xform_clip)
        half = 0.5 * (torch.exp(grown) * sides)
        return torch.cat((moved - half, moved + half), -1).reshape(rel_codes.shape)


def clip_boxes(boxes: Tensor, sizes: list[tuple[int, int]], counts: list[int]) -> Tensor:
    """Clip (R, ..., 4) boxes, `counts` of each image, to the images' `sizes` (height, width).

    The numbers are those of torchvision's `clip_boxes_to_image`, for all images together.
    """
    limits = np.array([[w, h, w, h] for h, w in sizes], dtype=np.float32).repeat(counts, axis=0)
    limits = send(torch.from_numpy(limits).to(boxes.dtype), boxes.device)
    return boxes.clamp(min=0).minimum(limits.view(len(boxes), *[1] * (boxes.ndim - 2), 4))


ACCEPTED = "[x1, y1, x2, y2] in pixels of the picture with x2 > x1 and y2 > y1"


def check_boxes(boxes: Any, where: str = "box") -> Tensor:
    """Convert M rows of xyxy pixels (a tensor, an array or a list) to an (M, 4) float32 tensor.

    Raises:
        ValueError: a box is not finite or has no area. The message names the first such box by `where` and index.
    """
    if not isinstance(boxes, (Tensor, np.ndarray, list, tuple)):
        raise ValueError(f"{where}: boxes are {str(boxes)[:60]!r}; accepted: a list of {ACCEPTED}")
    for index, row in enumerate(boxes if isinstance(boxes, (list, tuple)) else ()):
        is_box = isinstance(row, (list, tuple, np.ndarray)) and len(row) == 4
        if not is_box or not all(isinstance(v, Real) for v in row):
            raise ValueError(f"{where} {index} is {str(row)[:60]}; accepted: {ACCEPTED}")
    checked = torch.as_tensor(boxes, dtype=torch.float32)
    if len(checked) == 0 and not isinstance(boxes, Tensor):
        return checked.reshape(0, 4)
    _refuse_first(checked, _sound_boxes(checked, where), where, ACCEPTED)
    return checked


def _sound_boxes(boxes: Tensor, where: str) -> Tensor:
    """(M,) bool: whether each of (M, 4) boxes is finite and has an area. ValueError: they have another shape."""
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{where}: boxes are {tuple(boxes.shape)}; accepted: (M, 4), each {ACCEPTED}")
    return torch.isfinite(boxes).all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def _refuse_first(values: Tensor, sound: Tensor, where: str, accepted: str) -> None:
    """Raise a ValueError for the first row of `values` (M, ...) that is not `sound` (M,)."""
    if not sound.all():
        index = int((~sound).nonzero()[0])
        raise ValueError(f"{where} {index} is {values[index].tolist()}; accepted: {accepted}")


def check_targets(targets: list[dict[str, Any]], num_images: int, num_classes: int | None = None) -> None:
    """Check the boxes of targets, and their labels where `num_classes`, K, is given.

    The loader's targets, which have `original_size`, were checked when they were read. The device is asked once for all.
    ValueError: a sentence that names the image, and the first such box or label.
    """
    if len(targets) != num_images:
        raise ValueError(f"{num_images} images and {len(targets)} targets are given; accepted: one for each")
    checks: list[tuple[Tensor, Tensor, str, str]] = []
    for i, target in enumerate(targets):
        if "original_size" in target:
            continue
        boxes, labels = target.get("boxes"), target.get("labels")
        if not isinstance(boxes, Tensor) or not (num_classes is None or isinstance(labels, Tensor)):
            found = sorted(target)
            raise ValueError(f"image {i}: the target has {found}; accepted: tensors of boxes and labels")
        checks.append((boxes, _sound_boxes(boxes, f"image {i}: box"), f"image {i}: box", ACCEPTED))
        if num_classes is None:
            continue
        if labels.shape != boxes.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"image {i}: labels are {tuple(labels.shape)} {labels.dtype}; accepted: one int64 for each of {len(boxes)} boxes"
            )
        sound = (labels >= 1) & (labels < num_classes)
        accepted = f"1 to {num_classes - 1}, since 0 is the background"
        checks.append((labels, sound, f"image {i}: label", accepted))
    if checks and not torch.cat([sound for _, sound, *_ in checks]).all():
        for check in checks:
            _refuse_first(*check)
