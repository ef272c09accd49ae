"""Compare a training step in several forms of one detector."""

import copy
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from detector.engine import autocast

from .models import ForcedProposals, build_form, make_images, random_boxes, random_weights, set_case
from .settings import DTYPES, Settings, Size
from .timing import Seconds, Stopwatch, alternate, per_second, ratios

NUM_OBJECTS = 8  # ground-truth boxes of a training image


def compare_training(
    settings: Settings, sizes: Sequence[Size], regions: Sequence[int], forms: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield a case for each size and number of regions: times of a step by form, and ratios to stock."""
    settings.apply()
    for size, count in product(sizes, regions):
        steps = build_training(settings, forms, size, count)
        differences = _compare_losses(steps, settings)
        times = alternate(
            {form: step.time for form, step in steps.items()}, settings.repeats, settings.warmup
        )
        yield {
            "size": list(size),
            "regions": count,
            "difference": differences,
            "times": times,
            "images_per_second": per_second(times, settings.batch),
            "ratios": ratios(times),
        }


def build_training(
    settings: Settings, forms: Sequence[str], size: Size, regions: int
) -> dict[str, "TrainingStep"]:
    weights = random_weights(settings.backbone)
    steps = {}
    for form in forms:
        model = build_form(form, settings, weights, training=True, box_batch_size_per_image=regions)
        ForcedProposals(model.rpn)
        # At least 2000, as in torchvision's training. Four in five are background, so the sample of regions fills.
        set_case(model, size, max(2000, 4 * regions))
        steps[form] = TrainingStep(form, model, settings, size)
    return steps


def make_targets(settings: Settings, size: Size) -> list[dict[str, Tensor]]:
    """`NUM_OBJECTS` seeded boxes per image: boxes (M, 4) xyxy pixels, labels (M,)."""
    labels = torch.arange(NUM_OBJECTS) % (settings.num_classes - 1) + 1
    return [
        {
            "boxes": random_boxes(NUM_OBJECTS, size, seed=1000 + i).to(settings.device),
            "labels": labels.to(settings.device),
        }
        for i in range(settings.batch)
    ]


class TrainingStep:
    """Forward, backward and SGD's update of one model on one batch. Our forms use the fused optimizer."""

    def __init__(self, form: str, model: FasterRCNN, settings: Settings, size: Size) -> None:
        self.model, self.watch = model, Stopwatch(settings.device)
        self.images, self.targets = make_images(settings, size), make_targets(settings, size)
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

    def time(self) -> Seconds:
        return self.watch.time(self)

    def count_regions(self) -> tuple[int, dict[str, float]]:
        """The number of regions that the head sees, and the losses, in a step without an update."""
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
    """The largest relative difference of each form's losses from the first form's, before any update.

    ValueError: a form trains on another number of regions.
    """
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
