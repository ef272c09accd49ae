"""Draw the anchors and regions that a training step learns from."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler


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
        masks = [self._sample(matched, key) for matched, key in zip(matched_idxs, self.keys, strict=True)]
        return [positive for positive, _ in masks], [negative for _, negative in masks]

    def _sample(self, matched: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Labels (A,) of one image -> its two masks (A,), drawn from `key`."""
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        positive, negative = torch.where(matched >= 1)[0], torch.where(matched == 0)[0]
        num_positive = min(len(positive), int(self.batch_size_per_image * self.positive_fraction))
        num_negative = min(len(negative), self.batch_size_per_image - num_positive)
        masks = []
        for indices, count in ((positive, num_positive), (negative, num_negative)):
            chosen = torch.randperm(len(indices), generator=generator)[:count].to(matched.device)
            masks.append(torch.zeros_like(matched, dtype=torch.uint8).index_fill_(0, indices[chosen], 1))
        return masks[0], masks[1]
