"""Numbers that are infinite or NaN: which pictures and layer they begin in, what to change, and weights without them."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import processes
from .config import TrainConfig
from .engine import NonFiniteLossError, Pass, Training
from .files import write_json

# No trained weight is near this. With larger ones, the next products overflow.
_LARGEST_WEIGHT = 1e8
_MOST_IN_A_ROW = 10
_MOST_REPORTS = 20
# Pictures of a batch that a message names; the report has all of them.
_MOST_NAMED = 16
# Losses start below 20, whatever the number of classes.
_EXPLODED = 1000.0
_EARLY = 100


class NonFiniteGuard:
    """Reports the updates of a run whose loss is not finite. It stops the run, or lets it skip them.

    folder: receives a JSON and a picture of the batch of each of the first reports.
    pictures: what is known of each picture of a batch, with its "file". save_sheet(path, batch) writes them as a picture.
    """

    def __init__(
        self,
        training: Training,
        folder: Path,
        options: TrainConfig,
        pictures: Callable[[Any], list[dict[str, Any]]],
        save_sheet: Callable[[Path, Any], None],
    ) -> None:
        self.training, self.folder, self.options = training, folder, options
        self.pictures, self.save_sheet = pictures, save_sheet
        self._skipped: deque[int] = deque(maxlen=_MOST_IN_A_ROW)
        self._has_warned = False

    def __call__(self, error: NonFiniteLossError) -> None:
        """Report an update that was not made, once for all processes.

        NonFiniteLossError: it was not to be skipped, or was one of ten in a row.
        """
        training = self.training
        training.skipped += 1
        self._skipped.append(training.step)
        layer = first_nonfinite_layer(training.model, error.cause.run)
        # The second pass changed the statistics of batch norms.
        training.rewind()
        culprit = next((i for i, is_loss in enumerate(processes.gather(error.is_loss)) if is_loss), 0)
        written = self._write(error.cause, layer) if processes.rank() == culprit else ""
        message = f"{error} {self._describe(error.cause, layer)}. {written}"
        message = processes.gather(message)[culprit]
        is_row = list(self._skipped) == list(range(training.step - _MOST_IN_A_ROW + 1, training.step + 1))
        if self.options.on_nonfinite == "stop" or is_row:
            error.args = (message + advice(self.options, training.step - 1),)
            raise error
        print(f"update {training.step} is skipped ({training.skipped} so far): {message}", flush=True)

    def watch(self, losses: list[dict[str, float]]) -> None:
        """Warn once where a loss explodes in the first updates."""
        step = self.training.step
        worst = max((sum(each.values()) for each in losses), default=0.0)
        if worst > _EXPLODED and step <= _EARLY and not self._has_warned:
            self._has_warned = True
            print(
                f"warning: the loss is {worst:.4g} at update {step}. {advice(self.options, step - 1)}",
                flush=True,
            )

    def _describe(self, cause: Pass, layer: str | None) -> str:
        pictures = [
            p["file"] + (f" with {len(p['boxes'])} boxes" if "boxes" in p else "")
            for p in self.pictures(cause.batch)
        ]
        more = f" and {len(pictures) - _MOST_NAMED} more" if len(pictures) > _MOST_NAMED else ""
        said = f"Pictures: {', '.join(pictures[:_MOST_NAMED])}{more}. "
        begins = "No layer's output is infinite or NaN, only what is computed from them"
        if layer is not None:
            begins = f"The first layer whose output is infinite or NaN is {layer}"
        return said + begins

    def _write(self, cause: Pass, layer: str | None) -> str:
        """Write the batch as a JSON and a picture, with boxes in the network's input. Returns a sentence about them."""
        if self.training.skipped > _MOST_REPORTS:
            return ""
        path = self.folder / f"update_{self.training.step}.json"
        names = self.training.task.losses
        losses = {name: f"{value:.4g}" for name, value in zip(names, cause.losses.tolist(), strict=True)}
        report = {"layer": layer, "losses": losses, "pictures": self.pictures(cause.batch)}
        write_json(path, report, indent=1)
        self.save_sheet(path.with_suffix(".jpg"), cause.batch)
        return f"The batch is in {path} and .jpg. "


def first_nonfinite_layer(model: nn.Module, run: Callable[[], object]) -> str | None:
    """The first module of `model` whose output is infinite or NaN while `run()` runs it; None: there is none."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: object, output: object) -> None:
            if not found and not _is_finite(output):
                found.append(name)

        return note

    handles = [layer.register_forward_hook(watch(name)) for name, layer in model.named_modules() if name]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _is_finite(output: Any) -> bool:
    if isinstance(output, Tensor):
        return bool(output.isfinite().all())
    if isinstance(output, dict):
        output = list(output.values())
    return all(map(_is_finite, output)) if isinstance(output, (list, tuple)) else True


def check_weights(training: Training, options: TrainConfig) -> None:
    """Raise a FloatingPointError where a weight or a buffer is infinite or NaN, or a weight is about to overflow."""
    for model in {training.model, training.evaluated_model}:
        limits = {name: _LARGEST_WEIGHT for name, _ in model.named_parameters()}
        tensors = {name: t for name, t in model.state_dict().items() if t.is_floating_point() and t.numel()}
        peaks = torch.stack([t.abs().max().float() for t in tensors.values()]).tolist()
        for name, peak in zip(tensors, peaks, strict=True):
            # A comparison with NaN is False.
            if not peak < limits.get(name, float("inf")):
                raise FloatingPointError(
                    f"{name} has a value of {peak:.3g} after update {training.step}, so nothing is written and the "
                    f"last good state stays. {advice(options, training.step)}"
                )


def advice(options: TrainConfig, num_updates: int) -> str:
    """What to change where losses explode after so many updates."""
    if num_updates == 0:
        return (
            "No update came before, so the rate is not the cause: look at the pictures and boxes, and at "
            "model.backbone: random weights (weights: null) do not fit a frozen norm or frozen stages"
        )
    clip = "none" if options.clip_norm is None else f"{options.clip_norm:g}"
    settings = (
        f"lower train.lr ({options.lr:g}), raise train.warmup_steps ({options.warmup_steps}), "
        f"or set train.clip_norm ({clip})"
    )
    if num_updates <= max(_EARLY, options.warmup_steps):
        return f"It came in the first updates: {settings}"
    half = "; with train.amp=fp16, bf16 overflows less" if options.amp == "fp16" else ""
    return f"Usual causes are a picture or box, or the rate: {settings}{half}"
