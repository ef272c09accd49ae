"""Normalise batches of pictures by a backbone's preprocessing."""

import torch
from torch import Tensor, nn

from backbones import Preprocessing


class Normalize(nn.Module):
    """(image * scale - mean) / std of uint8 pictures: (N, 3, h, w) RGB -> (N, 3, h, w) float in the channel order.

    It has no weights, and nothing in the state dict.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
        # Of pixels from 0 to 255: pixel * factor + shift.
        self.register_buffer("factor", preprocessing.scale / 255 / std, persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.preprocessing.channel_order == "bgr":
            images = images.flip(1)
        return torch.addcmul(self.shift, images.to(self.factor.dtype), self.factor)
