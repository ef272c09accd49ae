"""`optimize` and `compile_model`: the same detections as the model as trained, which stays as it is."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torchvision.ops import box_iou

from backbones.kernels.winograd import WinogradConv2d
from detector import Detections, Detector
from detector.build import build_model
from detector.checkpoint import Checkpoint, save_checkpoint
from detector.inference import to_tensor
from detector.model.faster_rcnn import C4FasterRCNN
from detector.model.speed import compile_model, optimize

NAMES = ("circle", "cross", "triangle", "star")
TOLERANCE = 1e-3  # of scores
SAME_BOX = 0.99  # IoU


@pytest.fixture(params=["photographs", "shapes"])
def pictures(request, tiny_shapes) -> list[Tensor]:
    """Four pictures of different content, (3, H, W) in [0, 1]."""
    if request.param == "photographs":
        folder = request.getfixturevalue("shared") / "data" / "coco128" / "images"
    else:
        folder = tiny_shapes
    return [to_tensor(path) for path in sorted(folder.rglob("*.[jp][pn]g"))[:4]]


def build_detector(config, pictures: list[Tensor]) -> C4FasterRCNN:
    """Random weights, calibrated on the pictures so that their detections are many and their scores far apart."""
    torch.manual_seed(0)
    model = build_model(config.model, len(NAMES) + 1)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    heads = model.roi_heads
    with torch.no_grad():
        model.train()
        for norm in norms:
            norm.momentum = None  # the plain mean of the passes
        for picture in pictures:
            heads.box_head(model.backbone(model.transform([picture])[0].tensors))
        model.eval()
        batch, _ = model.transform(pictures)
        maps = model.backbone(batch.tensors)
        spread_out(model.rpn.head.cls_logits, model.rpn.head([maps])[0][0], dim=1)
        proposals, _ = model.rpn(batch, {"0": maps})
        vectors = heads.box_head(heads.box_roi_pool({"0": maps}, proposals))
        spread_out(heads.box_predictor.cls_score, heads.box_predictor(vectors)[0], dim=1)
    return model


def spread_out(layer: nn.Module, logits: Tensor, dim: int) -> None:
    """Scale the layer so that each of its outputs has mean 0 and deviation 2."""
    others = [d for d in range(logits.ndim) if d != dim]
    scale = 2 / logits.std(others)
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias.sub_(logits.mean(others)).mul_(scale)


def missing(ours: Detections, theirs: Detections, score_thresh: float, nms_thresh: float) -> list[int]:
    """The rows of `ours` that `theirs` lacks, without those that rounding may decide: scores near the threshold,
    and boxes that another one suppresses whose score is as high or whose overlap is near the NMS threshold."""
    overlaps = box_iou(ours.boxes, theirs.boxes)
    closeness = (ours.scores[:, None] - theirs.scores).abs()
    same_label = ours.labels[:, None] == theirs.labels
    found = same_label & (overlaps >= SAME_BOX) & (closeness <= TOLERANCE)
    tie = (overlaps > nms_thresh) & (closeness <= TOLERANCE) | ((overlaps - nms_thresh).abs() < 0.01)
    excused = (ours.scores <= score_thresh + TOLERANCE) | (same_label & tie).any(1)
    return torch.where(~found.any(1) & ~excused)[0].tolist()


def check_same_detections(ours: Detector, theirs: Detector, pictures: list[Tensor]) -> None:
    heads, num_compared = theirs.model.roi_heads, 0
    for picture in pictures:
        a, b = ours(picture), theirs(picture)
        num_compared += len(b)
        assert missing(a, b, heads.score_thresh, heads.nms_thresh) == []
        assert missing(b, a, heads.score_thresh, heads.nms_thresh) == []
    assert num_compared >= 40


# Every anchor and every detection is kept where NMS keeps it: no rank cuts a list off between two near scores.
SETTINGS = (
    "model.backbone.width=16",
    "model.anchor_sizes=[32, 64]",
    "model.min_size=128",
    "model.max_size=224",
    "model.rpn_pre_nms_top_n_test=5000",
    "model.rpn_post_nms_top_n_test=5000",
    "model.box_detections_per_img=5000",
    "model.box_score_thresh=0.3",
)


@pytest.mark.parametrize("winograd", [True, False])
def test_a_loaded_detector_finds_the_same_optimised_and_as_trained(
    tiny_config, pictures, tmp_path, monkeypatch, winograd
):
    monkeypatch.setattr("backbones.kernels.winograd._time", lambda *args: 0.5 if winograd else 1.0)
    config, path = tiny_config(*SETTINGS), tmp_path / "best.safetensors"
    model = build_detector(config, pictures)
    save_checkpoint(path, Checkpoint(model.state_dict(), config, NAMES))
    fast, plain = Detector.load(path, "cpu"), Detector.load(path, "cpu", optimize=False)
    assert any(isinstance(layer, WinogradConv2d) for layer in fast.model.modules()) == winograd
    check_same_detections(fast, plain, pictures)


def test_the_comparison_sees_a_missing_box_and_excuses_a_tie():
    def detections(boxes: list[list[float]], scores: list[float]) -> Detections:
        return Detections(
            torch.tensor(boxes), torch.ones(len(boxes), dtype=torch.int64), torch.tensor(scores), NAMES
        )

    one, moved = [0.0, 0, 100, 100], [0.0, 0, 100, 98]
    wanted = detections([one, [200.0, 0, 300, 100]], [0.9, 0.8])
    assert missing(wanted, detections([one], [0.9]), 0.3, 0.5) == [1]
    assert missing(wanted, detections([one, [200.0, 0, 300, 100]], [0.9, 0.79]), 0.3, 0.5) == [1]
    assert missing(detections([one], [0.9]), detections([moved], [0.8]), 0.3, 0.5) == [0]
    # Of two boxes with one score, either may suppress the other.
    assert missing(detections([one], [0.9]), detections([moved], [0.9]), 0.3, 0.5) == []
    assert missing(detections([one], [0.3005]), detections([[200.0, 0, 300, 100]], [0.9]), 0.3, 0.5) == []


def test_optimising_leaves_the_model_as_trained(tiny_config):
    model = build_model(tiny_config().model, 5).train()
    before = copy.deepcopy(model.state_dict())
    fast = optimize(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fast.modules())
    assert not fast.training and not any(p.requires_grad for p in fast.parameters())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fast.parameters()}
    assert shared == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "backbone", ["{name: resnet18, width: 8}", "{name: timm/resnet18}", "{name: preact_resnet18}"]
)
def test_optimising_once_more_changes_nothing(tiny_config, monkeypatch, backbone, dtype):
    monkeypatch.setattr("backbones.kernels.winograd._time", lambda *args: 0.5)
    once = optimize(
        build_model(tiny_config(f"model.backbone={backbone}", "model.box_score_thresh=0").model, 5),
        dtype=dtype,
    )
    again = optimize(once, dtype=dtype)
    assert repr(again) == repr(once)
    before, after = once.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    picture = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))]
    found, expected = again.detect(picture)[0], once.detect(picture)[0]
    assert len(expected["boxes"]) and torch.equal(found["boxes"], expected["boxes"])
    # Nor does it take a model of 16 bits for one of 32.
    assert repr(optimize(once)) == repr(once)


@pytest.mark.slow
@pytest.mark.parametrize("optimized", [True, False])
def test_one_compilation_serves_every_image_size(tiny_config, optimized):
    # A batch of several, a square first image and fewer than 16 regions are each compiled once more: not here.
    config = tiny_config(
        "model.max_size=128", "model.rpn_pre_nms_top_n_test=500", "model.rpn_post_nms_top_n_test=40"
    )
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, *size, generator=generator) for size in ((64, 96), (100, 64), (64, 128))]
    model = build_detector(config, pictures)
    copied = optimize(model) if optimized else copy.deepcopy(model)
    plain, compiled = Detector(model, NAMES), Detector(copied, NAMES)
    compile_model(compiled.model)
    torch.compiler.reset()
    counters.clear()
    for picture in pictures:
        check_same_detections(compiled, plain, [picture])
        assert counters["stats"]["unique_graphs"] == 2  # the trunk, and the second block of conv5_x
