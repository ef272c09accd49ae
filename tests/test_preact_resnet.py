"""Pre-activation ResNets: timm's networks, the cut behind the BN-ReLU of conv5_1, and the paper's identity."""

import pytest
import torch
from networks import randomize_norms
from torch import nn

from backbones import Backbone, create_backbone
from backbones.preact_resnet import TIMM_BASIC_NAMES, TIMM_NAMES
from backbones.weights import load_into, rename

timm = pytest.importorskip("timm")

NAMES = {depth: TIMM_BASIC_NAMES if depth < 50 else TIMM_NAMES for depth in (18, 34, 50, 101, 152)}
# millions of parameters with the classifier of 1000 classes: timm's networks; pytorchcv's to these digits too, but for
# 44.542 of 101 layers, since it has a norm behind the stem (128 parameters)
PUBLISHED_MILLIONS = {18: "11.69", 34: "21.80", 50: "25.549", 101: "44.541", 152: "60.185"}


def small(depth: int = 18, **options) -> Backbone:
    torch.manual_seed(0)
    return create_backbone(f"preact_resnet{depth}", width=8, **options)


@pytest.mark.parametrize(
    "depth", [18, 50, *(pytest.param(d, marks=pytest.mark.slow) for d in (34, 101, 152))]
)
def test_pooled_features_equal_timms_in_float64(depth):
    torch.manual_seed(1)
    theirs = (
        randomize_norms(timm.create_model(f"resnetv2_{depth}", num_classes=0), weight=(-0.3, 0.7))
        .double()
        .eval()
    )
    ours = create_backbone(f"preact_resnet{depth}").double().eval()
    load_into(ours, theirs.state_dict(), NAMES[depth], source="timm's network")
    images = torch.rand(2, 3, 75, 101, dtype=torch.float64)
    with torch.no_grad():
        pooled, expected = ours(images), theirs(images)
    assert expected.std() > 1e-3
    assert (pooled - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("depth", NAMES)
def test_names_shapes_and_parameters_are_timms_and_the_published_ones(depth):
    with torch.device("meta"):
        ours, theirs = create_backbone(f"preact_resnet{depth}"), timm.create_model(f"resnetv2_{depth}")
    renamed = rename(
        {k: v for k, v in theirs.state_dict().items() if not k.startswith("head.")}, NAMES[depth]
    )
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in renamed.items()}
    millions = sum(p.numel() for p in theirs.parameters()) / 1e6
    digits = len(PUBLISHED_MILLIONS[depth].partition(".")[2])
    assert f"{millions:.{digits}f}" == PUBLISHED_MILLIONS[depth]


@pytest.mark.parametrize("depth", [18, 50])
def test_the_cut_stands_behind_the_norm_and_relu_that_open_conv5_1(depth):
    backbone = randomize_norms(small(depth), weight=(-0.3, 0.7)).eval()
    images = torch.rand(1, 3, 70, 90)
    with torch.no_grad():
        features = backbone.trunk(images)
        before = nn.Sequential(*backbone.trunk.stages[:3], *backbone.trunk.stage4[:-1])(images)
        assert torch.equal(features, backbone.trunk.stage4.end.bn(before).relu())
    first = backbone.roi_head.stage5[0]
    assert isinstance(first.branch[0], nn.Conv2d) and isinstance(first.shortcut[0], nn.Conv2d)
    assert [type(layer) for layer in backbone.roi_head.stage5.end] == [nn.BatchNorm2d, nn.ReLU]


@pytest.mark.parametrize("depth", [18, 50])
def test_with_all_branches_zero_the_network_is_the_identity_between_strides(depth):
    """So is its gradient: of `x_L = x_l + sum F` what is left is x_l (He et al. 2016, equations 4 and 5)."""
    backbone = randomize_norms(small(depth), weight=(-0.3, 0.7)).train()
    last = "conv2" if depth == 18 else "conv3"
    for name, parameter in backbone.named_parameters():
        if name.endswith(f"branch.{last}.weight"):
            nn.init.zeros_(parameter)
    trunk, head = backbone.trunk, backbone.roi_head
    for stage in (trunk.stage2.blocks, trunk.stage3, trunk.stage4, head.stage5):
        blocks = stage[1:-1]
        assert len(blocks) >= 1
        channels = stage.end.bn.num_features
        x = torch.randn(2, channels, 6, 6, requires_grad=True)
        gradient = torch.randn_like(x)
        y = blocks(x)
        y.backward(gradient)
        assert torch.equal(y, x) and torch.equal(x.grad, gradient)


def test_freezing_stage_4_freezes_the_norm_that_opens_conv5_1():
    backbone = small(frozen_stages=4).train()
    end = backbone.trunk.stage4.end.bn
    before = end.running_mean.clone()
    backbone(torch.rand(2, 3, 48, 48)).sum().backward()
    assert torch.equal(end.running_mean, before) and end.weight.grad is None
    assert backbone.roi_head.stage5.end.bn.weight.grad.any()


def test_relu_only_preactivation_ends_each_stage_with_a_relu_and_no_norm():
    backbone = small(50, order="relu_only_preactivation")
    for stage in (backbone.trunk.stage3, backbone.trunk.stage4, backbone.roi_head.stage5):
        assert [type(layer) for layer in stage.end] == [nn.ReLU]
    assert "bn1" in dict(backbone.trunk.stage1.named_children())


def test_weights_of_an_original_resnet_are_refused(tmp_path):
    torch.save(create_backbone("resnet18", width=8).state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(
        ValueError, match=r"does not fit preact_resnet18; missing: trunk\.stage2\.blocks\.end\.bn"
    ):
        create_backbone("preact_resnet18", width=8, weights=str(tmp_path / "resnet18.pth"))
