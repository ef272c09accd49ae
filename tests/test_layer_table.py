"""Table 1 of the ResNet paper from any network: layers, blocks, costs and receptive fields."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from backbones import cifar_resnet, create_backbone, list_backbones
from backbones.summary import count_parameters
from benchmarks import layer_table as command
from benchmarks.layer_table import bottleneck_weights, count_layers, layer_table
from benchmarks.receptive_field import ReachMode

DEEP = re.compile(r"101|152|161|169|201|wide")
ROOT = Path(__file__).resolve().parent.parent


def table(name, size=224, **options):
    with torch.device("meta"):
        network = create_backbone(name, **options)
    return layer_table(network, (size, size))


@pytest.mark.parametrize(
    ("name", "gmac", "blocks", "layers"),
    [  # He et al. 2015, Table 1; the paper cuts 3.86 and 3.64 to 3.8 and 3.6
        ("resnet18", 1.8, [2, 2, 2, 2], "1 + 2 x (2 + 2 + 2 + 2) + 1 = 18"),
        ("resnet34", 3.6, [3, 4, 6, 3], "1 + 2 x (3 + 4 + 6 + 3) + 1 = 34"),
        ("resnet50", 3.8, [3, 4, 6, 3], "1 + 3 x (3 + 4 + 6 + 3) + 1 = 50"),
        ("resnet101", 7.6, [3, 4, 23, 3], "1 + 3 x (3 + 4 + 23 + 3) + 1 = 101"),
        ("resnet152", 11.3, [3, 8, 36, 3], "1 + 3 x (3 + 8 + 36 + 3) + 1 = 152"),
    ],
)
def test_the_table_is_the_papers(name, gmac, blocks, layers):
    rows = table(name, stride_in="1x1")
    assert [row.stage for row in rows] == ["conv1", *(f"conv{k}_x" for k in range(2, 6)), "pool", "fc"]
    assert [row.output[1] for row in rows[:5]] == [112, 56, 28, 14, 7]
    assert [row.blocks for row in rows] == [None, *blocks, None, None]
    assert abs(sum(row.macs for row in rows) / 1e9 - gmac) < 0.07
    assert count_layers(rows) == layers


def test_a_row_says_the_convolutions_of_a_block():
    rows = {row.stage: row.layers for row in table("resnext50_32x4d")}
    assert rows["conv1"] == "7x7 64" and rows["conv2_x"] == "1x1 128, 3x3 128 C=32, 1x1 256"
    assert rows["fc"] is None
    assert table("densenet121")[1].layers == "1x1 128, 3x3 32"


def test_costs_and_parameters_add_up_to_torchvisions():
    rows = table("resnet101")
    assert sum(row.parameters for row in rows) == 44_549_160
    assert round(sum(row.macs for row in rows) / 1e9, 3) == 7.801


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [  # Araujo et al. 2019 (distill.pub/2019/computing-receptive-fields) for strides in the 1x1
        ("resnet50", {"stride_in": "1x1"}, 483),
        ("resnet101", {"stride_in": "1x1"}, 1027),
        ("resnet152", {"stride_in": "1x1"}, 1507),
        # 11 + 3*8, + 8 + 3*16, + 16 + 5*32, + 32 + 2*64
        ("resnet50", {}, 427),
        ("resnet18", {}, 435),
        ("torchvision/vgg16", {}, 212),
    ],
)
def test_receptive_fields_are_the_known_ones(name, options, rows):
    assert table(name, **options)[4].receptive_field == rows


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet18", {"shortcut": "A"}), ("resnet50", {}), ("bn_inception", {}), ("densenet121", {})],
)
def test_a_receptive_field_is_the_rows_that_get_a_gradient(name, options):
    torch.manual_seed(0)
    backbone = create_backbone(name, width=16, **options).double().eval()
    for layer in backbone.modules():
        if isinstance(layer, nn.MaxPool2d):
            layer.forward = average_like(layer)
    positive(backbone)
    images = torch.rand(1, 3, 1280, 32, dtype=torch.double, requires_grad=True)
    features = backbone.trunk(images)
    features[0, :, features.shape[2] // 2].sum().backward()
    seen = images.grad[0].abs().sum((0, 2)).nonzero()
    assert int(seen.max() - seen.min()) + 1 == layer_table(backbone.float(), (64, 64))[3].receptive_field


def conv(x, kernel, **options):
    return nn.functional.conv2d(x, torch.ones(1, x.shape[1], kernel, 1), **options)


@pytest.mark.parametrize(
    "network",
    [
        lambda x: conv(conv(x, 3, padding=(2, 0), dilation=2), 5, stride=3),
        lambda x: nn.functional.avg_pool2d(conv(nn.functional.pad(x, (1, 0, 2, 1)), 4, stride=2), 3, 2, 1),
        lambda x: conv(nn.functional.avg_pool2d(x, 2)[:, :, 1::2, ::2], 3),
        lambda x: torch.cat([conv(x, 3, padding=(1, 0))[:, :, :39], conv(x, 4, padding=(1, 0))], 1),
    ],
    ids=["dilation", "padding above", "slice", "concatenation"],
)
def test_a_reach_is_exactly_the_rows_that_are_read(network):
    images, row = torch.rand(1, 1, 40, 40, requires_grad=True), 3
    with ReachMode(images):
        features = network(images)
    reach = features.reach
    features[:, :, row].sum().backward()
    seen = images.grad[0, 0].sum(1).nonzero().ravel()
    first, last = (row * reach.stride + end for end in (reach.first, reach.last))
    assert (int(seen.min()), int(seen.max())) == (first, last) and reach.rows == last - first + 1


def average_like(pool):
    """A max pool's window as a mean, since the gradient of a maximum reaches one pixel only."""
    return lambda x: nn.functional.avg_pool2d(x, 3, pool.stride, pool.padding, pool.ceil_mode)


