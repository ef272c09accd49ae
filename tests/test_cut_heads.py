"""Heads of networks cut by tracing: the shared projection, the form for inference, no region, a detector."""

import pytest
import torch
from cut_networks import ALL, BOXES, FEW, backbone_of, uncut_and_cut
from networks import watch_projections
from torch import nn

from backbones import create_backbone
from backbones.cut.split import layer_path
from backbones.fuse import fuse
from backbones.kernels.winograd import WinogradConv2d
from backbones.regions import RegionPool
from detector.model.faster_rcnn import build_faster_rcnn


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["timm/resnest14d", "torchvision/regnet_y_400mf"])
def test_no_region_at_all_passes_the_head(name, training):
    head = backbone_of(name).roi_head.train(training)
    features = torch.rand(1, uncut_and_cut(name)[1].trunk.out_channels, 6, 10, requires_grad=True)
    for regions in (
        features[:0, :, :1, :1].expand(-1, -1, 14, 14),
        RegionPool()(features, [BOXES[0][:0]]),
    ):
        vectors = head(regions)
        assert vectors.shape == (0, head.out_channels)
        vectors.sum().backward()
        assert not features.grad.any()
    assert all(module.training == training for module in head.modules())


@pytest.mark.parametrize(
    ("name", "projected"),
    [
        ("torchvision/resnet18", {"layer4.0.downsample.0"}),
        ("torchvision/resnet50", {"layer4.0.conv1", "layer4.0.downsample.0"}),
        ("torchvision/regnet_y_400mf", {"f.a.0", "proj.0"}),
        ("timm/resnest14d", {"layer4.0.conv1"}),  # the shortcut pools first
        ("timm/resnetv2_50", {"stages.3.blocks.0.conv1", "stages.3.blocks.0.downsample.conv"}),
        ("timm/convnext_atto", set()),
    ],
)
def test_which_convolutions_are_projected(name, projected):
    with torch.device("meta"), torch.no_grad():
        backbone = create_backbone(name).eval()
        regions = RegionPool()(torch.zeros(1, backbone.trunk.out_channels, 4, 4), [torch.zeros(9, 4)])
        backbone.roi_head(regions)
    first = backbone.roi_head.stage5[0].named_modules()
    found = {path for path, layer in first if id(getattr(layer, "weight", None)) in regions.projected}
    assert {path.removeprefix("trunk_output.block4.block4-0.") for path in found} == projected


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("torchvision/resnet18", True),
        ("torchvision/regnet_y_400mf", True),
        ("torchvision/regnet_y_400mf", False),
        ("timm/resnest14d", False),
    ],
)
def test_head_on_the_shared_map_equals_the_head_on_crops_in_values_and_gradients(name, training):
    backbone = backbone_of(name).double().train(training)
    head, outcomes = backbone.roi_head, []
    features = torch.rand(2, backbone.trunk.out_channels, 6, 10, dtype=torch.float64, requires_grad=True)
    boxes = [b.double() for b in BOXES]
    for shared in (True, False):
        head.shared_projection = shared
        vectors = head(RegionPool()(features, boxes))
        weights = torch.linspace(-1, 1, vectors.numel(), dtype=torch.float64).view_as(vectors)
        gradients = torch.autograd.grad((vectors * weights).sum(), [features, *head.parameters()])
        outcomes.append((vectors.detach(), gradients))
    (shared_vectors, shared_grads), (plain_vectors, plain_grads) = outcomes
    torch.testing.assert_close(shared_vectors, plain_vectors, rtol=1e-9, atol=1e-11)
    for a, b in zip(shared_grads, plain_grads, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max().clamp(min=1e-3)  # a bias before a norm has none


def test_a_cut_head_runs_its_opening_convolutions_on_the_map(monkeypatch):
    head = backbone_of("torchvision/regnet_y_400mf").roi_head.eval()
    weights = watch_projections(monkeypatch)
    regions = RegionPool()(torch.rand(2, 208, 6, 10), BOXES)
    with torch.no_grad():
        head(regions)
    assert len(weights) == 2 and 1 not in regions._crops  # the branch, and the shortcut


@pytest.mark.parametrize("name", ALL)
def test_the_fused_form_gives_the_same_features_within_1e_4_of_the_largest(name):
    backbone = backbone_of(name).eval()
    fused = fuse(backbone)
    images = torch.rand(1, 3, 96, 160)
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


@pytest.mark.parametrize(
    "name", [name for name in FEW if name != "timm/convnext_atto"]
)  # which has no batch norm
def test_the_fused_form_keeps_only_the_norms_that_no_convolution_precedes(name):
    norms = [
        {layer_path(key) for key, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)}
        for network in (uncut_and_cut(name)[1], fuse(backbone_of(name)))
    ]
    assert norms[0] and norms[1] == {path for path in norms[0] if path.endswith("identity")}


def test_a_winograd_product_runs_maps_of_another_size_as_the_convolution():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    x = torch.rand(2, 8, 14, 14)
    with torch.no_grad():
        torch.testing.assert_close(WinogradConv2d(conv)(x), conv(x))


def test_activation_checkpointing_changes_neither_gradients_nor_statistics():
    outcomes = []
    for checkpointing in (False, True):
        backbone = backbone_of("torchvision/regnet_y_400mf").double().train()
        backbone.trunk.activation_checkpointing = backbone.roi_head.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        features = backbone.trunk(torch.rand(2, 3, 96, 160, dtype=torch.float64))
        vectors = backbone.roi_head(RegionPool()(features, [b.double() for b in BOXES]))
        vectors.square().sum().backward()
        outcomes.append(([p.grad for p in backbone.parameters()], list(backbone.buffers())))
    for kept, recomputed in zip(*(o[0] for o in outcomes), strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(*(o[1] for o in outcomes), strict=True))


@pytest.mark.parametrize("name", ["torchvision/regnet_y_400mf", "timm/convnext_atto"])
def test_a_detector_on_a_cut_network_trains_a_step_and_detects(name):
    sizes = {"min_size": 64, "max_size": 96, "anchor_sizes": (16, 32)}
    counts = {"rpn_post_nms_top_n_train": 12, "rpn_post_nms_top_n_test": 12, "box_batch_size_per_image": 8}
    torch.manual_seed(0)
    model = build_faster_rcnn(backbone_of(name).freeze(2), 3, **sizes, **counts)
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    boxes = torch.tensor([[5.0, 8, 40, 50]])
    targets = [{"boxes": boxes, "labels": torch.tensor([k])} for k in (1, 2)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    before = [p.detach().clone() for p in trained]
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    optimizer.step()
    assert all(loss.isfinite() for loss in losses.values())
    assert sum(not torch.equal(a, b) for a, b in zip(before, trained, strict=True)) > len(trained) / 2
    model.roi_heads.score_thresh = 0.0
    for found in model.eval()(images):
        assert found["boxes"].shape[1] == 4 and len(found["boxes"]) and found["scores"].isfinite().all()
