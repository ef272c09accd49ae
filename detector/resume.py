"""What must be as it was for a run to resume: model, optimisation, augmentation and data."""

import hashlib
from typing import Any

from .config import Config
from .data.dataset import DetectionDataset

# Settings of `train` that may change when a run resumes. The others, and those of `model`, may not. For the batch size see
# `check_same_batches`.
_FREE = ("batch_size", "eval_every", "patience", "log_every", "save_every", "on_nonfinite")


def check_resumable(saved: Config, config: Config) -> None:
    """Check that a run resumes with the model, optimisation and augmentation that it was saved with.

    ValueError: a setting changed. The saved schedule and moments would not fit it.
    """
    before, now = saved.model_dump(mode="json"), config.model_dump(mode="json")
    changed = [
        f"{section}.{key} was {before[section].get(key)!r}, now {value!r}"
        for section in ("model", "train", "augment")
        for key, value in now[section].items()
        if key not in _FREE and before[section].get(key) != value
    ]
    if changed:
        raise ValueError(
            f"--resume continues a run with its own settings; {'; '.join(changed)}. A new run with other settings begins "
            "with these weights: --start-from last.safetensors, and another --output"
        )


def check_same_batches(saved: int, now: int) -> None:
    """Check the images of a batch over all processes. ValueError: an epoch's batches would not be the same."""
    if saved != now:
        raise ValueError(
            f"--resume continues a run with its own batches; a batch had {saved} images, now {now} "
            "(train.batch_size x the number of processes)"
        )


def fingerprint(dataset: DetectionDataset | None) -> dict[str, Any] | None:
    """What a data set holds, wherever its files are: its numbers of images and boxes, and a hash of its annotations."""
    if dataset is None:
        return None
    digest = hashlib.sha256()
    for name in ("image_ids", "image_sizes", "offsets", "boxes", "labels", "crowd", "difficult"):
        digest.update(getattr(dataset, name).tobytes())
    return {"images": len(dataset), "boxes": len(dataset.boxes), "annotations": digest.hexdigest()[:16]}


def check_same_data(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Check the fingerprints of a run's splits against the saved ones. ValueError: a split holds other data."""
    changed = [
        f"data.{split} was {_describe(saved[split])}, now {_describe(now[split])}"
        for split in now
        if split in saved and saved[split] != now[split]
    ]
    if changed:
        raise ValueError(f"--resume continues a run with its own data; {'; '.join(changed)}")


def _describe(data: dict[str, Any] | None) -> str:
    if data is None:
        return "none"
    return ", ".join(f"{key} {v}" if isinstance(v, str) else f"{v} {key}" for key, v in data.items())
