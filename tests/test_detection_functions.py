"""The parts of the exact mode on Detectron2's pure-function cases (`detection_functions.pt`), in its own numbers.

Every group of the file is compared; its "no_gt" matching through the two callers, since torchvision's Matcher itself
refuses an image without targets. Values that no exp or log of the CPU's kernels enters are equal to the last bit.
"""

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from backbones import IMAGENET
from backbones.kernels.roi_align import bin_weights, sparse_roi_align
from backbones.layers import FrozenBatchNorm
from backbones.regions import RegionPool
from detector import build_faster_rcnn
from detector.engine import build_schedule
from detector.model.anchors import MapAnchors
from detector.model.conventions import DETECTRON2
from detector.model.losses import region_losses, rpn_losses
from detector.model.network_input import NetworkTransform, network_size
from detector.model.sampling import SeededSampler

WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)]
MATCHERS = {"rpn": (0.7, 0.3, True), "roi": (0.5, 0.5, False)}
GROUPS = {
    *("box2box", "pairwise_iou", "matcher", "anchors", "roi_align", "find_top_rpn_proposals", "smooth_l1"),
    *("fast_rcnn_inference", "fast_rcnn_losses", "rpn_losses", "subsample_labels", "resize_shapes"),
    *("lr_schedule_R50_3x", "lr_schedule_R101_3x", "image_list", "postprocess", "frozen_bn"),
}


@pytest.fixture(scope="module")
def cases(shared) -> dict:
    path = shared / "reference" / "detection_functions.pt"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return torch.load(path, weights_only=True)


