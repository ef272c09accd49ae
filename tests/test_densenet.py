"""DenseNet: equal to torchvision's, cut before the last transition's pool."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

from backbones import Backbone, create_backbone
from backbones.densenet import TORCHVISION_NAMES
from backbones.fuse import fuse
from backbones.weights import load_into

# Table 1 of the paper: channels of the map at stride 16, halved by the transition, and of the last
CHANNELS = {
    "densenet121": (512, 1024),
    "densenet161": (1056, 2208),
    "densenet169": (640, 1664),
    "densenet201": (896, 1920),
}


@torch.no_grad()
def torchvision_network(name: str) -> nn.Module:
    """Random weights in float64, norms as training leaves them, without the classifier."""
    torch.manual_seed(1)
    network = torchvision.models.get_model(name, weights=None).double().eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.uniform_(0.3, 1.0)
            layer.bias.uniform_(-0.2, 0.2)
            layer.running_mean.uniform_(-0.2, 0.2)
            layer.running_var.uniform_(0.8, 1.5)
    network.classifier = nn.Identity()
    return network


def with_weights(name: str, state: dict[str, Tensor]) -> Backbone:
    with torch.device("meta"):
        backbone = create_backbone(name)
    backbone = backbone.to_empty(device="cpu").double().eval()
    load_into(backbone, state, TORCHVISION_NAMES, source="torchvision's")
    return backbone


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and theirs.isfinite().all() and theirs.std() > 1e-3
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(
    "name", ["densenet121", *(pytest.param(n, marks=pytest.mark.slow) for n in list(CHANNELS)[1:])]
)
def test_pooled_features_equal_torchvisions(name):
    theirs = torchvision_network(name)
    ours = with_weights(name, theirs.state_dict())
    with torch.no_grad():
        for size in ((75, 101), (64, 96)):
            images = torch.rand(2, 3, *size, dtype=torch.float64)
            assert largest_difference(ours(images), theirs(images)) < 1e-9


def test_the_trunk_ends_before_the_pool_of_the_last_transition():
    theirs, seen = torchvision_network("densenet121"), {}
    for layer in ("conv", "pool"):
        theirs.features.transition3.get_submodule(layer).register_forward_hook(
            lambda module, inputs, output, layer=layer: seen.update({layer: output})
        )
    ours = with_weights("densenet121", theirs.state_dict())
    images = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        features = ours.trunk(images)
        theirs(images)
        assert tuple(features.shape) == (1, 512, 4, 6)
        assert largest_difference(features, seen["conv"]) < 1e-9
        assert largest_difference(ours.roi_head.stage5.pool(features), seen["pool"]) < 1e-9


@pytest.mark.parametrize("name", CHANNELS)
def test_names_of_the_published_files_are_read(name, tmp_path):
    """They say denselayer1.norm.1.weight, of a time when a module's name could hold a dot."""
    with torch.device("meta"):
        state = torchvision.models.get_model(name, weights=None).state_dict()
        ours = create_backbone(name)
    old = {
        key.replace("norm1.", "norm.1.")
        .replace("norm2.", "norm.2.")
        .replace("conv1.", "conv.1.")
        .replace("conv2.", "conv.2."): value
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock3.denselayer24.norm.1.running_mean" in old
    load_into(ours, old, TORCHVISION_NAMES, source="an old file")


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_of_the_cut_are_the_papers_and_scale_with_width(name):
    with torch.device("meta"):
        full, narrow = create_backbone(name), create_backbone(name, width=8)
    assert (full.trunk.out_channels, full.roi_head.out_channels) == CHANNELS[name]
    for a, b in zip(narrow.modules(), full.modules(), strict=True):
        if isinstance(a, nn.Conv2d):
            assert a.out_channels * 8 == b.out_channels


def test_an_odd_map_loses_its_last_row_as_in_the_published_network():
    trunk = create_backbone("densenet121", width=8).eval().trunk
    with torch.no_grad():
        for size, expected in {
            16: 1,
            28: 1,
            29: 2,
            31: 2,
            32: 2,
            44: 2,
            45: 3,
            47: 3,
            48: 3,
            800: 50,
        }.items():
            assert trunk(torch.rand(1, 3, size, 32)).shape[-2:] == (expected, 2)


def test_fusing_leaves_only_norms_that_no_convolution_precedes():
    fused = fuse(create_backbone("densenet121", width=8))
    left = [name for name, layer in fused.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(left) == (6 + 12 + 24 + 16) + 3 + 1  # norm1 of every layer, the transitions', the last
    assert all(name.endswith((".norm1", "transition.norm", "stage5.norm")) for name in left)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("densenet121", {"width": 9}, "width is 9; accepted by densenet121: a positive multiple of 2"),
        ("densenet161", {"width": 6}, "width is 6; accepted by densenet161: a positive multiple of 4"),
        ("densenet121", {"width": 0}, "width is 0; accepted"),
        ("densenet121", {"width": 8.0}, r"width is 8\.0; accepted"),
        (
            "densenet121",
            {"width": 8, "weights": "imagenet_v1"},
            "'imagenet_v1' were trained with width 64; got width 8",
        ),
    ],
)
def test_a_width_that_cannot_be_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(name, **options)


def test_weights_of_another_depth_are_refused():
    with torch.device("meta"):
        state = torchvision.models.densenet121(weights=None).state_dict()
        ours = create_backbone("densenet169")
    with pytest.raises(
        ValueError,
        match=r"does not fit densenet169; missing: trunk\.stage4\.block\.24\.branch\.norm1\.weight",
    ):
        load_into(ours, state, TORCHVISION_NAMES, source="densenet121.pth")
