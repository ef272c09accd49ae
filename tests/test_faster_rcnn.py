"""The detector: torchvision's with the same weights, seeded sampling, evaluation in one pass, and the edges."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, box_iou

import detector.model.roi_heads
from backbones import IMAGENET, Preprocessing, backbone_options, create_backbone
from detector import build_faster_rcnn, build_model
from detector.config import ModelConfig
from detector.model.anchors import MapAnchors, check_anchor_sizes
from detector.model.boxes import BoxCoder
from detector.model.conventions import TORCHVISION
from detector.model.network_input import NetworkTransform, network_size
from detector.model.sampling import SeededSampler, match

LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
SIZES = (16, 32, 64)
RATIOS = (0.5, 1.0, 2.0)
# Small samples, so that there is something to choose from; no score threshold, so that there are detections.
SETTINGS = {
    "min_size": 64,
    "max_size": 128,
    "rpn_batch_size_per_image": 16,
    "box_batch_size_per_image": 16,
    "rpn_pre_nms_top_n_train": 120,
    "rpn_post_nms_top_n_train": 60,
    "rpn_pre_nms_top_n_test": 60,
    "rpn_post_nms_top_n_test": 20,
    "box_score_thresh": 0.01,
}
KEYS = [(0, 7, 11), (0, 7, 12)]  # seed, step, image id


@torch.no_grad()
def spread(model: nn.Module) -> nn.Module:
    """Make the scores of an untrained detector differ, so that rounding cannot swap their order."""
    torch.manual_seed(5)
    for layer, gain in ((model.rpn.head.cls_logits, 0.3), (model.roi_heads.box_predictor.cls_score, 0.3)):
        layer.weight.normal_(std=gain)
    model.rpn.head.bbox_pred.weight.normal_(std=0.05)
    return model


def build(backbone, num_classes=4, **options):
    """A small detector whose random weights give many different detections."""
    torch.manual_seed(2)
    return spread(build_faster_rcnn(backbone, num_classes, **{"anchor_sizes": SIZES, **SETTINGS, **options}))


def small(name):
    torch.manual_seed(0)
    return create_backbone(name, **({"width": 8} if "width" in backbone_options(name) else {}))


def batch(*sizes, num_boxes=3, num_classes=4, seed=0):
    """Images of the given (height, width) and targets with boxes inside."""
    random = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=random) for size in sizes]
    targets = []
    for i, (height, width) in enumerate(sizes):
        corner = torch.rand(num_boxes, 2, generator=random) * torch.tensor([width, height]) * 0.5
        extent = (0.2 + 0.3 * torch.rand(num_boxes, 2, generator=random)) * torch.tensor([width, height])
        labels = torch.randint(1, num_classes, (num_boxes,), generator=random)
        targets.append({"boxes": torch.cat([corner, corner + extent], 1), "labels": labels, "image_id": i})
    return images, targets


def empty_target():
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def assert_same_losses(a, b, tolerance=1e-5):
    assert set(a) == set(b) == LOSSES
    for name in LOSSES:
        torch.testing.assert_close(
            a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_detections(a, b, tolerance=1e-4):
    assert len(a) == len(b)
    for first, second in zip(a, b, strict=True):
        assert torch.equal(first["labels"], second["labels"])
        torch.testing.assert_close(first["boxes"], second["boxes"], rtol=tolerance, atol=10 * tolerance)
        torch.testing.assert_close(first["scores"], second["scores"], rtol=tolerance, atol=tolerance)


def train_step(model, images, targets):
    """Losses after a check that they are four finite numbers and that every parameter can learn from them."""
    losses = model.train()(images, targets)
    assert set(losses) == LOSSES and all(
        loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values()
    )
    model.zero_grad()
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    return losses


# ---- the same detector as torchvision's


def compose_by_hand(model, num_classes=4):
    """A stock FasterRCNN of the same trunk and head, with the same weights."""
    head = copy.deepcopy(model.roi_heads.box_head)
    theirs = FasterRCNN(
        copy.deepcopy(model.backbone),
        rpn_anchor_generator=AnchorGenerator((SIZES,), (RATIOS,)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2),
        box_head=head,
        box_predictor=FastRCNNPredictor(head.out_channels, num_classes),
        **SETTINGS,
    )
    assert type(theirs.transform) is GeneralizedRCNNTransform
    theirs.transform.torch_choice = min  # it draws a random number an image to choose among one size
    theirs.load_state_dict(model.state_dict())
    return theirs


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "preact_resnet18", "se_resnet18"])
def test_detections_and_losses_equal_those_of_torchvisions_detector_with_the_same_weights(name):
    ours = build(small(name))
    for layer in ours.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = (
                1.0  # evaluation then normalises by the step before, so that scores stay moderate
            )
    theirs = compose_by_hand(ours)
    # at network size these are multiples of 32: torchvision guesses stride and scale from them correctly
    images, targets = batch((64, 128), (128, 192), (96, 64))
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        losses.append(model.train()(images, targets))
    assert_same_losses(*losses)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        found, expected = ours(images), theirs(images)
    assert sum(len(d["boxes"]) for d in expected) > 20
    assert_same_detections(found, expected)


def test_the_resnet101_detector_has_52_95_million_parameters():
    with torch.device("meta"):
        model = build_faster_rcnn(create_backbone("resnet101"), num_classes=91)
    backbone = 42_500_160
    rpn = 1024 * 1024 * 9 + 1024 + 15 * (1024 + 1) + 60 * (1024 + 1)  # 3x3, 15 scores, 15 x 4 deltas
    predictor = (91 + 91 * 4) * (2048 + 1)
    assert sum(p.numel() for p in model.parameters()) == backbone + rpn + predictor == 52_947_538


def test_it_is_a_torchvision_detector_with_the_backbones_parts(tiny_backbone):
    model = build_faster_rcnn(tiny_backbone, 3)
    assert isinstance(model, FasterRCNN)
    assert model.backbone is tiny_backbone.trunk and model.roi_heads.box_head is tiny_backbone.roi_head
    assert model.rpn.anchor_generator.num_anchors_per_location() == [15]
    assert model.roi_heads.box_roi_pool.output_size == (14, 14)
    assert (model.rpn.nms_thresh, model.roi_heads.nms_thresh, model.roi_heads.score_thresh) == (
        0.7,
        0.5,
        0.05,
    )


def test_freezing_survives_training_mode_of_the_detector():
    model = build(create_backbone("resnet18", width=8, frozen_stages=3)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train_step(model, *batch((64, 64), (64, 96)))
    moved = {
        k.split(".")[1]
        for k, v in model.state_dict().items()
        if "running" in k and not torch.equal(v, before[k])
    }
    assert moved == {"stage4", "box_head"}
    with_gradient = {
        n.split(".")[1] for n, p in model.backbone.named_parameters("backbone") if p.grad is not None
    }
    assert with_gradient == {"stage4"}


# ---- the transform


def image_sizes():
    random = np.random.default_rng(0)
    drawn = [tuple(int(n) for n in random.integers(20, 2500, 2)) for _ in range(60)]
    return [(480, 640), (640, 480), (375, 500), (333, 500), (160, 160), (800, 1333), (801, 1334), (1, 1), (7, 3000),
            (3000, 7), (1080, 1920), *drawn]  # fmt: skip


@pytest.mark.parametrize(("min_size", "max_size"), [(800, 1333), (600, 1000), (160, 160), (64, 96)])
def test_network_size_is_the_shape_that_torchvisions_transform_gives(min_size, max_size):
    theirs = GeneralizedRCNNTransform(min_size, max_size, [0.0], [1.0])
    checked = 0
    for height, width in image_sizes():
        if min(height, width) * max_size < max(height, width):
            continue  # torchvision's image would have no pixels
        if min_size / min(height, width) > 40:
            continue  # enlarging a pixel to a screen shows nothing new
        resized, _ = theirs.resize(torch.zeros(1, height, width))
        assert network_size(height, width, min_size, max_size) == tuple(resized.shape[-2:])
        checked += 1
    assert checked > 50


def test_the_longest_image_keeps_a_pixel():
    assert network_size(1, 5000, 800, 1333) == (1, 1333)
    assert network_size(5000, 1, 800, 1333) == (1333, 1)
    assert network_size(480, 640, 800, 1333) == (800, 1066)


def test_plain_images_and_boxes_go_through_as_in_torchvisions_transform():
    default = IMAGENET
    ours = NetworkTransform(64, 96, default, TORCHVISION)
    theirs = GeneralizedRCNNTransform(64, 96, list(default.mean), list(default.std))
    images, targets = batch((50, 61), (200, 100), (64, 96))
    (found, found_targets), (expected, expected_targets) = ours(images, targets), theirs(images, targets)
    assert torch.equal(found.tensors, expected.tensors) and found.image_sizes == expected.image_sizes
    for a, b, given in zip(found_targets, expected_targets, targets, strict=True):
        assert torch.equal(a["boxes"], b["boxes"])
        assert given["boxes"] is not a["boxes"]


def test_batches_of_the_loader_pass_through_and_other_images_are_resized():
    transform = NetworkTransform(64, 96, Preprocessing((0.0,) * 3, (1.0,) * 3), TORCHVISION)
    images, targets = batch((70, 80), (70, 80))
    targets[0]["original_size"] = torch.tensor([140, 160])
    batched, moved = transform(images, targets)
    assert batched.image_sizes == [(70, 80), (64, 73)]
    assert torch.equal(batched.tensors[0, :, :70, :80], images[0])
    assert torch.equal(moved[0]["boxes"], targets[0]["boxes"])
    scale = torch.tensor([73 / 80, 64 / 70, 73 / 80, 64 / 70])
    torch.testing.assert_close(moved[1]["boxes"], targets[1]["boxes"] * scale)


def test_preprocessing_is_the_weights_channel_order_and_scale(tiny_backbone):
    mean, std = (103.5, 116.3, 123.7), (57.4, 57.1, 58.4)
    tiny_backbone.preprocessing = Preprocessing(mean, std, channel_order="bgr", scale=255.0)
    transform = build(tiny_backbone).transform
    image = torch.rand(3, 64, 96)
    expected = torch.stack([(image[2 - c] * 255 - mean[c]) / std[c] for c in range(3)])
    torch.testing.assert_close(transform([image])[0].tensors[0], expected)
    transform.set_preprocessing(IMAGENET)
    expected = (image - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    torch.testing.assert_close(transform([image])[0].tensors[0], expected)


# ---- seeded sampling


def losses_with(model, keys, global_seed=0, **options):
    torch.manual_seed(global_seed)
    model.seed_sampling(keys)
    return model.train()(*batch((64, 96), (64, 128), **options))


def test_the_same_keys_give_the_same_losses_whatever_the_global_seed(tiny_backbone):
    model = build(tiny_backbone)
    first, again = losses_with(model, KEYS, 0), losses_with(model, KEYS, 1)
    assert all(torch.equal(first[name], again[name]) for name in LOSSES)
    without = losses_with(model, None, 0), losses_with(model, None, 1)
    assert without[0]["loss_objectness"] != without[1]["loss_objectness"]


def test_seeded_sampling_leaves_the_global_state_alone(tiny_backbone):
    model = build(tiny_backbone)
    losses_with(model, KEYS, 4)
    after = torch.rand(1)
    torch.manual_seed(4)
    assert torch.equal(after, torch.rand(1))


def test_another_step_draws_another_sample(tiny_backbone):
    model = build(tiny_backbone)
    first, other = losses_with(model, KEYS), losses_with(model, [(0, 8, 11), (0, 8, 12)])
    assert first["loss_objectness"] != other["loss_objectness"]
    assert first["loss_classifier"] != other["loss_classifier"]


def test_each_image_needs_its_key(tiny_backbone):
    with pytest.raises(ValueError, match="zip.. argument 2 is shorter"):
        losses_with(build(tiny_backbone), KEYS[:1])


def test_a_sample_is_a_function_of_its_key_not_of_the_place_in_the_batch():
    random = torch.Generator().manual_seed(0)
    matched = [torch.randint(-1, 3, (500,), generator=random) for _ in range(3)]
    keys = [(1, 2, 30), (1, 2, 10), (1, 2, 20)]

    def sample(order):
        sampler = SeededSampler(64, 0.25)
        sampler.keys = [keys[i] for i in order]
        positive, negative = sampler([matched[i] for i in order])
        return {i: (p, n) for i, p, n in zip(order, positive, negative, strict=True)}

    straight, turned, alone = sample([0, 1, 2]), sample([2, 0, 1]), sample([1])
    for i, (positive, negative) in straight.items():
        assert torch.equal(positive, turned[i][0]) and torch.equal(negative, turned[i][1])
        assert positive.sum() == 16 and negative.sum() == 48
        assert (matched[i][positive.bool()] >= 1).all() and (matched[i][negative.bool()] == 0).all()
    assert torch.equal(straight[1][0], alone[1][0])


def test_a_seeded_sample_has_torchvisions_numbers_of_each_kind():
    for num_positive, num_negative in ((3, 500), (500, 3), (0, 500), (500, 0), (0, 0)):
        matched = torch.cat([torch.ones(num_positive), torch.zeros(num_negative), -torch.ones(9)])
        sampler = SeededSampler(64, 0.25)
        expected = [m[0].sum() for m in sampler([matched])]
        sampler.keys = [(0, 1)]
        assert [m[0].sum() for m in sampler([matched])] == expected


@pytest.mark.parametrize("most", [1, 2**20])
@pytest.mark.parametrize("low_quality", [True, False])
def test_the_matches_of_a_batch_are_torchvisions_of_each_image(monkeypatch, most, low_quality):
    monkeypatch.setattr(detector.model.sampling, "_MOST_OVERLAPS", most)
    random = torch.Generator().manual_seed(0)
    # Whole pixels, so that overlaps are often equal. The first object overlaps no box.
    corners = torch.randint(0, 40, (4, 300, 2), generator=random).float()
    boxes = torch.cat([corners, corners + torch.randint(5, 20, (4, 300, 2), generator=random)], dim=2)
    objects = [
        torch.cat([torch.tensor([[500.0, 500, 510, 510]]), boxes[0, :4]]),
        boxes[1, :0],
        boxes[2, 5:7],
        boxes[3, 1:2],
    ]
    matcher = Matcher(0.7, 0.3, low_quality)
    found = match(matcher, objects, boxes)
    for i in (0, 2, 3):
        assert torch.equal(found[i], matcher(box_iou(objects[i], boxes[i])))
    assert (found[1] == -1).all() and {-2, -1, 0} <= set(found[2].tolist())


def test_a_batch_without_objects_matches_nothing():
    assert (match(Matcher(0.7, 0.3, True), [torch.zeros(0, 4)] * 2, torch.rand(2, 5, 4)) == -1).all()


def test_the_box_coder_gives_torchvisions_numbers_to_the_last_bit():
    boxes, others = (torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(i)) * 300 for i in (0, 1))
    boxes, others = (torch.cat([corner, corner + side + 1], dim=1) for corner, side in (boxes, others))
    weights = (10.0, 10.0, 5.0, 5.0)
    ours, theirs = BoxCoder(weights), TorchvisionBoxCoder(weights)
    deltas = theirs.encode_single(boxes, others)
    assert torch.equal(ours.encode_single(boxes, others), deltas)
    codes = torch.cat([deltas, 2 * deltas, -deltas], dim=1)
    assert torch.equal(ours.decode_single(codes, others), theirs.decode_single(codes, others))


# ---- 16 bits


@pytest.mark.parametrize("anchor_stride", ["fixed", "grid"])
def test_anchors_are_float32_on_a_map_of_bfloat16(anchor_stride):
    conventions = TORCHVISION.model_copy(update={"anchor_stride": anchor_stride})
    images = ImageList(torch.zeros(1, 3, 800, 1333), [(800, 1333)])
    narrow, wide = (
        MapAnchors((32.0, 512.0), (0.5, 1.0), conventions)(images, [torch.zeros(1, 8, 50, 84, dtype=dtype)])[
            0
        ]
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert narrow.dtype == torch.float32 and torch.equal(narrow, wide)


def test_a_step_under_autocast_has_losses_within_two_percent_of_float32s(monkeypatch):
    torch.manual_seed(0)
    model = build_faster_rcnn(create_backbone("resnet18", width=8), 4).train()
    images, targets = batch((800, 1333))
    boxes = torch.tensor([[10.0, 20, 300, 400], [500, 100, 1300, 790], [900, 300, 960, 380]] * 20)
    monkeypatch.setattr(model.rpn, "filter_proposals", lambda *args: ([boxes], None))
    losses = []
    for enabled in (False, True):
        model.seed_sampling([(0, 0, 1)])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append({name: float(v) for name, v in model(images, copy.deepcopy(targets)).items()})
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# ---- evaluation


def test_evaluation_gives_the_detections_of_the_plain_call(tiny_backbone):
    model = build(tiny_backbone).eval()
    images, targets = batch((64, 96), (100, 150), (50, 61))
    with torch.no_grad():
        expected = model(images)
    _, found = model.evaluate(images, targets)
    assert sum(len(d["boxes"]) for d in expected) > 20
    assert_same_detections(found, expected)


def training_losses_on_test_proposals(model, images, targets):
    """torchvision's own training code, on the features and proposals of the test settings."""
    with torch.no_grad():
        images, targets = model.transform(images, targets)
        features = {"0": model.backbone(images.tensors)}
        proposals, _ = model.rpn(images, features)
        model.rpn.training = model.roi_heads.training = True
        _, rpn_losses = model.rpn(images, features, targets)
        proposals, _, labels, wanted = model.roi_heads.select_training_samples(proposals, targets)
        vectors = model.roi_heads.box_head(
            model.roi_heads.box_roi_pool(features, proposals, images.image_sizes)
        )
        classifier, box = fastrcnn_loss(*model.roi_heads.box_predictor(vectors), labels, wanted)
        roi_losses = {"loss_classifier": classifier, "loss_box_reg": box}
        model.rpn.training = model.roi_heads.training = False
    return rpn_losses | roi_losses


