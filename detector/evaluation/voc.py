"""Pascal VOC's average precision (Everingham et al. 2010, section 4.2), vectorised.

The rules are those of py-faster-rcnn's `lib/datasets/voc_eval.py`. Each detection is compared with the object of its
class and image that it overlaps most. If their IoU is above the threshold, the detection claims that object. The first
claim by score is right, and later claims are wrong. A claim to a `difficult` object is not counted. A detection that
claims no object is wrong.

Letters: D detections, M objects, P pairs of both with the same class and image.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..tables import format_percent, format_table
from .coco import check_results, class_names_by_id

RECALLS = np.arange(0.0, 1.1, 0.1)
"""The eleven recalls of VOC2007's metric, rounded as in voc_eval: the fourth is 0.30000000000000004, above 3/10."""


class _Boxes(NamedTuple):
    """B boxes: `boxes` (B, 4) float64 xyxy, `images` (B,) ids, `classes` (B,) category ids."""

    boxes: np.ndarray
    images: np.ndarray
    classes: np.ndarray


def evaluate_voc(ground_truth: dict, results: list[dict], *, iou_threshold: float = 0.5) -> dict[str, Any]:
    """Compute each class's average precision and the mean, by eleven points (VOC2007) and by exact area (VOC2010).

    Args:
        ground_truth: COCO-format dict, `bbox` as xywh in pixels. A missed object costs nothing if it has
            `difficult` or `iscrowd` set, and detections of it are not counted.
        results: COCO results, `bbox` as xywh in pixels of the original image. May be empty.
        iou_threshold: a match has an IoU strictly above it.

    Widths are continuous: x2 - x1. A file with 1-based inclusive pixels is read as [xmin - 1, xmax], whose width is
    voc_eval's `xmax - xmin + 1`.

    Returns:
        `mAP_11point`, `mAP_allpoint` and `per_class`: class name -> {"ap11", "ap_all"}, each in [0, 1]. A
        class without objects, or with difficult ones only, is None and is left out of the means.

    Raises:
        ValueError: the ground truth, the results or the threshold cannot be used.
    """
    if not 0 <= iou_threshold < 1:
        raise ValueError(f"iou_threshold is {iou_threshold}; accepted is 0 <= iou_threshold < 1")
    names = class_names_by_id(ground_truth)
    check_results(results, ground_truth)
    annotations = ground_truth["annotations"]
    # Equal scores keep the given order.
    objects, detections = _stack(annotations), _stack(sorted(results, key=lambda r: -r["score"]))
    difficult = np.array(
        [bool(a.get("difficult", 0) or a.get("iscrowd", 0)) for a in annotations], dtype=bool
    )
    matched = _match(detections, objects, iou_threshold)
    counted, right = _judge(matched, difficult)
    per_class = {}
    for category_id, name in names.items():
        own = counted & (detections.classes == category_id)
        num_objects = np.count_nonzero((objects.classes == category_id) & ~difficult)
        per_class[name] = _average_precision(right[own], num_objects)
    return {
        "mAP_11point": _mean([row["ap11"] for row in per_class.values()]),
        "mAP_allpoint": _mean([row["ap_all"] for row in per_class.values()]),
        "per_class": per_class,
    }


def format_voc(metrics: Mapping[str, Any]) -> str:
    """Format the result of `evaluate_voc` as a table in percent, with a line for each class and the mean last."""
    rows = [
        (name, format_percent(row["ap11"]), format_percent(row["ap_all"]))
        for name, row in metrics["per_class"].items()
    ]
    rows.append(("mean", format_percent(metrics["mAP_11point"]), format_percent(metrics["mAP_allpoint"])))
    return format_table(rows, header=("VOC AP, %", "11-point", "all-point"))


