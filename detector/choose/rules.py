"""The rules that choose a recipe, each with its reason. They are tuned on the measured recipes of configs/.

A rule returns settings by section, and a sentence.
"""

import math
import re
from typing import Any

import numpy as np

from ..model.anchor_fit import anchor_recall, fit_anchors
from .statistics import Machine, Objects

Settings = dict[str, dict[str, Any]]
Rule = tuple[Settings, str]

# Small objects, the smallest tenth, should have this many pixels: one and a half positions of the map.
_SMALL = 24
_SHORTEST = 300
_LONGEST = {"cpu": 480, "cuda": 800}
_RATIOS = 3
# Words of classes whose mirror image is another class.
_SIDED = re.compile(r"\b(left|right|arrow|text|letter|digit|number|sign|clock|[0-9a-z])\b", re.IGNORECASE)


def choose_network(machine: Machine, weights: str | None, why: str) -> Rule:
    """weights: of the ImageNet network that `published_network` names, or None. why: where they are, or why not."""
    name = published_network(machine)
    if weights is not None:
        backbone = {"name": name, "weights": weights, "norm": "frozen", "frozen_stages": 2}
        return {"model": {"backbone": backbone}}, f"{name} with published weights ({why})"
    width = 64 if machine.has_gpu else 32
    reason = f"resnet18 of width {width} from random weights, as {why}"
    return {"model": {"backbone": {"name": "resnet18", "width": width}}}, reason


def published_network(machine: Machine) -> str:
    return "resnet50" if machine.has_gpu else "resnet18"


def choose_size(objects: Objects, machine: Machine) -> Rule:
    """The network's size, from the sizes of the objects and of the pictures."""
    small = float(np.percentile(objects.roots, 10))
    longest = _LONGEST["cuda" if machine.has_gpu else "cpu"]
    short = round(objects.short * _SMALL / small / 4) * 4
    short = min(max(short, _SHORTEST), longest)
    ratio = min(max(objects.long / objects.short, 1), 5 / 3)
    shown = small * short / objects.short
    reason = (
        f"pictures of {objects.short} x {objects.long} pixels (short and long side) are resized to a short side of {short}: "
        f"the smallest tenth of the objects then has up to {shown:.0f} pixels ({small:.0f} in the pictures)"
    )
    return {"model": {"min_size": short, "max_size": math.ceil(short * ratio)}}, reason


def choose_anchors(objects: Objects, min_size: int, max_size: int) -> Rule:
    """Anchors that reach the objects at the network's size."""
    shapes = objects.shapes_at(min_size, max_size)
    fits = [fit_anchors(shapes, count, _RATIOS) for count in (3, 4, 5)]
    recalls = [anchor_recall(shapes, *fit) for fit in fits]
    # A further size must bring something, since it costs time.
    chosen = next(i for i, recall in enumerate(recalls) if recall >= max(recalls) - 0.005)
    sizes, ratios = fits[chosen]
    reason = f"anchors of {_listed(sizes)} pixels and height / width {_listed(ratios)} reach {recalls[chosen]:.1%} of the objects"
    return {"model": {"anchor_sizes": list(sizes), "aspect_ratios": list(ratios)}}, reason


def choose_regions(objects: Objects, machine: Machine) -> Rule:
    """Regions and proposals of an image, from the number of objects in a picture."""
    usual, most = float(objects.counts.mean()), int(np.percentile(objects.counts, 98))
    if machine.has_gpu:
        regions, proposals, kept = 256, 1000, 500
    else:
        regions = int(min(max(12, 4 * round(usual)), 64))
        proposals, kept = max(200, 4 * regions), min(max(50, 10 * most), 300)
    # Crowded pictures need more than the usual cost allows.
    kept = max(kept, min(2 * most, 2000))
    pre = max(2000 if machine.has_gpu else 600, 2 * kept)
    model = {
        "rpn_pre_nms_top_n_train": pre,
        "rpn_pre_nms_top_n_test": pre,
        "rpn_post_nms_top_n_train": proposals,
        "rpn_post_nms_top_n_test": kept,
        "rpn_batch_size_per_image": 256 if machine.has_gpu else 128 if usual > 3 else 64,
        "box_batch_size_per_image": regions,
        "box_positive_fraction": 0.25 if usual > 3 else 0.5,
        "box_score_thresh": 0.01,
        "box_detections_per_img": max(100, 2 * most),
    }
    return {"model": model}, (
        f"{usual:.1f} objects a picture, at most {most} in 98 % of them: {regions} regions an image to train, {kept} to detect"
    )


def choose_augmentation(objects: Objects) -> Rule:
    """Flips that the classes and the objects' places allow, scale, brightness and contrast."""
    sided = [name for name in objects.class_names if _SIDED.search(name.replace("_", " "))]
    heights = (objects.boxes[:, 1] + objects.boxes[:, 3]) / 2 / objects.sizes[:, 0]
    # Where there is an above and a below, objects keep to one of them, or are larger in one of them.
    sizes = objects.roots / objects.sizes.max(axis=1)
    tied = abs(np.corrcoef(heights, sizes)[0, 1]) if heights.std() * sizes.std() > 0 else 1.0
    is_even = len(heights) >= 200 and abs(heights.mean() - 0.5) < 0.015 and tied < 0.1
    augment = {
        "horizontal_flip": 0.0 if sided else 0.5,
        "vertical_flip": 0.5 if is_even and not sided else 0.0,
        "scale": [0.8, 1.2],
        "brightness": 0.2,
        "contrast": 0.2,
    }
    mirrored = f"no flip, since {sided[0]!r} may change its meaning" if sided else "horizontal flips"
    if augment["vertical_flip"]:
        mirrored += ", and vertical ones, since objects lie and grow alike above and below"
    return {"augment": augment}, f"augmentation: {mirrored}; scale, brightness, contrast"


def choose_training(machine: Machine, is_pretrained: bool, num_images: int) -> Rule:
    """Batch size, rate and precision."""
    batch = 4 if not machine.has_gpu else 16 if machine.memory > 30 * 2**30 else 8
    batch = max(1, min(batch, num_images // 4 or 1))
    # 1e-3 is that of the measured recipes, at batches of 4.
    rate = (2e-4 if is_pretrained else 1e-3) * math.sqrt(batch * machine.num_processes / 4)
    train: dict[str, Any] = {
        "batch_size": batch,
        "optimizer": "adamw",
        "lr": float(f"{rate:.2g}"),
        "weight_decay": 0.05,
        "schedule": "cosine",
        "clip_norm": 10.0,
        # AP50 of few pictures is too coarse to choose by.
        "best_metric": "AP",
    }
    if machine.has_gpu:
        train["amp"] = "bf16"
    workers = min(8, max(1, machine.cores - 1)) if machine.has_gpu else min(2, machine.cores)
    return {"train": train, "loader": {"num_workers": workers}}, (
        f"batches of {batch}, AdamW at {train['lr']:g}, cosine{', bf16' if machine.has_gpu else ''}"
    )


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
