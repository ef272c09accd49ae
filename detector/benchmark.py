"""Measurements of tools/benchmark.py: our detector and torchvision's of one network, alternating in one process.

Forced, and alike in every form: the weights (random, batch norm's statistics those of noise pictures, so that
activations keep their scale), the proposals (`ForcedProposals`) and the score threshold (`DETECTED` pairs of box
and class above it in an image). Stock is what a user composes of torchvision's parts: eager, contiguous, its own pool.
"""

import copy
import importlib.util
import inspect
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from backbones import create_backbone
from backbones.resnet import TORCHVISION_NAMES
from backbones.weights import DEFERRED, load_into

from .config import Config
from .data import build_dataset, load_image
from .data.loader import TrainBatches, TransformedDataset, build_loader
from .data.transforms import TrainTransform
from .engine import autocast
from .evaluation import COCO_METRICS, evaluate_coco
from .faster_rcnn import build_faster_rcnn, optimize
from .roi_align import MapRegions
from .run import multiply_accumulates

DTYPES = {"float32": None, "bf16": torch.bfloat16}
INFERENCE_FORMS = ("stock", "stock_channels_last", "ours", "ours_direct", "ours_optimized")
TRAINING_FORMS = ("stock", "stock_channels_last", "ours", "ours_checkpointed")
DETECTED = (
    300  # pairs of box and class of an image that reach NMS, about what a trained detector leaves at 0.05
)
NUM_OBJECTS = 8  # ground-truth boxes of a training image
MAX_DIFFERENCE = 1e-4  # of float32 head features, relative to the largest
CROPS = 14
Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Settings:
    """What a measurement of the detector is made with; `stock_dtype` None means that of ours."""

    backbone: str = "resnet101"
    batch: int = 1
    dtype: str = "float32"
    stock_dtype: str | None = None
    device: str = "cpu"
    threads: int | None = None
    tf32: bool = False
    repeats: int = 5
    warmup: int = 1
    num_classes: int = 91
    matrix_size: int = 2048

    def dtype_of(self, form: str) -> str:
        return self.stock_dtype or self.dtype if form.startswith("stock") else self.dtype


def apply_settings(settings: Settings) -> None:
    """Threads of the process, and whether CUDA's float32 products may be TF32 (torch's own default differs)."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    _allow_tf32(settings.tf32)


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on and with."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_cuda else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32 if on_cuda else None,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# Time: parts of a call, alternating calls, medians.


class Stopwatch:
    """Seconds of a call by part, each moment counted once: a part within another is taken out of it."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._marks: list[tuple[str, Any]] = []
        self._open: list[str] = []

    def time(self, call: Callable[[], object]) -> dict[str, float]:
        """{"total", "other" and each part: seconds}; on CUDA the parts are of the device's own clock."""
        self._marks, self._open = [], []
        self._synchronize()
        started = time.perf_counter()
        with self.part("other"):
            call()
        self._synchronize()
        seconds: dict[str, float] = defaultdict(float, total=time.perf_counter() - started)
        for (part, begin), (_, end) in pairwise(self._marks):
            seconds[part] += begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin
        return dict(seconds)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._open.append(name)
        self._mark(name)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1] if self._open else "")

    @contextmanager
    def watch(self, points: Iterable[tuple[Any, str, str]]) -> Iterator[None]:
        """Within, every call of `owner.attribute` is a part; points: (owner, attribute, part)."""
        with ExitStack() as stack:
            for owner, attribute, part in points:
                stack.enter_context(_replaced(owner, attribute, self._timed(getattr(owner, attribute), part)))
            yield

    def _timed(self, call: Callable, part: str) -> Callable:
        def timed(*args: object, **kwargs: object) -> object:
            with self.part(part):
                return call(*args, **kwargs)

        return timed

    def _mark(self, part: str) -> None:
        """From now on it is `part` that runs."""
        if self.device.type != "cuda":
            self._marks.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self._marks.append((part, event))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def _replaced(owner: Any, attribute: str, value: object) -> Iterator[None]:
    own, before = attribute in vars(owner), getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before) if own else delattr(owner, attribute)


