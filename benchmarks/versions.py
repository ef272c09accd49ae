"""Time two checkouts of this project in one process, in turns: the same weights, images and proposals.

git worktree add ../before COMMIT
python benchmarks/versions.py ../before . --output benchmarks/versions.json

A checkout before version 0.1.0 may hold its measurements in `detector/benchmark`.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType

import torch

PACKAGES = ("backbones", "detector", "benchmarks")
SIZE = (600, 800)
# name: (form, regions an image, whether a training step)
CASES = {
    "inference, 300 proposals": ("ours_optimized", 300, False),
    "inference, 1000 proposals": ("ours_optimized", 1000, False),
    "inference, not fused, 300 proposals": ("ours", 300, False),
    "training, 128 regions": ("ours", 128, True),
    "training, 512 regions": ("ours", 512, True),
    "training, checkpointed, 128 regions": ("ours_checkpointed", 128, True),
}


def load(tree: Path, *names: str) -> list[ModuleType]:
    """Modules of the measurements of one checkout; models that are built with them outlive the next call."""
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    sys.path.insert(0, str(tree))
    package = "benchmarks" if (tree / "benchmarks" / "models.py").exists() else "detector.benchmark"
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    for module in modules:
        if tree not in Path(module.__file__).resolve().parents:
            raise ImportError(f"{module.__name__} comes from {module.__file__}, not from {tree}")
    return modules


def prepare(tree: Path, form: str, regions: int, trains: bool) -> Callable[[], dict[str, float]]:
    """A call that runs the work of a case with the code in `tree`, and gives its seconds by part."""
    models, training, settings, timing = load(tree, "models", "training", "settings", "timing")
    chosen = settings.Settings(backbone="resnet101")
    if trains:
        return training.build_training(chosen, (form,), SIZE, regions)[form].time
    model = models.build_form(form, chosen, models.random_weights("resnet101"))
    models.ForcedProposals(model.rpn)
    models.set_case(model, SIZE, regions)
    images, watch = models.make_images(chosen, SIZE), timing.Stopwatch("cpu")
    return torch.inference_mode()(lambda: watch.time(lambda: model(images)))


def compare(trees: list[Path], case: str, rounds: int) -> dict:
    """Seconds of both checkouts in turns, after a warm-up round."""
    calls = {side: prepare(tree, *CASES[case]) for side, tree in zip(("before", "after"), trees, strict=True)}
    (timing,) = load(trees[1], "timing")
    times = timing.alternate(calls, rounds, warmup=1)
    seconds = {side: parts["total"]["seconds"] for side, parts in times.items()}
    return {
        "case": case,
        "seconds": seconds,
        "medians": [parts["total"]["median"] for parts in times.values()],
        "median_of_ratios": median(a / b for b, a in zip(*seconds.values(), strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", metavar="FILE.json")
    args = parser.parse_args()
    # Finders of an editable installation would find one checkout whatever the path says.
    sys.meta_path = [f for f in sys.meta_path if "editable" not in str(getattr(f, "__module__", f)).lower()]
    torch.set_flush_denormal(True)
    trees = [args.before.resolve(), args.after.resolve()]
    measured = []
    for case in args.cases:
        measured.append(compare(trees, case, args.rounds))
        print(
            "{case}: {medians[0]:.2f} s, {medians[1]:.2f} s, {median_of_ratios:.3f}".format(**measured[-1]),
            flush=True,
        )
    if args.output:
        (settings,) = load(trees[1], "settings")
        write_json = importlib.import_module("detector.files").write_json
        write_json(args.output, {"machine": settings.describe_machine(), "cases": measured}, indent=1)


if __name__ == "__main__":
    main()