def mixed_batch():
    images, targets = batch((64, 96), (100, 150), (64, 64))
    targets[1] |= empty_target()
    return images, targets


def all_empty_batch():
    images, _ = batch((64, 96), (64, 96))
    return images, [empty_target(), empty_target()]


@pytest.mark.parametrize("make", [lambda: batch((64, 96), (100, 150)), mixed_batch, all_empty_batch])
def test_evaluation_losses_equal_torchvisions_training_code_on_the_test_proposals(tiny_backbone, make):
    images, targets = make()
    model = build(tiny_backbone).eval()
    model.seed_sampling([(0, 7, i) for i in range(len(images))])
    losses, _ = model.evaluate(images, targets)
    assert_same_losses(losses, training_losses_on_test_proposals(model, images, targets))


def test_evaluation_is_repeatable_with_keys_and_leaves_the_model_as_it_was(tiny_backbone):
    model = build(tiny_backbone).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images, targets = batch((64, 96), (100, 150))
    model.seed_sampling(KEYS)
    given = copy.deepcopy(targets)
    (losses, detections), (again, same) = model.evaluate(images, targets), model.evaluate(images, targets)
    assert all(torch.equal(losses[name], again[name]) for name in LOSSES)
    assert_same_detections(detections, same, 0)
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(given, targets, strict=True))
    assert not model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_image_without_objects_has_no_box_loss(tiny_backbone):
    losses, detections = build(tiny_backbone).eval().evaluate(*all_empty_batch())
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0 and losses["loss_objectness"] > 0
    assert len(detections) == 2 and sum(len(d["boxes"]) for d in detections) > 0


