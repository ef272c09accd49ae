"""Folded frozen norms and the weight gradients of convolutions, against the layers one by one."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import backbones.layers
from backbones import create_backbone
from backbones.folding import FoldingSequential, use_folding
from backbones.kernels.cudnn import fuses
from backbones.kernels.gradients import _Conv1x1, conv2d

CHANNELS = 16


def frozen_norm(channels: int) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.uniform_(-0.5, 0.5)
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.5, 2.0)
    return norm


@pytest.fixture
def layers() -> FoldingSequential:
    """Two folded pairs, one of them with a bias, between what is not folded."""
    torch.manual_seed(0)
    parts = (
        *(nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), frozen_norm(CHANNELS), nn.ReLU(inplace=True)),
        *(
            nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
            frozen_norm(CHANNELS),
            nn.BatchNorm2d(CHANNELS),
        ),
        nn.Conv2d(CHANNELS, CHANNELS, 1),
    )
    return FoldingSequential(*parts).double()


def outcome(layers: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layers(x)
    wanted = torch.autograd.grad(
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), (x, *layers.parameters())
    )
    return [y.detach(), *wanted]


def test_folded_norms_give_the_same_values_and_gradients(layers):
    x = torch.rand(2, CHANNELS, 9, 12, dtype=torch.float64)
    folded = outcome(layers, x)
    layers.fold_norms = False
    for a, b in zip(folded, outcome(layers, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_folded_norm_makes_no_pass_of_its_own(layers, monkeypatch):
    passes, forward = [], FrozenBatchNorm2d.forward
    monkeypatch.setattr(FrozenBatchNorm2d, "forward", lambda self, x: passes.append(1) or forward(self, x))
    x = torch.rand(1, CHANNELS, 4, 4, dtype=torch.float64)
    layers(x)
    assert not passes
    with torch.no_grad():
        layers(x)
    assert len(passes) == 2


@pytest.mark.parametrize("place", [0, 1], ids=["convolution", "norm"])
def test_a_layer_that_somebody_listens_to_is_not_folded(layers, place):
    heard = []
    layers[place].register_forward_hook(lambda module, args, output: heard.append(output))
    layers(torch.rand(1, CHANNELS, 4, 4, dtype=torch.float64))
    assert len(heard) == 1


def test_a_sequence_becomes_a_folding_one_and_keeps_its_names_and_hooks():
    network = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 3, 1), inner=nn.Sequential(nn.ReLU())))
    keys, heard = list(network.state_dict()), []
    network.inner.register_forward_hook(lambda *_: heard.append(1))
    use_folding(network)
    assert all(type(network.get_submodule(path)) is FoldingSequential for path in ("", "inner"))
    network(torch.rand(1, 3, 4, 4))
    assert list(network.state_dict()) == keys and heard == [1]


@pytest.mark.parametrize("size", [(7, 7), (20, 24)], ids=["region", "map"])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_the_weight_gradient_is_that_of_torch(kernel, stride, size):
    torch.manual_seed(0)
    x = torch.randn(3, CHANNELS, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(24, CHANNELS, kernel, kernel).contiguous(memory_format=torch.channels_last)
    inputs = (x, weight.requires_grad_(), torch.randn(24).requires_grad_())
    geometry = ((stride, stride), (kernel // 2, kernel // 2))
    y, wanted = conv2d(*inputs, *geometry), F.conv2d(*inputs, *geometry)
    assert torch.equal(y, wanted) and isinstance(y.grad_fn, _Conv1x1._backward_cls) == (kernel == 1)
    grad = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", ["float64", "grouped", "contiguous", "no_grad", "autocast"])
def test_elsewhere_the_convolution_is_torchs_own(case):
    dtype = torch.float64 if case == "float64" else torch.float32
    x = torch.randn(2, CHANNELS, 8, 8, dtype=dtype)
    if case != "contiguous":
        x = x.contiguous(memory_format=torch.channels_last)
    groups = 2 if case == "grouped" else 1
    weight = torch.randn(CHANNELS, CHANNELS // groups, 1, 1, dtype=dtype, requires_grad=True)
    with torch.set_grad_enabled(case != "no_grad"), torch.autocast("cpu", enabled=case == "autocast"):
        y = conv2d(x, weight, groups=groups)
    assert not isinstance(y.grad_fn, _Conv1x1._backward_cls)


def test_a_resnets_convolutions_in_front_of_frozen_norms_are_folded():
    backbone = create_backbone("resnet50", width=16, norm="frozen", weights="deferred")
    pairs = [
        m
        for m in backbone.modules()
        if isinstance(m, FoldingSequential) and any(isinstance(c, FrozenBatchNorm2d) for c in m)
    ]
    assert len(pairs) == 1 + 16 + 4  # the stem, 16 branches, 4 projections


def test_joined_layers_pass_torchs_compiler():
    torch.manual_seed(0)
    trunk, image = create_backbone("resnet18", width=8).trunk.eval(), torch.rand(1, 3, 64, 64)
    use_folding(trunk)
    compiled = torch.compile(trunk, backend="eager")
    # With gradients, as on a GPU, a convolution and the ReLU behind it run as one call.
    torch.testing.assert_close(compiled(image), trunk(image))


@pytest.mark.parametrize(
    ("shape", "out_channels", "accepted"),
    [
        ((8, 64, 1000, 1000), 64, True),
        ((8, 64, 1000, 1000), 256, True),
        ((8, 64, 2048, 2048), 64, False),  # 2**31 elements
        ((8, 64, 1024, 1024), 256, False),  # of the result
        ((0, 64, 14, 14), 64, False),
    ],
)
def test_maps_of_2_to_the_31_elements_are_left_to_torchs_convolution(shape, out_channels, accepted):
    """Not run on a GPU, for which a class stands."""

    class OnGPU:
        is_cuda, dtype = True, torch.bfloat16

    OnGPU.shape, OnGPU.numel = shape, torch.empty(shape, device="meta").numel
    assert fuses(OnGPU(), out_channels) == accepted


@pytest.mark.parametrize("name", ["preact_resnet50", "densenet121", "bn_inception", "resnet18"])
def test_frozen_norms_keep_a_map_in_16_bits_in_training(name, monkeypatch):
    """Those of pre-activation networks and DenseNets have no convolution to fold into."""
    monkeypatch.setitem(backbones.layers.NORMS, "batch", backbones.layers.FrozenBatchNorm)
    torch.manual_seed(0)
    trunk = create_backbone(name).trunk.train()
    dtypes = set()
    for layer in trunk.modules():
        if isinstance(layer, FrozenBatchNorm2d):
            layer.running_var.fill_(4.0)
            layer.register_forward_hook(
                lambda layer, inputs, output: dtypes.add((inputs[0].dtype, output.dtype))
            )
    images = torch.rand(1, 3, 64, 64)
    exact, (wanted,) = _with_gradient(trunk, images)
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        half, (given,) = _with_gradient(trunk, images)
    assert half.dtype == torch.bfloat16 and dtypes == {(torch.bfloat16, torch.bfloat16)}
    assert (half - exact).norm() / exact.norm() < 0.03
    assert (given - wanted).norm() / wanted.norm() < 0.1


def _with_gradient(trunk, images):
    features = trunk(images)
    return features, torch.autograd.grad(features.float().square().sum(), next(trunk.parameters()))
