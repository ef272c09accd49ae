"""The named conventions: what each changes, torchvision's as the defaults, Detectron2's in its recipes and in the docs."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import settings
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import box_iou

from backbones import IMAGENET, Preprocessing
from detector import build_faster_rcnn, build_model, load_config
from detector.config import ModelConfig, parse_config
from detector.data.transforms import EvalTransform
from detector.model.conventions import DETECTRON2, Conventions
from detector.model.losses import region_losses
from detector.model.network_input import NetworkTransform, network_size, resize_pil
from detector.model.sampling import SeededSampler

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs").glob("detectron2_*.yaml"))
SETTINGS = {"anchor_sizes": (16, 32, 64), "min_size": 64, "max_size": 128, "box_score_thresh": 0.01}
BACKBONE = {"name": "resnet18", "width": 8}


def build(backbone, **options):
    """A detector of four classes whose scores differ."""
    torch.manual_seed(2)
    model = build_faster_rcnn(backbone, 5, **settings(**{**SETTINGS, **options})).eval()
    with torch.no_grad():
        model.rpn.head.cls_logits.weight.normal_(std=0.3)
        model.rpn.head.bbox_pred.weight.normal_(std=0.05)
        model.roi_heads.box_predictor.cls_score.weight.normal_(std=0.3)
    return model


def noise(*size, seed=0):
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))


# ---- torchvision's are the defaults, to the last bit


def stock(model):
    """torchvision's own detector of the same parts."""
    return FasterRCNN(
        model.backbone,
        rpn_anchor_generator=model.rpn.anchor_generator,
        rpn_head=model.rpn.head,
        box_roi_pool=model.roi_heads.box_roi_pool,
        box_head=model.roi_heads.box_head,
        box_predictor=model.roi_heads.box_predictor,
        box_score_thresh=0.01,
    ).eval()


def test_by_default_proposals_and_detections_are_torchvisions_to_the_last_bit(tiny_backbone):
    ours = build(tiny_backbone)
    theirs = stock(ours)
    batch, _ = ours.transform([noise(64, 96), noise(64, 128)])
    with torch.no_grad():
        features = {"0": ours.backbone(batch.tensors)}
        found, expected = ours.rpn(batch, features)[0], theirs.rpn(batch, features)[0]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        found = ours.roi_heads.detect(ours.roi_heads(features["0"], found, batch.image_sizes))
        expected = theirs.roi_heads(features, expected, batch.image_sizes)[0]
    assert sum(len(d["boxes"]) for d in expected) > 20
    for a, b in zip(found, expected, strict=True):
        assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_by_default_losses_are_torchvisions_to_the_last_bit(tiny_backbone):
    ours, random = build(tiny_backbone).train(), torch.Generator().manual_seed(1)
    theirs = stock(ours)
    theirs.rpn.fg_bg_sampler = ours.rpn.fg_bg_sampler = SeededSampler(64, 0.5)
    ours.rpn.fg_bg_sampler.keys = [(1,), (2,)]
    logits, deltas = torch.randn(600, 1, generator=random), torch.randn(600, 4, generator=random)
    labels = list(torch.randint(-1, 2, (2, 300), generator=random).float())
    wanted = list(torch.randn(2, 300, 4, generator=random))
    assert ours.rpn.compute_loss(logits, deltas, labels, wanted) == theirs.rpn.compute_loss(
        logits, deltas, labels, wanted
    )
    logits, deltas = torch.randn(90, 5, generator=random), torch.randn(90, 20, generator=random)
    labels, wanted = torch.randint(0, 5, (90,), generator=random), torch.randn(90, 4, generator=random)
    expected = fastrcnn_loss(logits, deltas, [labels], [wanted])
    assert (
        region_losses(logits, deltas, labels, wanted, ours.roi_heads.conventions.box_smooth_l1_beta)
        == expected
    )


# ---- what the options change