def test_boxes_come_back_in_pixels_of_the_original_image(tiny_backbone):
    model = build(tiny_backbone).eval()
    images, targets = batch((64, 96))
    _, at_network_size = model.evaluate(images, targets)
    targets[0]["original_size"] = torch.tensor([128, 288])
    _, original = model.evaluate(images, targets)
    assert len(original[0]["boxes"]) > 0
    torch.testing.assert_close(
        original[0]["boxes"], at_network_size[0]["boxes"] * torch.tensor([3.0, 2.0, 3.0, 2.0])
    )


def test_evaluation_in_training_mode_is_refused(tiny_backbone):
    with pytest.raises(RuntimeError, match=r"needs the model in evaluation mode: call model\.eval\(\) first"):
        build(tiny_backbone).train().evaluate(*batch((64, 96)))


@pytest.mark.parametrize("nothing", ["box_score_thresh", "rpn_score_thresh"])
def test_no_detection_at_all_gives_empty_tensors(tiny_backbone, nothing):
    model = build(tiny_backbone, **{nothing: 1.0}).eval()
    images, targets = batch((64, 96), (64, 64))
    losses, detections = model.evaluate(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    for detection in [*detections, *model(images)]:
        assert tuple(detection["boxes"].shape) == (0, 4)
        assert tuple(detection["scores"].shape) == tuple(detection["labels"].shape) == (0,)
        assert detection["labels"].dtype == torch.int64


# ---- vectors of regions


def test_region_vectors_are_the_heads_vectors_of_the_pooled_boxes(tiny_backbone):
    model = build(tiny_backbone).eval()
    images, targets = batch((64, 96), (128, 192))  # the second is halved
    vectors = model.region_vectors(images, [t["boxes"] for t in targets])
    assert [tuple(v.shape) for v in vectors] == [(3, 32), (3, 32)]
    small_image, _ = model.transform([images[1]])
    with torch.no_grad():
        features = model.backbone(small_image.tensors)
        pool = MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2)
        regions = pool({"0": features}, [targets[1]["boxes"] / 2], [(64, 96)])
        torch.testing.assert_close(vectors[1], model.roi_heads.box_head(regions), rtol=1e-4, atol=1e-5)


