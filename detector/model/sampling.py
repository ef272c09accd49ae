"""Which anchors and regions a step learns from."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler


class SeededSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler of anchors or regions, drawing for each image from a key instead of the global state.

    With `keys` (one tuple of non-negative integers an image) the draw is a function of the key, whichever process
    or device makes it; without, it is torchvision's.
    """

    keys: Sequence[tuple[int, ...]] | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if self.keys is None:
            return super().__call__(matched_idxs)
        masks = [self._sample(matched, key) for matched, key in zip(matched_idxs, self.keys, strict=True)]
        return [positive for positive, _ in masks], [negative for _, negative in masks]

    def _sample(self, matched: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        positive, negative = torch.where(matched >= 1)[0], torch.where(matched == 0)[0]
        num_positive = min(len(positive), int(self.batch_size_per_image * self.positive_fraction))
        num_negative = min(len(negative), self.batch_size_per_image - num_positive)
        masks = []
        for indices, count in ((positive, num_positive), (negative, num_negative)):
            chosen = torch.randperm(len(indices), generator=generator)[:count].to(matched.device)
            masks.append(torch.zeros_like(matched, dtype=torch.uint8).index_fill_(0, indices[chosen], 1))
        return masks[0], masks[1]
