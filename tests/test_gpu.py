"""What only a CUDA device can show: python -m pytest -m gpu. It takes some minutes."""

import copy
import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import several
import torch
from short_runs import stop_after
from torchvision.ops import roi_align

from backbones import create_backbone
from backbones.kernels.cudnn import fuses
from backbones.regions import RegionPool
from backbones.summary import multiply_accumulates
from detector import processes
from detector.engine import autocast
from detector.inference import Detector
from detector.model.faster_rcnn import build_faster_rcnn
from detector.model.speed import compile_model, optimize
from detector.run import Run
from detector.stop import Interrupted

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
ROOT = Path(__file__).resolve().parent.parent
# How often the host may wait for the device, an image.
MAX_SYNCS = {"training": 8, "inference": 10}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Compare in float32, not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture
def model():
    torch.manual_seed(0)
    # The shorter side is 800, the longer 1333 pixels: eight bits cannot count them.
    return build_faster_rcnn(create_backbone("resnet18", width=16), 5, rpn_post_nms_top_n_test=100)


def random_rois(count, num_images, height, width):
    corners = torch.rand(count, 2) * torch.tensor([width, height]) - 30
    sides = torch.rand(count, 2) * 300
    images = torch.randint(num_images, (count, 1)).sort(0).values
    return torch.cat([images, corners, corners + sides], dim=1).to(CUDA)


def per_image(rois, num_images):
    return [rois[rois[:, 0] == i, 1:] for i in range(num_images)]


def batch(num_images=2, height=800, width=1333, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, height, width, generator=generator) for _ in range(num_images)]
    boxes = torch.tensor([[100.0, 120, 400, 380], [610, 50, 1300, 700]])
    return images, [{"boxes": boxes, "labels": torch.tensor([1, 3])} for _ in images]


def to_cuda(images, targets):
    return [i.to(CUDA) for i in images], [{k: v.to(CUDA) for k, v in t.items()} for t in targets]


# RoIAlign


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_triton_roi_align_and_its_gradient_equal_torchvisions(dtype, ratio, aligned, stride):
    torch.manual_seed(0)
    rois = random_rois(50, 2, 800, 1333)
    ours = torch.randn(2, 200, 50, 84, device=CUDA).to(dtype).contiguous(memory_format=torch.channels_last)
    theirs = ours.detach().float().requires_grad_()
    ours.requires_grad_()
    pool = RegionPool(14, ratio, aligned=aligned)
    pooled = pool.crop(ours, per_image(rois, 2), stride)
    expected = roi_align(theirs, rois, 14, 1 / 16, ratio, aligned)[:, :, ::stride, ::stride]
    grad = torch.randn_like(expected).to(dtype)
    pooled.backward(grad)
    expected.backward(grad.float())
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(pooled.float(), expected, atol=tolerance, rtol=tolerance)
    largest = theirs.grad.abs().max()
    assert (ours.grad.float() - theirs.grad).abs().max() <= tolerance * largest


@pytest.mark.parametrize("sparse", [True, False])
def test_more_regions_than_32_bits_count_are_pooled(sparse):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free memory")
    features = torch.rand(1, 2048, 10, 10, device=CUDA) + 1
    boxes = torch.tensor([[10.0, 10, 100, 100]], device=CUDA).expand(6000, 4)
    with torch.no_grad():
        pooled = RegionPool(14, 2, sparse=sparse).crop(features, [boxes])
    assert pooled[-1].min() >= 1 and torch.equal(pooled[0], pooled[-1])


def test_a_map_on_another_device_than_the_current_one_is_pooled():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    features, boxes = torch.rand(1, 8, 10, 10), torch.tensor([[10.0, 10, 100, 100]])
    pooled = [RegionPool(14).crop(features.to(d), [boxes.to(d)]) for d in ("cpu", "cuda:1")]
    torch.testing.assert_close(pooled[1].cpu(), pooled[0], atol=1e-5, rtol=1e-5)


# The detector


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_multiply_accumulates_are_counted_as_on_a_cpu(name):
    trunk, image = create_backbone(name, width=16).trunk, torch.zeros(1, 3, 96, 128)
    on_cpu = multiply_accumulates(trunk, image)
    assert multiply_accumulates(trunk.to(CUDA), image.to(CUDA)) == on_cpu