def alternate(
    calls: dict[str, Callable[[], dict[str, float]]], repeats: int, warmup: int
) -> dict[str, dict[str, Any]]:
    """Each call's parts summarised over `repeats` rounds of all calls in turn, every second round backwards."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for number in range(-warmup, repeats):
        for name in list(calls) if number % 2 == 0 else reversed(calls):
            sample = calls[name]()
            if number >= 0:
                samples[name].append(sample)
    return {
        name: {part: summarize([s[part] for s in parts]) for part in parts[0]}
        for name, parts in samples.items()
    }


def summarize(seconds: Sequence[float]) -> dict[str, Any]:
    quartiles = np.percentile(seconds, (0, 25, 50, 75, 100)).tolist()
    names = ("min", "quartile1", "median", "quartile3", "max")
    return {**dict(zip(names, quartiles, strict=True)), "seconds": list(seconds)}


def ratios(forms: dict[str, dict[str, Any]], reference: str = "stock") -> dict[str, dict[str, float]]:
    """Medians of each form over the reference's, for the parts that both have; {} without a reference."""
    if reference not in forms:
        return {}
    base = {part: times["median"] for part, times in forms[reference].items() if times["median"] > 0}
    return {
        name: {part: times["median"] / base[part] for part, times in parts.items() if part in base}
        for name, parts in forms.items()
        if name != reference
    }


# Models: one set of weights in every form.


def random_weights(name: str) -> dict[str, Tensor]:
    """A torchvision network's seeded random weights, batch norm's statistics those of noise pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = _stock_network(name, nn.BatchNorm2d).train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the plain mean of the batches
        with torch.no_grad():
            network(torch.randn(2, 3, 128, 128))
    return network.state_dict()


def _stock_network(name: str, norm: Callable[[int], nn.Module]) -> nn.Module:
    if not name.startswith("resnet"):
        raise ValueError(f"backbone is {name!r}; accepted: torchvision's resnet18, 34, 50, 101, 152")
    network = torchvision.models.get_model(name, weights=None, norm_layer=norm)
    network.out_channels, network.fc = network.fc.in_features, nn.Identity()
    return network


def build_form(
    form: str, settings: Settings, weights: dict[str, Tensor], *, training: bool = False, **options: object
) -> FasterRCNN:
    """The detector in one form, in evaluation or training mode; `options` are FasterRCNN's.

    In training batch norm is frozen, and so are the stem and conv2_x.
    """
    if form.startswith("stock"):
        model = _stock_detector(settings, weights, training, **options)
    else:
        model = _our_detector(settings, weights, training, form == "ours_checkpointed", **options)
    _seed_outputs(model)
    model = model.to(settings.device).train(training)
    if form in ("ours_direct", "ours_optimized"):
        model = optimize(model, winograd=form == "ours_optimized")
    return model if form == "stock" else model.to(memory_format=torch.channels_last)


def _stock_detector(
    settings: Settings, weights: dict[str, Tensor] | None, frozen: bool, **options: object
) -> FasterRCNN:
    """FasterRCNN of torchvision's parts, the network cut behind layer3; `weights` None leaves its own."""
    network = _stock_network(settings.backbone, FrozenBatchNorm2d if frozen else nn.BatchNorm2d)
    if weights is not None:
        network.load_state_dict(weights)
    stem = (network.conv1, network.bn1, network.relu, network.maxpool, network.layer1)
    trunk = nn.Sequential(*stem, network.layer2, network.layer3)
    trunk.out_channels = network.layer4[0].conv1.in_channels
    if frozen:
        for module in stem:
            module.requires_grad_(False)
    return FasterRCNN(
        trunk,
        rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], CROPS, 2),
        box_head=nn.Sequential(network.layer4, network.avgpool, nn.Flatten(1)),
        box_predictor=FastRCNNPredictor(network.out_channels, settings.num_classes),
        **options,
    )


def _our_detector(
    settings: Settings, weights: dict[str, Tensor], frozen: bool, checkpointing: bool, **options: object
) -> FasterRCNN:
    if checkpointing:
        require_checkpointing()
        options["activation_checkpointing"] = True
    norm = {"norm": "frozen", "frozen_stages": 2} if frozen else {}
    backbone = create_backbone(settings.backbone, weights=DEFERRED, **norm)
    load_into(backbone, weights, TORCHVISION_NAMES, source="the stock network")
    return build_faster_rcnn(backbone, settings.num_classes, **options)


def require_checkpointing() -> None:
    if "activation_checkpointing" not in inspect.signature(build_faster_rcnn).parameters:
        raise ValueError(
            "build_faster_rcnn has no argument activation_checkpointing: it cannot be measured yet"
        )