def test_anchors_stand_at_the_stride_whatever_the_width(tiny_backbone):
    fixed = build(tiny_backbone, anchor_stride="fixed", size_divisible=1, max_size=413)
    batch, _ = fixed.transform([noise(64, 413)])
    assert batch.tensors.shape[-2:] == (64, 413)  # 413 // 26 = 15 would be torchvision's stride
    anchors = fixed.rpn.anchor_generator(batch, [torch.zeros(1, 16, 4, 26)])[0].view(4, 26, 9, 4)
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2
    assert torch.equal(centres[..., 0], (torch.arange(26) * 16.0)[None, :, None].expand(4, 26, 9))
    assert torch.equal(centres[..., 1], (torch.arange(4) * 16.0)[:, None, None].expand(4, 26, 9))


def test_the_order_of_anchors_is_ratios_then_sizes_or_the_reverse(tiny_backbone):
    cells = [
        build(tiny_backbone, anchor_rounding=False, anchor_order=order).rpn.anchor_generator.cell_anchors[0]
        for order in ("ratio_major", "size_major")
    ]
    height = [(c[:, 3] - c[:, 1]).view(3, 3) for c in cells]
    ratio = [h / (c[:, 2] - c[:, 0]).view(3, 3) for h, c in zip(height, cells, strict=True)]
    expected = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(ratio[0], expected[:, None].expand(3, 3))
    torch.testing.assert_close(ratio[1], expected[None].expand(3, 3))
    assert torch.equal(height[0], height[1].T)


def test_a_proposal_of_a_ten_thousandth_of_a_pixel_is_kept_and_an_empty_one_is_not(tiny_backbone):
    boxes = torch.tensor([[[0, 0, 1e-4, 8], [20, 0, 20, 8], [40, 0, 48, 8]]])
    logits = torch.tensor([[3.0], [2.0], [1.0]])
    for rank_on in ("sigmoid", "logits"):
        for min_size, expected in ((1e-3, [2]), (0.0, [0, 2])):
            rpn = build(tiny_backbone, rpn_min_size=min_size, rpn_rank_on=rank_on).rpn
            found = rpn.filter_proposals(boxes, logits, [(64, 64)], [3])[0][0]
            assert torch.equal(found, boxes[0, expected])


def test_large_logits_rank_where_their_sigmoids_are_all_one(tiny_backbone):
    """The second box overlaps the first and has the higher logit; both sigmoids are 1 in float32."""
    boxes = torch.tensor([[[0.0, 0, 30, 30], [0, 0, 30, 29], [40, 40, 60, 60]]])
    logits = torch.tensor([[30.0], [31.0], [20.0]])
    assert (logits.sigmoid() == 1).all()
    rpn = build(tiny_backbone, rpn_rank_on="logits").rpn
    found, scores = rpn.filter_proposals(boxes, logits, [(64, 64)], [3])
    assert torch.equal(found[0], boxes[0, [1, 2]]) and scores[0].tolist() == [31.0, 20.0]


def test_an_rpn_score_threshold_is_of_probabilities_in_both_rankings(tiny_backbone):
    boxes = torch.tensor([[[0.0, 0, 30, 30], [40, 40, 60, 60]]])
    logits = torch.tensor([[1.0], [-1.0]])  # sigmoids 0.73 and 0.27
    for rank_on in ("sigmoid", "logits"):
        rpn = build(tiny_backbone, rpn_rank_on=rank_on, rpn_score_thresh=0.5).rpn
        assert len(rpn.filter_proposals(boxes, logits, [(64, 64)], [2])[0][0]) == 1


def test_empty_detections_leave_after_they_are_back_in_the_image(tiny_backbone):
    boxes = torch.tensor([[[0.0] * 4, [0, 0, 5e-3, 8]], [[0.0] * 4, [20, 0, 20, 8]]])
    scores = torch.tensor([[0.1, 0.9], [0.2, 0.8]])
    least, none = (build(tiny_backbone, box_min_size=m) for m in (1e-2, 0.0))
    assert len(least.roi_heads.select(boxes, scores, [2], [(64, 64)])[0][0]) == 0
    kept, kept_scores, _, rows = none.roi_heads.select(boxes, scores, [2], [(64, 64)])[0]
    assert rows.tolist() == [0, 1]
    final = none.transform.postprocess([{"boxes": kept, "scores": kept_scores}], [(64, 64)], [(128, 128)])[0]
    torch.testing.assert_close(final["boxes"], torch.tensor([[0, 0, 1e-2, 16]]))
    assert final["scores"].tolist() == pytest.approx([0.9])