def test_region_vectors_of_no_boxes_are_no_vectors(tiny_backbone):
    model = build(tiny_backbone).eval()
    images, targets = batch((64, 96), (64, 96))
    none = torch.zeros(0, 4)
    assert [tuple(v.shape) for v in model.region_vectors(images, [none, none])] == [(0, 32), (0, 32)]
    mixed = model.region_vectors(images, [none, targets[1]["boxes"]])
    assert [len(v) for v in mixed] == [0, 3]
    alone = model.region_vectors(images[1:], [targets[1]["boxes"]])
    torch.testing.assert_close(mixed[1], alone[0])


# ---- what trains


@pytest.mark.parametrize("roi_pool", ["align", "max"])
def test_both_region_pools_train(tiny_backbone, roi_pool):
    model = build(tiny_backbone, roi_pool=roi_pool)
    assert model.roi_heads.box_roi_pool.mode == roi_pool
    train_step(model, *batch((64, 96), (100, 150)))


def test_the_two_region_pools_differ(tiny_backbone):
    images, targets = batch((64, 96))
    vectors = [
        build(tiny_backbone, roi_pool=pool).eval().region_vectors(images, [targets[0]["boxes"]])[0]
        for pool in ("align", "max")
    ]
    assert not torch.allclose(*vectors)


