"""Where the time of a recipe's training goes: the loader, the passes, the update, and waiting for the device."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from detector import engine
from detector.build import build_batches, build_model, build_training
from detector.config import Config
from detector.data.loader import Batch
from detector.data.sources import build_dataset
from detector.model.speed import apply_speed

from .timing import Stopwatch

WARMUP = 3
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def profile_training(
    config: Config, device: torch.device, num_batches: int, trace: Path
) -> dict[str, float | int]:
    """Train `num_batches` batches after a warm-up. Writes a Chrome trace, and returns the seconds of a batch by part.

    On a GPU, "waiting" is the host's time in calls that wait for the device; the other parts are the device's time.

    ValueError: an epoch has fewer batches.
    """
    train_set = build_dataset(config.data, "train")
    model = build_model(config.model, Config.num_classes(train_set.class_names)).to(device)
    apply_speed(model, config.speed)
    _, batches, loader = build_batches(config, train_set, device)
    if len(batches) <= WARMUP + num_batches:
        raise ValueError(
            f"--batches is {num_batches}; accepted: up to {len(batches) - WARMUP - 1} of these data, "
            f"after {WARMUP} that warm up"
        )
    training = build_training(config, model, num_batches=len(batches), device=device)
    watch, source = Stopwatch(device), iter(loader)

    def loaded() -> Iterator[Batch]:
        for _ in range(num_batches):
            with watch.part("loader"):
                batch = next(source)
            yield batch

    def train(some: Iterator[Batch]) -> None:
        options = config.train
        engine.train_one_epoch(
            training,
            some,
            device,
            num_batches=len(batches),
            seed=options.seed,
            amp_dtype=engine.AMP_DTYPES[options.amp],
            accumulate=options.accumulate,
            clip_norm=options.clip_norm,
            read_every=options.log_every,
        )

    train(islice(source, WARMUP))
    parts: Any = [
        (engine, "forward", "forward"),
        (torch.Tensor, "backward", "backward"),
        (engine, "update", "update"),
    ]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler, watch.watch(parts):
        seconds = watch.time(lambda: train(loaded()))
    profiler.export_chrome_trace(str(trace))
    # torch takes a second for each batch to look through what it noted.
    noted = profiler.key_averages() if device.type == "cuda" else ()
    waits = sum(e.self_cpu_time_total for e in noted if e.key in _WAITS) / 1e6
    each = {part: value / num_batches for part, value in {**seconds, "waiting": waits}.items()}
    return {**each, "images": batches.batch_size}
