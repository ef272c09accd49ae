"""The numbers of a run: `metrics.jsonl`, and TensorBoard's events."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .files import write_atomically


class RunLog:
    """The numbers of a run: a JSON object a line in `metrics.jsonl`, and TensorBoard's events when installed.

    A line is `{"kind": "train" or "val", "epoch": ..., "step": ..., <name>: <number>, ...}`, on disk when
    `write` returns. JSON has no NaN or infinity: they are written as null. An existing file is continued; the
    torn last line of a killed run is dropped.
    """

    def __init__(self, run_dir: str | Path, *, tensorboard: bool = True) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self.run_dir / "metrics.jsonl"
        self._tensorboard = tensorboard
        self._writer: Any = None
        self._purge_step: int | None = None
        if self.path.exists():
            self._rewrite(read_log(self.path))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (held for the run)

    def write(self, kind: str, *, epoch: int, step: int, **numbers: Any) -> None:
        """Append one line. Numbers may be Python's, numpy's or tensors of one element, and dicts of them."""
        line = _plain({"kind": kind, "epoch": epoch, "step": step, **numbers})
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self._write_events(kind, step, line)

    def truncate_after(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a run resumed there will write again."""
        self._file.close()
        self._rewrite([line for line in read_log(self.path) if line["step"] <= step])
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._close_events()
        self._purge_step = step + 1

    def close(self) -> None:
        self._file.close()
        self._close_events()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rewrite(self, lines: list[dict]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _write_events(self, kind: str, step: int, line: Mapping[str, Any]) -> None:
        if self._tensorboard and self._writer is None:
            self._writer = _open_tensorboard(self.run_dir, self._purge_step)
            self._tensorboard = self._writer is not None
        if self._writer is None:
            return
        for name, value in line.items():
            if name not in ("kind", "step") and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        self._writer.flush()

    def _close_events(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def read_log(path: str | Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; an incomplete last line, as a killed run leaves it, is left out."""
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
