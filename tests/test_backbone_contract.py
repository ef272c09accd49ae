"""What every backbone keeps, whoever adds it: shapes, gradients, freezing, the shared projection, a detector's step.

Each name of `list_backbones()` is built as narrow as its family allows. The very deep and the wide ones are slow tests.
"""

import copy
import math
import re
from fnmatch import fnmatch

import pytest
import torch
from networks import watch_projections
from torch import Tensor, nn

from backbones import (
    IMAGENET,
    Backbone,
    RoIHead,
    Trunk,
    backbone_options,
    create_backbone,
    list_backbones,
)
from backbones.fuse import fuse
from backbones.kernels.winograd import use_winograd
from backbones.regions import RegionPool
from detector.model.faster_rcnn import build_faster_rcnn

DEEP = re.compile(r"101|152|161|169|201|wide")
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if DEEP.search(name) else name for name in list_backbones()
]
every_backbone = pytest.mark.parametrize("name", NAMES)

# Within the image, over its edge, outside of it, and smaller than a position of the map
BOXES = [
    [[10.0, 10, 60, 70], [0, 0, 96, 80], [70, 50, 130, 110], [3, 3, 4, 4], [-20, -20, 5, 5]],
    [[20.0, 30, 77, 70], [30, 2, 31, 80]],
]
# What opens stage 5, first match first: the 1x1 convolutions that run on the shared map, and whether anything reads the
# map's raw crops. A basic block's branch opens with a 3x3, a dense one with a pool, a plain network has no shortcut.
INCEPTION = ("branches.3x3.conv1", "branches.double_3x3.conv1")
PROJECTED = (
    ("densenet*", (), True),
    ("*bn_inception", INCEPTION, True),
    ("plain*", (), True),
    ("*resnet18", ("shortcut.conv",), True),
    ("*resnet34", ("shortcut.conv",), True),
    ("*resnet*", ("branch.conv1", "shortcut.conv"), False),
    ("resnext*", ("branch.conv1", "shortcut.conv"), False),
)


def map_size(name: str, pixels: int) -> int:
    """Positions of the trunk's map: the contract's ceil(pixels / 16), or the family's own rule."""
    if name.startswith("densenet"):  # the published averages drop an odd last row
        return math.ceil(pixels / 4) // 2 // 2
    return math.ceil(pixels / 16)


def small(name: str, seed: int = 0, **options) -> Backbone:
    """The named backbone with repeatable random weights, norms and biases as training leaves them."""
    if "width" in backbone_options(name):
        options = {"width": 8} | options
    torch.manual_seed(seed)
    backbone = create_backbone(name, **options)
    with torch.no_grad():
        for layer in backbone.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.4, 0.8)
                layer.bias.uniform_(-0.2, 0.2)
                layer.running_mean.uniform_(-0.2, 0.2)
                layer.running_var.uniform_(0.8, 1.5)
            elif isinstance(layer, nn.Conv2d) and layer.bias is not None:
                layer.bias.uniform_(-0.2, 0.2)
    return backbone


