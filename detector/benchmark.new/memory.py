"""Peak memory of one form, in a process that holds it alone."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .inference import build_inference, inference_call, set_case
from .models import make_images
from .settings import Settings, Size
from .timing import Seconds, Stopwatch
from .training import build_training


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