@pytest.mark.parametrize("make", [mixed_batch, all_empty_batch])
def test_images_without_objects_train(tiny_backbone, make):
    losses = train_step(build(tiny_backbone), *make())
    assert make is mixed_batch or losses["loss_box_reg"] == 0


def test_a_batch_without_any_region_trains(tiny_backbone):
    # Several processes wait for the gradient of each parameter.
    losses = train_step(build(tiny_backbone, rpn_score_thresh=1.0), *all_empty_batch())
    assert losses["loss_classifier"] == losses["loss_box_reg"] == 0


def target_of(**changes):
    target = {"boxes": torch.tensor([[1.0, 1, 20, 20], [5, 5, 40, 30]]), "labels": torch.tensor([1, 2])}
    return {name: value for name, value in (target | changes).items() if value is not None}


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": torch.tensor([1, -1])},
            "image 1: label 1 is -1; accepted: 1 to 3, since 0 is the background",
        ),
        ({"labels": torch.tensor([0, 1])}, "image 1: label 0 is 0; accepted: 1 to 3"),
        ({"labels": torch.tensor([3, 4])}, "image 1: label 1 is 4; accepted: 1 to 3"),
        (
            {"labels": torch.tensor([1, 2, 3])},
            r"image 1: labels are \(3,\) torch.int64; .* for each of 2 boxes",
        ),
        ({"labels": torch.tensor([1])}, r"image 1: labels are \(1,\) torch.int64; .* for each of 2 boxes"),
        (
            {"labels": torch.tensor([1.0, 2.0])},
            r"image 1: labels are \(2,\) torch.float32; accepted: one int64",
        ),
        ({"labels": torch.tensor([[1], [2]])}, r"image 1: labels are \(2, 1\)"),
        ({"labels": None}, r"image 1: the target has \['boxes'\]; accepted: tensors of boxes and labels"),
        ({"labels": [1, 2]}, "image 1: .*accepted: tensors of boxes and labels"),
        ({"boxes": None}, r"image 1: the target has \['labels'\]; accepted: tensors of boxes and labels"),
        (
            {"boxes": torch.tensor([[1.0, 1, 20, 20], [5, 5, 5, 30]])},
            r"image 1: box 1 is \[5.0, 5.0, 5.0, 30.0\]",
        ),
        ({"boxes": torch.ones(2, 5)}, r"image 1: box: boxes are \(2, 5\); accepted: \(M, 4\)"),
    ],
)
def test_a_wrong_target_is_refused_by_image_and_index(tiny_backbone, mode, changes, message):
    model, images = build(tiny_backbone, num_classes=4), [torch.rand(3, 64, 64) for _ in range(2)]
    call = model.train() if mode == "train" else model.eval().evaluate
    with pytest.raises(ValueError, match=message):
        call(images, [target_of(), target_of(**changes)])