@pytest.mark.parametrize("agnostic", [False, True])
def test_class_agnostic_nms_leaves_no_two_boxes_that_overlap(tiny_backbone, agnostic):
    found = build(tiny_backbone, class_agnostic_nms=agnostic)([noise(64, 96)])[0]
    assert len(found["boxes"]) > 5
    overlaps = box_iou(found["boxes"], found["boxes"]).fill_diagonal_(0)
    assert bool((overlaps > 0.5).any()) != agnostic


def test_class_scores_are_the_posterior_behind_each_score_from_one_pass_of_the_trunk(tiny_backbone):
    model, passes = build(tiny_backbone), []
    images = [noise(64, 96), noise(100, 150, seed=1)]
    plain = model(images)
    model.backbone.register_forward_hook(lambda *args: passes.append(1))
    found = model.detect(images, vectors=True, class_scores=True)
    assert len(passes) == 1
    for detection, expected in zip(found, plain, strict=True):
        scores = detection["class_scores"]
        assert torch.equal(detection["boxes"], expected["boxes"]) and len(scores) > 5
        assert torch.equal(scores.gather(1, detection["labels"][:, None])[:, 0], detection["scores"])
        torch.testing.assert_close(scores.sum(dim=1), torch.ones(len(scores)))
        assert scores.shape[1] == 5 and detection["vectors"].shape == (len(scores), 32)
        assert set(expected) == {"boxes", "labels", "scores"}


def test_class_scores_of_no_detection_are_no_rows(tiny_backbone):
    found = build(tiny_backbone, box_score_thresh=1.0).detect([noise(64, 96)], class_scores=True)[0]
    assert tuple(found["class_scores"].shape) == (0, 5)


def test_the_conventions_of_detectron2_train_and_detect(tiny_backbone):
    model = build(tiny_backbone, conventions="detectron2", preprocessing=replace(IMAGENET, scale=255.0))
    image, target = noise(64, 90), {"boxes": torch.tensor([[4.0, 4, 40, 50]]), "labels": torch.tensor([2])}
    losses = model.train()([image], [dict(target)])
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    evaluated, detections = model.eval().evaluate([image], [dict(target)])
    assert all(loss.isfinite() for loss in (*losses.values(), *evaluated.values()))
    assert torch.equal(detections[0]["boxes"], model([image])[0]["boxes"])


# ---- the resize


def test_pil_resizes_before_the_normalisation_and_the_loader_resizes_the_same(tiny_backbone):
    preprocessing = Preprocessing((100.0, 110.0, 120.0), (1.0,) * 3, "bgr", 255.0)
    transform = NetworkTransform(48, 96, preprocessing, DETECTRON2)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    expected = resize_pil(pixels, (48, 69)).astype(np.float32)[:, :, ::-1] - np.float32([100, 110, 120])
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    (batch, (target,)) = transform([image], [{"boxes": torch.tensor([[13.0, 9, 65, 45]])}])
    assert np.array_equal(batch.tensors[0].permute(1, 2, 0).numpy(), expected)
    torch.testing.assert_close(target["boxes"], torch.tensor([[6.9, 4.8, 34.5, 24.0]]))
    empty = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64), "image_id": 1}
    loader = EvalTransform(48, 96, resize="pil", resize_rounding="nearest")
    resized, loaded = loader(pixels, empty, (0, 0, 1))
    assert torch.equal(transform([resized.float() / 255], [loaded])[0].tensors, batch.tensors)


@pytest.mark.parametrize("resize", ["torch", "pil"])
def test_bytes_are_refused_and_not_taken_for_numbers_in_0_to_1(resize):
    transform = NetworkTransform(48, 96, replace(IMAGENET, scale=255.0), Conventions(resize=resize))
    with pytest.raises(TypeError, match=r"an image is torch\.uint8; accepted: floating point in \[0, 1\]"):
        transform([torch.zeros(3, 48, 64, dtype=torch.uint8)])


def test_half_a_pixel_is_rounded_up_or_down():
    assert network_size(480, 640, 800, 1333) == (800, 1066)
    assert network_size(480, 640, 800, 1333, "nearest") == (800, 1067)
    assert network_size(2, 5, 1, 100, "nearest") == (1, 3)  # 2.5
    assert network_size(1, 5000, 800, 1333, "nearest") == (1, 1333)


