"""RoIAlign as a sparse product, against torchvision's kernels."""

import os
import subprocess
import sys
import types
from importlib.util import find_spec

import pytest
import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, roi_align, roi_pool

import backbones.regions
from backbones.kernels.roi_align import bin_weights, sparse_roi_align
from backbones.regions import RegionPool, max_kernel_regions

STRIDE = 16
CASES = {
    "tiny": [100.3, 50.2, 100.9, 50.4],
    "thin": [3.0, 40.0, 290.0, 41.0],
    "tall": [77.7, 2.0, 79.0, 200.0],
    "whole image": [0.0, 0.0, 300.0, 210.0],
    "over the corner": [250.0, 180.0, 420.0, 333.0],
    "negative": [-60.0, -35.0, 45.0, 70.0],
    "outside": [900.0, 900.0, 1000.0, 960.0],
    "outside, negative": [-300.0, -300.0, -200.0, -250.0],
    "larger than the image": [-200.0, -100.0, 800.0, 700.0],
    "without area": [64.0, 64.0, 64.0, 64.0],
}


def random_boxes(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    start = torch.rand(count, 2, generator=g, dtype=torch.float64) * torch.tensor([320.0, 230.0]) - 20
    return torch.cat((start, start + torch.rand(count, 2, generator=g, dtype=torch.float64) * 150), 1).to(
        dtype
    )


def boxes_of_three_images(dtype: torch.dtype) -> list[torch.Tensor]:
    """Every special case, an image with no boxes, and random ones."""
    special = torch.tensor(list(CASES.values()), dtype=dtype)
    return [
        torch.cat((special, random_boxes(8, dtype))),
        torch.empty(0, 4, dtype=dtype),
        random_boxes(9, dtype, 1),
    ]


def random_map(n: int, channels: int, size: tuple[int, int], dtype=torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randn(n, channels, *size, generator=g, dtype=torch.float64).to(dtype)


def weights_for(features: torch.Tensor, boxes, **options):
    return bin_weights(boxes, features.shape[-2:], len(features), spatial_scale=1 / STRIDE, **options)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if theirs.numel():
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [1, 2, 3, 0, -1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_values_and_gradient_equal_torchvision(dtype, tolerance, sampling_ratio, aligned, layout):
    features = random_map(3, 7, (14, 19), dtype).contiguous(memory_format=layout).requires_grad_()
    boxes = boxes_of_three_images(dtype)
    options = {"sampling_ratio": sampling_ratio, "aligned": aligned}
    ours = sparse_roi_align(features, weights_for(features, boxes, **options))
    theirs = roi_align(features, boxes, 14, 1 / STRIDE, **options)
    assert_near(ours, theirs, tolerance)
    grad = torch.randn_like(theirs)
    assert_near(
        *(torch.autograd.grad(out, features, grad, retain_graph=True)[0] for out in (ours, theirs)), tolerance
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (13, 1), (13, 19), (14, 18)], ids=str)
def test_one_box_on_maps_of_any_size_equals_torchvision(name, size):
    features = random_map(1, 3, size)
    boxes = [torch.tensor([CASES[name]])]
    ours = sparse_roi_align(features, weights_for(features, boxes, output_size=(5, 3)))
    assert_near(ours, roi_align(features, boxes, (5, 3), 1 / STRIDE, 2), 1e-5)


def test_boxes_outside_the_map_pool_zero():
    features = random_map(1, 3, (13, 19))
    boxes = [torch.tensor([CASES["outside"], CASES["outside, negative"]])]
    assert not sparse_roi_align(features, weights_for(features, boxes)).any()


@pytest.mark.parametrize("bins", [slice(None, None, 2), slice(1, None, 3), slice(3, 9), slice(0, 0)], ids=str)
@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_a_part_of_the_grid_is_that_part_of_the_whole(bins, sampling_ratio):
    features, boxes = random_map(3, 4, (14, 19)), boxes_of_three_images(torch.float32)
    weights = weights_for(features, boxes, sampling_ratio=sampling_ratio)
    whole = sparse_roi_align(features, weights)
    part = sparse_roi_align(features, weights.select(bins))
    assert torch.equal(part, whole[:, :, bins, bins])


def test_gradient_of_a_part_is_that_of_the_sliced_whole():
    features = random_map(3, 4, (14, 19)).requires_grad_()
    weights = weights_for(features, boxes_of_three_images(torch.float32))
    even = slice(None, None, 2)
    part = sparse_roi_align(features, weights.select(even))
    sliced = sparse_roi_align(features, weights)[:, :, even, even]
    grad = torch.randn_like(part)
    assert_near(*(torch.autograd.grad(out, features, grad)[0] for out in (part, sliced)), 1e-5)


def test_gradcheck():
    features = random_map(2, 2, (4, 5), torch.float64).requires_grad_()
    boxes = [torch.tensor([[-5.0, 3.0, 40.0, 60.0], [20.0, 20.0, 90.0, 70.0]], dtype=torch.float64)] * 2
    weights = weights_for(features, boxes, output_size=3)
    assert torch.autograd.gradcheck(lambda f: sparse_roi_align(f, weights), features)


def test_a_batch_with_more_positions_than_an_int16_has_the_right_gradient():
    features = random_map(5, 1, (80, 90)).requires_grad_()  # 36,000 positions: two passes of the sort
    boxes = [random_boxes(6, torch.float32, i) * 4 for i in range(5)]
    pooled = [
        sparse_roi_align(features, weights_for(features, boxes)),
        roi_align(features, boxes, 14, 1 / STRIDE, 2),
    ]
    grad = torch.randn_like(pooled[1])
    assert_near(*(torch.autograd.grad(out, features, grad)[0] for out in pooled), 1e-5)


def test_output_is_channels_last():
    features = random_map(1, 5, (14, 19)).contiguous(memory_format=torch.channels_last)
    pooled = sparse_roi_align(features, weights_for(features, [random_boxes(4, torch.float32)]))
    assert pooled.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_maps_keep_their_dtype_and_full_precision_boxes(dtype):
    features, boxes = random_map(3, 8, (14, 19)), boxes_of_three_images(torch.float32)
    narrow = features.to(dtype).requires_grad_()
    pooled = sparse_roi_align(narrow, weights_for(narrow, boxes))
    assert pooled.dtype == dtype
    assert_near(pooled.float(), roi_align(features, boxes, 14, 1 / STRIDE, 2), 0.01)
    (grad,) = torch.autograd.grad(pooled.sum(), narrow)
    assert grad.dtype == dtype and grad.isfinite().all()


@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_no_region_at_all_pools_nothing_and_gives_a_zero_gradient(sampling_ratio):
    features = random_map(2, 3, (14, 19)).requires_grad_()
    weights = weights_for(features, [torch.empty(0, 4)] * 2, sampling_ratio=sampling_ratio)
    pooled = sparse_roi_align(features, weights)
    assert pooled.shape == (0, 3, 14, 14)
    pooled.sum().backward()
    assert features.grad.shape == features.shape and not features.grad.any()


def test_weights_of_a_bin_inside_the_map_add_up_to_one():
    weights = bin_weights([torch.tensor([[33.0, 17.0, 250.0, 180.0]])], (14, 19), 1, spatial_scale=1 / 16)
    rows = weights.matrix @ torch.ones(weights.matrix.shape[1], 1)
    torch.testing.assert_close(rows, torch.ones(14 * 14, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [torch.zeros(2, 5)]}, r"image 0 must be \(R, 4\).*got \(2, 5\)"),
        ({"boxes": [torch.zeros(1, 4)] * 2}, "got 2 for 1 images"),
        ({"boxes": []}, "got 0 for 1 images"),
        ({"output_size": 0}, "output_size must be a positive integer.*got 0"),
        ({"map_size": (3, 4, 5)}, r"map_size .*got \(3, 4, 5\)"),
        ({"spatial_scale": 0.0}, "spatial_scale must be positive, got 0.0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {"boxes": [torch.zeros(1, 4)], "map_size": (3, 4), "num_images": 1, "spatial_scale": 1 / 16}
    with pytest.raises(ValueError, match=message):
        bin_weights(**good | change)


def test_a_map_that_the_weights_are_not_for_is_refused():
    weights = bin_weights([torch.zeros(1, 4)], (3, 4), 1, spatial_scale=1 / 16)
    with pytest.raises(ValueError, match=r"for a map \(1, C, 3, 4\), got \(1, 8, 4, 3\)"):
        sparse_roi_align(torch.zeros(1, 8, 4, 3), weights)
    with pytest.raises(TypeError, match="floating point, got torch.int64"):
        sparse_roi_align(torch.zeros(1, 8, 3, 4, dtype=torch.int64), weights)


# RegionPool


def test_region_pool_equals_multi_scale_roi_align():
    features, boxes, shapes = (
        random_map(2, 5, (14, 19)),
        [random_boxes(6, torch.float32)] * 2,
        [(224, 304)] * 2,
    )
    theirs = MultiScaleRoIAlign(["0"], 14, 2)({"0": features}, boxes, shapes)
    assert_near(RegionPool()({"0": features}, boxes, shapes), theirs, 1e-5)
    assert_near(RegionPool()(features, boxes), theirs, 1e-5)


def test_region_pool_keeps_its_scale_where_torchvision_guesses_another():
    """40 pixels are padded to 64, 4 rows at stride 16; log2(4 / 40) = -3.3 rounds to 1/8."""
    low, boxes = random_map(1, 5, (4, 40)), [torch.tensor([[8.0, 8.0, 90.0, 36.0]])]
    image, later = random_map(1, 5, (14, 19)), [random_boxes(6, torch.float32)]
    ours, theirs = RegionPool(), MultiScaleRoIAlign(["0"], 14, 2)
    for pool in (ours, theirs):
        pool({"0": low}, boxes, [(40, 640)])
    assert theirs.scales == [1 / 8] and ours.scales == [1 / 16]
    expected = roi_align(image, later, 14, 1 / 16, 2)
    assert_near(ours({"0": image}, later, [(224, 304)]), expected, 1e-5)
    assert (theirs({"0": image}, later, [(224, 304)]) - expected).abs().max() > 0.1


def test_max_mode_equals_torchvision_roi_pool():
    features, boxes = random_map(2, 5, (14, 19)), [random_boxes(6, torch.float32)] * 2
    assert torch.equal(RegionPool(7, mode="max")(features, boxes), roi_pool(features, boxes, 7, 1 / STRIDE))
    assert RegionPool(7, mode="max")(features.bfloat16(), boxes).dtype == torch.bfloat16


def test_aligned_stride_and_sampling_reach_the_pool():
    features, boxes = random_map(1, 5, (14, 19)), [random_boxes(6, torch.float32) / 2]
    pool = RegionPool((7, 5), 0, stride=8, aligned=True)
    assert_near(pool(features, boxes), roi_align(features, boxes, (7, 5), 1 / 8, 0, True), 1e-5)


def test_one_set_of_weights_reads_every_map_of_the_size():
    features, boxes, pool = random_map(1, 5, (14, 19)), [random_boxes(6, torch.float32)], RegionPool()
    weights = pool.bin_weights(features, boxes)
    for image in (features, features.repeat(1, 2, 1, 1)):
        assert torch.equal(sparse_roi_align(image, weights), pool(image, boxes))


@pytest.mark.filterwarnings("ignore")
def test_region_pool_traces_to_torchvisions_operator():
    features, boxes = random_map(1, 5, (14, 19)), random_boxes(6, torch.float32)
    traced = torch.jit.trace(lambda f, b: RegionPool()(f, [b]).crop(), (features, boxes), check_trace=False)
    assert "torchvision::roi_align" in str(traced.graph)
    other = random_boxes(9, torch.float32, 3)
    assert_near(traced(features, other), RegionPool()(features, [other]), 1e-5)


def test_region_pool_refuses_what_it_cannot_do():
    features, boxes = random_map(1, 5, (14, 19)), [random_boxes(6, torch.float32)]
    with pytest.raises(ValueError, match=r"one feature map, got 2: \['0', '1'\]"):
        RegionPool()({"0": features, "1": features}, boxes)
    with pytest.raises(ValueError, match="mode is 'mean'.*accepted: align, max"):
        RegionPool(mode="mean")
    with pytest.raises(ValueError, match='needs mode="align"'):
        RegionPool(mode="max", aligned=True)
    with pytest.raises(ValueError, match="stride must be positive, got 0"):
        RegionPool(stride=0)
    with pytest.raises(ValueError, match="weighted sum"):
        RegionPool(mode="max").bin_weights(features, boxes)


def test_repr_says_everything():
    said = repr(RegionPool(7, 0, stride=8, aligned=True))
    assert said == "RegionPool(output_size=(7, 7), sampling_ratio=0, stride=8, aligned=True, mode='align')"


class TinyBackbone(torch.nn.Sequential):
    out_channels = 8

    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, 8, 16, stride=16), torch.nn.ReLU())


@pytest.mark.parametrize("mode", ["align", "max"])
def test_trains_and_infers_inside_torchvisions_faster_rcnn(mode):
    torch.manual_seed(0)
    model = FasterRCNN(
        TinyBackbone(),
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((32, 64),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=RegionPool(7, mode=mode),
        min_size=96,
        max_size=128,
    )
    images = [torch.rand(3, 96, 128), torch.rand(3, 100, 90)]
    targets = [{"boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]), "labels": torch.tensor([1])}] * 2
    sum(model(images, targets).values()).backward()
    assert model.backbone[0].weight.grad.abs().sum() > 0
    assert len(model.eval()(images)) == 2


# On a GPU


@pytest.mark.parametrize("works", [True, False])
def test_torchvisions_kernel_serves_where_triton_cannot_compile_and_that_is_said_once(
    monkeypatch, capsys, works
):
    """Not run on a GPU without a C compiler: what Triton raises there is simulated."""

    def triton_roi_align(features, rois, output_size, spatial_scale):
        if not works:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    triton = types.ModuleType("triton_roi_align")
    triton.triton_roi_align, zeros = triton_roi_align, torch.zeros
    monkeypatch.setitem(sys.modules, "backbones.kernels.triton_roi_align", triton)
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    backbones.regions._has_triton.cache_clear()
    found = [backbones.regions._has_triton() for _ in range(2)]
    backbones.regions._has_triton.cache_clear()
    assert found == [works] * 2
    said = capsys.readouterr().out
    assert said.count("torchvision's RoIAlign serves, since Triton fails: Failed to find C compiler") == (
        not works
    )


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernels_equal_torchvisions_in_tritons_interpreter():
    """The same numbers on a GPU are tests marked gpu."""
    script = """
import torch
from torchvision.ops import roi_align
from backbones.kernels.triton_roi_align import triton_roi_align

torch.manual_seed(0)
for ratio, aligned, stride in ((2, False, 1), (0, True, 2)):
    rois = torch.tensor([[1, -20.0, 3, 90, 60], [0, 10, 20, 300, 90], [1, 100, 10, 130, 300], [0, 900, 0, 990, 50]])
    ours = torch.randn(2, 5, 6, 20, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    pooled = triton_roi_align(
        ours, rois, (6, 6), spatial_scale=1 / 16, sampling_ratio=ratio, aligned=aligned, stride=stride
    )
    expected = roi_align(theirs, rois, 6, 1 / 16, ratio, aligned)[:, :, ::stride, ::stride]
    grad = torch.randn_like(expected)
    pooled.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)
"""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this Triton does not run with this numpy (3.6 with 2.4)")
    assert done.returncode == 0, done.stderr


def test_torchvisions_kernels_get_fewer_outputs_than_32_bits_count():
    for channels, size in ((2048, (14, 14)), (512, (14, 14)), (256, (7, 3))):
        regions = max_kernel_regions(channels, size)
        outputs = channels * size[0] * size[1]
        # Their loop adds up to 4096 blocks of 512 threads to an index before it compares.
        assert regions * outputs + 4096 * 512 < 2**31 <= (regions + 1) * outputs + 4096 * 512


def test_many_regions_are_pooled_in_parts_to_the_same_crops(monkeypatch):
    features, boxes = (
        random_map(2, 3, (13, 19)),
        [random_boxes(9, torch.float32), random_boxes(4, torch.float32)],
    )
    pool = RegionPool(14, 2, sparse=False)
    whole = pool.crop(features, boxes)
    monkeypatch.setattr("backbones.regions.max_kernel_regions", lambda channels, size: 5)
    assert torch.equal(pool.crop(features, boxes), whole)