@torch.no_grad()
def positive(network):
    """Make all weights positive, so that no ReLU stops a gradient, and each layer an average."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.fill_(1 / layer.weight[0].numel())


def test_gates_that_see_the_whole_picture_change_no_field_and_no_depth():
    for name, plain in (("se_resnet18", "resnet18"), ("shrinkage_resnet18", "resnet18")):
        fields, wanted = ([(row.receptive_field, row.depth) for row in table(n)] for n in (name, plain))
        assert fields == wanted


def test_the_pool_and_the_classifier_see_the_whole_picture():
    assert [row.receptive_field for row in table("resnet18")][-2:] == [None, None]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if DEEP.search(n) else n for n in list_backbones()],
)
def test_every_backbone_has_a_table_whose_parts_are_the_whole(name):
    with torch.device("meta"):
        backbone = create_backbone(name)
    rows = layer_table(backbone, (64, 64))
    assert sum(row.parameters for row in rows[:-1]) == count_parameters(backbone)
    strides = [row.stride for row in rows]
    assert strides == [2, 4, 8, 16, 32, None, None]


@pytest.mark.parametrize(
    ("name", "total"),
    [("densenet121", 121), ("densenet169", 169), ("preact_resnet50", 50), ("se_resnet50", 50)],
)
def test_the_layers_are_those_in_the_name(name, total):
    assert count_layers(table(name, 64)).endswith(f" = {total}")


def test_a_cut_network_has_no_blocks_and_the_same_costs():
    ours, cut = table("resnet50"), table("torchvision/resnet50")
    assert {row.blocks for row in cut} == {None}
    for name in ("output", "parameters", "macs", "receptive_field", "stride", "depth"):
        assert [getattr(row, name) for row in ours] == [getattr(row, name) for row in cut]
    assert count_layers(cut) == "1 + 9 + 12 + 18 + 9 + 1 = 50"


def test_cifar_networks_have_three_stages():
    rows = layer_table(cifar_resnet(56), (32, 32))
    assert [row.stage for row in rows] == ["stem", "stage1", "stage2", "stage3", "pool", "fc"]
    assert [row.output for row in rows[:4]] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert sum(row.parameters for row in rows) == 853_018  # 0.85 M in Table 6
    assert count_layers(rows) == "1 + 2 x (9 + 9 + 9) + 1 = 56"


def test_a_table_leaves_the_network_as_it_was():
    network = cifar_resnet(20).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    layer_table(network, (32, 32))
    assert network.training and all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_a_bottleneck_has_a_seventeenth_of_two_3x3_layers():
    # 256*64 + 9*64*64 + 64*256 against 2 * 9*256*256
    assert bottleneck_weights(create_backbone("resnet50")) == (256, 69_632, 1_179_648)
    assert bottleneck_weights(create_backbone("resnet18")) is None


@pytest.fixture
def run_command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["layer_table.py", *arguments])
        return command.main(), *capsys.readouterr()

    return run


def test_the_command_prints_the_table(run_command):
    status, out, err = run_command("resnet101", "cifar_resnet110")
    assert (status, err) == (0, "")
    assert "layers with weights: 1 + 3 x (3 + 4 + 23 + 3) + 1 = 101" in out
    assert "a bottleneck of 256 channels: 69,632 weights; two 3x3 layers so wide: 1,179,648" in out
    assert "cifar_resnet110, image of 32x32 pixels" in out and "= 110" in out
    (line,) = (line.split() for line in out.splitlines() if line.startswith("conv4_x"))
    assert line[-6:] == ["23", "1024x14x14", "26,090,496", "5,176.6", "811", "16"]


def test_the_command_gives_the_stages_as_json(run_command):
    status, out, _ = run_command("resnet18", "--json", "--size", "64", "64")
    assert status == 0 and json.loads(out)["resnet18"][4]["output"] == [512, 2, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [("cifar_resnet21", "depth is 21; accepted: 6n + 2"), ("cifar_resnt20", "cifar_resnt20")],
)
def test_a_wrong_network_is_one_line(run_command, name, message):
    status, out, err = run_command(name)
    assert status == 1 and out == "" and message in err and err.count("\n") == 1