def test_detections_equal_those_of_a_cpu(model):
    images, _ = batch()
    on_cpu = model.eval().detect(images)
    on_gpu = model.to(CUDA).detect([i.to(CUDA) for i in images])
    for one, other in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(other["scores"].cpu(), one["scores"], atol=1e-4, rtol=1e-4)
        assert other["boxes"].shape == one["boxes"].shape


def test_losses_of_a_step_equal_those_of_a_cpu(model):
    images, targets = batch()
    losses = []
    for device in ("cpu", "cuda"):
        on_device = copy.deepcopy(model).to(device).train()
        on_device.seed_sampling([(0, 0, 1), (0, 0, 2)])
        moved = (images, targets) if device == "cpu" else to_cuda(images, targets)
        losses.append({k: float(v) for k, v in on_device(*copy.deepcopy(moved)).items()})
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_in_16_bits_are_near_float32s(model, dtype):
    images, targets = to_cuda(*batch())
    model.to(CUDA).train()
    losses = []
    for used in (None, dtype):
        model.seed_sampling([(0, 0, 1), (0, 0, 2)])
        with autocast(CUDA, used):
            losses.append({k: float(v) for k, v in model(images, copy.deepcopy(targets)).items()})
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_optimised_copy_in_16_bits_scores_as_float32_does(model, dtype):
    images, _ = to_cuda(*batch())
    model.to(CUDA).eval()
    wide = optimize(model).detect(images, score_thresh=0.0)
    narrow = optimize(model, dtype=dtype).detect(images, score_thresh=0.0)
    for one, other in zip(wide, narrow, strict=True):
        assert other["boxes"].dtype == torch.float32
        assert float(other["scores"][0]) == pytest.approx(float(one["scores"][0]), abs=0.02)


def test_a_detector_runs_in_half_precision(model, tmp_path):
    detector = Detector(optimize(model.to(CUDA), dtype=torch.float16), ["a", "b", "c", "d"], CUDA)
    found = detector(torch.rand(3, 800, 1333), score_thresh=0.0, features=True)
    assert found.boxes.device.type == "cpu" and found.features.dtype == torch.float32
    assert found.features.shape == (len(found), detector.model.roi_heads.box_head.out_channels)


def test_a_compiled_detector_finds_the_same(model):
    images, _ = to_cuda(*batch())
    model.to(CUDA).eval()
    plain, compiled = (optimize(model, dtype=torch.bfloat16) for _ in range(2))
    compile_model(compiled)
    for one, other in zip(plain.detect(images), compiled.detect(images), strict=True):
        assert float(other["scores"][0]) == pytest.approx(float(one["scores"][0]), abs=0.02)


# Syncs


def count_syncs(call):
    """How often `call` waits for the device, as torch's sync debug mode sees it."""
    call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def test_detection_reads_seldom_from_the_device(model):
    fast, images = optimize(model.to(CUDA).eval()), batch(4)[0]
    images = [i.to(CUDA) for i in images]
    one, four = (count_syncs(lambda n=n: fast.detect(images[:n])) for n in (1, 4))
    print(f"syncs: {one} for 1 image, {four} for 4")
    assert four <= 4 * MAX_SYNCS["inference"]


def test_a_training_step_reads_seldom_from_the_device(model):
    model.to(CUDA).train()
    images, targets = to_cuda(*batch(4))

    def step(n):
        model.seed_sampling([(0, 0, i) for i in range(n)])
        with autocast(CUDA, torch.bfloat16):
            losses = model(images[:n], copy.deepcopy(targets[:n]))
        sum(losses.values()).backward()

    one, four = (count_syncs(lambda n=n: step(n)) for n in (1, 4))
    print(f"syncs: {one} for 1 image, {four} for 4")
    assert four <= 4 * MAX_SYNCS["training"] + 2


# Runs


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_run_trains_stops_and_resumes(tiny_config, tmp_path, monkeypatch, amp):
    config = tiny_config("train.epochs=2", f"train.amp={amp}", "train.ema=0.9")
    with monkeypatch.context() as patch:
        stop_after(patch, 1, signal.SIGINT)
        with pytest.raises(Interrupted):
            Run(config, tmp_path, CUDA).train()
    resumed = Run(config, tmp_path, CUDA, resume=True)
    resumed.train()
    assert resumed.training.epoch == 2
    assert (tmp_path / "best.safetensors").exists()


