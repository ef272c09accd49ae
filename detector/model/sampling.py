"""Match anchors and regions to objects, and draw those that a training step learns from.

The images of a batch are handled together: on a GPU, a small operation takes as long as a large one.
Letters: N images, A boxes of an image, G objects of an image.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.ops import box_iou

from backbones.kernels.transfer import send

# Overlaps computed at once. With more, their memory counts, and not the number of operations.
_MOST_OVERLAPS = 2**20


class Drawn(NamedTuple):
    """Drawn rows of the boxes of all images: positives (P,), negatives (Q,), each ascending; how many of each image."""

    positive: Tensor
    negative: Tensor
    num_positive: list[int]
    num_negative: list[int]

    def by_image(self) -> list[tuple[Tensor, Tensor]]:
        """The positives (P_i,) and negatives (Q_i,) of each image, as rows of the boxes of all images."""
        kinds = self.positive.split(self.num_positive), self.negative.split(self.num_negative)
        return list(zip(*kinds, strict=True))


def padded(values: list[Tensor]) -> Tensor:
    """N x (G_i, ...) -> (N, G, ...), filled up with zeros, with at least one row."""
    row = values[0].new_zeros(1, *values[0].shape[1:])
    return pad_sequence([*values, row], batch_first=True)[:-1]


def match(matcher: Matcher, objects: list[Tensor], boxes: Tensor) -> Tensor:
    """torchvision's `matcher` for all images: N x (G_i, 4) objects, (N, A, 4) boxes -> (N, A) indices of objects.

    -1 is below the low threshold, -2 between the two. An image without objects has -1 alone.
    """
    most = max(1, *(len(o) for o in objects)) * boxes.shape[1]
    at_once = max(1, _MOST_OVERLAPS // max(1, most))
    parts = range(0, len(objects), at_once)
    return torch.cat([_match(matcher, objects[i : i + at_once], boxes[i : i + at_once]) for i in parts])


def _match(matcher: Matcher, objects: list[Tensor], boxes: Tensor) -> Tensor:
    """`match` of some of the images, whose overlaps (N, G, A) are in memory together."""
    given = padded(objects)
    is_object = np.arange(given.shape[1]) < np.array([len(o) for o in objects])[:, None]
    is_object = send(torch.from_numpy(is_object), boxes.device)[..., None]
    quality = box_iou(given, boxes).masked_fill_(~is_object, -1)
    best, index = quality.max(dim=1)
    unmatched = torch.where(
        best < matcher.low_threshold, matcher.BELOW_LOW_THRESHOLD, matcher.BETWEEN_THRESHOLDS
    )
    matches = torch.where(best < matcher.high_threshold, unmatched, index)
    if matcher.allow_low_quality_matches:
        # Each object also takes the boxes that overlap it most, even if little.
        is_best = ((quality == quality.amax(dim=2, keepdim=True)) & is_object).any(dim=1)
        matches = torch.where(is_best, index, matches)
    return matches


def draw(sampler: BalancedPositiveNegativeSampler, labels: list[Tensor]) -> Drawn:
    """Labels N x (A_i,) -> what `sampler` draws of each image."""
    if isinstance(sampler, SeededSampler) and sampler.keys is not None:
        return sampler.draw(labels)
    masks = sampler(labels)
    counts = torch.stack([mask.sum() for kind in masks for mask in kind]).view(2, -1).tolist()
    return Drawn(*(torch.where(torch.cat(kind))[0] for kind in masks), *counts)


class SeededSampler(BalancedPositiveNegativeSampler):
    """torchvision's balanced sampler of anchors or regions, with an optional random key for each image.

    keys: one tuple of non-negative integers an image. The draw then depends on labels and key only, not on the
    process or the device. None: torchvision's draw from the global random state.
    """

    keys: Sequence[tuple[int, ...]] | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Labels N x (A_i,) -> uint8 masks N x (A_i,) of the positives drawn, and of the negatives.

        Labels of 1 or more are positive, 0 is negative, and -1 is never drawn.
        """
        if self.keys is None:
            return super().__call__(matched_idxs)
        none = torch.zeros_like(torch.cat(matched_idxs), dtype=torch.uint8)
        sizes = [len(v) for v in matched_idxs]
        return tuple(list(none.index_fill(0, rows, 1).split(sizes)) for rows in self.draw(matched_idxs)[:2])

    def draw(self, labels: list[Tensor]) -> Drawn:
        """Labels N x (A_i,) -> what each image's key draws."""
        rows = pad_sequence(labels, batch_first=True, padding_value=-1)
        # The counts of all images are read together, because each read makes the host wait for a GPU.
        counts = torch.stack([(rows >= 1).sum(dim=1), (rows == 0).sum(dim=1)], dim=1).tolist()
        # In each row positives come first, then negatives, both in ascending order.
        order = torch.argsort((rows < 1).byte() + (rows < 0).byte(), dim=1, stable=True)
        first = np.array([0, *accumulate(map(len, labels[:-1]))])
        order += send(torch.from_numpy(first), order.device)[:, None]
        chosen = [self._choose(key, *count) for count, key in zip(counts, self.keys, strict=True)]
        kinds = [
            [places + i * rows.shape[1] for i, places in enumerate(kind)]
            for kind in zip(*chosen, strict=True)
        ]
        places = send(torch.from_numpy(np.concatenate(sum(kinds, []))), order.device)
        counts = [list(map(len, kind)) for kind in kinds]
        return Drawn(*order.flatten()[places].split(list(map(sum, counts))), *counts)

    def _choose(
        self, key: tuple[int, ...], num_positive: int, num_negative: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw places among an image's positives, and among its negatives, which follow them."""
        rng = np.random.default_rng(key)
        most = min(num_positive, int(self.batch_size_per_image * self.positive_fraction))
        positive = _draw(rng, num_positive, most)
        negative = _draw(rng, num_negative, min(num_negative, self.batch_size_per_image - most))
        return positive, num_positive + negative


def _draw(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
    """(count,) different numbers below `total`, ascending."""
    return np.sort(rng.choice(total, count, replace=False, shuffle=False))
