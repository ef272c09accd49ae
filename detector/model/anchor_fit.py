"""How well anchors can cover objects, and the anchors that cover given objects best.

Letters: M objects, A anchors a position. All sizes are in pixels at the network's size.
"""

from collections.abc import Sequence

import numpy as np

from .anchors import STRIDE

_SAMPLE = 2000
# The fit moves the logarithm of a size or ratio by these steps, the larger ones first.
_STEPS = (0.4, 0.2, 0.1, 0.05)
_MAX_SWEEPS = 10
# An anchor of this IoU is a positive one of the RPN. A better one gains nothing, and another object may lose by it.
_ENOUGH = 0.7


def best_anchor_ious(
    sizes: np.ndarray,
    anchor_sizes: Sequence[float],
    aspect_ratios: Sequence[float],
    offsets: np.ndarray | float = STRIDE / 4,
) -> np.ndarray:
    """(M,) the highest IoU of each object with any anchor.

    An object overlaps most with the anchors of the nearest position, so only those are computed.

    Args:
        sizes: (M, 2) widths and heights of the objects.
        anchor_sizes: square roots of the anchors' areas. aspect_ratios: height / width.
        offsets: (M, 2) distances in x and y between the object's centre and the nearest position, see `grid_offsets`.
            The default is their mean over all places of an object.
    """
    width, height = np.asarray(sizes, np.float64).reshape(-1, 2).T
    shift_x, shift_y = np.broadcast_to(offsets, (len(width), 2)).T
    area, best = width * height, np.zeros(len(width))
    for anchor_width, anchor_height in _shapes(anchor_sizes, aspect_ratios):
        overlap = _overlap(width, anchor_width, shift_x) * _overlap(height, anchor_height, shift_y)
        union = area + anchor_width * anchor_height - overlap
        np.maximum(best, overlap / union, out=best)
    return best


def anchor_recall(
    sizes: np.ndarray,
    anchor_sizes: Sequence[float],
    aspect_ratios: Sequence[float],
    iou_thresh: float = 0.5,
    offsets: np.ndarray | float = STRIDE / 4,
) -> float:
    """The share of the objects that some anchor overlaps by `iou_thresh`; other arguments as `best_anchor_ious`."""
    return float((best_anchor_ious(sizes, anchor_sizes, aspect_ratios, offsets) >= iou_thresh).mean())


def grid_offsets(boxes: np.ndarray, stride: int = STRIDE) -> np.ndarray:
    """(M, 2) distances in x and y from the centre of each box (M, 4) to the nearest position of the anchors."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return np.abs(centres - stride * np.round(centres / stride))


def fit_anchors(
    sizes: np.ndarray, num_sizes: int = 5, num_ratios: int = 3
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Find (anchor_sizes, aspect_ratios) that overlap objects of `sizes`, (M, 2), well: by an IoU of 0.7 if they can.

    The search starts from quantiles and from evenly spaced values, and moves one number at a time. The result depends
    on the arguments only. Of many objects it takes 2,000, evenly spaced by their area. Sizes are at least half the
    stride. Equal numbers are joined, so fewer may come back.

    ValueError: there is no object with an area.
    """
    sizes = np.asarray(sizes, np.float64).reshape(-1, 2)
    sizes = sizes[(sizes > 0).all(axis=1)]
    if not len(sizes):
        raise ValueError(
            "fit_anchors got no object with an area; accepted: (M, 2) widths and heights above 0"
        )
    spaced = np.linspace(0, len(sizes) - 1, min(len(sizes), _SAMPLE)).astype(np.int64)
    sample = sizes[np.argsort(sizes.prod(axis=1), kind="stable")][spaced]
    log_sizes, log_ratios = np.log(sample.prod(axis=1)) / 2, np.log(sample[:, 1] / sample[:, 0])
    lowest = np.repeat([np.log(STRIDE / 2), -np.inf], (num_sizes, num_ratios))
    starts = [
        np.concatenate([spread(log_sizes, num_sizes), spread(log_ratios, num_ratios)])
        for spread in (_quantiles, _evenly)
    ]
    fits = [_climb(sample, np.maximum(start, lowest), num_sizes, lowest) for start in starts]
    fitted = np.exp(max(fits, key=lambda fit: fit[0])[1])
    return _distinct(fitted[:num_sizes].round()), _distinct(fitted[num_sizes:].round(2).clip(0.01))


def _shapes(anchor_sizes: Sequence[float], aspect_ratios: Sequence[float]) -> list[tuple[float, float]]:
    """The A (width, height) of the anchors."""
    return [(size / ratio**0.5, size * ratio**0.5) for ratio in aspect_ratios for size in anchor_sizes]


def _overlap(lengths: np.ndarray, length: float, shifts: np.ndarray) -> np.ndarray:
    """(M,) the common part of intervals of `lengths` and of `length` whose centres are `shifts` apart."""
    return np.minimum(np.minimum(lengths, length), (lengths + length) / 2 - shifts).clip(min=0)


def _quantiles(values: np.ndarray, count: int) -> np.ndarray:
    """`count` values with equally many of `values` around each."""
    return np.quantile(values, (np.arange(count) + 0.5) / count)


def _evenly(values: np.ndarray, count: int) -> np.ndarray:
    """`count` values at equal distances over the range of `values`."""
    low, high = np.quantile(values, (0.02, 0.98))
    return low + (high - low) * (np.arange(count) + 0.5) / count


def _climb(
    sizes: np.ndarray, logs: np.ndarray, num_sizes: int, lowest: np.ndarray
) -> tuple[float, np.ndarray]:
    """Move one of `logs` (sizes, then ratios) at a time, as long as the score rises. Returns (score, logs).

    The score is the mean best IoU, where no IoU counts for more than `_ENOUGH`.
    """

    def score(logs: np.ndarray) -> float:
        values = np.exp(logs)
        return float(
            np.minimum(best_anchor_ious(sizes, values[:num_sizes], values[num_sizes:]), _ENOUGH).mean()
        )

    best = score(logs)
    for step in _STEPS:
        for _ in range(_MAX_SWEEPS):
            before = best
            for move in np.concatenate([np.diag([step] * len(logs)), np.diag([-step] * len(logs))]):
                tried = np.maximum(logs + move, lowest)
                if (value := score(tried)) > best + 1e-6:
                    logs, best = tried, value
            if best == before:
                break
    return best, logs


def _distinct(values: np.ndarray) -> tuple[float, ...]:
    return tuple(np.unique(values).tolist())
