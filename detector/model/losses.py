"""The four losses of Faster R-CNN, from samples of anchors and of regions.

Letters: S anchors sampled, P positive ones among them, R regions sampled, K classes with background.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

LOSSES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")


def rpn_losses(
    logits: Tensor, labels: Tensor, deltas: Tensor, wanted: Tensor, normalizer: int, beta: float
) -> tuple[Tensor, Tensor]:
    """Objectness and box loss of the sampled anchors, each a sum divided by `normalizer`.

    logits: (S,); labels: (S,), 1.0 or 0.0; deltas, wanted: (P, 4), of the positive anchors.
    beta: where smooth L1 turns from quadratic to linear; 0: L1.
    """
    objectness = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    box = F.smooth_l1_loss(deltas, wanted, beta=beta, reduction="sum")
    return objectness / normalizer, box / normalizer


def region_losses(
    logits: Tensor, deltas: Tensor, labels: Tensor, wanted: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Classification and box loss, each a sum divided by the R sampled regions.

    logits: (R, K); deltas: (R, 4K); labels: (R,), 0 for background; wanted: (R, 4).
    beta: where smooth L1 turns from quadratic to linear; 0: L1.
    The box loss reads only the foreground regions, and of their deltas only the four of the true class. Without any
    region both losses are 0.
    """
    if not len(labels):
        return logits.sum(), deltas.sum()
    positive = (labels > 0).nonzero().squeeze(1)
    of_class = deltas.view(*logits.shape, 4)[positive, labels[positive]]
    box = F.smooth_l1_loss(of_class, wanted[positive], beta=beta, reduction="sum")
    return F.cross_entropy(logits, labels), box / labels.numel()


def mean_losses(losses: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The mean of each of two losses over images, or the losses of the one batch that is given."""
    return tuple(torch.stack(each).mean() for each in zip(*losses, strict=True))
