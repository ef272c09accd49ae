"""Training and evaluation loops. They take built objects, not a configuration."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR
from torch.optim.swa_utils import AveragedModel
from torchvision.ops import FrozenBatchNorm2d

from . import processes
from .data.loader import Batch
from .draws import tagged
from .model.faster_rcnn import C4FasterRCNN
from .model.losses import LOSSES
from .state_fit import check_fit, check_moments

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Task(Protocol):
    """What a training computes of a batch, and the names of its losses."""

    losses: tuple[str, ...]

    def __call__(
        self, network: nn.Module, batch: Any, device: torch.device, key: tuple[int, int, int]
    ) -> dict[str, Tensor]:
        """The losses of `network`. key: (seed, epoch, batch), for what is drawn at random."""

    def name(self, batch: Any) -> str:
        """The pictures of a batch, in words."""

    def count(self, batch: Any) -> int:
        """The number of pictures of a batch."""


class DetectorTask:
    """The training of a detector. Anchors and regions are sampled by (seed, epoch, image id)."""

    losses = LOSSES

    def __init__(self, model: C4FasterRCNN) -> None:
        self.model = model

    def __call__(
        self, network: nn.Module, batch: Batch, device: torch.device, key: tuple[int, int, int]
    ) -> dict[str, Tensor]:
        images, targets = to_device(batch, device)
        self.model.seed_sampling([(*key[:2], target["image_id"]) for target in targets])
        return network(images, targets)

    def name(self, batch: Batch) -> str:
        return f"image ids {[target['image_id'] for target in batch[1]]}"

    def count(self, batch: Batch) -> int:
        return len(batch[0])


@dataclass
class Pass:
    """A batch that went through the model in training. `run()` computes its losses again, with the same samples."""

    batch: Any
    losses: Tensor  # in the order of the task's
    run: Callable[[], dict[str, Tensor]]


class NonFiniteLossError(FloatingPointError):
    """An update whose loss or gradients are infinite or NaN; the message has the pictures and the losses.

    cause: the first batch of the update with such a loss, or the first batch. is_loss: whether it has such a loss.
    """

    def __init__(self, passes: list[Pass], task: Task) -> None:
        bad = [p for p in passes if not p.losses.isfinite().all()]
        self.is_loss, self.cause = bool(bad), (bad or passes)[0]
        numbers = zip(task.losses, self.cause.losses.tolist(), strict=True)
        losses = ", ".join(f"{name} {value:.4g}" for name, value in numbers)
        what = "loss" if bad else "gradient"
        super().__init__(f"a {what} is not finite at {task.name(self.cause.batch)}: {losses}.")


def stop_at_nonfinite(error: NonFiniteLossError) -> None:
    raise error


def parameter_groups(model: nn.Module, weight_decay: float, norm_decay: bool) -> list[dict[str, Any]]:
    """Trainable parameters in two groups for an optimizer: with weight decay, and without.

    Norms and biases, which have one dimension, decay only if `norm_decay` is True.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if norm_decay or p.ndim > 1]
    others = [p for p in trainable if not norm_decay and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_schedule(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    *,
    kind: str,
    milestones: Iterable[int] = (),
    gamma: float = 0.1,
    warmup_steps: int = 0,
    warmup_factor: float = 0.001,
) -> LRScheduler:
    """Linear warm-up, then steps at `milestones`, or a cosine to 0 at `total_steps`. Steps are updates.

    kind: "multistep" or "cosine". The warm-up takes at most half of `total_steps`.
    """
    warmup_steps = min(warmup_steps, total_steps // 2)
    if kind == "cosine":
        main: LRScheduler = CosineAnnealingLR(optimizer, max(1, total_steps - warmup_steps))
    else:
        main = MultiStepLR(optimizer, sorted(max(1, m - warmup_steps) for m in milestones), gamma)
    if warmup_steps == 0:
        return main
    warmup = LinearLR(optimizer, start_factor=warmup_factor, total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, main], milestones=[warmup_steps])


class WeightAverage(AveragedModel):
    """Exponential moving average of a model's weights; after n updates its decay is min(decay, (1 + n) / (10 + n)).

    Running means and variances of batch norms are averaged too: those of the newest weights fit averaged ones less
    well. Both models have the same other buffers.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay
        for copy, module in zip(self.module.modules(), model.modules(), strict=True):
            for name, buffer in module.named_buffers(recurse=False):
                if not (isinstance(module, _BatchNorm) and buffer.is_floating_point()):
                    setattr(copy, name, buffer)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Average `model` as it is now. The first one is taken as it is.

        torch's own update reads its counter back from the device. It also writes every buffer, and frozen norms that
        were written to are folded anew.
        """
        n = int(self.n_averaged)
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        both = [(*each.parameters(), *each.buffers()) for each in (self.module, model)]
        apart = [(average, newest) for average, newest in zip(*both, strict=True) if average is not newest]
        averages, newest = map(list, zip(*apart, strict=True))
        torch._foreach_lerp_(averages, newest, 1 - decay)
        self.n_averaged += 1


@dataclass
class Training:
    """The state of a training, which changes with each update and from which a run resumes."""

    model: nn.Module
    task: Task
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    ema: WeightAverage | None = None
    epoch: int = 0  # whole epochs done
    batch: int = 0  # batches done of the current epoch
    step: int = 0  # updates done
    best: float = -math.inf
    evaluations_since_best: int = 0
    awaits_evaluation: bool = False  # of the last whole epoch
    skipped: int = 0  # updates without a step, because a loss was not finite
    point: Any = None  # what `rewind` goes back to; None in the middle of an update

    def __post_init__(self) -> None:
        self.network = processes.parallel(self.model)  # what training calls

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    @property
    def evaluated_model(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in self._parts}
        return parts | {name: getattr(self, name) for name in self._counters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self._parts:
            if name not in state:
                raise ValueError(
                    f"the training state has no {name}: resume with the config it was saved with"
                )
            try:
                _load(getattr(self, name), state[name])
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
                raise ValueError(
                    f"the training state's {name} does not fit the config: resume with the config it was saved with"
                ) from error
        for name in self._counters:
            # States of earlier versions lack the last two.
            setattr(self, name, state.get(name, getattr(self, name)))

    def remember(self) -> None:
        """Remember this point between two updates: all that a batch changes before the weights change."""
        buffers = self._changing_buffers()
        copies = [torch.empty_like(buffer) for buffer in buffers]
        _copy(copies, buffers)
        self.point = (self.epoch, self.batch, copies)

    def rewind(self) -> bool:
        """Go back to the last whole update. Returns False, and does nothing, in the middle of an update."""
        if self.point is None:
            return False
        self.epoch, self.batch, buffers = self.point
        _copy(self._changing_buffers(), buffers)
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _changing_buffers(self) -> list[Tensor]:
        """The buffers that a batch may change. Those of frozen norms are most of a network's, and never change."""
        modules = (m for m in self.model.modules() if not isinstance(m, FrozenBatchNorm2d))
        return [buffer for module in modules for buffer in module.buffers(recurse=False)]

    @property
    def _parts(self) -> list[str]:
        return ["model", "optimizer", "schedule", "scaler"] + (["ema"] if self.ema is not None else [])

    _counters = ("epoch", "batch", "step", "best", "evaluations_since_best", "awaits_evaluation", "skipped")


@torch.no_grad()
def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    """Copy many tensors at once, since each copy alone is an operation of the host."""
    if into:
        torch._foreach_copy_(into, values)


def _load(part: Any, saved: Any) -> None:
    """Load the state of one part of a training. ValueError: it is not of such a part."""
    check_fit(saved, part.state_dict())
    part.load_state_dict(saved)
    if isinstance(part, torch.optim.Optimizer):
        check_moments(part)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to `device`: images (3, h, w) uint8 -> float32 in [0, 1], and the tensors of the targets.

    Copies from pinned memory do not wait.
    """
    images, targets = batch
    images = [image.to(device, non_blocking=True).float().div_(255) for image in images]
    moved = [
        {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in target.items()}
        for target in targets
    ]
    return images, moved


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """The context of mixed precision in `dtype`; None changes nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class LossMonitor:
    """Collects the losses of steps on the device, and reads them every `interval` steps.

    On a CPU it reads every step. Elsewhere it reads seldom, because reading waits for the device.
    """

    def __init__(self, device: torch.device, interval: int, names: tuple[str, ...] = LOSSES) -> None:
        self.names = names
        self.interval = 1 if device.type == "cpu" else interval
        self.pending: list[Tensor] = []

    def add(self, losses: Tensor) -> list[dict[str, float]]:
        """Add a step's losses, in the order of their names. Returns the steps that are read now, or [] if it is not yet time to read."""
        self.pending.append(losses)
        return self.read() if len(self.pending) >= self.interval else []

    def read(self) -> list[dict[str, float]]:
        """The losses of the steps not yet read, one dict a step, without those that are infinite or NaN."""
        if not self.pending:
            return []
        values, self.pending = processes.mean(torch.stack(self.pending)).tolist(), []
        return [dict(zip(self.names, row, strict=True)) for row in values if all(map(math.isfinite, row))]


def forward(
    training: Training,
    network: nn.Module,
    batch: Any,
    device: torch.device,
    key: tuple[int, int, int],
    amp_dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The losses of a batch in training.

    key: (seed, epoch, batch). What draws from torch's global state, such as dropout, depends on the key and the number
    of the process.
    """
    rng = np.random.default_rng(tagged("layers", *key, processes.rank()))
    torch.manual_seed(int(rng.integers(2**63)))
    with autocast(device, amp_dtype):
        return training.task(network, batch, device, key)


def train_one_epoch(
    training: Training,
    loader: Iterable[Any],
    device: torch.device,
    *,
    num_batches: int,
    seed: int,
    amp_dtype: torch.dtype | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    read_every: int = 20,
    on_step: Callable[[list[dict[str, float]], int], bool | None] = lambda losses, num_images: None,
    on_nonfinite: Callable[[NonFiniteLossError], None] = stop_at_nonfinite,
) -> bool:
    """Train on the rest of an epoch: the batches that `loader` still has of the epoch's `num_batches`.

    The loss is the sum of the task's. Each update has the mean gradient of `accumulate` batches; the epoch's
    last update may have fewer. `on_step(losses, num_images)` is called after each batch, with the losses that were
    read after it. When it returns True, training stops after the current update. Returns whether the epoch was
    finished.

    An update whose loss or gradients are infinite or NaN changes no weight. `on_nonfinite` is called with the error,
    and training goes on where it returns. Whatever is raised here, `training.rewind()` gives the last whole update.

    Several processes train with the mean of their gradients. They skip the same updates, and the losses read are their
    means. `on_step` must return the same on all of them.
    """
    network, task, stop = training.network, training.task, False
    monitor = LossMonitor(device, read_every, task.losses)
    network.train()
    training.remember()
    passes: list[Pass] = []
    for batch in loader:
        key = (seed, training.epoch, training.batch)
        run = partial(forward, training, batch=batch, device=device, key=key, amp_dtype=amp_dtype)
        begun = training.batch // accumulate * accumulate
        in_update = min(accumulate, num_batches - begun)
        training.batch += 1
        whole = training.batch == begun + in_update
        with nullcontext() if whole else processes.keeping_gradients(network):
            losses = run(network)
            values = torch.stack([losses[name].detach().float() for name in task.losses])
            passes.append(Pass(batch, values, partial(run, training.model)))
            training.scaler.scale(sum(losses.values()) / in_update).backward()
        read = monitor.add(passes[-1].losses)
        if training.batch == num_batches:
            read += monitor.read()
        if whole:
            if not update(training, clip_norm, torch.stack([p.losses for p in passes]).sum()):
                on_nonfinite(NonFiniteLossError(passes, task))
            passes = []
        stop = bool(on_step(read, task.count(batch))) or stop
        if stop and whole and training.batch < num_batches:
            return False
    training.epoch, training.batch = training.epoch + 1, 0
    return True


def update(training: Training, clip_norm: float | None, loss: Tensor) -> bool:
    """Clip the gradients, step the optimizer, the schedule and the averages, and clear the gradients.

    Returns False where `loss` or the gradients' norm is not finite: then no weight, buffer, average or scale changes.
    fp16's gradients overflow now and then. The scaler skips those steps itself, and halves its scale; a scale of 1 or less
    makes no gradient overflow.
    """
    training.scaler.unscale_(training.optimizer)
    norm = clip_gradients(training.optimizer, clip_norm)
    finite = bool(torch.isfinite(loss + norm))
    if not finite and training.scaler.is_enabled():
        finite = training.scaler.get_scale() > 1 and bool(torch.isfinite(loss))
    finite = not processes.any_of(not finite)
    (*_, buffers), training.point = training.point, None
    if finite:
        training.scaler.step(training.optimizer)
    else:
        _copy(training._changing_buffers(), buffers)
    training.scaler.update(None if finite else training.scaler.get_scale())
    training.optimizer.zero_grad(set_to_none=True)
    training.schedule.step()
    training.step += 1
    if finite and training.ema is not None:
        training.ema.update_parameters(training.model)
    training.remember()
    return finite


def clip_gradients(optimizer: torch.optim.Optimizer, clip_norm: float | None) -> Tensor:
    """Scale all gradients down to a norm of `clip_norm`, if one is given. Returns the norm before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if clip_norm is not None:
        return nn.utils.clip_grad_norm_(parameters, clip_norm)
    return nn.utils.get_total_norm([p.grad for p in parameters])


@torch.inference_mode()
def evaluate(
    model: C4FasterRCNN,
    loader: Iterable[Batch],
    device: torch.device,
    *,
    category_ids: Iterable[int],
    seed: int = 0,
    amp_dtype: torch.dtype | None = None,
    on_step: Callable[[int], object] = lambda num_images: None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Detections in COCO's results format, and mean losses per image, from one pass over the images.

    category_ids: the data set's own ids, `category_ids[label - 1]`. Returns (results, losses); losses["loss"] is the
    sum of the four. Where several processes share the batches, the first one gets those of all of them. Anchors and regions are sampled by (seed, image id), so the losses of two epochs can be compared.
    """
    ids, was_training = list(category_ids), model.training
    model.eval()
    results: list[list[dict[str, Any]]] = []
    losses: list[Tensor] = []  # (N, 4) a batch

    def evaluate_one_size(
        images: list[Tensor], targets: list[dict]
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        model.seed_sampling([tagged("evaluation", seed, target["image_id"]) for target in targets])
        with autocast(device, amp_dtype):
            means, detections = model.evaluate(images, targets)
        own = torch.stack([means[name].float() for name in LOSSES])
        return [(own, detected) for detected in detections]

    for batch in loader:
        images, targets = to_device(batch, device)
        found = model.transform.by_padded_size(evaluate_one_size, images, targets)
        losses.append(torch.stack([own for own, _ in found]))
        results.append([])
        for target, (_, detected) in zip(targets, found, strict=True):
            results[-1] += coco_results(detected, target["image_id"], ids)
        on_step(len(images))
    model.seed_sampling(None)
    model.train(was_training)
    batches = processes.collect(list(zip(results, [values.tolist() for values in losses], strict=True)))
    rows = [row for _, values in batches for row in values] or [[0.0] * len(LOSSES)]
    means = dict(zip(LOSSES, np.mean(rows, axis=0).tolist(), strict=True))
    return [each for found, _ in batches for each in found], with_total(means)


def with_total(losses: dict[str, float]) -> dict[str, float]:
    """The losses with their sum as "loss" before them. A single one, of that name, stays as it is."""
    return {"loss": sum(losses.values()), **losses}


def coco_results(detected: dict[str, Tensor], image_id: int, category_ids: list[int]) -> list[dict[str, Any]]:
    """One image's detections as COCO results: xywh boxes, and the data set's own category ids.

    detected: boxes (M, 4) xyxy pixels, labels (M,), scores (M,). category_ids: `category_ids[label - 1]`.
    """
    boxes = detected["boxes"].float().cpu()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(
            boxes, detected["labels"].tolist(), detected["scores"].tolist(), strict=True
        )
    ]
