"""How much the experiments train, and the recipe that all their classifiers share."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detector.classify.config import ClassifierConfig
from detector.config import parse_config

_VOC = {"format": "voc", "one_based": False}


def objects(root: Path, size: int) -> dict[str, Any]:
    """The section `data` of a classifier on the objects of FOD-A, cut out at so many pixels."""
    detection = {"root": str(root / "foda"), **{s: {**_VOC, "split": s} for s in ("train", "val")}}
    return {"format": "objects", "size": size, "detection": detection}


@dataclass(frozen=True)
class Scale:
    """Settings of the experiments; benchmarks/residual.py --quick makes them tiny.

    data_root: the folder that holds bccd and foda.
    pictures, large_pictures: the section `data` of CIFAR networks, and of backbones.
    depths: of the plain and residual networks that are compared. orders: depths of the networks in each order.
    depth: of all other CIFAR networks.
    thousand: depths of very deep networks, and whether their blocks are bottlenecks. Their epochs must reach well past
        the warm-up of 100 steps before the rate is divided, which is at half of them.
    share: of the epochs of a detector's recipe. detector: overrides of it.
    """

    data_root: Path
    pictures: dict[str, Any]
    large_pictures: dict[str, Any]
    seeds: int = 3
    epochs: int = 50
    batch_size: int = 64
    depths: tuple[int, ...] = (20, 32, 44, 56)
    orders: tuple[int, ...] = (56, 110)
    depth: int = 56
    thousand: tuple[tuple[int, bool], ...] = ((1001, True), (1202, False))
    thousand_epochs: int = 20
    thousand_seeds: int = 1
    widths: tuple[int, ...] = (8, 16, 32)
    noises: tuple[int, ...] = (0, 30, 60)
    share: float = 0.25
    detector: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """The settings for JSON that no name of a training tells."""
        kept = (
            "pictures",
            "large_pictures",
            "epochs",
            "batch_size",
            "depth",
            "share",
            "detector",
            "overrides",
        )
        return json.loads(json.dumps({name: getattr(self, name) for name in kept}))


def full_scale(data_root: Path, overrides: tuple[str, ...] = ()) -> Scale:
    return Scale(data_root, objects(data_root, 16), objects(data_root, 64), overrides=overrides)


def quick_scale(data_root: Path, overrides: tuple[str, ...] = ()) -> Scale:
    """Tiny networks on a few generated pictures, and detectors without training to speak of."""
    shapes = {"format": "shapes", "root": str(data_root / "shapes32"), "num_train": 24, "num_test": 10}
    return Scale(
        data_root,
        shapes,
        shapes,
        seeds=1,
        epochs=2,
        batch_size=12,
        depths=(14,),
        orders=(8,),
        depth=8,
        thousand=((29, True), (14, False)),
        thousand_epochs=1,
        widths=(8,),
        noises=(60,),
        share=0.04,
        detector=(
            "model.backbone.width=8",
            "model.min_size=64",
            "model.max_size=96",
            "model.anchor_sizes=[24]",
        ),
        overrides=overrides,
    )


def recipe(
    scale: Scale,
    backbone: dict[str, Any],
    seed: int,
    *,
    pictures: dict[str, Any] | None = None,
    epochs: int = 0,
) -> ClassifierConfig:
    """The recipe of one run: SGD whose rate is divided by ten after a half and three quarters, as in He et al. 2015."""
    epochs = epochs or scale.epochs
    values = {
        "model": {"backbone": backbone},
        "data": pictures or scale.pictures,
        "augment": {"padding": 2},
        "train": {
            "epochs": epochs,
            "batch_size": scale.batch_size,
            "lr": 0.05,
            "norm_decay": True,
            "milestones": [epochs / 2, epochs * 3 / 4],
            "warmup_steps": 100,
            "warmup_factor": 0.1,
            "eval_every": max(1, epochs // 10),
            "save_every": 2,
            "seed": seed,
        },
    }
    return parse_config(values, scale.overrides, kind=ClassifierConfig)
