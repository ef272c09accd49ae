"""What a two-stage detector makes of the objects: their size after the resize, and how well anchors cover them.

Letters: M objects, of the training data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config import ModelConfig
from ..model.anchor_fit import best_anchor_ious, fit_anchors, grid_offsets
from ..model.anchors import STRIDE
from ..model.network_input import network_sizes
from ..tables import format_table
from .findings import Finding
from .part import Part

# An object counts as reached by an anchor from this IoU on.
IOU = 0.5
# Below half a cell, objects fall between two positions of the map.
_SMALL = STRIDE / 2
_LOW_RECALL = 0.9
_MIN_GAIN = 0.02
_LARGER = (
    "Raise model.min_size and model.max_size, give anchors of these sizes, or cut the pictures into parts."
)
_SIZE_EDGES = (0, 8, 16, 32, 64, 128, 256)
_MOST_CLASSES = 20
_HEADER = ("objects", "number", "small, px", "median, px", "large, px", "cells", "reached", "by fitted")


@dataclass(frozen=True)
class AnchorFit:
    """How anchors cover the training objects, at the network's size.

    names: (M,) classes; sizes: (M,) square roots of areas, in pixels. ious, fitted_ious: (M,) the best IoU that the
    recipe's anchors and the fitted ones reach. anchors, fitted: (anchor_sizes, aspect_ratios).
    """

    names: np.ndarray
    sizes: np.ndarray
    ious: np.ndarray
    fitted_ious: np.ndarray
    anchors: tuple[tuple[float, ...], tuple[float, ...]]
    fitted: tuple[tuple[float, ...], tuple[float, ...]]


def fit(parts: Sequence[Part], model: ModelConfig) -> AnchorFit | None:
    """Measure the training objects against a recipe's anchors. None: there is no object."""
    names, boxes = training_boxes(parts, model)
    if not len(boxes):
        return None
    shapes, offsets = boxes[:, 2:] - boxes[:, :2], grid_offsets(boxes)
    anchors = (model.anchor_sizes, model.aspect_ratios)
    fitted = fit_anchors(shapes, *map(len, anchors))
    ious = [best_anchor_ious(shapes, *a, offsets) for a in (anchors, fitted)]
    return AnchorFit(names, np.sqrt(shapes.prod(axis=1)), *ious, anchors, fitted)


def training_boxes(parts: Sequence[Part], model: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Class names (M,) and boxes (M, 4) of the training objects, clipped and at the network's size."""
    names, boxes = [np.empty(0, object)], [np.empty((0, 4))]
    for part in parts:
        if part.split != "train" or not len(part.boxes):
            continue
        kept = np.isfinite(part.boxes).all(axis=1) & ~part.crowd & ~part.refused
        limits = part.sizes[part.rows[kept]][:, [1, 0, 1, 0]]
        resized = network_sizes(part.sizes, model.min_size, model.max_size, model.conventions.resize_rounding)
        factors = (resized / part.sizes)[part.rows[kept]][:, [1, 0, 1, 0]]
        clipped = part.boxes[kept].clip(0, limits) * factors
        sound = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
        names.append(part.names[kept][sound])
        boxes.append(clipped[sound])
    return np.concatenate(names), np.concatenate(boxes)


def check_anchors(found: AnchorFit, source: str) -> list[Finding]:
    """Findings about objects that are small for the map, and about anchors that others would beat."""
    findings = []
    small = (found.sizes < _SMALL).mean()
    if small > 0.01:
        what = f"{source}: {small:.0%} of the training objects are under {_SMALL:g} pixels (half a cell) at the network's size"
        findings.append(Finding("warning", "small objects", source, None, what, _LARGER))
    if found.fitted_ious.mean() > found.ious.mean() + _MIN_GAIN:
        sizes, ratios = map(_listed, found.fitted)
        advice = f"Try model.anchor_sizes={sizes} model.aspect_ratios={ratios}."
        reaches_more = _recall(found.fitted_ious) > _recall(found.ious) + _MIN_GAIN
        what = (
            f"{source}: the anchors reach {_recall(found.ious):.0%} of the training objects at IoU {IOU} (mean best IoU "
            f"{found.ious.mean():.2f}); fitted ones would reach {_recall(found.fitted_ious):.0%} ({found.fitted_ious.mean():.2f})"
        )
        severity = "warning" if reaches_more else "note"
        findings.append(Finding(severity, "anchors", source, None, what, advice))
    for name in sorted(set(found.names)):
        of_class = found.names == name
        if (recall := _recall(found.ious[of_class])) < _LOW_RECALL:
            what = (
                f"{source}: the anchors reach {recall:.0%} of the training objects of {name!r} at IoU {IOU}"
            )
            findings.append(Finding("note", "class that anchors miss", source, None, what, _LARGER))
    return findings


def describe_objects(found: AnchorFit) -> str:
    """A table of the training objects by class and by size, and the anchors of the recipe and the fitted ones."""
    names, counts = np.unique(found.names.astype(str), return_counts=True)
    frequent = names[np.argsort(-counts, kind="stable")][:_MOST_CLASSES]
    others = len(names) - len(frequent)
    rest = f"The other {others} classes have fewer objects.\n" if others else ""
    groups = [(name, found.names == name) for name in frequent]
    groups += _by_size(found) + [("all", np.ones(len(found.names), bool))]
    table = format_table([_row(name, mask, found) for name, mask in groups if mask.any()], _HEADER)
    return (
        "Training objects at the network's size: 5 %, 50 % and 95 % of the square roots of their areas in pixels, the\n"
        f"median in cells of {STRIDE} pixels, and the share that the anchors reach at IoU {IOU}\n{table}\n{rest}"
        f"anchors: {_described(found.anchors)}, mean best IoU {found.ious.mean():.3f}\n"
        f"fitted:  {_described(found.fitted)}, mean best IoU {found.fitted_ious.mean():.3f}"
    )


def _by_size(found: AnchorFit) -> list[tuple[str, np.ndarray]]:
    """The groups of sizes with a mask (M,) each."""
    groups = [
        (f"{low} to {high} pixels", (found.sizes >= low) & (found.sizes < high))
        for low, high in zip(_SIZE_EDGES, _SIZE_EDGES[1:], strict=False)
    ]
    return [*groups, (f"{_SIZE_EDGES[-1]} pixels and more", found.sizes >= _SIZE_EDGES[-1])]


def _row(name: str, mask: np.ndarray, found: AnchorFit) -> tuple:
    small, median, large = np.quantile(found.sizes[mask], (0.05, 0.5, 0.95))
    reached = [f"{_recall(ious[mask]):.0%}" for ious in (found.ious, found.fitted_ious)]
    pixels = [f"{value:.0f}" for value in (small, median, large)]
    return (name, int(mask.sum()), *pixels, f"{median / STRIDE:.1f}", *reached)


def _recall(ious: np.ndarray) -> float:
    return float((ious >= IOU).mean())


def _described(anchors: tuple[Sequence[float], Sequence[float]]) -> str:
    return f"sizes {_listed(anchors[0])}, ratios {_listed(anchors[1])}"


def _listed(values: Sequence[float]) -> str:
    return "[" + ",".join(f"{value:g}" for value in values) + "]"
