"""ResNet-18 inside detectors: options of its blocks, and pre-training on the training split's objects."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from detector.classify.config import ClassifierConfig
from detector.config import Config, load_config
from detector.data.sources import build_dataset
from detector.evaluate import Evaluation
from detector.evaluation.coco import evaluate_coco
from detector.files import read_json, write_json
from detector.inference import Detector
from detector.run import Run

from .classifiers import (
    CPU,
    OVERHEAD,
    UNTRAINED,
    ClassifierJob,
    has_state,
    seconds_per_step,
    train_timed,
)
from .experiment import Experiment, Result, Results, by_arm
from .scale import Scale
from .spread import spread

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = ("bccd", "foda")
ARMS: dict[str, tuple[str, ...]] = {
    "original": (),
    "full_preactivation": ("order=full_preactivation",),
    "se": ("branch_end=se",),
    "shrinkage_cw": ("branch_end=shrinkage_cw",),
    "stochastic depth": ("stochastic_depth=0.2",),
    "shortcut A": ("shortcut=A",),
    "plain": ("shortcut=none",),
}


@dataclass(frozen=True)
class DetectorJob:
    """Train a detector and score its last weights."""

    config: Config

    def __call__(self, folder: Path) -> Result:
        run = self.open(folder)
        minutes = cpu_minutes(train_timed(run), run.training.step)
        found = score(self.config, folder / "best.safetensors")
        return {"epochs": self.config.train.epochs, "minutes": minutes, **found}

    def open(self, folder: Path) -> Run:
        return Run(self.config, folder, CPU, resume=has_state(folder))

    def seconds(self) -> float:
        run = self.open(UNTRAINED)
        return (1 + OVERHEAD) * seconds_per_step(run) * len(run.batches) * self.config.train.epochs


@dataclass(frozen=True)
class PretrainedJob:
    """Train a classifier on objects, and then a detector from its last weights, in the time of `detector` alone."""

    classifier: ClassifierConfig
    detector: DetectorJob

    def __call__(self, folder: Path) -> Result:
        job = DetectorJob(self.starting_from(folder / "classifier", self.epochs_left(folder)))
        before = ClassifierJob(self.classifier)(folder / "classifier")
        end = before["curve"][-1]
        minutes, found = cpu_minutes(before["seconds_per_step"], end["step"]), job(folder / "detector")
        whole = None if None in (minutes, found["minutes"]) else minutes + found["minutes"]
        return {"classifier_error": end["test_error"], **found, "minutes": whole}

    def epochs_left(self, folder: Path) -> int:
        """The detector's epochs after the classifier's time. They are kept, for a run that goes on later."""
        path = folder / "epochs.json"
        if not path.exists():
            spent = ClassifierJob(self.classifier).seconds() / self.detector.seconds()
            write_json(path, max(1, round((1 - spent) * self.detector.config.train.epochs)))
        return read_json(path)

    def starting_from(self, classifier: Path, epochs: int) -> Config:
        config = self.detector.config
        backbone = {**config.model.backbone, "weights": str(classifier / "last.safetensors")}
        model = config.model.model_copy(update={"backbone": backbone})
        train = config.train.model_copy(update={"epochs": epochs, "eval_every": epochs})
        return config.model_copy(update={"model": model, "train": train})

    def seconds(self) -> float:
        return self.detector.seconds()


def cpu_minutes(seconds_per_step: float | None, steps: int) -> float | None:
    """The CPU minutes of a whole training; None where nothing was timed."""
    return None if seconds_per_step is None else seconds_per_step * steps / 60


def score(config: Config, weights: Path) -> Result:
    """AP and AP50 on the test split, or on val where the data have none."""
    split = "val" if config.data.test is None else "test"
    detector = Detector.load(weights, CPU)
    dataset = build_dataset(config.data, split, detector.class_names)
    results, _ = Evaluation(dataset, config, CPU).run(detector.model)
    metrics = evaluate_coco(dataset.to_coco(), results)
    return {"split": split, "AP": metrics["AP"], "AP50": metrics["AP50"]}


def detector_job(scale: Scale, data: str, seed: int, options: tuple[str, ...] = ()) -> DetectorJob:
    """A share of a recipe's epochs, evaluated once, after the last one."""
    path, root = CONFIGS / f"{data}_resnet18.yaml", f"data.root={scale.data_root / data}"
    epochs = max(1, round(scale.share * load_config(path).train.epochs))
    train = [
        f"train.{key}={value}" for key, value in (("epochs", epochs), ("eval_every", epochs), ("seed", seed))
    ]
    backbone = [f"model.backbone.{option}" for option in options]
    return DetectorJob(load_config(path, [root, "loader.num_workers=0", *train, *backbone, *scale.detector]))


def detectors(scale: Scale) -> Experiment:
    jobs: dict[str, Any] = {}
    for seed in range(scale.seeds):
        for data in DATA:
            found = {arm: detector_job(scale, data, seed, options) for arm, options in ARMS.items()}
            found["pre-trained"] = PretrainedJob(objects_recipe(scale, data, seed), found["original"])
            jobs |= {f"{data} {arm}/{seed}": job for arm, job in found.items()}
    return Experiment(jobs, draw, HEADER, row)


def objects_recipe(scale: Scale, data: str, seed: int) -> ClassifierConfig:
    """The same share of the epochs of the classifier's recipe, with the detector's network."""
    path = CONFIGS / "classify" / f"{data}_objects.yaml"
    epochs = max(1, round(scale.share * load_config(path, kind=ClassifierConfig).train.epochs))
    width = detector_job(scale, data, seed).config.model.backbone["width"]
    overrides = [
        f"data.detection.root={scale.data_root / data}",
        f"model.backbone.width={width}",
        f"train.epochs={epochs}",
        f"train.seed={seed}",
    ]
    return load_config(path, overrides, kind=ClassifierConfig)


HEADER = ("split", "epochs", "CPU minutes", "AP50", "AP")


def row(found: list[Result]) -> list[str | None]:
    epochs = ", ".join(map(str, sorted({r["epochs"] for r in found})))
    digits = {"minutes": 1, "AP50": 3, "AP": 3}
    return [found[0]["split"], epochs, *(spread([r[name] for r in found], n) for name, n in digits.items())]


def draw(figure: Figure, results: Results) -> None:
    """AP50 of each seed, a panel for each data set."""
    for axes, data in zip(figure.subplots(1, len(DATA), squeeze=False)[0], DATA, strict=True):
        arms: Mapping[str, list[Result]] = {
            arm.removeprefix(data): found for arm, found in by_arm(results).items() if arm.startswith(data)
        }
        for place, found in enumerate(arms.values()):
            axes.plot([r["AP50"] for r in found], [place] * len(found), "o", color="C0", alpha=0.6)
        axes.set_yticks(range(len(arms)), list(arms))
        axes.invert_yaxis()
        axes.set(xlabel="AP50", title=data)
        axes.grid(alpha=0.3)
