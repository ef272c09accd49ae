"""The RoI head's vectors of an image's regions, with boxes, scores and class posteriors.

Letters: N images, M regions of an image, K classes with background, C5 channels of conv5_x (2048 in a ResNet-50).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.messages import check_choice

from .evaluation.coco import names_beside
from .files import read_json
from .model.boxes import check_boxes
from .model.faster_rcnn import C4FasterRCNN

REGIONS = ("detections", "proposals")


@dataclass(frozen=True)
class RegionFeatures:
    """One image's regions.

    boxes: (M, 4) float32 xyxy, pixels of the image as given; features: (M, C5) float32;
    class_scores: (M, K) float32, the softmax over classes, background first; image_size: (height, width).
    labels (M,) and scores (M,): a detection's own; for other regions, the best foreground class and its probability.
    """

    boxes: Tensor
    features: Tensor
    scores: Tensor
    labels: Tensor
    class_scores: Tensor
    image_size: tuple[int, int]


@torch.inference_mode()
def extract_regions(
    model: C4FasterRCNN,
    images: list[Tensor],
    regions: str = "detections",
    boxes: Sequence[Tensor] | None = None,
) -> list[RegionFeatures]:
    """Vectors of the detector's own regions, or of given ones, from one run of the trunk.

    images: N x (3, H, W) in [0, 1]. regions: "detections", or "proposals", the RPN's boxes before classification.
    boxes: N x (M, 4) xyxy in pixels of the images; they replace `regions`.

    `features` are pooled from the final boxes. A detection's `class_scores` come from its proposal, as its score does.
    """
    check_choice("regions", regions, REGIONS)
    given = None if boxes is None else [{"boxes": b} for b in boxes]
    return model.transform.by_padded_size(partial(_extract, model, regions), images, given)


def _extract(model: C4FasterRCNN, regions: str, images: list[Tensor], given: Any) -> list[RegionFeatures]:
    """`extract_regions` of images that have one padded size. given: dicts of boxes, or None."""
    if given is not None:
        encoded = model.encode(images, given)
        found = [{"boxes": target["boxes"]} for target in encoded.targets]
    else:
        encoded = model.encode(images)
        proposals = model.propose(encoded).boxes
        found = [{"boxes": b} for b in proposals]
        if regions == "detections":
            found = model.roi_heads.detect(model.classify(encoded, proposals), class_scores=True)
    final = model.classify(encoded, [f["boxes"] for f in found])
    columns = zip(found, final.by_image("vectors"), final.by_image("logits"), strict=True)
    found = [{**_best_class(logits), **f, "features": vectors} for f, vectors, logits in columns]
    if given is None:
        found = model.restore(found, encoded)
    else:
        found = [{**f, **target} for f, target in zip(found, given, strict=True)]
    return [
        RegionFeatures(**{name: value.cpu() for name, value in f.items()}, image_size=size)
        for f, size in zip(found, encoded.original_sizes, strict=True)
    ]


def _best_class(logits: Tensor) -> dict[str, Tensor]:
    """(M, K) logits -> class_scores (M, K), and scores (M,) and labels (M,) of the best foreground class."""
    class_scores = logits.softmax(dim=-1)
    scores, labels = class_scores[:, 1:].max(dim=1)
    return {"class_scores": class_scores, "scores": scores, "labels": labels + 1}


def read_boxes(path: str | Path, images: Sequence[Path]) -> dict[Path, Tensor]:
    """Read the boxes of each picture from a JSON file: (M, 4) xyxy pixels.

    The file is {"a.jpg": [[x1, y1, x2, y2], ...], ...}, or the detections.json that tools/infer.py writes, with the
    images.json beside it. It names a picture by its path as given, or by its file name. ValueError: a picture has no boxes, or its name is ambiguous.
    """
    path = Path(path)
    content = read_json(path)
    listed = {name: check_boxes(b, f"{path}: {name}: box") for name, b in _listed(path, content).items()}
    names = [image.name for image in images]
    found = {}
    for image in images:
        key = str(image) if str(image) in listed else image.name
        if key not in listed:
            raise ValueError(f"{path} has no boxes of {image}")
        if key != str(image) and names.count(key) > 1:
            raise ValueError(f"{path}: {key} names several of the pictures; name them by their paths")
        found[image] = listed[key]
    return found


def _listed(path: Path, content: Any) -> dict[str, Any]:
    """Boxes by the picture's name, from either form of the file."""
    if isinstance(content, dict):
        return content
    try:
        names = names_beside(path)["image_id"]
        listed: dict[str, list] = {name: [] for name in names.values()}
        for found in content:
            x, y, width, height = found["bbox"]
            listed[names[found["image_id"]]].append([x, y, x + width, y + height])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f'{path}: accepted are {{"a.jpg": [[x1, y1, x2, y2], ...], ...}}, or the detections.json of tools/infer.py '
            "with its images.json beside it"
        ) from None
    return listed