# ---- names and values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_stride": "fix"}, "anchor_stride is 'fix'; did you mean 'fixed'"),
        ({"anchor_order": "size"}, "anchor_order is 'size'; .*accepted: ratio_major, size_major"),
        ({"resize": "cv2"}, "resize is 'cv2'; accepted: torch, pil"),
        ({"resize_rounding": "up"}, "resize_rounding is 'up'; accepted: floor, nearest"),
        ({"rpn_loss_normalizer": 256}, "rpn_loss_normalizer is 256; accepted: sampled, batch_size"),
        ({"rpn_rank_on": "logit"}, "rpn_rank_on is 'logit'; did you mean 'logits'"),
        ({"rpn_min_size": -1}, "rpn_min_size is -1: Input should be greater than or equal to 0"),
        ({"size_divisible": 0}, "size_divisible is 0: Input should be greater than or equal to 1"),
        ({"size_divisible": 1}, "size_divisible is 1 and anchor_stride is 'grid'.*a multiple of 16, or anchor_stride 'fixed'"),
        ({"roi_align_aligned": True, "roi_pool": "max"}, 'aligned=True needs mode="align"'),
    ],
)  # fmt: skip
def test_an_impossible_convention_is_refused_by_name(tiny_backbone, options, message):
    with pytest.raises(ValueError, match=message):
        build_faster_rcnn(tiny_backbone, 3, **settings(**options))


def test_a_config_refuses_conventions_that_do_not_go_together():
    with pytest.raises(ValueError, match="size_divisible is 1 and anchor_stride is 'grid'"):
        parse_config({"model": {"backbone": BACKBONE, "conventions": {"size_divisible": 1}}})


def test_the_config_has_every_convention_and_builds_them():
    config = ModelConfig(backbone=BACKBONE, conventions="detectron2", class_agnostic_nms=True,
        preprocessing={"mean": [1, 2, 3], "std": [4, 5, 6], "channel_order": "bgr", "scale": 255})  # fmt: skip
    assert config.conventions == DETECTRON2
    model = build_model(config, 3)
    assert model.transform.preprocessing == Preprocessing((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), "bgr", 255.0)
    pool = model.roi_heads.box_roi_pool
    assert (pool.aligned, pool.sampling_ratio, pool.stride) == (True, 0, 16)
    parts = (model.rpn, model.roi_heads, model.transform)
    assert all(part.conventions == DETECTRON2 for part in parts) and model.roi_heads.class_agnostic_nms
    assert model.transform.size_divisible == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_a_recipe_of_detectron2_has_all_its_conventions(path):
    model = load_config(path).model
    assert model.conventions == DETECTRON2
    assert (model.backbone["stride_in"], model.backbone["norm"], model.backbone["frozen_stages"]) == (
        "1x1",
        "frozen",
        2,
    )
    counts = (model.rpn_pre_nms_top_n_train, model.rpn_post_nms_top_n_train, model.rpn_pre_nms_top_n_test,
        model.rpn_post_nms_top_n_test)  # fmt: skip
    assert counts == (12000, 2000, 6000, 1000)
    assert model.preprocessing.mean == (103.530, 116.280, 123.675)
    assert (model.preprocessing.channel_order, model.preprocessing.scale) == ("bgr", 255)


def test_there_is_a_recipe_of_each_published_model():
    assert [p.stem for p in RECIPES] == [
        *("detectron2_resnet101_c4", "detectron2_resnet50_c4", "detectron2_voc_resnet50_c4")
    ]


def test_the_documented_values_are_those_of_the_code():
    text = (ROOT / "docs" / "conventions.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (`[^`]+` \| `[^`]+`) \|", text, re.MULTILINE))
    for name in Conventions.model_fields:
        values = (_shown(getattr(conventions, name)) for conventions in (Conventions(), DETECTRON2))
        assert [cell.strip("` ") for cell in rows[name].split("|")] == list(values), name


def _shown(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "1/9" if value == 1 / 9 else f"{value:g}" if isinstance(value, float) else str(value)