@torch.no_grad()
def _seed_outputs(model: FasterRCNN) -> None:
    """The same small random weights of RPN and predictor in every form."""
    generator = torch.Generator().manual_seed(1)
    for parameter in (*model.rpn.head.parameters(), *model.roi_heads.box_predictor.parameters()):
        parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))


class ForcedProposals:
    """The RPN's own filter runs, so that its time counts; then seeded boxes take the place of what it gave.

    Random weights' proposals are too few and too alike. In training the seed of what follows is set too: every
    form samples the same anchors and regions.
    """

    def __init__(self, rpn: nn.Module, count: int = 0) -> None:
        self.rpn, self.count = rpn, count
        self._filter = rpn.filter_proposals
        self._boxes: dict[tuple, Tensor] = {}
        rpn.filter_proposals = self

    def __call__(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[Size],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        _, scores = self._filter(proposals, objectness, image_shapes, num_anchors_per_level)
        if self.rpn.training:
            torch.manual_seed(0)
        return [self._of(i, tuple(s), proposals.device) for i, s in enumerate(image_shapes)], scores

    def _of(self, image: int, shape: Size, device: torch.device) -> Tensor:
        key = image, shape, self.count
        if key not in self._boxes:
            self._boxes[key] = random_boxes(self.count, shape, seed=image).to(device)
        return self._boxes[key]


def random_boxes(count: int, size: Size, seed: int) -> Tensor:
    """(count, 4) boxes within the image: sides of 16 to 512 pixels, uniform in their logarithm, as far as they fit."""
    rng = np.random.default_rng(seed)
    limit = 0.9 * np.array(size[::-1])
    sides = np.minimum(np.exp(rng.uniform(math.log(16), math.log(512), (count, 2))), limit)
    corners = rng.uniform(0, 1, (count, 2)) * (np.array(size[::-1]) - sides)
    return torch.from_numpy(np.concatenate([corners, corners + sides], axis=1).astype(np.float32))


def set_size(model: FasterRCNN, size: Size) -> None:
    """Have the model's transform leave images of `size` at it."""
    model.transform.min_size, model.transform.max_size = (min(size),), max(size)


def make_images(settings: Settings, size: Size) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, *size, generator=generator).to(settings.device) for _ in range(settings.batch)]


# The limit: multiply-accumulates over the machine's rate of matrix products.


def matrix_product(size: int, device: str, dtype: str) -> Callable[[], Tensor]:
    """A product of size^3 multiply-accumulates."""
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype] or torch.float32) for _ in range(2))
    return lambda: a @ b


