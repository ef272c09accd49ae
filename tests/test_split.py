"""Classifiers cut by tracing: equal to the uncut network in both modes, refused with the reason."""

import pytest
import torch
from cut_networks import ALL, backbone_of, pooled_features, timm, uncut_and_cut
from torch import Tensor, nn
from torch.nn import functional as F

from backbones import create_backbone, cut_network
from backbones.cut.split import layer_path


@pytest.mark.parametrize("name", ALL)
def test_a_cut_network_equals_the_uncut_one_to_the_last_bit(name):
    network, backbone = uncut_and_cut(name)
    for size in ((96, 160), (64, 96)):
        images = torch.rand(2, 3, *size)
        with torch.no_grad():
            expected = pooled_features(network, images)
            assert torch.equal(backbone(images), expected)
            assert backbone.trunk(images).shape[2:] == (size[0] // 16, size[1] // 16)
        assert expected.isfinite().all() and expected.std() > 1e-4 * expected.abs().mean()


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_receives_a_gradient_and_regions_become_7x7(name):
    backbone = backbone_of(name).train()
    regions = torch.rand(2, backbone.trunk.out_channels, 14, 14)
    with torch.no_grad():
        assert backbone.roi_head.stage5(regions).shape == (2, backbone.roi_head.out_channels, 7, 7)
    backbone(torch.rand(2, 3, 64, 96)).square().sum().backward()
    assert [
        key for key, p in backbone.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ] == []


def test_the_cut_of_resnet18_is_where_the_paper_puts_conv4_x():
    _, backbone = uncut_and_cut("torchvision/resnet18")
    stages = [*backbone.trunk.stages, backbone.roi_head.stage5]
    held = [
        {layer_path(f"trunk.stage1.{key}").split(".")[0] for key in stage.state_dict()} for stage in stages
    ]
    assert held == [{"conv1", "bn1"}, {"layer1"}, {"layer2"}, {"layer3"}, {"layer4"}]


def test_vgg_is_cut_before_conv5_x_since_only_a_pool_follows_it():
    with torch.device("meta"):
        backbone = create_backbone("torchvision/vgg16")
    convolutions = [layer for layer in backbone.roi_head.modules() if isinstance(layer, nn.Conv2d)]
    assert (backbone.trunk.out_channels, len(convolutions)) == (512, 3)


# ---- training mode


def test_stochastic_depth_draws_in_training_as_the_uncut_network_does_and_not_in_evaluation():
    torch.manual_seed(0)
    network = timm.create_model("convnext_atto", drop_path_rate=0.5)
    backbone, images = cut_network(network, "convnext"), torch.rand(4, 3, 64, 96)
    outcomes = {}
    for mode in (True, False):
        network.train(mode), backbone.train(mode)
        for seed in (1, 2):
            with torch.no_grad():
                torch.manual_seed(seed)
                expected = pooled_features(network, images)
                torch.manual_seed(seed)
                outcomes[mode, seed] = backbone(images)
            assert torch.equal(outcomes[mode, seed], expected)
    assert torch.equal(outcomes[False, 1], outcomes[False, 2])
    assert not torch.equal(outcomes[True, 1], outcomes[True, 2])


class Tiny(nn.Module):
    """Six convolutions to stride 32 and a classifier; `between` runs around stride 16."""

    def __init__(self, between: str = "") -> None:
        super().__init__()
        self.between = between
        self.stem = nn.Sequential(*(self._halve(a, b) for a, b in ((3, 8), (8, 8), (8, 16))))
        self.four, self.five = self._halve(16, 16), self._halve(16, 32)
        self.flat = nn.Conv2d(16, 32, 1)
        self.fc = nn.Linear(32, 4)

    @staticmethod
    def _halve(a: int, b: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.four(x)
        if self.between == "dropout":
            y = F.dropout(y, 0.5, training=self.training)
        if self.between == "control flow" and y.mean() > 0:
            y = -y
        if self.between == "no stride 32":
            return self.fc(self.flat(y).mean((2, 3)))
        if self.between == "14x14":
            return self.fc(F.pixel_shuffle(F.pixel_unshuffle(self.five(y), 2), 2).mean((2, 3)))
        z = self.five(y)
        if self.between == "bypass":
            z = z + F.max_pool2d(self.flat(x), 4)
        return self.fc(z.mean((2, 3)))


def test_a_functional_dropout_is_active_in_training_only():
    backbone, images = cut_network(Tiny("dropout"), "tiny"), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        first, second = (backbone.train()(images) for _ in range(2))
        assert not torch.equal(first, second)
        assert torch.equal(*(backbone.eval()(images) for _ in range(2)))
        assert torch.equal(backbone.freeze(5).train()(images), backbone.eval()(images))


# ---- refusals


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (
            "bypass",
            "a tensor bypasses every map of stride 16: around the last, four.1, goes stem.2.1 into flat",
        ),
        ("no stride 32", r"no map of stride 32 holds all data.*\(strides found: 2, 4, 8, 16\)"),
        ("control flow", "torch.fx cannot trace it"),
        ("14x14", r"its stage 5 does not take \(2, 16, 14, 14\) \(pixel_unshuffle expects height"),
    ],
)
def test_a_network_that_cannot_be_cut_is_refused_with_the_reason(between, reason):
    with pytest.raises(ValueError, match=f"^tiny cannot be cut at stride 16: {reason}"):
        cut_network(Tiny(between), "tiny")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "torchvision/vit_b_16",
            "does not take images of any size, 128x192 for one .Wrong image height! Expected 224 but got 128",
        ),
        ("torchvision/swin_t", r"none of its tensors is a map \(N, C, H/16, W/16\)"),
        ("timm/hrnet_w18_small", "a tensor bypasses every map of stride 16"),
        ("timm/inception_v4", "none of its tensors is a map"),
        ("timm/mambaout_femto", "behind its last map of stride 32.*still makes"),
        ("timm/mobilevitv2_050", r"its stage 5 makes \(2, 256, 8, 8\) of \(2, 192, 14, 14\)"),
    ],
)
def test_networks_without_such_a_tensor_are_refused(name, reason):
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=f"^{name} cannot be cut at stride 16: .*{reason}"),
    ):
        create_backbone(name)
