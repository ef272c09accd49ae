"""Compare detection in several forms of one detector: times by part, ratios to stock, distance to the limit."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from backbones.regions import Regions
from detector.engine import autocast
from detector.model.roi_heads import BoxHeads

from .detectron2 import build_detectron2, detectron2_parts, has_detectron2
from .limit import count_macs, matrix_call, over_limit
from .models import ForcedProposals, build_form, make_images, random_weights, set_case
from .settings import DTYPES, Settings, Size, allow_tf32
from .timing import Parts, Seconds, Stopwatch, alternate, per_second, ratios

# Pairs of box and class per image that reach NMS: about as many as a trained detector leaves at a score of 0.05.
DETECTED = 300
# Accepted difference of head features, relative to the largest: in float32, and of a form that is cast to 16 bits.
MAX_DIFFERENCE, MAX_DIFFERENCE_16 = 1e-4, 0.1


def compare_inference(
    settings: Settings, sizes: Sequence[Size], proposals: Sequence[int], forms: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield a case for each size and number of proposals: times by form, ratios to stock, distance to the limit."""
    settings.apply()
    models = build_inference(settings, forms, max(proposals))
    for size, count in product(sizes, proposals):
        yield _inference_case(settings, models, size, count)


def build_inference(settings: Settings, forms: Sequence[str], most_proposals: int) -> dict[str, FasterRCNN]:
    """A model of each form, all with the same random weights and with forced proposals."""
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
        set_case(model, size, count)
    threshold, differences = agree(models, images, settings.tf32)
    watch = Stopwatch(settings.device)
    # A form that is cast to 16 bits needs no autocast.
    calls = {
        form: inference_call(watch, model, images, settings.dtype_of(form) if _is_wide(model) else "float32")
        for form, model in models.items()
    }
    if has_detectron2(settings.backbone):
        model = build_detectron2(settings, size, count)
        inputs = [{"image": image * 255, "height": size[0], "width": size[1]} for image in images]
        calls["detectron2"] = inference_call(watch, model, inputs, settings.dtype, detectron2_parts(model))
    dtypes = sorted({settings.dtype_of(form) for form in calls})
    calls |= {f"matrix {dtype}": matrix_call(watch, settings, dtype) for dtype in dtypes}
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
        "images_per_second": per_second(times, settings.batch),
        "ratios": ratios(times),
        "macs": macs,
        "matrix_product": {"seconds": matrices, "macs_per_second": rates},
        "over_limit": over_limit(times, macs, rates, settings, settings.batch * count),
    }


def inference_call(
    watch: Stopwatch, model: nn.Module, inputs: list, dtype: str, parts: Parts | None = None
) -> Callable[[], Seconds]:
    """A call that times model(inputs). parts: None takes those of `inference_parts`."""
    parts = inference_parts(model) if parts is None else parts

    @torch.inference_mode()
    def call() -> Seconds:
        with autocast(watch.device, DTYPES[dtype]), watch.watch(parts):
            return watch.time(lambda: model(inputs))

    return call


def inference_parts(model: FasterRCNN) -> Parts:
    """The parts of a detector with torchvision's attributes. Our head crops its maps when it reads `Regions`."""
    heads, trunk = model.roi_heads, model.backbone
    return [
        (model.transform, "forward", "transform"),
        # A clock inside a compiled call would break it in two, so this one is outside.
        (trunk, "forward" if trunk._compiled_call_impl is None else "_compiled_call_impl", "trunk"),
        (model.rpn, "forward", "rpn"),
        (heads.box_roi_pool, "forward", "roi_align"),
        (Regions, "_read", "roi_align"),
        (heads.box_head, "forward", "head"),
        (heads.box_predictor, "forward", "predictor"),
        (heads, "detect" if isinstance(heads, BoxHeads) else "postprocess_detections", "postprocessing"),
        (model.transform, "postprocess", "postprocessing"),
    ]


def agree(models: dict[str, FasterRCNN], images: list[Tensor], tf32: bool) -> tuple[float, dict[str, float]]:
    """Check that all forms compute the same, and give them the same score threshold.

    images: N x (3, H, W). Returns the threshold, and the largest difference of each form's float32 head features from
    the first form's, relative to the largest feature. ValueError: a difference is above `MAX_DIFFERENCE`.
    """
    allow_tf32(False)
    outputs = {form: head_outputs(model, images) for form, model in models.items()}
    allow_tf32(tf32)
    reference, logits = next(iter(outputs.values()))
    differences = {
        form: float((features - reference).abs().max() / reference.abs().max())
        for form, (features, _) in outputs.items()
    }
    for form, difference in differences.items():
        accepted = MAX_DIFFERENCE if _is_wide(models[form]) else MAX_DIFFERENCE_16
        if not difference <= accepted:
            raise ValueError(
                f"{form} differs by {difference:.2e} of the largest feature; accepted: {accepted}"
            )
    scores = logits.softmax(-1)[:, 1:].flatten()
    rank = min(DETECTED * len(images), len(scores))
    threshold = float(scores.topk(rank).values[-1])
    for model in models.values():
        model.roi_heads.score_thresh = threshold
    return threshold, differences


def _is_wide(model: FasterRCNN) -> bool:
    return next(model.backbone.parameters()).dtype == torch.float32


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
