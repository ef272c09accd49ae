"""Resize a decoded picture and its boxes to the network's size, then augment them.

Pictures are (H, W, 3) uint8 RGB arrays, boxes (M, 4) float32 xyxy pixels; the result is torch's (3, h, w) uint8.
"""

import os

# Without this, albumentations looks on the internet for a newer version when it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch

from ..config import AugmentConfig
from ..draws import tagged
from ..model.network_input import network_size, resize_pil

Key = tuple[int, int, int]  # seed, epoch, image id


def clip_boxes(boxes: np.ndarray, labels: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes (M, 4) to an image of `size` (height, width), and drop empty ones with their labels (M,)."""
    height, width = size
    boxes = boxes.clip(0, [width, height, width, height]).astype(np.float32)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return boxes[kept], labels[kept]


def resize(
    image: np.ndarray, boxes: np.ndarray, size: tuple[int, int], method: str = "torch"
) -> tuple[np.ndarray, np.ndarray]:
    """Resize an image (H, W, 3) and its boxes (M, 4) to `size` (height, width), as the model does.

    method: "torch" is bilinear without antialiasing, computed by OpenCV; "pil" is PIL's bilinear, which antialiases.
    """
    height, width = image.shape[:2]
    if (height, width) == size:
        return image, boxes
    factor = np.array([size[1] / width, size[0] / height] * 2, dtype=np.float32)
    if method == "pil":
        return resize_pil(image, size), boxes * factor
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR), boxes * factor


class EvalTransform:
    """Resize to the network's size, without augmentation. `Conventions` describes resize and resize_rounding."""

    def __init__(
        self, min_size: int, max_size: int, *, resize: str = "torch", resize_rounding: str = "floor"
    ) -> None:
        self.min_size = min_size
        self.max_size = max_size
        self.resize_with = resize
        self.resize_rounding = resize_rounding

    def __call__(self, image: np.ndarray, target: dict, key: Key) -> tuple[torch.Tensor, dict]:
        """Image (H, W, 3) uint8 and target -> image (3, h, w) uint8 and target, as tensors at the network's size.

        target: boxes (M, 4), labels (M,), image_id. The result has `original_size` (height, width) too.
        key: the seed of all random draws.
        """
        original_size = image.shape[:2]
        boxes, labels = clip_boxes(target["boxes"], target["labels"], original_size)
        rng = np.random.default_rng(tagged("augmentation", *key))
        image, boxes = resize(image, boxes, self.draw_size(original_size, rng), self.resize_with)
        image, boxes, labels = self.augment(image, boxes, labels, rng)
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.from_numpy(labels),
            "image_id": target["image_id"],
            "original_size": original_size,
        }

    def draw_size(self, original_size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        """The (height, width) to resize to."""
        return network_size(*original_size, self.min_size, self.max_size, self.resize_rounding)

    def augment(
        self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image (h, w, 3), boxes (M, 4) and labels (M,), unchanged."""
        return image, boxes, labels


class TrainTransform(EvalTransform):
    """Resize to the network's size times a random factor, then augment with albumentations.

    All random draws depend on the key only.
    """

    def __init__(self, min_size: int, max_size: int, augment: AugmentConfig, **resizing: str) -> None:
        super().__init__(min_size, max_size, **resizing)
        self.scale = augment.scale
        self.compose = build_augmentation(augment)

    def draw_size(self, original_size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        """The network's (height, width), times a factor drawn from `scale`."""
        factor = rng.uniform(*self.scale)
        height, width = super().draw_size(original_size, rng)
        return max(1, round(height * factor)), max(1, round(width * factor))

    def augment(
        self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image (h, w, 3), boxes (M, 4) and labels (M,) -> the same, augmented. A crop may drop boxes."""
        # Every worker has its own copy of Compose's generators.
        # With a seed for each sample, the worker does not matter.
        self.compose.set_random_seed(int(rng.integers(2**31)))
        if not self.compose.processors:
            return self.compose(image=image)["image"], boxes, labels
        result = self.compose(image=image, bboxes=boxes, labels=labels)
        boxes = np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 4)
        labels = np.asarray(result["labels"], dtype=np.int64).reshape(-1)
        return (result["image"], *clip_boxes(boxes, labels, result["image"].shape[:2]))


def build_augmentation(augment: AugmentConfig) -> A.Compose:
    """Build the albumentations pipeline of a configuration. It takes boxes and labels only if a step moves boxes."""
    jitter = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    steps = [
        A.BBoxSafeRandomCrop(p=augment.crop) if augment.crop else None,
        A.HorizontalFlip(p=augment.horizontal_flip) if augment.horizontal_flip else None,
        A.VerticalFlip(p=augment.vertical_flip) if augment.vertical_flip else None,
        A.ColorJitter(*jitter, p=1.0) if any(jitter) else None,
    ]
    steps = [step for step in steps if step is not None]
    boxes = A.BboxParams(format="pascal_voc", label_fields=["labels"])
    moves_boxes = any(isinstance(step, A.DualTransform) for step in steps)
    return A.Compose(steps, bbox_params=boxes if moves_boxes else None)
