"""Peak memory of one form, in a process that holds nothing else."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .inference import build_inference, inference_call
from .models import make_images, set_case
from .settings import Settings, Size
from .timing import Seconds, Stopwatch
from .training import build_training

_RUN = (
    f"import json, sys, {__name__} as memory; print(json.dumps(memory.run_alone(*json.loads(sys.argv[1]))))"
)


def peak_memory(
    task: str, settings: Settings, form: str, size: Sequence[int], count: int
) -> dict[str, float]:
    """Call `run_alone` in a new process and return its result. ChildProcessError: the process failed."""
    command = [sys.executable, "-c", _RUN, json.dumps([task, asdict(settings), form, list(size), count])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise ChildProcessError(f"the process that measures memory failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_alone(
    task: str, settings: dict[str, Any], form: str, size: Sequence[int], count: int
) -> dict[str, float]:
    """Run one form and return its peaks of memory in MB. On CUDA, they are of tensors on the device.

    task: "inference" of `count` proposals, or "training" on `count` regions. Inference runs once. Training runs two
    steps, because the optimizer's state exists only in the second.
    building_mb: until the model is built. running_mb: from then on. peak_mb: the larger of both.
    """
    chosen = Settings(**settings)
    chosen.apply()
    build, times = (_build_step, 2) if task == "training" else (_build_detection, 1)
    run = build(chosen, form, tuple(size), count)
    building = peak_mb(chosen.device)
    forget_peak(chosen.device)
    for _ in range(times):
        run()
    running = peak_mb(chosen.device)
    return {"peak_mb": max(building, running), "building_mb": building, "running_mb": running}


def _build_step(settings: Settings, form: str, size: Size, count: int) -> Callable[[], Seconds]:
    return build_training(settings, [form], size, count)[form].time


def _build_detection(settings: Settings, form: str, size: Size, count: int) -> Callable[[], Seconds]:
    model = build_inference(settings, [form], count)[form]
    set_case(model, size, count)
    watch, images = Stopwatch(settings.device), make_images(settings, size)
    return inference_call(watch, model, images, settings.dtype_of(form))


def peak_mb(device: str) -> float:
    """The process's peak in MB: resident memory, or the memory of tensors on a CUDA device.

    Linux's VmHWM counts this program alone. `ru_maxrss` may also count the process that started it.
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


def forget_peak(device: str) -> None:
    """Begin a new peak, on CUDA and on Linux. On other systems the old one stays."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
