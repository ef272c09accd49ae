"""Metrics of stored detections: COCO's twelve numbers and Pascal VOC's average precision.

Ground truth is a COCO-format dict (`images`, `categories`, `annotations` with `bbox` xywh, and optionally
`iscrowd` and `difficult`), detections a list of COCO results `{"image_id", "category_id", "bbox": [x, y, w,
h], "score"}`.
"""

from .coco import COCO_METRICS, check_results, evaluate_coco, format_coco, load_results
from .voc import evaluate_voc, format_voc

__all__ = [
    "COCO_METRICS",
    "check_results",
    "evaluate_coco",
    "evaluate_voc",
    "format_coco",
    "format_voc",
    "load_results",
]
