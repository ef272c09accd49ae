"""Look into a CIFAR network: gradients and responses of its layers, and what is left of it without some blocks.

Letters: N pictures of h x w pixels, L 3x3 layers, B blocks.
"""

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn

from backbones.residual import ResidualBlock
from backbones.shortcuts import ZeroPadding


def conv3x3_layers(network: nn.Module) -> list[nn.Conv2d]:
    """The L 3x3 layers in the order of the forward pass, the stem's first."""
    convs = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return [layer for layer in convs if layer.kernel_size == (3, 3)]


def gradient_norms(network: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Norms of the cross entropy's gradient in the weights of each 3x3 layer, in training mode: (L,).

    images: (N, 3, h, w). labels: (N,). The network keeps its statistics and gradients.
    """
    network = copy.deepcopy(network).train()
    layers = conv3x3_layers(network)
    loss = nn.functional.cross_entropy(network(images), labels)
    gradients = torch.autograd.grad(loss, [layer.weight for layer in layers])
    return [float(gradient.norm()) for gradient in gradients]


@torch.no_grad()
def response_deviations(network: nn.Module, images: Tensor) -> list[float]:
    """Standard deviation of the norm's output behind each convolution of a branch: He et al. 2015, Figure 7.

    The network is in evaluation mode, and in the original order. images: (N, 3, h, w).
    """
    network, found = copy.deepcopy(network).eval(), []
    for place in block_places(network):
        for layer in network.get_submodule(place).branch:
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_hook(lambda layer, inputs, output: found.append(float(output.std())))
    network(images)
    return found


def block_places(network: nn.Module) -> list[str]:
    """The names of the B residual blocks, in the order of the forward pass."""
    return [name for name, module in network.named_modules() if isinstance(module, ResidualBlock)]


def keeps_size(block: ResidualBlock) -> bool:
    """Whether the block's output has the size of its input."""
    convs = [layer for layer in block.branch if isinstance(layer, nn.Conv2d)]
    return all(conv.stride == (1, 1) for conv in convs) and convs[0].in_channels == convs[-1].out_channels


def bypass(block: ResidualBlock) -> nn.Module:
    """The block without its branch. A plain block, which has no shortcut, leaves what option A's would give."""
    shortcut = block.shortcut
    if shortcut is None:
        convs = [layer for layer in block.branch if isinstance(layer, nn.Conv2d)]
        shortcut = ZeroPadding(convs[0].in_channels, convs[-1].out_channels, convs[0].stride[0])
    return nn.Sequential(shortcut, block.closing)


def without_blocks(network: nn.Module, places: Collection[str]) -> nn.Module:
    """A copy of the network in which these blocks are bypassed."""
    network = copy.deepcopy(network)
    for place in places:
        network.set_submodule(place, bypass(network.get_submodule(place)))
    return network


def with_blocks_swapped(network: nn.Module, one: str, two: str) -> nn.Module:
    """A copy of the network in which two blocks have changed places. They must fit each other's."""
    network = copy.deepcopy(network)
    first, second = network.get_submodule(one), network.get_submodule(two)
    network.set_submodule(one, second)
    network.set_submodule(two, first)
    return network
