"""Metrics of stored detections: COCO's twelve numbers and Pascal VOC's average precision.

Ground truth is a COCO-format dict (`images`, `categories`, `annotations` with `bbox` xywh, and optionally
`iscrowd` and `difficult`), detections a list of COCO results `{"image_id", "category_id", "bbox": [x, y, w,
h], "score"}`.
"""
