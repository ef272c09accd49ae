"""Activation checkpointing: compute activations again in the backward pass, which takes less memory and more time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .regions import Regions


def has_gradients(block: nn.Module) -> bool:
    """Whether a forward pass of `block` keeps activations for the gradients of its parameters."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in block.parameters())


def run_blocks(blocks: nn.Module, features: Tensor, checkpointing: bool) -> Tensor:
    """blocks(features), (N, C, H, W) -> (N, C', H', W'); with `checkpointing` each block is recomputed."""
    if not checkpointing:
        return blocks(features)
    for block in blocks if isinstance(blocks, nn.Sequential) else [blocks]:
        if isinstance(block, nn.Sequential):
            features = run_blocks(block, features, checkpointing)
        else:
            features = recomputed(block, block, features) if has_gradients(block) else block(features)
    return features


def recomputed(block: nn.Module, function: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """function(features), (N, C, H, W) -> a tensor; its activations are computed again in the backward pass.

    `function` runs `block`, whose batch norms update their running statistics only once. For `Regions` only the map
    is kept.
    """
    if isinstance(features, Regions):
        regions = features
        return recomputed(block, lambda whole: function(regions.of(whole)), regions.features)
    batch_norms = (layer for layer in block.modules() if isinstance(layer, nn.BatchNorm2d))
    norms = [layer for layer in batch_norms if layer.track_running_stats]

    @contextmanager
    def still() -> Iterator[None]:
        """Hold the running statistics of the batch norms."""
        momenta, counts = [n.momentum for n in norms], [n.num_batches_tracked.clone() for n in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum, count in zip(norms, momenta, counts, strict=True):
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(count)

    return checkpoint(function, features, use_reentrant=False, context_fn=lambda: (nullcontext(), still()))