def test_each_image_has_a_target(tiny_backbone):
    with pytest.raises(ValueError, match="2 images and 1 targets are given; accepted: one for each"):
        build(tiny_backbone).train()([torch.rand(3, 64, 64)] * 2, [target_of()])


def test_a_data_set_of_one_class_trains(tiny_backbone):
    train_step(build(tiny_backbone, num_classes=2), *batch((64, 96), (64, 64), num_classes=2))


def test_boxes_at_the_border_and_of_a_pixel_train(tiny_backbone):
    images, targets = batch((64, 96))
    targets[0]["boxes"] = torch.tensor(
        [[0, 0, 96, 64], [95, 63, 96, 64], [0, 0, 1, 1], [0, 63, 96, 64]], dtype=torch.float32
    )
    targets[0]["labels"] = torch.tensor([1, 2, 3, 1])
    train_step(build(tiny_backbone), images, targets)


def test_a_few_steps_lower_the_loss(tiny_backbone):
    model = build_faster_rcnn(tiny_backbone, 4, anchor_sizes=SIZES, **SETTINGS)
    images, targets = batch((64, 96), (64, 64))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    totals = []
    for _ in range(30):
        model.seed_sampling(KEYS)
        total = sum(train_step(model, images, targets).values())
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.7 * totals[0]