class _Uncounted:
    """One region (`backbones.backbone.Regions`) whose crops are zeros and whose projections cost nothing."""

    def __init__(self, channels: int) -> None:
        self.channels, self.macs_per_position = channels, 0

    def crop(self, stride: int = 1) -> Tensor:
        return torch.zeros(1, self.channels, -(-CROPS // stride), -(-CROPS // stride))

    def conv1x1(self, weight: Tensor, stride: int) -> Tensor:
        self.macs_per_position += weight.numel()
        return torch.zeros(1, len(weight), -(-CROPS // stride), -(-CROPS // stride))

    def split(self) -> Iterable["_Uncounted"]:
        return (self,)


def count_macs(settings: Settings, size: Size) -> dict[str, int]:
    """Multiply-accumulates an image (trunk, RPN, projection of the shared map) and a region (head).

    trunk, rpn, head: of the stock network. projected_head: what is left of a region when the head's opening 1x1
    convolutions run on the map, for `projection` an image.
    """
    with torch.device("meta"):
        stock = _stock_detector(settings, None, frozen=False)
        channels = stock.backbone.out_channels
        height, width = (-(-s // 32) * 32 for s in size)
        image, features = (
            torch.zeros(1, 3, height, width),
            torch.zeros(1, channels, height // 16, width // 16),
        )
        counts = {
            "trunk": multiply_accumulates(stock.backbone, image),
            "rpn": multiply_accumulates(stock.rpn.head, [features]),
            "head": multiply_accumulates(stock.roi_heads.box_head, torch.zeros(1, channels, CROPS, CROPS)),
        }
        head, region = create_backbone(settings.backbone).roi_head.eval(), _Uncounted(channels)
        counts["projected_head"] = multiply_accumulates(head, region)
    return {**counts, "projection": region.macs_per_position * height * width // 256}


def over_limit(
    times: dict[str, dict[str, Any]],
    macs: dict[str, int],
    rates: dict[str, float],
    settings: Settings,
    regions: int,
) -> dict[str, dict[str, float]]:
    """Time of trunk and head over that of their multiply-accumulates at the machine's rate.

    Ours is held to the projected head's count, without the projection.
    """
    result = {}
    for form, parts in times.items():
        rate = rates[settings.dtype_of(form)]
        head = macs["head" if form.startswith(("stock", "detectron2")) else "projected_head"]
        limits = {"trunk": settings.batch * macs["trunk"] / rate, "head": regions * head / rate}
        result[form] = {part: parts[part]["median"] / limit for part, limit in limits.items()}
    return result


# Inference


def compare_inference(
    settings: Settings, sizes: Sequence[Size], proposals: Sequence[int], forms: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A case for each size and number of proposals: times of every form, ratios to stock, distance to the limit."""
    apply_settings(settings)
    models = build_inference(settings, forms, max(proposals))
    for size, count in product(sizes, proposals):
        yield _inference_case(settings, models, size, count)


def build_inference(settings: Settings, forms: Sequence[str], most_proposals: int) -> dict[str, FasterRCNN]:
    weights = random_weights(settings.backbone)
    options = {
        "rpn_pre_nms_top_n_test": max(1000, most_proposals),
        "rpn_post_nms_top_n_test": max(1000, most_proposals),
    }
    models = {form: build_form(form, settings, weights, **options) for form in forms}
    for model in models.values():
        ForcedProposals(model.rpn)
    return models


def _inference_case(
    settings: Settings, models: dict[str, FasterRCNN], size: Size, count: int
) -> dict[str, Any]:
    images = make_images(settings, size)
    for model in models.values():
        set_size(model, size)
        model.rpn.filter_proposals.count = count
    threshold, differences = agree(models, images, settings.tf32)
    watch = Stopwatch(settings.device)
    calls = {form: _inference_call(watch, models[form], images, settings.dtype_of(form)) for form in models}
    if has_detectron2(settings.backbone):
        calls["detectron2"] = _detectron2_call(watch, settings, images, size, count)
    dtypes = sorted({settings.dtype_of(form) for form in calls})
    calls |= {f"matrix {dtype}": _matrix_call(watch, settings, dtype) for dtype in dtypes}
    times = alternate(calls, settings.repeats, settings.warmup)
    matrices = {dtype: times.pop(f"matrix {dtype}")["total"] for dtype in dtypes}
    rates = {dtype: settings.matrix_size**3 / matrices[dtype]["median"] for dtype in dtypes}
    macs = count_macs(settings, size)
    return {
        "size": list(size),
        "proposals": count,
        "score_threshold": threshold,
        "difference": differences,
        "times": times,
        "images_per_second": {
            form: settings.batch / parts["total"]["median"] for form, parts in times.items()
        },
        "ratios": ratios(times),
        "macs": macs,
        "matrix_product": {"seconds": matrices, "macs_per_second": rates},
        "over_limit": over_limit(times, macs, rates, settings, settings.batch * count),
        "detectron2": times.get("detectron2"),
    }


def _matrix_call(watch: Stopwatch, settings: Settings, dtype: str) -> Callable[[], dict[str, float]]:
    multiply = matrix_product(settings.matrix_size, settings.device, dtype)
    return lambda: {"total": median(watch.time(multiply)["total"] for _ in range(3))}


def _inference_call(
    watch: Stopwatch, model: nn.Module, images: list[Tensor], dtype: str
) -> Callable[[], dict[str, float]]:
    @torch.inference_mode()
    def call() -> dict[str, float]:
        with autocast(watch.device, DTYPES[dtype]), watch.watch(inference_parts(model)):
            return watch.time(lambda: model(images))

    return call


def inference_parts(model: FasterRCNN) -> list[tuple[Any, str, str]]:
    """The parts of a detector of torchvision's shape; our head crops its maps itself, by `MapRegions`."""
    heads = model.roi_heads
    return [
        (model.transform, "forward", "transform"),
        (model.backbone, "forward", "trunk"),
        (model.rpn, "forward", "rpn"),
        (heads.box_roi_pool, "forward", "roi_align"),
        (MapRegions, "_crop", "roi_align"),
        (heads.box_head, "forward", "head"),
        (heads.box_predictor, "forward", "predictor"),
        (heads, "postprocess_detections", "postprocessing"),
        (model.transform, "postprocess", "postprocessing"),
    ]


def agree(models: dict[str, FasterRCNN], images: list[Tensor], tf32: bool) -> tuple[float, dict[str, float]]:
    """Check that the forms compute the same, and give each one score threshold.

    Gives the threshold, and each form's largest difference of float32 head features from the first form's,
    relative to the largest feature; more than `MAX_DIFFERENCE` is an error.
    """
    _allow_tf32(False)
    outputs = {form: head_outputs(model, images) for form, model in models.items()}
    _allow_tf32(tf32)
    reference, logits = next(iter(outputs.values()))
    differences = {
        form: float((features - reference).abs().max() / reference.abs().max())
        for form, (features, _) in outputs.items()
    }
    for form, difference in differences.items():
        if not difference <= MAX_DIFFERENCE:
            raise ValueError(
                f"{form} differs by {difference:.2e} of the largest feature; accepted: {MAX_DIFFERENCE}"
            )
    scores = logits.softmax(-1)[:, 1:].flatten()
    rank = min(DETECTED * len(images), len(scores))
    threshold = float(scores.topk(rank).values[-1])
    for model in models.values():
        model.roi_heads.score_thresh = threshold
    return threshold, differences


@torch.inference_mode()
def head_outputs(model: FasterRCNN, images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Features (R, C5) of the head, and class logits (R, K)."""
    seen: list[Tensor] = []
    heads = model.roi_heads
    hooks = [
        heads.box_head.register_forward_hook(lambda module, args, output: seen.append(output)),
        heads.box_predictor.register_forward_hook(lambda module, args, output: seen.append(output[0])),
    ]
    threshold, heads.score_thresh = heads.score_thresh, math.inf
    try:
        model(images)
    finally:
        heads.score_thresh = threshold
        for hook in hooks:
            hook.remove()
    return seen[0], seen[1]


# Detectron2, where it is installed


def has_detectron2(backbone: str) -> bool:
    """Whether it is installed and has a C4 recipe of that network."""
    return backbone in ("resnet50", "resnet101") and importlib.util.find_spec("detectron2") is not None


def _detectron2_call(
    watch: Stopwatch, settings: Settings, images: list[Tensor], size: Size, count: int
) -> Callable[[], dict[str, float]]:
    """Its C4 recipe of the same depth, random weights, the same number of forced proposals."""
    model = build_detectron2(settings, size, count)
    inputs = [{"image": image * 255, "height": size[0], "width": size[1]} for image in images]
    parts = [
        (model.backbone, "forward", "trunk"),
        (model.proposal_generator, "forward", "rpn"),
        (model.roi_heads.pooler, "forward", "roi_align"),
        (model.roi_heads.res5, "forward", "head"),
        (model.roi_heads.box_predictor, "forward", "predictor"),
        (model.roi_heads.box_predictor, "inference", "postprocessing"),
    ]

    @torch.inference_mode()
    def call() -> dict[str, float]:
        with autocast(watch.device, DTYPES[settings.dtype]), watch.watch(parts):
            return watch.time(lambda: model(inputs))

    return call


def build_detectron2(settings: Settings, size: Size, count: int) -> nn.Module:
    from detectron2 import model_zoo
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances

    depth = settings.backbone.removeprefix("resnet")
    config = model_zoo.get_config(f"COCO-Detection/faster_rcnn_R_{depth}_C4_3x.yaml", trained=False)
    config.MODEL.WEIGHTS, config.MODEL.DEVICE = "", settings.device
    config.MODEL.RPN.PRE_NMS_TOPK_TEST = config.MODEL.RPN.POST_NMS_TOPK_TEST = max(1000, count)
    model = build_model(config).eval()
    rpn = model.proposal_generator
    predict = rpn.predict_proposals

    def forced(anchors: object, logits: object, deltas: object, image_sizes: list[Size]) -> list[Any]:
        predict(anchors, logits, deltas, image_sizes)
        boxes = [random_boxes(count, size, seed=i).to(settings.device) for i in range(len(image_sizes))]
        scores = torch.zeros(count, device=settings.device)
        return [Instances(size, proposal_boxes=Boxes(b), objectness_logits=scores) for b in boxes]

    rpn.predict_proposals = forced
    return model


# Training


def compare_training(
    settings: Settings, sizes: Sequence[Size], regions: Sequence[int], forms: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A case for each size and number of regions: times of a step of every form, and ratios to stock."""
    apply_settings(settings)
    watch = Stopwatch(settings.device)
    for size, count in product(sizes, regions):
        steps = build_training(settings, forms, size, count, watch)
        differences = _compare_losses(steps, settings)
        times = alternate(
            {form: step.time for form, step in steps.items()}, settings.repeats, settings.warmup
        )
        yield {
            "size": list(size),
            "regions": count,
            "difference": differences,
            "times": times,
            "images_per_second": {f: settings.batch / parts["total"]["median"] for f, parts in times.items()},
            "ratios": ratios(times),
            "detectron2": None,
        }


def build_training(
    settings: Settings, forms: Sequence[str], size: Size, regions: int, watch: Stopwatch
) -> dict[str, "TrainingStep"]:
    weights = random_weights(settings.backbone)
    steps = {}
    for form in forms:
        model = build_form(form, settings, weights, training=True, box_batch_size_per_image=regions)
        set_size(model, size)
        # torchvision's own number of training proposals: four in five are background, so the sample fills
        ForcedProposals(model.rpn, max(2000, 4 * regions))
        images, targets = make_images(settings, size), make_targets(settings, size)
        steps[form] = TrainingStep(form, model, images, targets, settings, watch)
    return steps


def make_targets(settings: Settings, size: Size) -> list[dict[str, Tensor]]:
    """`NUM_OBJECTS` seeded boxes an image."""
    labels = torch.arange(NUM_OBJECTS) % (settings.num_classes - 1) + 1
    return [
        {
            "boxes": random_boxes(NUM_OBJECTS, size, seed=1000 + i).to(settings.device),
            "labels": labels.to(settings.device),
        }
        for i in range(settings.batch)
    ]


class TrainingStep:
    """Forward, backward and SGD's update of one model on one batch; ours with the fused optimizer."""

    def __init__(
        self,
        form: str,
        model: FasterRCNN,
        images: list[Tensor],
        targets: list[dict[str, Tensor]],
        settings: Settings,
        watch: Stopwatch,
    ) -> None:
        self.model, self.images, self.targets, self.watch = model, images, targets, watch
        self.dtype = DTYPES[settings.dtype_of(form)]
        parameters = [p for p in model.parameters() if p.requires_grad]
        fused = {} if form.startswith("stock") else {"fused": True}
        self.optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=1e-4, **fused)

    def losses(self) -> dict[str, Tensor]:
        with autocast(self.watch.device, self.dtype):
            return self.model(self.images, copy.deepcopy(self.targets))

    def __call__(self) -> None:
        with self.watch.part("forward"):
            loss = sum(self.losses().values())
        with self.watch.part("backward"):
            loss.backward()
        with self.watch.part("update"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def time(self) -> dict[str, float]:
        return self.watch.time(self)

    def count_regions(self) -> tuple[int, dict[str, float]]:
        """How many regions the head sees, and the losses, of a step without update."""
        seen: list[int] = []
        predictor = self.model.roi_heads.box_predictor
        hook = predictor.register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
        try:
            with torch.no_grad():
                losses = {name: float(value) for name, value in self.losses().items()}
        finally:
            hook.remove()
        return seen[0], losses


def _compare_losses(steps: dict[str, TrainingStep], settings: Settings) -> dict[str, float]:
    """The largest relative difference of each form's first losses from the first form's; checks the regions too."""
    counted = {form: step.count_regions() for form, step in steps.items()}
    _, reference = next(iter(counted.values()))
    sampler = next(iter(steps.values())).model.roi_heads.fg_bg_sampler
    for form, (count, _) in counted.items():
        if count != sampler.batch_size_per_image * settings.batch:
            raise ValueError(
                f"{form} trained on {count} regions, not {sampler.batch_size_per_image} an image"
            )
    return {
        form: max(abs(losses[name] - value) / max(abs(value), 1e-12) for name, value in reference.items())
        for form, (_, losses) in counted.items()
    }


# Memory: a process that holds one model alone


def peak_memory(command: Sequence[str], **request: object) -> dict[str, float]:
    """What `run_alone` gives for the request, in a new process: `command` and the request as JSON."""
    request = {k: asdict(v) if isinstance(v, Settings) else v for k, v in request.items()}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [*command, json.dumps(request)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_alone(
    task: str, settings: dict[str, Any], form: str, size: Sequence[int], count: int
) -> dict[str, float]:
    """Run one form once (training: two steps, the second with the optimizer's state) and give peaks in MB.

    building_mb: until the model stood; running_mb: from then on; peak_mb: of both. On CUDA, of tensors on the device.
    """
    chosen = Settings(**settings)
    apply_settings(chosen)
    if task == "training":
        run, times = (
            build_training(chosen, [form], tuple(size), count, Stopwatch(chosen.device))[form].time,
            2,
        )
    else:
        run, times = _run_inference(chosen, form, tuple(size), count), 1
    building = peak_mb(chosen.device)
    _forget_peak(chosen.device)
    for _ in range(times):
        run()
    running = peak_mb(chosen.device)
    return {"peak_mb": max(building, running), "building_mb": building, "running_mb": running}


def _run_inference(settings: Settings, form: str, size: Size, count: int) -> Callable[[], dict[str, float]]:
    model = build_inference(settings, [form], count)[form]
    set_size(model, size)
    model.rpn.filter_proposals.count = count
    images = make_images(settings, size)
    return _inference_call(Stopwatch(settings.device), model, images, settings.dtype_of(form))


def peak_mb(device: str) -> float:
    """The process's peak: resident memory, or tensors' memory on a CUDA device.

    Linux's VmHWM is of this program alone; `ru_maxrss` also remembers the process that started it.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    except (OSError, StopIteration):
        import resource

        unit = 2**20 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _forget_peak(device: str) -> None:
    """Begin a new peak, where the system can (Linux; elsewhere the old one stays)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# Growth with regions and pixels


def measure_scaling(
    settings: Settings, size: Size, regions: Sequence[int], sizes: Sequence[Size], form: str
) -> dict[str, dict[str, Any]]:
    """Times of one form: at `size` for each number of regions, and at their middle number for each of `sizes`."""
    apply_settings(settings)
    model = build_inference(settings, [form], max(regions))[form]
    middle = sorted(regions)[len(regions) // 2]
    set_size(model, size)
    model.rpn.filter_proposals.count = middle
    agree({form: model}, make_images(settings, size), settings.tf32)  # for the score threshold
    by_regions = {str(count): (size, count) for count in regions}
    by_pixels = {f"{h}x{w}": ((h, w), middle) for h, w in sizes}
    return {
        "regions": _growth(settings, model, by_regions, [float(count) for count in regions]),
        "pixels": _growth(settings, model, by_pixels, [float(h * w) for h, w in sizes]),
    }


def _growth(
    settings: Settings, model: FasterRCNN, cases: dict[str, tuple[Size, int]], x: list[float]
) -> dict[str, Any]:
    watch = Stopwatch(settings.device)

    def call(size: Size, count: int) -> Callable[[], dict[str, float]]:
        timed = _inference_call(watch, model, make_images(settings, size), settings.dtype)

        def run() -> dict[str, float]:
            set_size(model, size)
            model.rpn.filter_proposals.count = count
            return timed()

        return run

    calls = {name: call(*case) for name, case in cases.items()}
    times = alternate(calls, settings.repeats, settings.warmup)
    return {
        "x": x,
        "times": times,
        "fit": fit_line(x, [parts["total"]["median"] for parts in times.values()]),
    }


def fit_line(x: Sequence[float], y: Sequence[float]) -> dict[str, float] | None:
    """y = slope * x + intercept by least squares, and the part of y's variance that it explains; None below 2 points."""
    if len(x) < 2:
        return None
    slope, intercept = np.polyfit(x, y, 1).tolist()
    rest = float(np.sum((np.asarray(y) - slope * np.asarray(x) - intercept) ** 2))
    spread = float(np.sum((np.asarray(y) - np.mean(y)) ** 2))
    return {"slope": slope, "intercept": intercept, "r_squared": 1 - rest / spread if spread else 1.0}


# The loader and the evaluation


class _Decoded(Dataset):
    """The pictures of a data set decoded and thrown away; an item is asked for as `TransformedDataset`'s."""

    def __init__(self, paths: np.ndarray) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[int, ...], dict]:
        return load_image(str(self.paths[key[1]])).shape, {}


def measure_loader(
    config: Config, num_images: int, workers: Sequence[int], repeats: int
) -> Iterator[dict[str, Any]]:
    """For each number of workers: images/s of the training loader, and of decoding the same files alone.

    Both passes go through the same kind of loader over the same batches, from the first asked for to the last; the
    workers live on between passes.
    """
    dataset = build_dataset(config.data, "train")
    transform = TrainTransform(config.model.min_size, config.model.max_size, config.augment)
    datasets = {
        "loader": TransformedDataset(dataset, transform, config.train.seed),
        "decoding": _Decoded(dataset.image_paths),
    }
    batches = _batches(dataset.aspect_ratios(), num_images, config)
    count, watch = sum(map(len, batches)), Stopwatch("cpu")
    for num_workers in workers:
        loaders = {
            name: build_loader(d, batches, num_workers, pin_memory=False) for name, d in datasets.items()
        }
        calls = {name: partial(watch.time, partial(_drain, loader)) for name, loader in loaders.items()}
        times = alternate(calls, repeats, warmup=1)  # starts the workers
        yield {
            "workers": num_workers,
            "images": count,
            "times": times,
            "images_per_second": {name: count / parts["total"]["median"] for name, parts in times.items()},
            "ratio": ratios(times, "decoding")["loader"]["total"],
        }


def _batches(aspect_ratios: np.ndarray, num_images: int, config: Config) -> list[list[tuple[int, int]]]:
    """Training batches of as many epochs as `num_images` need."""
    sampler = TrainBatches(
        aspect_ratios, config.train.batch_size, config.train.seed, config.loader.group_by_aspect_ratio
    )
    batches: list[list[tuple[int, int]]] = []
    for epoch in range(-(-num_images // len(aspect_ratios))):
        sampler.set_epoch(epoch)
        batches += sampler
    return batches[: -(-num_images // config.train.batch_size)]


def _drain(loader: Iterable) -> None:
    for _ in loader:
        pass


def coco_backends() -> list[str]:
    packages = {"faster": "faster_coco_eval", "pycocotools": "pycocotools"}
    return [name for name, package in packages.items() if importlib.util.find_spec(package)]


def measure_evaluation(
    num_images: int, num_classes: int, num_boxes: int, detections: int, backends: Sequence[str], repeats: int
) -> dict[str, Any]:
    """Seconds of COCO's evaluation of generated detections by each backend, and its twelve numbers."""
    ground_truth, results = make_coco(num_images, num_classes, num_boxes, detections)
    watch, metrics = Stopwatch("cpu"), {}

    def call(backend: str) -> dict[str, float]:
        def evaluate() -> None:
            found = evaluate_coco(ground_truth, results, backend=backend)
            metrics[backend] = {name: found[name] for name in COCO_METRICS}

        return watch.time(evaluate)

    times = alternate({b: partial(call, b) for b in backends}, repeats, warmup=0)
    first = metrics[backends[0]]
    differences = {b: max(abs((m[k] or 0) - (first[k] or 0)) for k in first) for b, m in metrics.items()}
    return {
        "times": times,
        "metrics": metrics,
        "difference": differences,
        "ratios": ratios(times, "pycocotools"),
    }


def make_coco(num_images: int, num_classes: int, num_boxes: int, detections: int) -> tuple[dict, list[dict]]:
    """Seeded ground truth, and results of which each object has a shifted one and the rest are anywhere."""
    rng = np.random.default_rng(0)
    size = np.array([640, 480])

    def draw(count: int) -> np.ndarray:
        sides = np.exp(rng.uniform(math.log(8), math.log(400), (count, 2)))
        return np.concatenate([rng.uniform(0, 1, (count, 2)) * (size - sides), sides], axis=1)  # xywh

    image_of = np.sort(rng.integers(num_images, size=num_boxes))
    class_of = rng.integers(num_classes, size=num_boxes)
    boxes = draw(num_boxes)
    annotations = [
        {"id": n, "image_id": i, "category_id": k, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (i, k, box) in enumerate(
            zip((image_of + 1).tolist(), (class_of + 1).tolist(), boxes.tolist(), strict=True), start=1
        )
    ]
    results = []
    for image in range(num_images):
        own = np.flatnonzero(image_of == image)[:detections]
        shifted = boxes[own] + boxes[own][:, [2, 3, 2, 3]] * rng.normal(0, 0.08, (len(own), 4))
        rest = detections - len(own)
        every = np.concatenate([shifted, draw(rest)])
        every[:, 2:] = every[:, 2:].clip(1)
        labels = np.concatenate([class_of[own], rng.integers(num_classes, size=rest)]) + 1
        scores = np.concatenate([rng.uniform(0.2, 1, len(own)), rng.uniform(0, 0.5, rest)])
        results += [
            {"image_id": image + 1, "category_id": label, "bbox": box, "score": score}
            for label, box, score in zip(labels.tolist(), every.tolist(), scores.tolist(), strict=True)
        ]
    images = [{"id": i + 1, "height": 480, "width": 640} for i in range(num_images)]
    categories = [{"id": k + 1, "name": f"class {k + 1}"} for k in range(num_classes)]
    return {"images": images, "categories": categories, "annotations": annotations}, results
