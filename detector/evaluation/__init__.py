"""Metrics of stored detections: COCO's twelve numbers and Pascal VOC's average precision.

Ground truth is a COCO-format dict: `images`, `categories`, and `annotations` with `bbox` as xywh, optionally with
`iscrowd` and `difficult`. Detections are a list of COCO results: `{"image_id", "category_id", "bbox": [x, y, w, h],
"score"}`. All boxes are in pixels of the original images.
"""
