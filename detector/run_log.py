"""The numbers of a run: `metrics.jsonl`, and TensorBoard's events."""

import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .engine import Training, with_total
from .files import write_atomically
from .progress import Progress, memory_mb


class RunLog(AbstractContextManager):
    """The numbers of a run: one JSON object per line in `metrics.jsonl`, and TensorBoard's events when installed.

    A line is `{"kind": "train" or "val", "epoch": ..., "step": ..., <name>: <number>, ...}`. It is in the file when
    `write` returns. JSON has no NaN or infinity, so these are written as null. An existing file is continued, without
    the incomplete last line that a killed run may leave.

    run_dir: None writes nothing, for the processes after the first.
    after_step: drop the lines of later steps, because a run that resumes there writes them again; None drops none.
    awaits_evaluation: drop that step's evaluation too.
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        *,
        after_step: int | None = None,
        awaits_evaluation: bool = False,
        tensorboard: bool = True,
    ) -> None:
        self.path, self._writer = None, None
        if run_dir is None:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        before = read_log(self.path) if self.path.exists() else []
        if after_step is not None:
            ends = {"train": after_step, "val": after_step - awaits_evaluation}
            before = [line for line in before if line["step"] <= ends.get(line["kind"], after_step)]
        text = "".join(json.dumps(line) + "\n" for line in before)
        write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        purged_from = None if after_step is None else after_step + 1
        self._writer = _open_tensorboard(run_dir, purged_from) if tensorboard else None

    def write(self, kind: str, *, epoch: int, step: int, **numbers: Any) -> None:
        """Append one line. Numbers may be Python's, numpy's, tensors of one element, or dicts of them."""
        if self.path is None:
            return
        line = _plain({"kind": kind, "epoch": epoch, "step": step, **numbers})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._writer is not None:
            for name, value in line.items():
                if name not in ("kind", "step") and isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
            self._writer.flush()

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


class StepLog:
    """Shows the steps of an epoch as they come, and logs their means over `interval` updates."""

    def __init__(self, log: RunLog, progress: Progress, training: Training, interval: int) -> None:
        self.log, self.progress, self.training, self.interval = log, progress, training, interval
        self._losses: list[dict[str, float]] = []
        self._written = training.step

    def add(self, losses: list[dict[str, float]], num_images: int, last: bool) -> None:
        """Add the losses read after a batch of `num_images`. last: write a line now, whatever the interval."""
        self._losses += losses
        shown = with_total(losses[-1]) if losses else {}
        self.progress.update(num_images, **shown, lr=self.training.lr)
        if self._losses and (last or self.training.step - self._written >= self.interval):
            self._write()

    def _write(self) -> None:
        training = self.training
        means = {name: float(np.mean([step[name] for step in self._losses])) for name in training.task.losses}
        self.log.write(
            "train",
            epoch=training.epoch + 1,
            step=training.step,
            lr=training.lr,
            **with_total(means),
            images_per_second=self.progress.images_per_second,
            memory_mb=memory_mb(),
        )
        self._losses, self._written = [], training.step


def read_log(path: str | Path) -> list[dict]:
    """Read the lines of a `metrics.jsonl`, without an incomplete last line that a killed run may leave.

    ValueError: another line is not JSON.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not a JSON object: {line[:80]!r}") from error
    return records


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: tensors and numpy numbers as Python's, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _open_tensorboard(run_dir: Path, purge_step: int | None) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)
