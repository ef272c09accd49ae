"""Fixtures shared by all tests."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from backbones import Backbone, RoIHead, Trunk

# A background job starts with Ctrl-C ignored, and so would the programs that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# So does a program under nohup with the closing of its terminal.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Run a tool in this process: run_tool("infer", argument, ...) -> (exit status, standard output, standard error)."""

    def run_tool(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        status = module.main()
        return status, *capsys.readouterr()

    return run_tool


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and reference numbers beside the project; without it tests skip."""
    root = Path(__file__).resolve().parent.parent
    path = Path(os.environ.get("DETECTOR_SHARED", root.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path} (set DETECTOR_SHARED)")
    return path


@pytest.fixture(scope="session")
def tiny_shapes(tmp_path_factory) -> Path:
    """The folder of a generated data set of 64 pixels: 8 pictures to train, 4 to validate."""
    from detector.data.shapes import generate_shapes

    root = tmp_path_factory.mktemp("tiny_shapes")
    generate_shapes(root, num_train=8, num_val=4, image_size=64)
    return root


@pytest.fixture(scope="session")
def tiny_config(tiny_shapes):
    """Make a recipe on `tiny_shapes` that runs an epoch in a quarter of a second: tiny_config("train.epochs=3", ...)."""
    from detector.config import parse_config

    source = {"format": "shapes", "num_train": 8, "num_val": 4, "image_size": 64}
    recipe = {
        "model": {
            "backbone": {"name": "resnet18", "width": 8},
            "anchor_sizes": [16, 32],
            "min_size": 64,
            "max_size": 64,
            "rpn_pre_nms_top_n_train": 40,
            "rpn_pre_nms_top_n_test": 40,
            "rpn_post_nms_top_n_train": 16,
            "rpn_post_nms_top_n_test": 16,
            "rpn_batch_size_per_image": 32,
            "box_batch_size_per_image": 16,
        },
        "data": {
            "root": str(tiny_shapes),
            "train": {**source, "split": "train"},
            "val": {**source, "split": "val"},
        },
        "train": {"epochs": 2, "lr": 0.01, "warmup_steps": 2},
        "loader": {"num_workers": 0},
    }

    def make(*overrides: str):
        return parse_config(recipe, overrides)

    return make


@pytest.fixture(scope="session")
def varied(tiny_config):
    """A recipe with everything that a resumed run must take up again."""
    from short_runs import VARIED

    return tiny_config(*VARIED)


@pytest.fixture(scope="session")
def unbroken(varied, tmp_path_factory) -> Path:
    """The folder of a run of `varied` that never stopped. Tests only read it."""
    from short_runs import CPU

    from detector.run import Run

    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    Run(varied, folder, CPU).train()
    return folder


def _tiny_stage(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1), nn.ReLU())


@pytest.fixture
def tiny_backbone() -> Backbone:
    """Five convolutions, C4 = 16 and C5 = 32: a backbone for what is not about backbones. The same weights each time."""
    widths = (3, 8, 8, 16, 16, 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stages = [_tiny_stage(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    return Backbone("tiny", Trunk(stages[:4], out_channels=16), RoIHead(stages[4], out_channels=32))
