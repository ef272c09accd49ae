"""Fuse a network for inference: fold its batch norms into the convolutions before them."""

import copy

import torch
from torch import nn

from .cut.block import Block
from .folding import fold, is_foldable


def fuse(module: nn.Module) -> nn.Module:
    """A copy for inference, in evaluation mode and without gradients.

    Each batch norm that directly follows a convolution is folded into it. A fused module stays as it is.
    """
    fused = copy.deepcopy(module).eval().requires_grad_(False)
    for parent in list(fused.modules()):
        if isinstance(parent, nn.Sequential):
            _fold_sequence(parent)
        elif isinstance(parent, Block):
            _fold_block(parent)
    return fused


def _fold_sequence(layers: nn.Sequential) -> None:
    """Fold each batch norm of a sequence into the convolution before it."""
    names = list(layers._modules)
    for name, following in zip(names[:-1], names[1:], strict=True):
        conv, norm = layers._modules.get(name), layers._modules[following]
        if is_foldable(conv, norm):
            _fold_into(conv, norm)
            del layers._modules[following]


def _fold_block(block: Block) -> None:
    """Fold the batch norms of a traced block. A timm norm with an activation inside leaves its activation."""
    for conv, path in block.conv_norms:
        norm = block.get_submodule(path)
        _fold_into(block.get_submodule(conv), norm)
        rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
        block.set_submodule(path, rest)
    block.conv_norms = ()


@torch.no_grad()
def _fold_into(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Make `conv` compute norm(conv(x)). The fold runs in float64, so that it costs no precision.

    It runs on the CPU, because Apple's GPUs have no float64.
    """
    device, dtype = conv.weight.device, conv.weight.dtype
    weight, bias = (t.to(device, dtype) for t in fold(conv.cpu(), norm.cpu(), torch.float64))
    conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    conv.bias = nn.Parameter(bias, requires_grad=False)
