"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and reference numbers beside the project; without it tests skip."""
    root = Path(__file__).resolve().parent.parent
    path = Path(os.environ.get("DETECTOR_SHARED", root.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path} (set DETECTOR_SHARED)")
    return path
