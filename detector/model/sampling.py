"""Match anchors and regions to objects, and draw those that a training step learns from."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher

Drawn = tuple[Tensor, Tensor]


class AnchorMatcher(Matcher):
    """torchvision's matcher, with the same matches, that reads nothing back from the device."""

    def set_low_quality_matches_(
        self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor
    ) -> None:
        """Match the anchors that overlap an object most, even if little: matches and all_matches (A,), quality (M, A)."""
        highest = match_quality_matrix.max(dim=1, keepdim=True).values
        is_best = (match_quality_matrix == highest).any(dim=0)
        matches.copy_(torch.where(is_best, all_matches, matches))


def draw(sampler: BalancedPositiveNegativeSampler, labels: list[Tensor]) -> list[Drawn]:
    """Labels N x (A,) -> for each image the indices that `sampler` draws, ascending: positives (P,), negatives (Q,)."""
    if isinstance(sampler, SeededSampler) and sampler.keys is not None:
        return sampler.draw(labels)
    return [(torch.where(p)[0], torch.where(n)[0]) for p, n in zip(*sampler(labels), strict=True)]


class SeededSampler(BalancedPositiveNegativeSampler):
    """torchvision's balanced sampler of anchors or regions, with an optional random key for each image.

    keys: one tuple of non-negative integers an image. The draw then depends on labels and key only, not on the
    process or the device. None: torchvision's draw from the global random state.
    """

    keys: Sequence[tuple[int, ...]] | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Labels N x (A,) -> uint8 masks N x (A,) of the positives drawn, and of the negatives.

        Labels of 1 or more are positive, 0 is negative, and -1 is never drawn.
        """
        if self.keys is None:
            return super().__call__(matched_idxs)
        masks = [
            [torch.zeros_like(labels, dtype=torch.uint8).index_fill_(0, rows, 1) for rows in drawn]
            for labels, drawn in zip(matched_idxs, self.draw(matched_idxs), strict=True)
        ]
        return [positive for positive, _ in masks], [negative for _, negative in masks]

    def draw(self, labels: list[Tensor]) -> list[Drawn]:
        """Labels N x (A,) -> for each image the indices drawn from its key, ascending: positives (P,), negatives (Q,)."""
        # The counts of all images are read together, because each read makes the host wait for a GPU.
        counts = torch.stack([n for v in labels for n in ((v >= 1).sum(), (v == 0).sum())]).tolist()
        images = zip(labels, counts[::2], counts[1::2], self.keys, strict=True)
        return [self._draw(*image) for image in images]

    def _draw(self, labels: Tensor, num_positive: int, num_negative: int, key: tuple[int, ...]) -> Drawn:
        """Labels (A,) of one image with so many positives and negatives -> the indices drawn from `key`."""
        rng = np.random.default_rng(key)
        most = min(num_positive, int(self.batch_size_per_image * self.positive_fraction))
        # Positives come first, then negatives, both in ascending order.
        order = torch.argsort((labels < 1).byte() + (labels < 0).byte(), stable=True)
        positive = _choose(rng, num_positive, most)
        negative = _choose(rng, num_negative, min(num_negative, self.batch_size_per_image - most))
        chosen = torch.from_numpy(np.concatenate([positive, num_positive + negative]))
        if labels.is_cuda:
            # A copy from pinned memory does not wait.
            chosen = chosen.pin_memory().to(labels.device, non_blocking=True)
        return order[chosen].split([len(positive), len(negative)])


def _choose(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
    """(count,) different numbers below `total`, ascending."""
    return np.sort(rng.choice(total, count, replace=False, shuffle=False))