@pytest.fixture
def model(tiny_backbone):
    """A detector of four classes of objects under Detectron2's conventions."""
    return build_faster_rcnn(tiny_backbone, 5, conventions=DETECTRON2).eval()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def background_first(logits: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Detectron2's (R, K + 1) logits and (R, 4K) deltas in torchvision's order."""
    return logits.roll(1, dims=1), torch.cat([torch.zeros(len(deltas), 4), deltas], dim=1)


def test_every_group_of_the_file_is_compared_here(cases):
    assert set(cases) == GROUPS


@pytest.mark.parametrize("weights", WEIGHTS)
def test_boxes_are_encoded_and_decoded(cases, weights):
    case, coder = cases["box2box"][weights], BoxCoder(weights)
    assert case["scale_clamp"] == coder.bbox_xform_clip
    close(coder.encode_single(case["dst"], case["src"]), case["get_deltas"])
    close(coder.decode_single(case["deltas_k3"], case["src"]), case["apply_deltas"])


def test_overlaps_are_the_same_to_the_last_bit(cases):
    case = cases["pairwise_iou"]
    assert torch.equal(box_iou(case["gt"], case["boxes"]), case["iou"])


@pytest.mark.parametrize("stage", MATCHERS)
@pytest.mark.parametrize("name", ["boxes", "ties"])
def test_boxes_are_matched(cases, name, stage):
    case = cases["matcher"][name]
    matched, labels = case[stage]
    found = Matcher(*MATCHERS[stage])(case["iou"])
    assert torch.equal((found >= 0).long() - (found == Matcher.BETWEEN_THRESHOLDS).long(), labels.long())
    assert torch.equal(found[found >= 0], matched[labels == 1])


def test_without_targets_every_box_is_a_negative(cases, model):
    none, boxes = torch.zeros(0, 4), torch.rand(7, 4).cumsum(dim=1)
    anchor_labels, _ = model.rpn.assign_targets_to_anchors([boxes], [{"boxes": none}])
    matched, labels = model.roi_heads.assign_targets_to_proposals([boxes], [none], [none[:, 0].long()])
    assert torch.equal(anchor_labels[0], cases["matcher"]["no_gt"]["rpn"][1].float())
    assert torch.equal(matched[0], cases["matcher"]["no_gt"]["roi"][0])
    assert torch.equal(labels[0], cases["matcher"]["no_gt"]["roi"][1].long())


def test_anchors_are_the_same_to_the_last_bit(cases):
    case = cases["anchors"]
    generator = MapAnchors((32, 64, 128, 256, 512), (0.5, 1.0, 2.0), DETECTRON2)
    assert torch.equal(generator.cell_anchors[0], case["cell_anchors"])
    images = ImageList(torch.zeros(1, 3, 37, 61), [(37, 61)])
    found = generator(images, [torch.zeros(1, 8, *case["grid"])])
    assert torch.equal(found[0], case["anchors"])


def by_image(rois):
    """(R, 5) rows of image, x1, y1, x2, y2 -> boxes of each of the two images, and the order that this gives."""
    return [rois[rois[:, 0] == image, 1:] for image in (0, 1)], rois[:, 0].argsort(stable=True)


@pytest.mark.parametrize("sparse", [True, False])
def test_roi_align_and_its_gradient(cases, sparse):
    case = cases["roi_align"]
    features = case["feat"].clone().requires_grad_()
    pool = RegionPool(14, sampling_ratio=0, stride=16, aligned=True, sparse=sparse)
    boxes, order = by_image(case["rois"])
    pooled = pool.crop(features, boxes)
    pooled.backward(case["grad_out"][order])
    assert sparse or torch.equal(pooled, case["out"][order])
    close(pooled, case["out"][order], 1e-5)
    close(features.grad, case["grad_feat"], 1e-5)


def test_roi_align_without_the_shift(cases):
    case = cases["roi_align"]
    pool = RegionPool(14, sampling_ratio=0, stride=16, sparse=False)
    boxes, order = by_image(case["rois"])
    assert torch.equal(pool.crop(case["feat"], boxes), case["out_unaligned"][order])
    weights = bin_weights(boxes, case["feat"].shape[-2:], 2, spatial_scale=1 / 16, sampling_ratio=0)
    close(sparse_roi_align(case["feat"], weights), case["out_unaligned"][order], 1e-5)


@pytest.mark.parametrize("name", ["100_20", "all"])
def test_proposals_are_selected_to_the_last_bit(cases, model, name):
    given, case = cases["find_top_rpn_proposals"], cases["find_top_rpn_proposals"]["cases"][name]
    assert given["nms_thresh"] == model.rpn.nms_thresh and given["min_box_size"] == DETECTRON2.rpn_min_size
    model.rpn._pre_nms_top_n["testing"], model.rpn._post_nms_top_n["testing"] = case["pre"], case["post"]
    boxes, logits = model.rpn.filter_proposals(
        given["proposals"][None], given["logits"], [given["image_size"]], [len(given["logits"])]
    )
    assert torch.equal(boxes[0], case["boxes"]) and torch.equal(logits[0], case["logits"])


@pytest.mark.parametrize("name", ["default", "top7", "high", "all"])
def test_detections_are_selected_to_the_last_bit(cases, model, name):
    given, case, heads = (
        cases["fast_rcnn_inference"],
        cases["fast_rcnn_inference"]["cases"][name],
        model.roi_heads,
    )
    heads.score_thresh, heads.nms_thresh = case["score_thresh"], case["nms_thresh"]
    heads.detections_per_img = None if case["topk"] < 0 else case["topk"]
    scores, boxes = background_first(given["probs"], given["boxes"])
    found = heads.select(boxes.view(len(boxes), -1, 4), scores, [len(boxes)], [given["image_size"]])[0]
    for values, key in zip(found, ("boxes", "scores", "classes", "proposal_index"), strict=True):
        assert torch.equal(values - 1 if key == "classes" else values, case[key]), key


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0])
def test_smooth_l1_is_summed_with_its_beta(cases, beta):
    case, none = cases["smooth_l1"], torch.zeros(0)
    _, box = rpn_losses(none, none, case["pred"], case["target"], normalizer=1, beta=beta)
    close(box, case[f"sum_beta_{beta}"])


def test_losses_of_the_regions(cases, model):
    case = cases["fast_rcnn_losses"]
    logits, deltas = background_first(case["cls_logits"], case["box_deltas"])
    labels = (case["gt_classes"] + 1) % (case["num_classes"] + 1)
    coder = BoxCoder(case["weights"])
    wanted = coder.encode_single(case["gt_boxes"], case["proposal_boxes"])
    classifier, box = region_losses(
        logits, deltas, labels, wanted, model.roi_heads.conventions.box_smooth_l1_beta
    )
    assert classifier.item() == pytest.approx(case["losses"]["loss_cls"], rel=1e-6)
    assert box.item() == pytest.approx(case["losses"]["loss_box_reg"], rel=1e-6)


def test_losses_of_the_rpn_are_divided_by_the_anchors_asked_for(cases, model):
    case, rpn = cases["rpn_losses"], model.rpn
    labels = list(case["labels"].float())
    anchors = [case["anchors"]] * len(labels)
    assert rpn.fg_bg_sampler.batch_size_per_image == case["batch_size_per_image"]

    class Everything(SeededSampler):
        def __call__(self, matched):
            return [m == 1 for m in matched], [m == 0 for m in matched]

    rpn.fg_bg_sampler = Everything(256, 0.5)
    wanted = rpn.box_coder.encode(list(case["matched_gt_boxes"]), anchors)
    objectness, box = rpn.compute_loss(
        case["objectness"].reshape(-1, 1), case["deltas"].reshape(-1, 4), labels, wanted
    )
    assert objectness.item() == pytest.approx(case["losses"]["loss_rpn_cls"], rel=1e-6)
    assert box.item() == pytest.approx(case["losses"]["loss_rpn_loc"], rel=1e-6)


def test_a_sample_under_the_same_seed_has_the_same_members(cases):
    case = cases["subsample_labels"]
    labels = case["labels"]
    matched = torch.where(labels == case["bg_label"], 0, torch.where(labels < 0, -1, 1))
    torch.manual_seed(case["seed"])
    positive, negative = SeededSampler(case["num_samples"], case["positive_fraction"])([matched])
    assert torch.equal(positive[0].nonzero().flatten(), case["pos_idx"].sort().values)
    assert torch.equal(negative[0].nonzero().flatten(), case["neg_idx"].sort().values)


def test_every_resize_has_the_same_shape(cases):
    for (height, width, min_size, max_size), expected in cases["resize_shapes"].items():
        assert network_size(height, width, min_size, max_size, "nearest") == tuple(expected)


def test_the_learning_rate_follows_the_3x_schedule(cases):
    expected = cases["lr_schedule_R50_3x"]
    assert cases["lr_schedule_R101_3x"] == expected
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.02)
    schedule = build_schedule(optimizer, 270_000, kind="multistep", milestones=[210_000, 250_000],
        warmup_steps=1000, warmup_factor=0.001)  # fmt: skip
    optimizer.step()
    found, step = {}, 0
    for wanted in expected:
        while step < wanted:
            schedule.step()
            step += 1
        found[wanted] = optimizer.param_groups[0]["lr"]
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_batch_is_padded_with_zeros_to_its_largest_height_and_width(cases):
    case = cases["image_list"]
    images = [x[:, :h, :w] for x, (h, w) in zip(case["tensor"], case["image_sizes"], strict=True)]
    transform = NetworkTransform(32, 64, IMAGENET, DETECTRON2)
    assert torch.equal(transform.batch_images(images, transform.size_divisible), case["tensor"])


def test_boxes_go_back_to_the_original_image_and_empty_ones_are_dropped(cases, model):
    case = cases["postprocess"]
    rows = torch.arange(len(case["in"]))
    found = model.transform.postprocess(
        [{"boxes": case["in"], "labels": rows}], [case["net_size"]], [case["out_size"]]
    )[0]
    assert torch.equal(found["boxes"], case["out"]) and torch.equal(found["labels"], case["kept_classes"])


def test_frozen_norm(cases):
    case = cases["frozen_bn"]
    norm = FrozenBatchNorm(6, eps=case["eps"])
    norm.load_state_dict({k: case[k] for k in ("weight", "bias", "running_mean", "running_var")})
    close(norm(case["x"]), case["out"])
    close(norm(case["x"].clone().requires_grad_()), case["out"])
