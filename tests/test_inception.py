"""BN-Inception: equal to the published network written out by Caffe's layers, with its parameters and its cost."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import IMAGENET, Backbone, create_backbone
from backbones.inception import CAFFE_INCEPTION, CAFFE_NAMES
from backbones.summary import count_parameters, multiply_accumulates
from backbones.weights import rename

# module -> output channels of Caffe's layers, in the order of its concatenation; reduce before the layer it feeds
MODULES = {
    "3a": {"1x1": 64, "3x3": (64, 64), "double_3x3": (64, 96, 96), "pool_proj": 32},
    "3b": {"1x1": 64, "3x3": (64, 96), "double_3x3": (64, 96, 96), "pool_proj": 64},
    "3c": {"3x3": (128, 160), "double_3x3": (64, 96, 96)},
    "4a": {"1x1": 224, "3x3": (64, 96), "double_3x3": (96, 128, 128), "pool_proj": 128},
    "4b": {"1x1": 192, "3x3": (96, 128), "double_3x3": (96, 128, 128), "pool_proj": 128},
    "4c": {"1x1": 160, "3x3": (128, 160), "double_3x3": (128, 160, 160), "pool_proj": 128},
    "4d": {"1x1": 96, "3x3": (128, 192), "double_3x3": (160, 192, 192), "pool_proj": 128},
    "4e": {"3x3": (128, 192), "double_3x3": (192, 256, 256)},
    "5a": {"1x1": 352, "3x3": (192, 320), "double_3x3": (160, 224, 224), "pool_proj": 128},
    "5b": {"1x1": 352, "3x3": (192, 320), "double_3x3": (192, 224, 224), "pool_proj": 128},
}
HALVING = ("3c", "4e")


def caffe_layers() -> dict[str, tuple[int, int, int]]:
    """name -> input channels, output channels, kernel size of every convolution."""
    layers = {"conv1_7x7_s2": (3, 64, 7), "conv2_3x3_reduce": (64, 64, 1), "conv2_3x3": (64, 192, 3)}
    channels = 192
    for module, branches in MODULES.items():
        prefix, total = f"inception_{module}", channels if module in HALVING else 0
        for branch, width in branches.items():
            if branch == "3x3":
                reduced, out = width
                layers[f"{prefix}_3x3_reduce"] = (channels, reduced, 1)
                layers[f"{prefix}_3x3"] = (reduced, out, 3)
            elif branch == "double_3x3":
                reduced, middle, out = width
                layers[f"{prefix}_double_3x3_reduce"] = (channels, reduced, 1)
                layers[f"{prefix}_double_3x3_1"] = (reduced, middle, 3)
                layers[f"{prefix}_double_3x3_2"] = (middle, out, 3)
            else:
                out = width
                layers[f"{prefix}_{branch}"] = (channels, out, 1)
            total += out
        channels = total
    return layers


def caffe_weights(bias: bool) -> dict[str, Tensor]:
    """Random weights in float64 under Caffe's names, norms as training leaves them."""
    torch.manual_seed(0)
    state = {}
    for name, (inputs, outputs, kernel) in caffe_layers().items():
        fan = inputs * kernel * kernel
        state[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel) * (2 / fan) ** 0.5
        if bias:
            state[f"{name}.bias"] = torch.empty(outputs).uniform_(-0.3, 0.3)
        for value, low, high in (
            ("weight", 0.5, 1.5),
            ("bias", -0.3, 0.3),
            ("running_mean", -0.3, 0.3),
            ("running_var", 0.5, 1.5),
        ):
            state[f"{name}_bn.{value}"] = torch.empty(outputs).uniform_(low, high)
    return {key: value.double() for key, value in state.items()}


