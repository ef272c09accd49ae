"""Watch the memory of a training on pictures of many sizes: of its main process and of its workers.

python -m benchmarks.steady_memory --minutes 180 --output benchmarks/steady_memory.json

The slope is fitted over the second half, because the allocator's pools fill in the first minutes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from detector.command_line import make_parser
from detector.data.shapes import CLASS_NAMES, draw_picture
from detector.files import write_json
from detector.run_log import read_log
from detector.tables import format_table

from .growth import fit_line
from .settings import describe_machine

TRAIN = Path(__file__).parents[1] / "tools" / "train.py"
SIDES = (96, 800)
RECIPE = {
    "model": {
        "backbone": {"name": "resnet18", "width": 8},
        "anchor_sizes": [16, 32, 64],
        "min_size": 160,
        "max_size": 480,
        "rpn_post_nms_top_n_train": 200,
        "rpn_post_nms_top_n_test": 100,
        "box_batch_size_per_image": 32,
    },
    "augment": {"scale": [0.6, 1.4], "crop": 0.5, "brightness": 0.2},
    "train": {
        "epochs": 10**6,
        "batch_size": 4,
        "lr": 1e-4,
        "clip_norm": 10.0,
        "eval_every": 5,
        "save_every": 1,
    },
    "loader": {"num_workers": 2, "group_by_aspect_ratio": False},
}


def draw_data(root: Path, num_pictures: int) -> dict[str, Any]:
    """Write pictures, each of another size, and a CSV for each split. Returns the recipe's section `data`."""
    data: dict[str, Any] = {"root": str(root), "class_names": list(CLASS_NAMES)}
    for seed, split in enumerate(("train", "val")):
        lines = ["filename,width,height,class,xmin,ymin,xmax,ymax"]
        for number in range(num_pictures if split == "train" else num_pictures // 5):
            rng, name = np.random.default_rng((seed, number)), f"{split}{number}.jpg"
            width, height = rng.integers(*SIDES, 2).tolist()
            drawn, objects = draw_picture(rng, 256)
            Image.fromarray(drawn).resize((width, height)).save(root / name)
            for label, box, _ in objects:
                corners = (np.array(box) * [width, height, width, height] / 256).round(2).tolist()
                row = name, width, height, CLASS_NAMES[label - 1], *corners
                lines.append(",".join(map(str, row)))
        (root / f"{split}.csv").write_text("\n".join(lines), encoding="utf-8")
        data[split] = {"format": "csv", "annotations": f"{split}.csv", "images": "."}
    return data


def processes_of(pid: int) -> list[int]:
    """A process and all that it started, the oldest first."""
    children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [pid, *(each for child in sorted(map(int, children.split())) for each in processes_of(child))]


def resident_mb(pid: int) -> float:
    """The resident memory of a process (Linux). Pages that it shares with others count too."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def watch(process: subprocess.Popen, minutes: float, every: float) -> dict[str, list[tuple[float, float]]]:
    """(minute, MB) of a process and its children, by name, every so many seconds until `minutes` are over."""
    began, seen = time.monotonic(), {}
    while process.poll() is None and (now := (time.monotonic() - began) / 60) <= minutes:
        for number, pid in enumerate(processes_of(process.pid)):
            name = f"worker {number}" if number else "main"
            # The process may end while it is looked at.
            with suppress(FileNotFoundError, StopIteration):
                seen.setdefault(name, []).append((round(now, 2), round(resident_mb(pid), 1)))
        time.sleep(every)
    return seen


def slope(samples: list[tuple[float, float]]) -> float | None:
    """MB an hour over the second half of the samples."""
    fit = fit_line(*zip(*samples[len(samples) // 2 :], strict=True))
    return fit and round(60 * fit["slope"], 2)


def measure(root: Path, minutes: float, every: float, num_pictures: int) -> dict[str, Any]:
    """Train in a process of its own, and stop it after so many minutes.

    ChildProcessError: the training ended otherwise than by that.
    """
    recipe, folder = root / "recipe.yaml", root / "run"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": draw_data(root, num_pictures)}), encoding="utf-8")
    with open(root / "log.txt", "w+", encoding="utf-8") as log:
        command = [sys.executable, str(TRAIN), str(recipe), "--output", str(folder)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            seen = watch(process, minutes, every)
        finally:
            process.terminate()
            status = process.wait()
        if status != 130:
            log.seek(0)
            raise ChildProcessError(f"the training ended with exit status {status}: {log.read()[-2000:]}")
    slopes = {name: slope(samples) for name, samples in seen.items()}
    # The machine may have had other work, so the minutes alone do not say how much was trained.
    updates = read_log(folder / "metrics.jsonl")[-1]["step"]
    return {"updates": updates, "megabytes": seen, "slope_mb_an_hour": slopes}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=180)
    parser.add_argument("--every", type=float, default=60, help="seconds between two looks")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--output", metavar="FILE.json")
    args: argparse.Namespace = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        measured = measure(Path(root), args.minutes, args.every, args.pictures)
    rows = [
        (name, samples[len(samples) // 2][1], samples[-1][1], measured["slope_mb_an_hour"][name])
        for name, samples in measured["megabytes"].items()
    ]
    print(f"{measured['updates']} updates")
    print(format_table(rows, header=("process", "MB at half time", "MB at the end", "MB an hour")))
    if args.output:
        write_json(args.output, {"machine": describe_machine(), "settings": vars(args), **measured}, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