def shared_gpu():
    """A GPU for this process of several; two share one where there are no more."""
    device = torch.device("cuda", processes.rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    # The fixture of exact products does not reach this process.
    torch.backends.cudnn.allow_tf32 = False
    return device


def sync_norm_step(images):
    """One step of a network with `norm: sync` on this process's share of the images: its statistics and gradients."""
    device = shared_gpu()
    torch.manual_seed(0)
    backbone = create_backbone("resnet18", width=8, norm="sync").to(device).train()
    network = processes.parallel(backbone)
    share = torch.stack(list(processes.share(list(images)))).to(device)
    network(share).square().mean().backward()
    tensors = dict(backbone.named_buffers()) | {n: p.grad for n, p in backbone.named_parameters()}
    return {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}


def test_sync_norm_in_two_processes_is_batch_norm_over_both():
    # NCCL wants a GPU for each process. Over gloo, two share one.
    torch.manual_seed(1)
    images = torch.randn(4, 3, 64, 64)
    one, two = several.run(2, sync_norm_step, images)
    torch.manual_seed(0)
    alone = create_backbone("resnet18", width=8).to(CUDA).train()
    alone(images.to(CUDA)).square().mean().backward()
    expected = dict(alone.named_buffers()) | {n: p.grad for n, p in alone.named_parameters()}
    for name, tensor in expected.items():
        np.testing.assert_allclose(
            one[name], tensor.float().cpu().numpy(), rtol=1e-3, atol=1e-4, err_msg=name
        )
        np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-4, err_msg=name)


def train_on_this_gpu(config, folder):
    return Run(config, folder, shared_gpu()).train()


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_two_processes_train_on_one_device(tiny_config, tmp_path, amp):
    metrics, nothing = several.run(2, train_on_this_gpu, tiny_config(f"train.amp={amp}"), tmp_path)
    assert metrics["epoch"] in (1, 2) and nothing == {}


def test_a_gpu_for_each_process_is_joined_over_nccl(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "tools/train.py"]
    recipe = ["configs/shapes.yaml", "train.epochs=1", f"data.root={tmp_path / 'data'}"]
    run = [*command, *recipe, "--output", str(tmp_path / "run")]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "best.safetensors").exists()


ENDS = """
import torch
from detector.data.loader import build_loader
loader = build_loader([torch.zeros(1)] * 8, [[0, 1], [2, 3], [4, 5]], 3, pin_memory=True, collate=list)
list(loader)
print("done", flush=True)
"""


def test_a_process_whose_loader_lives_ends_at_once():
    """torch 2.11 alone waits five seconds for each worker."""
    process = subprocess.Popen([sys.executable, "-c", ENDS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "done\n"
    assert process.wait(timeout=5) == 0


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_infer_runs_on_the_device(tiny_shapes, tiny_config, tmp_path, dtype):
    run = Run(tiny_config(), tmp_path, CUDA)
    run.train()
    weights, pictures = tmp_path / "last.safetensors", tmp_path / "drawn"
    command = [
        sys.executable,
        "tools/infer.py",
        str(tiny_shapes),
        "--device",
        "cuda",
        "--dtype",
        dtype,
    ]
    done = subprocess.run(
        [*command, "--weights", str(weights), "--output", str(pictures)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((pictures / "images.json").read_text())["images"]


# Fused convolutions


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "se_resnet18", "preact_resnet18"])
def test_convolutions_with_their_relus_in_one_pass_equal_separate_ones(name, monkeypatch):
    torch.manual_seed(0)
    network = create_backbone(name, width=16).to(CUDA).eval()
    images = torch.rand(2, 3, 96, 128, device=CUDA)
    gradients, vectors = [], []
    for enabled in (False, True):
        monkeypatch.setattr("backbones.folding.fuses", fuses if enabled else lambda x, out_channels: False)
        out = network(images)
        network.zero_grad()
        out.square().sum().backward()
        with torch.no_grad():
            vectors += [out.detach(), network(images)]
        gradients.append([p.grad.clone() for p in network.parameters()])
    for other in vectors[1:]:
        torch.testing.assert_close(other, vectors[0], atol=1e-4, rtol=1e-4)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 1e-3 * one.abs().max() + 1e-6
