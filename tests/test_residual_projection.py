"""The shared projection, the folded norms and recomputed activations on every kind of residual head."""

import copy

import pytest
import torch
from networks import randomize_norms, watch_projections
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from backbones import Backbone, create_backbone
from backbones.fuse import fuse
from backbones.regions import RegionPool

BOXES = [
    torch.tensor([[10.0, 10, 60, 70], [0, 0, 160, 128], [100, 90, 170, 140], [3, 3, 4, 4], [-20, -20, 5, 5]]),
    torch.tensor([[50.0, 60, 127, 120], [30, 2, 31, 120]]),
]
# the network, its options, and which of branch, shortcut and gate begin with a projection
HEADS = [
    ("se_resnet18", {}, "shortcut"),
    ("se_resnet50", {}, "branch shortcut"),
    ("shrinkage_resnet18", {}, "shortcut"),
    ("shrinkage_resnet50", {"branch_end": "shrinkage_cs"}, "branch shortcut"),
    ("shrinkage_resnet50", {"norm": "group", "order": "full_preactivation"}, "branch shortcut"),
    ("preact_resnet18", {}, "shortcut"),
    ("preact_resnet50", {}, "branch shortcut"),
    ("preact_resnet50", {"stride_in": "1x1"}, "branch shortcut"),
    ("resnext50_32x4d", {}, "branch shortcut"),
    ("wide_resnet50_2", {}, "branch shortcut"),
    ("plain18", {}, ""),
    ("resnet50", {"shortcut": "none"}, "branch"),
    ("resnet50", {"shortcut": "A"}, "branch"),
    ("resnet50", {"shortcut": "C"}, "branch shortcut"),
    ("resnet18", {"shortcut": "constant_scaling"}, "shortcut"),
    ("resnet18", {"shortcut": "shortcut_only_gating"}, "shortcut gate"),
    ("resnet50", {"shortcut": "exclusive_gating", "gate_bias": 0.0}, "branch shortcut gate"),
    ("resnet50", {"order": "bn_after_addition"}, "branch shortcut"),
    ("resnet50", {"order": "relu_before_addition"}, "branch shortcut"),
    ("resnet50", {"order": "relu_only_preactivation"}, "branch shortcut"),
]
IDS = [" ".join([name, *map(str, options.values())]) for name, options, _ in HEADS]
every_head = pytest.mark.parametrize(("name", "options"), [head[:2] for head in HEADS], ids=IDS)


def narrow(name: str, **options) -> Backbone:
    torch.manual_seed(0)
    return randomize_norms(
        create_backbone(name, width=16, **options), weight=(0.5, 1.5), shift=(-0.5, 0.5), variance=(0.5, 2.0)
    )


def shared_map(backbone: Backbone, dtype: torch.dtype = torch.float32) -> Tensor:
    features = torch.rand(2, backbone.trunk.out_channels, 8, 10, dtype=dtype)
    return features.to(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize(("name", "options", "projected"), HEADS, ids=IDS)
def test_which_paths_are_projected(name, options, projected, monkeypatch):
    backbone, weights = narrow(name, **options).eval(), watch_projections(monkeypatch)
    with torch.no_grad():
        backbone.roi_head(RegionPool()(shared_map(backbone).detach(), BOXES))
    first = backbone.roi_head.stage5[0]
    found = [name for name, weight in first.named_parameters() if any(weight is w for w in weights)]
    assert [path.partition(".")[0] for path in found] == projected.split() and len(found) == len(weights)


@every_head
def test_head_on_the_shared_map_equals_the_head_on_crops_in_values_and_gradients(name, options):
    backbone = narrow(name, **options).double()
    head, features = backbone.roi_head.train(), shared_map(backbone, torch.float64)
    regions = RegionPool()(features, [boxes.double() for boxes in BOXES])
    parameters = (*head.parameters(), features)
    outcomes = []
    for shared in (True, False):
        head.shared_projection = shared
        vectors = head(regions)
        weights = torch.linspace(-1, 1, vectors.numel(), dtype=torch.float64).view_as(vectors)
        outcomes.append((vectors, torch.autograd.grad((vectors * weights).sum(), parameters)))
    (shared_vectors, shared_gradients), (vectors, gradients) = outcomes
    assert (shared_vectors - vectors).abs().max() <= 1e-9 * vectors.abs().max()
    for a, b in zip(shared_gradients, gradients, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp(min=1e-6)


def unfolded(network: nn.Module) -> list[str]:
    """Norms that still stand behind a convolution."""
    pairs = [
        (name, list(parent)) for name, parent in network.named_modules() if isinstance(parent, nn.Sequential)
    ]
    return [
        name
        for name, layers in pairs
        for conv, norm in zip(layers[:-1], layers[1:], strict=True)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    ]


@every_head
def test_the_fused_form_gives_the_same_features_and_passes_no_region(name, options):
    backbone = narrow(name, **options).eval()
    fused = fuse(backbone)
    images, boxes = torch.rand(1, 3, 97, 130), BOXES[:1]
    assert unfolded(fused) == [] and (unfolded(backbone) or "group" in options.values())
    with torch.no_grad():
        features = backbone.trunk(images)
        vectors = backbone.roi_head(RegionPool()(features, boxes))
        pairs = (
            (features, fused.trunk(images)),
            (vectors, backbone.roi_head(RegionPool(max_regions=3)(features, boxes))),
            (vectors, fused.roi_head(RegionPool(max_regions=3)(features, boxes))),
        )
        for plain, fast in pairs:
            assert (plain - fast).abs().max() <= 1e-4 * plain.abs().max()
        for head in (backbone.roi_head, fused.roi_head):
            none = head(RegionPool()(features, [boxes[0][:0]]))
            assert none.shape == (0, head.out_channels)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("preact_resnet50", {}),
        ("shrinkage_resnet18", {}),
        ("resnet18", {"shortcut": "exclusive_gating", "order": "relu_only_preactivation"}),
        ("resnet50", {"order": "relu_before_addition"}),
    ],
    ids=str,
)
def test_recomputed_activations_change_neither_gradients_nor_statistics(name, options):
    plain, outcomes = narrow(name, **options).double().train(), []
    images = torch.rand(2, 3, 96, 128, dtype=torch.float64)
    for checkpointing in (False, True):
        backbone = copy.deepcopy(plain)
        backbone.trunk.activation_checkpointing = backbone.roi_head.activation_checkpointing = checkpointing
        features = backbone.trunk(images)
        regions = RegionPool()(features, [boxes.double() for boxes in BOXES])
        backbone.roi_head(regions).square().sum().backward()
        outcomes.append([*(p.grad for p in backbone.parameters()), *backbone.buffers()])
    for kept, recomputed in zip(*outcomes, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["shrinkage_resnet18", "shrinkage_resnet50"])
def test_a_shrinkage_head_trains_on_a_single_region(name):
    backbone = narrow(name)
    vectors = backbone.roi_head.train()(RegionPool()(shared_map(backbone), [BOXES[0][:1], BOXES[1][:0]]))
    vectors.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.roi_head.parameters())


def test_frozen_norms_are_folded_too(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(narrow("se_resnet18").state_dict(), path)
    frozen = create_backbone("se_resnet18", width=16, norm="frozen", weights=str(path)).eval()
    fused = fuse(frozen)
    assert not any(isinstance(layer, FrozenBatchNorm2d) for layer in fused.modules())
    images = torch.rand(1, 3, 70, 50)
    with torch.no_grad():
        expected = frozen(images)
        assert (fused(images) - expected).abs().max() <= 1e-4 * expected.abs().max()