def test_outputs_are_float32_under_autocast(tiny_backbone):
    model = build(tiny_backbone)
    seen = []
    model.backbone.register_forward_hook(lambda module, given, out: seen.append(("trunk", out.dtype)))
    model.rpn.head.register_forward_hook(
        lambda m, g, out: seen.extend(("rpn", t.dtype) for part in out for t in part)
    )
    model.roi_heads.box_predictor.register_forward_hook(
        lambda m, g, out: seen.extend(("predictor", t.dtype) for t in out)
    )
    images, targets = batch((64, 96), (64, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train_step(model, images, targets)
        losses, detections = model.eval().evaluate(images, targets)
    assert {(where, dtype) for where, dtype in seen} == {
        ("trunk", torch.bfloat16), ("rpn", torch.float32), ("predictor", torch.float32)}  # fmt: skip
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert all(d["boxes"].dtype == d["scores"].dtype == torch.float32 for d in detections)


# ---- arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rpn_nms_tresh": 0.5},
            "build_faster_rcnn has no argument 'rpn_nms_tresh'; did you mean 'rpn_nms_thresh'",
        ),
        ({"roi_pol": "max"}, "no argument 'roi_pol'; did you mean 'roi_pool'"),
        ({"anchor_size": (32,)}, "no argument 'anchor_size'; did you mean 'anchor_sizes'"),
        ({"image_mean": [0.0] * 3}, "no argument 'image_mean'"),
        ({"box_head": nn.Identity()}, "no argument 'box_head'"),
    ],
)
def test_an_unknown_argument_is_refused_with_the_nearest(tiny_backbone, options, message):
    with pytest.raises(TypeError, match=message):
        build_faster_rcnn(tiny_backbone, 3, **options)


@pytest.mark.parametrize(
    ("num_classes", "options", "message"),
    [
        (1, {}, "num_classes is 1; accepted: 2 or more, since label 0 is background"),
        (0, {}, "num_classes is 0; accepted: 2 or more"),
        ("3", {}, "num_classes is '3'; accepted: 2 or more"),
        (
            3,
            {"min_size": 900, "max_size": 800},
            "min_size 900 and max_size 800: accepted: min_size <= max_size",
        ),
        (3, {"min_size": 0}, "min_size is 0: Input should be greater than 0"),
        (3, {"roi_pool": "mean"}, "roi_pool is 'mean'; .*accepted: align, max"),
        (
            3,
            {"anchor_sizes": ((32,), (64,))},
            r"anchor_sizes is .*one tuple a level; a C4 detector has one feature map",
        ),
        (3, {"aspect_ratios": ((0.5, 1.0),)}, r"aspect_ratios is .*give one flat tuple"),
        (3, {"anchor_sizes": ()}, r"anchor_sizes is \(\); accepted: positive numbers, at least one"),
        (3, {"rpn_fg_iou_thresh": 0.1}, "rpn_fg_iou_thresh is 0.1 and rpn_bg_iou_thresh is 0.3; accepted"),
        (3, {"box_fg_iou_thresh": 0.1}, "box_fg_iou_thresh is 0.1 and box_bg_iou_thresh is 0.5; accepted"),
        (3, {"anchor_sizes": (32, -1)}, "accepted: positive numbers"),
        (3, {"anchor_sizes": "32"}, "accepted: positive numbers"),
        (
            3,
            {"min_size": 64, "max_size": 96, "anchor_sizes": (256, 512)},
            r"\(256, 512\) are all larger than the images \(at most 64 x 96",
        ),
    ],
)
def test_an_impossible_value_is_refused(tiny_backbone, num_classes, options, message):
    with pytest.raises(ValueError, match=message):
        build_faster_rcnn(tiny_backbone, num_classes, **options)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((32, 512), r"anchor sizes \[512\] cover more than twice an image of 64 x 96 pixels"),
        ((4, 32), r"anchor sizes \[4\] are below half the stride of 16 pixels"),
    ],
)
def test_anchors_that_do_not_fit_are_warned_of(sizes, message):
    with pytest.warns(UserWarning, match=message):
        check_anchor_sizes(sizes, min_size=64, max_size=96)


def test_one_anchor_size_may_stand_alone(tiny_backbone):
    model = build_faster_rcnn(tiny_backbone, 3, anchor_sizes=64, aspect_ratios=1.0)
    assert model.rpn.anchor_generator.num_anchors_per_location() == [1]


