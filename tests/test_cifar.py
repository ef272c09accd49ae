"""ResNets for 32x32 pictures: the papers' depths, parameters and options."""

import pytest
import torch
from torch import nn

from backbones import list_backbones
from backbones.cifar import CIFAR_DEPTHS, cifar_resnet
from backbones.residual import ResidualBlock


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("depth", "options", "millions"),
    [  # He et al. 2015, Table 6: option A; the last: pytorchcv's preresnet1001_cifar10, with projections
        (20, {}, "0.27"),
        (32, {}, "0.46"),
        (44, {}, "0.66"),
        (56, {}, "0.85"),
        (110, {}, "1.7"),
        (1001, {"order": "full_preactivation", "shortcut": "B"}, "10.33"),
    ],
)
def test_parameter_counts_are_the_published_ones(depth, options, millions):
    with torch.device("meta"):
        found = count(cifar_resnet(depth, **options)) / 1e6
    assert f"{found:.{len(millions.partition('.')[2])}f}" == millions


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_the_depth_counts_the_layers_with_weights(depth):
    with torch.device("meta"):
        network = cifar_resnet(depth)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in network.modules()) == depth
    kernels = {m.kernel_size for m in network.modules() if isinstance(m, nn.Conv2d)}
    assert kernels == ({(3, 3)} if depth < 164 else {(1, 1), (3, 3)})


def test_three_stages_of_16_32_and_64_channels_halve_the_map_twice():
    network = cifar_resnet(20, num_classes=7).eval()
    x, shapes = torch.rand(2, 3, 32, 32), []
    with torch.no_grad():
        for layer in network:
            x = layer(x)
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8), (64, 1, 1), (64,), (7,)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shortcut": "none"},
        {"shortcut": "shortcut_only_gating", "gate_bias": 0.0},
        {"order": "full_preactivation"},
        {"order": "relu_only_preactivation", "shortcut": "B", "bottlenecks": True},
        {"branch_end": "shrinkage_cw", "order": "full_preactivation"},
        {"norm": "group"},
    ],
    ids=str,
)
def test_every_parameter_receives_a_gradient(options):
    torch.manual_seed(0)
    network = cifar_resnet(20, **options).train()
    nn.functional.cross_entropy(network(torch.rand(4, 3, 16, 16)), torch.tensor([0, 3, 9, 1])).backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_both_paths_of_a_pre_activation_networks_first_block_start_behind_the_stems_relu():
    network = cifar_resnet(20, order="full_preactivation").eval()
    first, second = network.stage1[0], network.stage1[1]
    assert isinstance(first.branch[0], nn.Conv2d) and isinstance(second.branch[0], nn.BatchNorm2d)
    assert [type(layer) for layer in network.stem] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert [type(layer) for layer in network.stage3.end] == [nn.BatchNorm2d, nn.ReLU]


def test_option_a_has_no_parameters_in_its_shortcuts():
    blocks = [m for m in cifar_resnet(20).modules() if isinstance(m, ResidualBlock)]
    assert len(blocks) == 9 and not any(count(m.shortcut) for m in blocks)


@pytest.mark.parametrize("depth", [21, 2, 20.0, "20"])
def test_a_depth_without_a_formula_is_refused(depth):
    with pytest.raises(ValueError, match=r"depth is .*; accepted: 6n \+ 2 layers of basic blocks"):
        cifar_resnet(depth)
    with pytest.raises(ValueError, match=r"depth is 1000; accepted: 9n \+ 2 layers of bottleneck blocks"):
        cifar_resnet(1000)
    with pytest.raises(ValueError, match="depth is 60002; accepted: .* up to 10000"):
        cifar_resnet(60_002, bottlenecks=False)


def test_frozen_norm_and_unknown_options_are_refused():
    with pytest.raises(ValueError, match="norm='frozen' needs trained weights"):
        cifar_resnet(20, norm="frozen")
    with pytest.raises(ValueError, match="shortcut is 'a'; .*accepted: A, B, C"):
        cifar_resnet(20, shortcut="a")


def test_they_are_not_detectors_backbones():
    assert list_backbones("*cifar*") == []
