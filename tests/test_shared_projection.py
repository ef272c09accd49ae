"""The shared projection, the folded norms and the Winograd products against the plain path on 14x14 crops."""

import copy

import pytest
import torch
from torch import nn

import backbones.regions
from backbones import create_backbone
from backbones.backbone import CHECKPOINTED_REGIONS
from backbones.fuse import fuse
from backbones.kernels.winograd import WinogradConv2d, use_winograd
from backbones.regions import RegionPool

RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
)  # every name: test_backbone_contract.py
BOXES = [
    torch.tensor([[10.0, 10, 60, 70], [0, 0, 160, 128], [100, 90, 170, 140], [3, 3, 4, 4], [-20, -20, 5, 5]]),
    torch.tensor([[50.0, 60, 127, 120], [30, 2, 31, 120]]),
]


def randomize_norms(module: nn.Module) -> nn.Module:
    """Statistics as training leaves them, so that a fold that forgets one shows."""
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for value, low, high in (
                (layer.weight, 0.5, 1.5),
                (layer.bias, -0.5, 0.5),
                (layer.running_mean, -0.5, 0.5),
                (layer.running_var, 0.5, 2.0),
            ):
                value.data.copy_(torch.empty(value.shape).uniform_(low, high, generator=generator))
    return module


def head_and_regions(name: str, dtype: torch.dtype = torch.float32, **options):
    backbone = randomize_norms(create_backbone(name, width=16, **options)).to(dtype)
    features = torch.rand(2, backbone.trunk.out_channels, 8, 10, dtype=dtype)
    features = features.to(memory_format=torch.channels_last).requires_grad_()
    return backbone.roi_head, features, [boxes.to(dtype) for boxes in BOXES]


