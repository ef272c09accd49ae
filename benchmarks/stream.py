"""Pictures a second of tools/infer.py, against what its network alone reaches, and against what its parts cost."""

import importlib.util
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from detector.checkpoint import load_checkpoint
from detector.data.images import load_image
from detector.inference import Detector, choose_device
from detector.progress import memory_mb

Cost = dict[str, float]
# The exit status of tools/infer.py after Ctrl-C.
STOPPED = 130


def measure_stream(
    weights: str, paths: list[Path], device: str, batch_size: int, dtype: str
) -> dict[str, Any]:
    """Seconds and CPU seconds of decoding, network and drawing, each alone, and of all together.

    Decoding and drawing alone take one picture after another. The network alone runs on batches of pictures in memory.
    The whole starts from the files and ends with drawings and JSON. The rates leave out the loading of the checkpoint.
    """
    infer, parts = _load_tool(), {}
    images = [load_image(path) for path in paths]
    parts["loading"], (detector,) = _measure(
        lambda path: Detector.load(load_checkpoint(path), choose_device(device), dtype=dtype), [weights]
    )
    parts["decoding"], _ = _measure(load_image, paths)
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    detector(batches[0])  # warms up
    parts["network"], found = _measure(detector, batches)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "drawing.jpg"
        pairs = list(zip(images, chain.from_iterable(found), strict=True))
        parts["drawing"], _ = _measure(lambda pair: infer.save_drawing(*pair, target), pairs)
        options = {
            "score_thresh": 0.5,
            "device": device,
            "batch_size": batch_size,
            "dtype": dtype,
            "font": None,
        }
        args = Namespace(paths=list(map(str, paths)), weights=weights, output=folder, **options)
        before = memory_mb()
        parts["whole"], (status,) = _measure(infer.infer, [args])
        if status == STOPPED:
            raise KeyboardInterrupt("stopped; nothing is measured")
        memory = {"before_mb": before, "after_mb": memory_mb()}
    seconds = parts["whole"]["seconds"] - parts["loading"]["seconds"]
    cores = len(os.sched_getaffinity(0))
    possible = sum(parts[name]["cpu_seconds"] for name in ("decoding", "network", "drawing")) / cores
    return {
        "images": len(paths),
        "parts": parts,
        "memory": memory,
        "of_network": parts["network"]["seconds"] / seconds,
        "of_cpu": possible / seconds,
    }


def _measure(call: Callable[[Any], Any], items: Iterable[Any]) -> tuple[Cost, list[Any]]:
    begun, cpu = time.perf_counter(), time.process_time()
    results = [call(item) for item in items]
    return {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}, results


def _load_tool() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "tools" / "infer.py"
    spec = importlib.util.spec_from_file_location("infer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
