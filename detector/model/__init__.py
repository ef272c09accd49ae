"""The detector: transform, trunk, RPN and RoI heads, composed on one page (`faster_rcnn.py`)."""
