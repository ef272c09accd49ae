"""The recipe that is chosen for a folder, against torchvision's ResNet-18-FPN from scratch, at equal CPU seconds.

python -m benchmarks.against_fpn --data datasets --output benchmarks/against_fpn.json [--minutes 20] [--only bccd-ours-0 ...]

Both sides train in one thread without workers, so the seconds of the process are all there are. FPN gets the better of two
input sizes at the middle rate, and then the best of three rates at that size, by the first seed. Finished runs are kept in the JSON, so the command goes on where it
stopped. `--data` holds the VOC folders bccd and foda. BCCD is scored on its test split, FOD-A on val.
"""

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from detector.choose.recipe import choose_recipe
from detector.config import parse_config
from detector.data.dataset import DetectionDataset
from detector.data.sources import build_dataset
from detector.engine import coco_results
from detector.evaluate import Evaluation
from detector.evaluation.coco import evaluate_coco
from detector.files import write_json
from detector.inference import Detector
from detector.run import Run
from detector.tables import format_table

from .experiments.spread import spread
from .settings import describe_machine

SCORED = {"bccd": "test", "foda": "val"}
SIZES, RATES, SEEDS = (300, 450), (2e-4, 5e-4, 1e-3), (0, 1, 2)
CPU = torch.device("cpu")
# Before the budget ends, our run needs these seconds for its last files.
RESERVE = 15


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds bccd and foda")
    parser.add_argument(
        "--output", type=Path, required=True, help="a JSON file; what it holds already is kept"
    )
    parser.add_argument("--minutes", type=float, default=20, help="CPU minutes of a run")
    parser.add_argument(
        "--only", nargs="+", help="the names of the runs to make, such as foda-fpn-450-0.001-0"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    results = json.loads(args.output.read_text())["runs"] if args.output.exists() else {}
    for name, run in runs(results):
        if name in results or (args.only and name not in args.only):
            continue
        print(name, flush=True)
        results[name] = run(args.data, 60 * args.minutes)
        print(name, results[name], flush=True)
        write_json(
            args.output, {"machine": describe_machine(), "minutes": args.minutes, "runs": results}, indent=1
        )
    print(table(results))
    return 0


def runs(results: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The name of each run, and a call(data, seconds) that makes it. FPN's best settings are known after the first seed."""
    for data in SCORED:
        yield from (ours(data, seed) for seed in SEEDS)
        yield from (fpn(data, size, RATES[1], SEEDS[0]) for size in SIZES)
        if (size := best_size(data, results)) is not None:
            yield from (fpn(data, size, rate, SEEDS[0]) for rate in RATES)
        if (best := best_fpn(data, results)) is not None:
            yield from (fpn(data, *best, seed) for seed in SEEDS[1:])


def fpn(data: str, size: int, rate: float, seed: int) -> tuple[str, Any]:
    return f"{data}-fpn-{size}-{rate:g}-{seed}", lambda root, seconds: train_fpn(
        data, root, seconds, size=size, rate=rate, seed=seed
    )


def ours(data: str, seed: int) -> tuple[str, Any]:
    return f"{data}-ours-{seed}", lambda root, seconds: train_ours(data, root, seconds, seed)


def best_size(data: str, results: dict[str, Any]) -> int | None:
    """The size of the highest AP50 at the middle rate, by the first seed; None: not all were tried."""
    best = best_of(data, results, [(size, RATES[1]) for size in SIZES])
    return None if best is None else best[0]


def best_fpn(data: str, results: dict[str, Any]) -> tuple[int, float] | None:
    """The size and rate of the highest AP50 of the first seed; None: not all were tried."""
    size = best_size(data, results)
    return None if size is None else best_of(data, results, [(size, rate) for rate in RATES])


def best_of(
    data: str, results: dict[str, Any], settings: list[tuple[int, float]]
) -> tuple[int, float] | None:
    tried = {each: results.get(f"{data}-fpn-{each[0]}-{each[1]:g}-{SEEDS[0]}") for each in settings}
    return None if None in tried.values() else max(tried, key=lambda each: tried[each]["AP50"])


def splits(data: str, root: Path) -> tuple[DetectionDataset, DetectionDataset]:
    """The training pictures, and those to score on."""
    source = {"format": "voc", "one_based": False}
    recipe = {
        "model": {"backbone": "resnet18"},
        "data": {"root": str(root / data)} | {s: {**source, "split": s} for s in {"train", SCORED[data]}},
    }
    config = parse_config(recipe).data
    train_set = build_dataset(config, "train")
    return train_set, build_dataset(config, SCORED[data], train_set.class_names)


def train_fpn(
    data: str, root: Path, seconds: float, *, size: int, rate: float, seed: int
) -> dict[str, float]:
    """torchvision's detector from scratch: AdamW, flips, cosine over the budget, its last weights."""
    train_set, scored = splits(data, root)
    torch.manual_seed(seed)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    model = FasterRCNN(
        backbone, len(train_set.class_names) + 1, min_size=size, max_size=math.ceil(size * 4 / 3)
    )
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate, weight_decay=0.05)
    begun, seen = time.process_time(), 0
    order: list[int] = []
    while (spent := time.process_time() - begun) < seconds:
        if len(order) < 4:
            order += torch.randperm(len(train_set)).tolist()
        batch, order = order[:4], order[4:]
        images, targets = zip(*(flipped(*train_set[row]) for row in batch), strict=True)
        warm = min(1, (seen / 4 + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * spent / seconds))
        loss = sum(model(list(images), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        seen += 4
    spent = time.process_time() - begun
    return {**score(model.eval(), scored), "cpu_seconds": spent, "passes": seen / len(train_set)}


def flipped(image: torch.Tensor, target: dict) -> tuple[torch.Tensor, dict]:
    """A picture and its boxes, mirrored left to right half of the time."""
    target = copy.copy(target)
    if torch.rand(()) < 0.5:
        width, boxes = image.shape[-1], target["boxes"]
        image = image.flip(-1)
        target["boxes"] = torch.stack(
            [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1
        )
    return image, target


@torch.inference_mode()
def score(model: nn.Module, scored: DetectionDataset) -> dict[str, float]:
    results = []
    for row in range(len(scored)):
        image, target = scored[row]
        results += coco_results(model([image])[0], target["image_id"], scored.category_ids.tolist())
    metrics = evaluate_coco(scored.to_coco(), results)
    return {name: metrics[name] for name in ("AP", "AP50")}


def train_ours(data: str, root: Path, seconds: float, seed: int) -> dict[str, float]:
    """The one command's choice on the training split alone, in what is left of the budget after choosing."""
    _, scored = splits(data, root)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "data"
        link_training_split(root / data, alone)
        overrides = [f"train.seed={seed}", "loader.num_workers=0"]
        # The choice times some steps. The budget is of the process, so its clock is too.
        with patch("time.perf_counter", time.process_time):
            config, reasons, datasets = choose_recipe(
                alone,
                Path(folder) / "run",
                CPU,
                overrides=overrides,
                minutes=(seconds - RESERVE) / 60,
                offline=True,
            )
        print(*reasons, sep="\n", flush=True)
        Run(config, Path(folder) / "run", CPU, datasets=datasets).train()
        spent = time.process_time() - begun
        detector = Detector.load(Path(folder) / "run" / "best.safetensors", CPU)
        results, _ = Evaluation(scored, config, CPU).run(detector.model)
    metrics = evaluate_coco(scored.to_coco(), results)
    passes = config.train.epochs
    return {"AP": metrics["AP"], "AP50": metrics["AP50"], "cpu_seconds": spent, "passes": passes}


def link_training_split(folder: Path, alone: Path) -> None:
    """Make a folder with the pictures and annotations of a VOC folder's training split alone."""
    for name in (folder / "ImageSets/Main/train.txt").read_text().split():
        for part in ("Annotations", "JPEGImages"):
            (alone / part).mkdir(parents=True, exist_ok=True)
            for file in (folder / part).glob(f"{name}.*"):
                (alone / part / file.name).symlink_to(file.absolute())


def table(results: dict[str, Any]) -> str:
    """Mean and standard deviation of both sides over the seeds."""
    rows = []
    for data in SCORED:
        best = best_fpn(data, results)
        sides = {"ours": [f"{data}-ours-{seed}" for seed in SEEDS]}
        if best is not None:
            sides[f"FPN, {best[0]} pixels, {best[1]:g}"] = [
                f"{data}-fpn-{best[0]}-{best[1]:g}-{s}" for s in SEEDS
            ]
        for side, names in sides.items():
            found = [results[name] for name in names if name in results]
            if found:
                rows.append(
                    (
                        data,
                        side,
                        len(found),
                        *(spread([r[m] for r in found], digits=3) for m in ("AP50", "AP", "passes")),
                    )
                )
    return format_table(rows, header=("data", "detector", "seeds", "AP50", "AP", "passes"))


if __name__ == "__main__":
    sys.exit(main())