def test_anchors_are_the_sizes_and_ratios_around_the_origin(recwarn):
    cells = MapAnchors((32,), (0.25, 1.0), TORCHVISION).cell_anchors
    # 32 x 32 pixels of area; height / width = 0.25 makes 16 high and 64 wide
    assert cells[0].tolist() == [[-32, -8, 32, 8], [-16, -16, 16, 16]]
    assert not recwarn.list


# ---- from a configuration


def test_build_model_is_the_detector_of_the_configuration():
    config = ModelConfig(
        backbone={"name": "resnet18", "width": 8, "frozen_stages": 1},
        anchor_sizes=SIZES, aspect_ratios=(1.0,), min_size=64, max_size=96, box_nms_thresh=0.3, rpn_post_nms_top_n_test=17,
    )  # fmt: skip
    model = build_model(config, 5)
    assert model.backbone.out_channels == 32 and model.backbone.frozen_stages == 1
    assert model.rpn.anchor_generator.num_anchors_per_location() == [3]
    assert (model.transform.min_size, model.transform.max_size) == ((64,), 96)
    assert model.roi_heads.nms_thresh == 0.3 and model.roi_heads.score_thresh == 0.05
    assert model.rpn.post_nms_top_n() == 2000 and model.eval().rpn.post_nms_top_n() == 17
    assert model.roi_heads.box_predictor.cls_score.out_features == 5
    assert model.backbone.stage2.blocks[0].branch.conv1.weight.is_contiguous(
        memory_format=torch.channels_last
    )


def test_build_model_for_a_checkpoint_fetches_no_weights(monkeypatch):
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *a, **k: pytest.fail("downloaded")
    )
    config = ModelConfig(backbone={"name": "resnet18", "weights": "imagenet_v1", "norm": "frozen"})
    assert build_model(config, 3, load_weights=False).backbone.out_channels == 256


def test_every_setting_of_the_builder_is_a_key_of_the_recipe_with_its_default():
    parameters = inspect.signature(build_faster_rcnn).parameters.values()
    declared = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    config = ModelConfig(backbone={"name": "resnet18"})
    assert {name: value for name, value in config if name != "backbone"} == declared


def test_settings_that_torchvision_has_too_have_its_defaults():
    theirs = inspect.signature(FasterRCNN.__init__).parameters
    ours = inspect.signature(build_faster_rcnn).parameters
    same = [name for name in ours if name in theirs and name.startswith(("rpn_", "box_", "m"))]
    assert len(same) == 19
    assert {name: ours[name].default for name in same} == {name: theirs[name].default for name in same}


def test_channels_last_changes_the_layout_and_not_the_result(tiny_backbone):
    model = build(tiny_backbone).eval()
    images, _ = batch((64, 96), (100, 150))
    with torch.no_grad():
        expected = model(images)
        found = model.to(memory_format=torch.channels_last)(images)
    assert math.isfinite(float(expected[0]["scores"].sum()))
    assert_same_detections(found, expected)


# ---- many detections


def test_detections_of_many_boxes_and_classes_are_those_of_nms_over_all_of_them(tiny_backbone, monkeypatch):
    heads = build(tiny_backbone, 401, box_score_thresh=0.0, box_detections_per_img=50).eval().roi_heads
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 400, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 20 + torch.rand(60, 400, 2, generator=generator) * 20], dim=-1)
    boxes = torch.cat([boxes[:, :1], boxes], dim=1)
    scores = torch.rand(60, 401, generator=generator)
    whole = heads.select(boxes, scores, [60], [(200, 200)], class_agnostic_nms=True)[0]
    seen, nms = [], detector.model.roi_heads.batched_nms
    monkeypatch.setattr(detector.model.roi_heads, "_MOST_AT_ONCE", 100)
    monkeypatch.setattr(
        detector.model.roi_heads, "batched_nms", lambda b, *rest: seen.append(len(b)) or nms(b, *rest)
    )
    parts = heads.select(boxes, scores, [60], [(200, 200)], class_agnostic_nms=True)[0]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)
    # Parts of 100, of which only the first has all its boxes: the kept ones suppress most of the others.
    assert seen[0] == 100 and max(seen[1:]) < 100 and len(seen) < 240
    # Classes that suppress only themselves, and a bound that is never reached, so that each part is looked at.
    heads.detections_per_img = 24_000
    few = slice(None), slice(0, 11)
    own = heads.select(boxes[few], scores[few], [60], [(200, 200)])[0]
    monkeypatch.setattr(detector.model.roi_heads, "_MOST_AT_ONCE", 10_000)
    for one, other in zip(own, heads.select(boxes[few], scores[few], [60], [(200, 200)])[0], strict=True):
        assert torch.equal(one, other)
