"""Kill training runs with SIGKILL at random moments, resume them, and compare their ends with an undisturbed run's.

python -m benchmarks.kills --runs 20 --kills 3

A state is written at every update, and every second kill waits until one is being written. Exit status 1: a file could
not be read after a kill, or a resumed run ended otherwise than the undisturbed one.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from detector import run, training_run
from detector.checkpoint import load_checkpoint, load_training_state, newest_training_state
from detector.command_line import make_parser
from detector.config import parse_config
from detector.files import read_json
from detector.run_log import read_log

SHAPES = {"format": "shapes", "num_train": 8, "num_val": 4, "image_size": 64}
RECIPE = {
    "model": {
        "backbone": {"name": "resnet18", "width": 8},
        "anchor_sizes": [16, 32],
        "min_size": 64,
        "max_size": 64,
        "rpn_post_nms_top_n_train": 16,
        "rpn_post_nms_top_n_test": 16,
        "box_batch_size_per_image": 16,
    },
    "augment": {"scale": [0.8, 1.2], "brightness": 0.3},
    "train": {"epochs": 3, "accumulate": 2, "batch_size": 2, "ema": 0.8, "save_every": 0, "clip_norm": 5.0},
    "loader": {"num_workers": 0},
}
READERS = {
    ".safetensors": load_checkpoint,
    ".pt": load_training_state,
    ".json": read_json,
    ".jsonl": read_log,
    ".jpg": lambda path: Image.open(path).load(),
}


def recipe(data_root: Path) -> dict[str, Any]:
    splits = {split: {**SHAPES, "split": split} for split in ("train", "val")}
    return {**RECIPE, "data": {"root": str(data_root), **splits}}


def train(values: dict[str, Any], folder: Path, resume: bool) -> None:
    """Train in this process, in silence."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    # Drawing takes longer than the training, and no state depends on it.
    training_run.plot_curves = lambda log_path, png_path: None
    run.Run(parse_config(values), folder, torch.device("cpu"), resume=resume).train()


def start(values: dict[str, Any], folder: Path) -> BaseProcess:
    """Begin a run in a new process, or resume it if the folder holds a state."""
    context = multiprocessing.get_context("forkserver")
    has_state = any(folder.glob("training_state*.pt"))
    process = context.Process(target=train, args=(values, folder, has_state))
    process.start()
    return process


def train_to_the_end(values: dict[str, Any], folder: Path) -> float:
    """Train in a process of its own until the run is finished. Returns the seconds."""
    began, process = time.perf_counter(), start(values, folder)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the run in {folder} ended with exit status {process.exitcode}")
    return time.perf_counter() - began


def kill(process: BaseProcess, folder: Path, seconds: float, while_writing: bool) -> bool:
    """Kill a process after so many seconds, and then while a state is written. Returns whether it was alive."""
    process.join(seconds)
    while while_writing and process.is_alive() and not any(folder.glob(".training_state.pt.*")):
        pass
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def unreadable_files(folder: Path) -> list[str]:
    """A sentence for each file that cannot be read. Temporary files are no one's, and go when the run resumes."""
    faults = []
    for path in sorted(folder.glob("[!.]*")):
        try:
            READERS.get(path.suffix, Path.stat)(path)
        except Exception as error:
            faults.append(f"{path.name}: {error}")
    return faults


def ending(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves for later: its state, its best weights and their metrics."""
    state = newest_training_state(folder / training_run.STATE)
    best = load_checkpoint(folder / "best.safetensors").state_dict
    return {**state, "best_weights": best, "metrics": read_json(folder / training_run.BEST_METRICS)}


def is_same(one: Any, two: Any) -> bool:
    """Whether two values are equal, tensors to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(is_same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(is_same, one, two))
    return one == two


def disturb(
    values: dict[str, Any], folder: Path, num_kills: int, seconds: float, rng: random.Random
) -> dict[str, Any]:
    """Kill a run `num_kills` times within `seconds` each, and then let it finish. Returns what was seen."""
    killed, writing, faults = 0, 0, []
    for number in range(num_kills):
        alive = kill(start(values, folder), folder, rng.uniform(0, seconds), while_writing := number % 2 == 0)
        killed, writing = killed + alive, writing + (alive and while_writing)
        faults += unreadable_files(folder)
    train_to_the_end(values, folder)
    faults += [f"{path.name}: is left" for path in folder.glob(".*.tmp*")]
    return {"killed": killed, "while_writing": writing, "faults": faults + unreadable_files(folder)}


def measure(root: Path, num_runs: int, num_kills: int, seed: int) -> dict[str, Any]:
    """Disturb so many runs. Returns counts of kills, of runs that end as the undisturbed one, and all faults."""
    values, rng = recipe(root / "shapes"), random.Random(seed)
    # A server that has imported everything forks each process, in place of seconds of imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([train.__module__])
    (first := context.Process(target=os.getpid)).start()
    first.join()
    seconds = train_to_the_end(values, root / "undisturbed")
    wanted, total = ending(root / "undisturbed"), {"killed": 0, "while_writing": 0, "equal": 0, "faults": []}
    for number in range(num_runs):
        folder = root / f"run{number}"
        seen = disturb(values, folder, num_kills, seconds, rng)
        total = {key: total[key] + seen.get(key, 0) for key in total if key != "faults"} | {
            "faults": total["faults"] + seen["faults"]
        }
        total["equal"] += is_same(ending(folder), wanted)
    return total


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    args: argparse.Namespace = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        seen = measure(Path(root), args.runs, args.kills, args.seed)
    print(
        f"{args.runs} runs, {seen['killed']} kills, {seen['while_writing']} of them while a state was written"
    )
    print(
        f"{seen['equal']} runs ended as the undisturbed one; files that could not be read: {len(seen['faults'])}"
    )
    print(*seen["faults"], sep="\n")
    return 0 if seen["equal"] == args.runs and not seen["faults"] else 1


if __name__ == "__main__":
    sys.exit(main())
