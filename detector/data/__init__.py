"""Data sets of images and boxes: read, augmented and batched."""
