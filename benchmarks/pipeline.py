"""Throughput of the parts around the detector: the loader of training images, and COCO's evaluation."""

import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from detector.config import Config
from detector.data.images import load_image
from detector.data.loader import TrainBatches, TransformedDataset, build_loader
from detector.data.sources import build_dataset
from detector.data.transforms import TrainTransform
from detector.evaluation.coco import COCO_METRICS, evaluate_coco

from .timing import Seconds, Stopwatch, alternate, per_second, ratios


class _Decoded(Dataset):
    """Decodes the pictures of a data set and keeps only their shapes. Keys are as in `TransformedDataset`."""

    def __init__(self, paths: np.ndarray) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[int, ...], dict]:
        return load_image(str(self.paths[key[1]])).shape, {}


def measure_loader(
    config: Config, num_images: int, workers: Sequence[int], repeats: int
) -> Iterator[dict[str, Any]]:
    """Yield, for each number of workers, images/s of the training loader and of decoding the same files alone.

    Both go through the same kind of loader over the same batches. A pass is timed from the first batch to the last. The
    workers live on between passes.
    """
    dataset = build_dataset(config.data, "train")
    transform = TrainTransform(augment=config.augment, **config.model.resizing)
    datasets = {
        "loader": TransformedDataset(dataset, transform, config.train.seed),
        "decoding": _Decoded(dataset.image_paths),
    }
    batches = _batches(dataset.aspect_ratios(), num_images, config)
    count, watch = sum(map(len, batches)), Stopwatch("cpu")
    for num_workers in workers:
        loaders = {
            name: build_loader(d, batches, num_workers, pin_memory=False) for name, d in datasets.items()
        }
        calls = {name: partial(watch.time, partial(_drain, loader)) for name, loader in loaders.items()}
        # The warm-up starts the workers.
        times = alternate(calls, repeats, warmup=1)
        yield {
            "workers": num_workers,
            "images": count,
            "times": times,
            "images_per_second": per_second(times, count),
            "ratio": ratios(times, "decoding")["loader"]["total"],
        }


def _batches(aspect_ratios: np.ndarray, num_images: int, config: Config) -> list[list[tuple[int, int]]]:
    """Training batches for `num_images` images, from as many epochs as they need."""
    sampler = TrainBatches(
        aspect_ratios, config.train.batch_size, config.train.seed, config.loader.group_by_aspect_ratio
    )
    batches: list[list[tuple[int, int]]] = []
    for epoch in range(-(-num_images // len(aspect_ratios))):
        sampler.set_epoch(epoch)
        batches += sampler
    return batches[: -(-num_images // config.train.batch_size)]


def _drain(loader: Iterable) -> None:
    for _ in loader:
        pass


def coco_backends() -> list[str]:
    """The backends of COCO evaluation that are installed."""
    packages = {"faster": "faster_coco_eval", "pycocotools": "pycocotools"}
    return [name for name, package in packages.items() if importlib.util.find_spec(package)]


def measure_evaluation(
    num_images: int, num_classes: int, num_boxes: int, detections: int, backends: Sequence[str], repeats: int
) -> dict[str, Any]:
    """Time each backend's COCO evaluation of generated detections, and compare its twelve numbers with the first's."""
    ground_truth, results = make_coco(num_images, num_classes, num_boxes, detections)
    watch, metrics = Stopwatch("cpu"), {}

    def call(backend: str) -> Seconds:
        def evaluate() -> None:
            found = evaluate_coco(ground_truth, results, backend=backend)
            metrics[backend] = {name: found[name] for name in COCO_METRICS}

        return watch.time(evaluate)

    times = alternate({b: partial(call, b) for b in backends}, repeats, warmup=0)
    first = metrics[backends[0]]
    differences = {b: max(abs((m[k] or 0) - (first[k] or 0)) for k in first) for b, m in metrics.items()}
    return {
        "times": times,
        "metrics": metrics,
        "difference": differences,
        "ratios": ratios(times, "pycocotools"),
    }


def make_coco(num_images: int, num_classes: int, num_boxes: int, detections: int) -> tuple[dict, list[dict]]:
    """Seeded ground truth and results, in COCO's formats.

    Each object has a result with a shifted box, up to `detections` per image. The other results are anywhere.
    """
    rng = np.random.default_rng(0)
    size = np.array([640, 480])

    def draw(count: int) -> np.ndarray:
        sides = np.exp(rng.uniform(math.log(8), math.log(400), (count, 2)))
        return np.concatenate([rng.uniform(0, 1, (count, 2)) * (size - sides), sides], axis=1)  # xywh

    image_of = np.sort(rng.integers(num_images, size=num_boxes))
    class_of = rng.integers(num_classes, size=num_boxes)
    boxes = draw(num_boxes)
    annotations = [
        {"id": n, "image_id": i, "category_id": k, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (i, k, box) in enumerate(
            zip((image_of + 1).tolist(), (class_of + 1).tolist(), boxes.tolist(), strict=True), start=1
        )
    ]
    results = []
    for image in range(num_images):
        own = np.flatnonzero(image_of == image)[:detections]
        shifted = boxes[own] + boxes[own][:, [2, 3, 2, 3]] * rng.normal(0, 0.08, (len(own), 4))
        rest = detections - len(own)
        every = np.concatenate([shifted, draw(rest)])
        every[:, 2:] = every[:, 2:].clip(1)
        labels = np.concatenate([class_of[own], rng.integers(num_classes, size=rest)]) + 1
        scores = np.concatenate([rng.uniform(0.2, 1, len(own)), rng.uniform(0, 0.5, rest)])
        results += [
            {"image_id": image + 1, "category_id": label, "bbox": box, "score": score}
            for label, box, score in zip(labels.tolist(), every.tolist(), scores.tolist(), strict=True)
        ]
    images = [{"id": i + 1, "height": 480, "width": 640} for i in range(num_images)]
    categories = [{"id": k + 1, "name": f"class {k + 1}"} for k in range(num_classes)]
    return {"images": images, "categories": categories, "annotations": annotations}, results
