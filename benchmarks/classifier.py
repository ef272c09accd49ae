"""A classifier's training: its matrix rate beside that of the same trunk in a detector, and CIFAR's loader beside its network."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbones import Preprocessing, create_backbone
from backbones.summary import multiply_accumulates
from detector.classify.classifier import ClassifierTask, build_classifier
from detector.classify.config import ClassifierConfig
from detector.classify.run import ClassifierRun
from detector.config import load_config

from .limit import matrix_call
from .settings import Settings
from .timing import Stopwatch, alternate, per_second

# Forward and backward: the product, and those of both gradients.
_PRODUCTS = 3
_RECIPE = Path(__file__).resolve().parent.parent / "configs" / "classify" / "cifar10.yaml"
# Of a file of CIFAR-10.
RECORDS = 10_000


def compare_rates(settings: Settings, side: int) -> dict[str, Any]:
    """Multiply-accumulates a second of forward and backward, of a classifier and of its trunk alone, with batch norm.

    Both see `settings.batch` pictures of side x side pixels. ratio: the classifier's rate over the trunk's.
    """
    settings.apply()
    options = {"name": settings.backbone, "norm": "batch"}
    plain = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    classifier = build_classifier(options, 1000, plain).train()
    trunk = create_backbone(settings.backbone, norm="batch").trunk.train()
    trunk = trunk.to(memory_format=torch.channels_last)
    pictures = torch.randint(0, 256, (settings.batch, 3, side, side), dtype=torch.uint8)
    images = torch.rand(settings.batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    batch, task = (pictures, torch.randint(1000, (settings.batch,))), ClassifierTask(0.0)
    losses: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "classifier": (classifier, lambda: task(classifier, batch, pictures.device, (0, 0, 0))["loss"]),
        "trunk": (trunk, lambda: trunk(images).mean()),
    }
    watch = Stopwatch("cpu")
    calls = {name: partial(watch.time, partial(_pass, *each)) for name, each in losses.items()}
    times = alternate(
        calls | {"matrix": matrix_call(watch, settings, "float32")}, settings.repeats, settings.warmup
    )
    macs = {
        "classifier": multiply_accumulates(classifier, pictures[:1]),
        "trunk": multiply_accumulates(trunk, images[:1]),
    }
    rates = {n: _PRODUCTS * settings.batch * macs[n] / times[n]["total"]["median"] for n in macs}
    rates["matrix"] = settings.matrix_size**3 / times["matrix"]["total"]["median"]
    return {
        "side": side,
        "times": times,
        "macs": macs,
        "macs_per_second": rates,
        "ratio": rates["classifier"] / rates["trunk"],
    }


def _pass(network: nn.Module, loss: Callable[[], Tensor]) -> None:
    network.zero_grad(set_to_none=True)
    loss().backward()


def compare_cifar_loader(settings: Settings) -> dict[str, Any]:
    """Pictures a second of the recipe's loader on files of random pictures in CIFAR-10's format, and of its network.

    The network's are of a forward and a backward pass.
    """
    settings.apply()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _write_cifar(root)
        run = ClassifierRun(
            load_config(_RECIPE, [f"data.root={root}"], kind=ClassifierConfig),
            root / "run",
            torch.device("cpu"),
        )
        model, batch = run.training.model.train(), next(iter(run.loader))
        watch, task = Stopwatch("cpu"), run.training.task

        def loss() -> Tensor:
            return task(model, batch, run.device, (0, 0, 0))["loss"]

        calls = {
            "loader": lambda: watch.time(lambda: list(run.loader)),
            "network": partial(watch.time, partial(_pass, model, loss)),
        }
        times = alternate(calls, settings.repeats, settings.warmup)
        workers = run.config.loader.num_workers
    rates = {
        "loader": per_second(times, len(run.train_set))["loader"],
        "network": per_second(times, len(batch[1]))["network"],
    }
    return {
        "workers": workers,
        "times": times,
        "images_per_second": rates,
        "ratio": rates["loader"] / rates["network"],
    }


def _write_cifar(root: Path) -> None:
    """Random records in files of CIFAR-10's names and format."""
    rng = np.random.default_rng(0)
    (root / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)), encoding="utf-8")
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        records = rng.integers(0, 256, (RECORDS, 1 + 3072), dtype=np.uint8)
        records[:, 0] %= 10
        (root / name).write_bytes(records.tobytes())