def _stack(records: list[dict]) -> _Boxes:
    """B annotations or results, with `bbox` as xywh -> arrays, with boxes as (B, 4) xyxy."""
    xywh = np.array([record["bbox"] for record in records], dtype=np.float64).reshape(-1, 4)
    return _Boxes(
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        images=np.array([record["image_id"] for record in records]),
        classes=np.array([record["category_id"] for record in records]),
    )


def _match(detections: _Boxes, objects: _Boxes, iou_threshold: float) -> np.ndarray:
    """The index of the object that each detection claims, -1 if there is none: (D,) int.

    Only the P pairs with the same class and image are compared, all at once.
    """
    matched = np.full(len(detections.boxes), -1)
    # (P,) and (P,), sorted by detection, then by object
    detection_index, object_index = _pairs(detections, objects)
    if not len(detection_index):
        return matched
    iou = _iou(detections.boxes[detection_index], objects.boxes[object_index])  # (P,)
    # The sort is stable: among equal overlaps the first object wins, as with argmax.
    best = np.lexsort((-iou, detection_index))
    best = best[np.unique(detection_index, return_index=True)[1]]
    best = best[iou[best] > iou_threshold]
    matched[detection_index[best]] = object_index[best]
    return matched


def _pairs(detections: _Boxes, objects: _Boxes) -> tuple[np.ndarray, np.ndarray]:
    """All pairs with the same class and image: (P,) indices into the detections, and (P,) into the objects."""
    if not len(detections.boxes) or not len(objects.boxes):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    groups = _groups(detections, objects)
    of_detections, of_objects = groups[: len(detections.boxes)], groups[len(detections.boxes) :]
    order = np.argsort(of_objects, kind="stable")
    first = np.searchsorted(of_objects[order], of_detections, side="left")  # (D,)
    counts = np.searchsorted(of_objects[order], of_detections, side="right") - first
    detection_index = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(detection_index)) - np.repeat(np.cumsum(counts) - counts, counts)
    return detection_index, order[np.repeat(first, counts) + within]


def _groups(detections: _Boxes, objects: _Boxes) -> np.ndarray:
    """(D + M,) numbers, equal where class and image are equal: first the detections, then the objects."""
    _, images = np.unique(np.concatenate([detections.images, objects.images]), return_inverse=True)
    _, classes = np.unique(np.concatenate([detections.classes, objects.classes]), return_inverse=True)
    return images * (classes.max() + 1) + classes


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of (P, 4) and (P, 4) xyxy boxes, row by row: (P,). It is 0 where the union is 0."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    intersection = sides.clip(min=0).prod(axis=1)
    union = (a[:, 2:] - a[:, :2]).prod(axis=1) + (b[:, 2:] - b[:, :2]).prod(axis=1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def _judge(matched: np.ndarray, difficult: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(D,) bool masks of the detections that count, and of those that are right.

    matched: (D,) claimed objects, by descending score; difficult: (M,) bool.
    """
    hit = matched >= 0
    counted = np.ones(len(matched), dtype=bool)
    counted[hit] = ~difficult[matched[hit]]
    right = np.zeros(len(matched), dtype=bool)
    # The first detection that claims an object.
    right[np.unique(matched, return_index=True)[1]] = True
    return counted, right & hit & counted


def _average_precision(right: np.ndarray, num_objects: int) -> dict[str, float | None]:
    """Both average precisions of one class.

    right: (D,) bool, of its counted detections by descending score. num_objects: its objects that are not difficult.
    """
    if num_objects == 0:
        return {"ap11": None, "ap_all": None}
    true_positives = np.cumsum(right)
    recall = true_positives / num_objects
    precision = true_positives / np.arange(1, len(right) + 1)
    # The best precision at this recall or a higher one.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(recall, RECALLS, side="left")
    ap11 = envelope[reached[reached < len(envelope)]].sum() / len(RECALLS)
    return {"ap11": float(ap11), "ap_all": float((np.diff(recall, prepend=0.0) * envelope).sum())}


def _mean(values: list[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return float(np.mean(measured)) if measured else None
