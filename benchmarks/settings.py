"""The settings of a measurement, and the machine that it runs on."""

import os
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torchvision

DTYPES = {"float32": None, "bf16": torch.bfloat16}  # for autocast
Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement of the detector. stock_dtype: None takes `dtype`."""

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

    def apply(self) -> None:
        """Set the threads of the process, and whether CUDA's float32 products and convolutions may be TF32.

        Denormal numbers become 0, as in a run. On some CPUs, their products take twenty times as long.
        """
        torch.set_flush_denormal(True)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        allow_tf32(self.tf32)


def allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """The machine, the versions and the command of a measurement."""
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
        "command": shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