@pytest.mark.parametrize("stride_in", ["3x3", "1x1"])
@pytest.mark.parametrize("name", RESNETS)
def test_head_on_the_shared_map_equals_the_head_on_crops_in_values_and_gradients(name, stride_in):
    head, features, boxes = head_and_regions(name, torch.float64, stride_in=stride_in)
    pool = RegionPool()
    outcomes = []
    for shared in (True, False):
        head.shared_projection = shared
        head.load_state_dict(copy.deepcopy(head.state_dict()))
        vectors = head.train()(pool(features, boxes))
        (
            vectors * torch.linspace(-1, 1, vectors.numel(), dtype=torch.float64).view_as(vectors)
        ).sum().backward()
        outcomes.append((vectors.detach(), [p.grad.clone() for p in (*head.parameters(), features)]))
        for p in (*head.parameters(), features):
            p.grad = None
    (shared_vectors, shared_grads), (plain_vectors, plain_grads) = outcomes
    torch.testing.assert_close(shared_vectors, plain_vectors, rtol=1e-9, atol=1e-11)
    for a, b in zip(shared_grads, plain_grads, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("name", RESNETS)
def test_regions_and_cropped_tensors_give_the_head_the_same(name):
    head, features, boxes = head_and_regions(name)
    head.eval()
    with torch.no_grad():
        crops = RegionPool()(features, boxes)
        torch.testing.assert_close(head(RegionPool()(features, boxes)), head(crops), rtol=1e-4, atol=1e-5)


def test_the_map_is_projected_once_for_all_parts_and_only_where_that_is_less_work(monkeypatch):
    _, features, boxes = head_and_regions("resnet18")
    weight = torch.rand(7, features.shape[1], 1, 1)
    calls = []
    pool = RegionPool(max_regions=2)
    regions = pool(features.detach(), boxes)
    original = backbones.regions.conv2d
    monkeypatch.setattr(backbones.regions, "conv2d", lambda x, w: calls.append(x.shape) or original(x, w))
    parts = [nn.functional.conv2d(part, weight) for part in regions.parts()]
    few = pool(features.detach().repeat(40, 1, 1, 1), [*boxes, *[boxes[0][:0]] * 78])
    nn.functional.conv2d(few, weight, stride=2)
    assert [len(part) for part in parts] == [2, 2, 1, 2]
    assert calls[:-1] == [features.shape]
    assert calls[-1][0] == 7  # seven regions of 49 bins are less than eighty maps of 80 positions


@pytest.mark.parametrize("mode", ["align", "max"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_bound_on_the_regions_at_once_changes_nothing(name, mode):
    head, features, boxes = head_and_regions(name)
    head.eval()
    with torch.no_grad():
        whole = head(RegionPool(mode=mode)(features, boxes))
        parts = head(RegionPool(mode=mode, max_regions=2)(features, boxes))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_regions", [None, 3])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_no_region_at_all_passes(name, max_regions):
    head, features, boxes = head_and_regions(name)
    with torch.no_grad():
        vectors = head.eval()(RegionPool(max_regions=max_regions)(features, [b[:0] for b in boxes]))
    assert vectors.shape == (0, head.out_channels)


@pytest.mark.parametrize("stride_in", ["3x3", "1x1"])
@pytest.mark.parametrize("name", RESNETS)
def test_the_fused_form_gives_the_same_features_within_1e_4_of_the_largest(name, stride_in):
    backbone = randomize_norms(create_backbone(name, width=16, stride_in=stride_in)).eval()
    fused = fuse(backbone)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fused.modules())
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in backbone.modules())
    images = torch.rand(1, 3, 97, 130)
    with torch.no_grad():
        features = backbone.trunk(images)
        boxes = [BOXES[0]]
        for plain, fast in (
            (features, fused.trunk(images)),
            (backbone(images), fused(images)),
            (
                backbone.roi_head(RegionPool()(features, boxes)),
                fused.roi_head(RegionPool(max_regions=3)(features, boxes)),
            ),
        ):
            assert (plain - fast).abs().max() <= 1e-4 * plain.abs().max()


@pytest.mark.parametrize("size", [4, 7, 9])
def test_winograd_products_equal_the_convolution(size):
    conv = nn.Conv2d(20, 12, 3, padding=1)
    x = torch.randn(5, 20, size, size).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = conv.double()(x.double())
        got = WinogradConv2d(conv.float(), size)(x)
        exact = WinogradConv2d(conv.double(), size)(x.double())
    assert (exact - expected).abs().max() < 1e-12 * expected.abs().max() * 10
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_winograd_replaces_only_convolutions_of_stride_1_and_keeps_the_features(monkeypatch):
    monkeypatch.setattr("backbones.kernels.winograd._time", lambda *args: 0.5)
    head = fuse(randomize_norms(create_backbone("resnet50", width=16)).eval()).roi_head
    crops = torch.rand(3, 256, 14, 14)
    with torch.no_grad():
        before = head(crops)
        assert use_winograd(head.stage5) == 2
        after = head(crops)
    assert isinstance(head.stage5[0].branch.conv2, nn.Conv2d)
    assert (before - after).abs().max() <= 1e-4 * before.abs().max()


def test_winograd_stays_off_where_it_is_not_faster(monkeypatch):
    monkeypatch.setattr("backbones.kernels.winograd._time", lambda *args: 1.0)
    head = create_backbone("resnet18", width=8).roi_head
    assert use_winograd(head.stage5) == 0
    assert not any(isinstance(layer, WinogradConv2d) for layer in head.modules())


@pytest.mark.parametrize(
    "options",
    [{"norm": "batch"}, {"norm": "group"}, {"norm": "group", "stochastic_depth": 0.5}]
    + [{"norm": "group", "shortcut": "dropout"}],
    ids=["batch", "group", "stochastic depth", "dropout"],
)
@pytest.mark.parametrize("shared", [True, False])
def test_activation_checkpointing_changes_neither_gradients_nor_statistics_nor_draws(
    options, shared, monkeypatch
):
    # several parts, where nothing is drawn and no statistics are
    monkeypatch.setitem(CHECKPOINTED_REGIONS, "cpu", 2)
    outcomes = []
    torch.manual_seed(0)
    plain = create_backbone("resnet50", width=8, **options).double()
    for checkpointing in (False, True):
        backbone = copy.deepcopy(plain).train()
        backbone.trunk.activation_checkpointing = backbone.roi_head.activation_checkpointing = checkpointing
        backbone.roi_head.shared_projection = shared
        torch.manual_seed(1)
        features = backbone.trunk(torch.rand(2, 3, 128, 160, dtype=torch.float64))
        vectors = backbone.roi_head(RegionPool()(features, [boxes.double() for boxes in BOXES]))
        vectors.square().sum().backward()
        outcomes.append(([p.grad for p in backbone.parameters()], list(backbone.buffers())))
    for kept, recomputed in zip(*(o[0] for o in outcomes), strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-9, atol=1e-12)
    for kept, recomputed in zip(*(o[1] for o in outcomes), strict=True):
        assert torch.equal(recomputed, kept)


class Waiting(nn.SyncBatchNorm, nn.BatchNorm2d):
    """Stands for a synchronised norm, which waits for the other processes in each pass. It counts its passes."""

    passes = 0

    def forward(self, x):
        Waiting.passes += 1
        return x * self.weight[:, None, None] + self.bias[:, None, None]


@pytest.mark.parametrize("shared", [True, False])
def test_a_synchronised_norm_takes_part_with_no_region_too(shared):
    """The others would wait for ever. Not run on a GPU, where torch's own norm takes an empty batch."""
    head = create_backbone("resnet50", width=8, norm="batch").roi_head
    norms = [layer for layer in head.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.__class__ = Waiting
    head.shared_projection, Waiting.passes = shared, 0
    features = torch.rand(2, 128, 8, 8, requires_grad=True)
    vectors = head(RegionPool()(features, [torch.zeros(0, 4)] * 2))
    assert vectors.shape == (0, 256) and Waiting.passes == len(norms)
    vectors.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in [features, *head.parameters()])
    head.eval()
    assert head(RegionPool()(features, [torch.zeros(0, 4)] * 2)).shape == (0, 256)
    assert Waiting.passes == len(norms)