def regions_of(backbone: Backbone, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """A map that takes gradients, and boxes on it."""
    features = torch.rand(2, backbone.trunk.out_channels, 5, 6, dtype=dtype)
    boxes = [torch.tensor(b, dtype=dtype) for b in BOXES]
    return features.to(memory_format=torch.channels_last).requires_grad_(), boxes


# ---- shapes and functions


@every_backbone
def test_it_is_a_backbone_of_its_name(name):
    backbone = small(name)
    assert isinstance(backbone, Backbone) and backbone.name == name
    assert isinstance(backbone.trunk, Trunk) and isinstance(backbone.roi_head, RoIHead)
    assert backbone.preprocessing == IMAGENET


@every_backbone
def test_the_trunk_gives_a_map_of_stride_16_at_any_size(name):
    backbone = small(name).eval()
    for height, width in ((33, 65), (50, 47), (32, 96)):
        with torch.no_grad():
            features = backbone.trunk(torch.rand(2, 3, height, width))
        expected = (2, backbone.trunk.out_channels, map_size(name, height), map_size(name, width))
        assert tuple(features.shape) == expected
    assert tuple(features.shape[2:]) == (2, 6)  # whatever the rule: a detector pads to multiples of 32


@every_backbone
def test_the_head_takes_14x14_regions_reads_them_at_7x7_and_gives_vectors(name):
    backbone = small(name).eval()
    head, regions = backbone.roi_head, torch.rand(3, backbone.trunk.out_channels, 14, 14)
    with torch.no_grad():
        assert tuple(head.stage5(regions).shape) == (3, head.out_channels, 7, 7)
        assert tuple(head(regions).shape) == (3, head.out_channels)


@every_backbone
def test_the_whole_network_is_the_head_on_the_trunks_map(name):
    backbone = small(name).eval()
    images = torch.rand(2, 3, 75, 50)
    with torch.no_grad():
        vectors = backbone(images)
        assert torch.equal(vectors, backbone.roi_head(backbone.trunk(images)))
    assert vectors.isfinite().all() and vectors.std() > 0


@every_backbone
def test_evaluation_is_deterministic_and_independent_of_the_batch(name):
    backbone = small(name).eval()
    images = torch.rand(3, 3, 48, 48)
    with torch.no_grad():
        first, second, alone = backbone(images), backbone(images), backbone(images[1:2])
    assert torch.equal(first, second)
    torch.testing.assert_close(alone, first[1:2], rtol=1e-3, atol=1e-5)


@every_backbone
def test_a_state_dict_carries_the_whole_network(name):
    first, second = small(name).eval(), small(name, seed=1).eval()
    images = torch.rand(1, 3, 40, 56)
    with torch.no_grad():
        expected = first(images)
        assert not torch.equal(second(images), expected)
        second.load_state_dict(first.state_dict())
        assert torch.equal(second(images), expected)


# ---- training


@every_backbone
def test_every_parameter_receives_a_gradient(name):
    backbone = small(name).train()
    vectors = backbone(torch.rand(3, 3, 64, 64))
    (vectors * torch.randn_like(vectors)).sum().backward()
    without = [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad.isfinite().all() for p in backbone.parameters())


def statistics(module: nn.Module) -> list[Tensor]:
    return [b.clone() for n, b in module.named_buffers() if "running" in n]


@every_backbone
@pytest.mark.parametrize("num_frozen", [2, 5])
def test_frozen_stages_keep_weights_and_statistics_under_train(name, num_frozen):
    backbone = small(name, frozen_stages=num_frozen).eval().train()
    stages = [*backbone.trunk.stages, backbone.roi_head.stage5]
    before = [statistics(stage) for stage in stages]
    vectors = backbone(torch.rand(2, 3, 48, 48))
    assert vectors.requires_grad == (num_frozen < 5)
    if vectors.requires_grad:
        vectors.square().sum().backward()
    for k, (stage, old) in enumerate(zip(stages, before, strict=True), start=1):
        same = [torch.equal(a, b) for a, b in zip(old, statistics(stage), strict=True)]
        has_gradient = [p.grad is not None for p in stage.parameters()]
        if k <= num_frozen:
            assert all(same) and not any(has_gradient)
            assert not any(p.requires_grad for p in stage.parameters())
            assert not any(m.training for m in stage.modules())
        else:
            assert not any(same) and all(has_gradient)


@every_backbone
def test_a_detector_trains_a_step_and_detects(name):
    model = build_faster_rcnn(
        small(name),
        num_classes=3,
        anchor_sizes=(16, 32),
        min_size=64,
        max_size=96,
        rpn_pre_nms_top_n_train=30,
        rpn_pre_nms_top_n_test=30,
        rpn_post_nms_top_n_train=8,
        rpn_post_nms_top_n_test=8,
        box_batch_size_per_image=8,
        box_score_thresh=0.0,
    )
    images = [torch.rand(3, 64, 80), torch.rand(3, 64, 64)]
    targets = [
        {"boxes": torch.tensor([[8.0, 8, 40, 48]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    losses = model.train()(images, targets)
    assert len(losses) == 4 and all(loss.isfinite() for loss in losses.values())
    before = copy.deepcopy(model.state_dict())
    sum(losses.values()).backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert {n.split(".")[0] for n in moved} == {"backbone", "rpn", "roi_heads"}
    with torch.no_grad():
        detections = model.eval()(images)
    assert len(detections) == 2 and any(len(d["boxes"]) for d in detections)
    assert all(d["boxes"].isfinite().all() and d["scores"].isfinite().all() for d in detections)


@every_backbone
def test_activation_checkpointing_changes_neither_gradients_nor_statistics(name):
    outcomes = []
    for checkpointing in (False, True):
        backbone = small(name).double().train()
        backbone.trunk.activation_checkpointing = backbone.roi_head.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        features = backbone.trunk(torch.rand(2, 3, 64, 96, dtype=torch.float64))
        boxes = regions_of(backbone, torch.float64)[1]
        backbone.roi_head(RegionPool()(features, boxes)).square().sum().backward()
        outcomes.append(([p.grad for p in backbone.parameters()], list(backbone.buffers())))
    (kept, kept_buffers), (recomputed, recomputed_buffers) = outcomes
    for a, b in zip(recomputed, kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
    for a, b in zip(recomputed_buffers, kept_buffers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


# ---- regions of a shared map


@every_backbone
def test_which_opening_branches_are_projected(name, monkeypatch):
    backbone, weights = small(name).eval(), watch_projections(monkeypatch)
    regions = RegionPool()(*regions_of(backbone))
    with torch.no_grad():
        backbone.roi_head(regions)
    opening = backbone.roi_head.stage5[0]
    found = [n for n, p in opening.named_parameters() if any(p is w for w in weights)]
    wanted = next((rule[1:] for rule in PROJECTED if fnmatch(name, rule[0])), None)
    assert wanted is not None, f"say in PROJECTED which branches of {name} are projected"
    assert (tuple(n.removesuffix(".weight") for n in found), 1 in regions._crops) == wanted
    assert len(found) == len(weights)


@every_backbone
def test_the_head_on_the_shared_map_equals_the_head_on_crops_in_values_and_gradients(name):
    head_of = small(name).double().train()
    features, boxes = regions_of(head_of, torch.float64)
    outcomes = []
    for shared in (True, False):
        head = copy.deepcopy(head_of.roi_head)
        head.shared_projection = shared
        vectors = head(RegionPool()(features, boxes))
        signs = torch.linspace(-1, 1, vectors.numel(), dtype=torch.float64).view_as(vectors)
        parameters = (*head.parameters(), features)
        outcomes.append((vectors.detach(), torch.autograd.grad((vectors * signs).sum(), parameters)))
    (shared_vectors, shared_gradients), (vectors, gradients) = outcomes
    assert (shared_vectors - vectors).abs().max() <= 1e-9 * vectors.abs().max()
    rounding = 1e-12 * max(
        g.abs().max() for g in gradients
    )  # a bias before a batch norm has no other gradient
    for a, b in zip(shared_gradients, gradients, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max() + rounding


@every_backbone
def test_the_fused_form_gives_the_same_within_1e_4_of_the_largest(name, monkeypatch):
    monkeypatch.setattr(
        "backbones.kernels.winograd._time", lambda *args: 0.5
    )  # Winograd products wherever they fit
    backbone = small(name).eval()
    fused = fuse(backbone)
    winograd = copy.deepcopy(fused.roi_head)
    use_winograd(winograd.stage5)
    num_norms = [sum(isinstance(m, nn.BatchNorm2d) for m in n.modules()) for n in (fused, backbone)]
    assert num_norms[0] < num_norms[1]
    images, boxes = torch.rand(1, 3, 97, 130), regions_of(backbone)[1][:1]
    with torch.no_grad():
        features = backbone.trunk(images)
        vectors = backbone.roi_head(RegionPool()(features, boxes))
        for plain, fast in (
            (features, fused.trunk(images)),
            (backbone(images), fused(images)),
            (vectors, fused.roi_head(RegionPool(max_regions=3)(features, boxes))),
            (vectors, winograd(RegionPool()(features, boxes))),
        ):
            assert (plain - fast).abs().max() <= 1e-4 * plain.abs().max()


@every_backbone
def test_no_region_at_all_passes_the_head(name):
    backbone = small(name)
    head, (features, boxes) = backbone.roi_head, regions_of(backbone)
    nothing = [b[:0] for b in boxes]
    for mode in (True, False):
        for regions in (torch.rand(0, features.shape[1], 14, 14), RegionPool()(features, nothing)):
            vectors = head.train(mode)(regions)
            assert tuple(vectors.shape) == (0, head.out_channels)
        vectors.sum().backward()
    # Several processes wait for the gradient of each parameter.
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