def caffe_network(state: dict[str, Tensor], images: Tensor, gates: dict[str, nn.Module]) -> Tensor:
    """The network as its prototxt wires it, from images to the last map; gates: module -> squeeze-excitation."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)
        norm = [state[f"{name}_bn.{v}"] for v in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *norm, eps=1e-5))

    x = conv("conv1_7x7_s2", images, 2)
    x = F.max_pool2d(x, 3, 2, ceil_mode=True)
    x = conv("conv2_3x3", conv("conv2_3x3_reduce", x))
    x = F.max_pool2d(x, 3, 2, ceil_mode=True)
    for module in MODULES:
        name, stride = f"inception_{module}", 2 if module in HALVING else 1
        outputs = [] if module in HALVING else [conv(f"{name}_1x1", x)]
        outputs.append(conv(f"{name}_3x3", conv(f"{name}_3x3_reduce", x), stride))
        inner = conv(f"{name}_double_3x3_1", conv(f"{name}_double_3x3_reduce", x))
        outputs.append(conv(f"{name}_double_3x3_2", inner, stride))
        if module in HALVING:
            outputs.append(F.max_pool2d(x, 3, 2, ceil_mode=True))
        elif module == "5b":
            outputs.append(conv(f"{name}_pool_proj", F.max_pool2d(x, 3, 1, 1)))
        else:
            outputs.append(conv(f"{name}_pool_proj", F.avg_pool2d(x, 3, 1, 1)))
        x = torch.cat(outputs, 1)
        if gates:
            down, up = gates[module].fc1, gates[module].fc2
            squeezed = F.relu(F.conv2d(x.mean((2, 3), keepdim=True), down.weight, down.bias))
            x = x * torch.sigmoid(F.conv2d(squeezed, up.weight, up.bias))
    return x


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and theirs.isfinite().all() and theirs.std() > 1e-3
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def with_caffe_weights(name: str, state: dict[str, Tensor]) -> Backbone:
    ours = create_backbone(name).double().eval()
    renamed = rename(state, CAFFE_NAMES)
    others = [key for key in ours.state_dict() if key not in renamed]
    assert all(key.endswith("num_batches_tracked") or ".end.fc" in key for key in others)
    ours.load_state_dict(ours.state_dict() | renamed)
    return ours


def gates_of(backbone: Backbone) -> dict[str, nn.Module]:
    """module -> its squeeze-excitation, with biases that are not 0."""
    gates = {key.split(".")[-2]: gate for key, gate in backbone.named_modules() if key.endswith(".end")}
    assert list(gates) == list(MODULES)
    for gate in gates.values():
        nn.init.uniform_(gate.fc1.bias, -0.3, 0.3)
        nn.init.uniform_(gate.fc2.bias, -0.3, 0.3)
    return gates


@pytest.mark.parametrize(("name", "bias"), [("bn_inception", True), ("se_bn_inception", False)])
def test_pooled_features_equal_the_published_networks(name, bias):
    state = caffe_weights(bias)
    ours = with_caffe_weights(name, state)
    gates = {} if bias else gates_of(ours)
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        theirs = caffe_network(state, images, gates).mean((2, 3))
        assert largest_difference(ours(images), theirs) < 1e-9


def test_squeeze_excitation_reduces_every_module_to_a_sixteenth():
    gates = gates_of(create_backbone("se_bn_inception"))
    # the authors' prototxt, inception_3a_1x1_down to inception_5b_1x1_down
    published = [16, 20, 36, 36, 36, 38, 38, 66, 64, 64]
    assert [gate.fc1.out_channels for gate in gates.values()] == published


def test_the_parameters_are_those_of_convolutions_with_bias_and_norm():
    """11,295,240 in pytorchcv: 10,240,192 weights, 10,016 channels with a bias and two numbers of a norm, 1,025,000."""
    layers = caffe_layers().values()
    weights = sum(inputs * outputs * kernel**2 for inputs, outputs, kernel in layers)
    channels = sum(outputs for _, outputs, _ in layers)
    assert (weights, channels) == (10_240_192, 10_016)
    with torch.device("meta"):
        assert count_parameters(create_backbone("bn_inception")) + 1_025_000 == 11_295_240
    assert weights + 3 * channels + 1_025_000 == 11_295_240


def test_the_published_cost_counts_norms_and_pools_too():
    """pytorchcv's 2,048.06 M is half of all FLOP: 4 an element of a norm, 1 of a ReLU, 9 of a 3x3 pool."""
    flop = [0]

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(module, nn.BatchNorm2d):
            flop[0] += 4 * output.numel()
        elif isinstance(module, nn.ReLU):
            flop[0] += output.numel()
        elif isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
            flop[0] += 9 * output.numel()

    with torch.device("meta"):
        backbone = create_backbone("bn_inception").eval()
        for layer in backbone.modules():
            layer.register_forward_hook(count)
        macs = multiply_accumulates(backbone, torch.zeros(1, 3, 224, 224))
    flop[0] += 2 * (macs + 1024 * 1000) + 49 * 1024  # the classifier and the 7x7 average before it
    assert round(flop[0] / 2 / 1e6, 2) == 2048.06


def test_odd_maps_round_up_where_caffe_could_not_concatenate():
    """On 3 positions Caffe's pool has one window, a strided 3x3 convolution two."""
    backbone = create_backbone("bn_inception", width=8).eval()
    with torch.no_grad():
        for size in (1, 17, 33, 47):
            assert backbone.trunk(torch.rand(1, 3, size, 48)).shape[-2:] == (math.ceil(size / 16), 3)
        assert backbone.roi_head.stage5(torch.rand(2, 76, 13, 7)).shape == (2, 128, 7, 4)


def test_a_file_under_caffes_names_brings_caffes_preprocessing_and_one_of_ours_does_not(tmp_path):
    state = caffe_weights(bias=True)
    torch.save(state | {"last_linear.weight": torch.zeros(1000, 1024)}, tmp_path / "caffe.pth")
    theirs = create_backbone("bn_inception", weights=str(tmp_path / "caffe.pth"))
    assert theirs.preprocessing == CAFFE_INCEPTION
    stem = state["conv1_7x7_s2.weight"].float()
    assert torch.equal(theirs.trunk.stage1.conv1.weight, stem)
    torch.save(theirs.state_dict(), tmp_path / "ours.pth")
    assert create_backbone("bn_inception", weights=str(tmp_path / "ours.pth")).preprocessing == IMAGENET


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 9}, ValueError, "width is 9; accepted by bn_inception: a positive even number"),
        ({"width": 0}, ValueError, "width is 0; accepted"),
        (
            {"weights": "imagenet_v1"},
            ValueError,
            "bn_inception has no weights 'imagenet_v1'; accepted: .*file",
        ),
        ({"bias": False}, TypeError, "bn_inception has no option 'bias'"),
    ],
)
def test_a_wrong_option_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        create_backbone("bn_inception", **options)
