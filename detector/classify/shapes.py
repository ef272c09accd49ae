"""Generate pictures of 32x32 pixels in ten classes of shapes, in the files of CIFAR-10's binary form.

    root/data_batch_1.bin ...  root/test_batch.bin  root/batches.meta.txt  root/shapes32.json

The class is the shape of the largest object. Small objects of other shapes, low contrast, noise and random colours,
turns and stretches make it hard: see `draw_labelled`.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from .. import processes
from ..data.drawing import blend, cover, draw_background, outline_of
from ..data.shapes import read_settings
from ..files import remove_temporaries, write_atomically, write_json
from ..settings import Count, checked
from .cifar import NAMES_FILE, load_cifar
from .pictures import Pictures

CLASS_NAMES = (
    "circle", "triangle", "square", "pentagon", "star", "cross", "arrow", "crescent", "half", "heart",
)  # fmt: skip
SIZE = 32
# Distance of a shape's colour to the ground behind it, in grey levels.
_CONTRAST = (20, 160)
# Raise this when the drawing changes, so that older folders are written anew.
_VERSION = 1
_SETTINGS_NAME = "shapes32.json"
_PER_FILE = 10_000
_OURS = re.compile(rf"data_batch_\d+\.bin|test_batch\.bin|{NAMES_FILE}|{_SETTINGS_NAME}")


@checked
def generate_labelled(
    root: str | Path,
    *,
    num_train: Count = 50_000,
    num_test: Count = 10_000,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> None:
    """Write the pictures into `root`, unless they are there already with the same settings.

    A picture depends on (seed, split, number) only. 60,000 pictures take a minute.

    ValueError: `root` holds files that this function did not write, or a setting is out of range.
    """
    root = Path(root)
    settings = {"version": _VERSION, "num_train": num_train, "num_test": num_test, "seed": seed}
    marker = root / _SETTINGS_NAME
    if read_settings(marker) == settings:
        return
    _clear(root)
    (root / NAMES_FILE).write_text("\n".join(CLASS_NAMES) + "\n", encoding="utf-8")
    for number, first in enumerate(range(0, num_train, _PER_FILE), start=1):
        last = min(first + _PER_FILE, num_train)
        _write(root / f"data_batch_{number}.bin", (seed, 0), range(first, last))
    _write(root / "test_batch.bin", (seed, 1), range(num_test))
    # The settings are written last, so a folder that has them is complete.
    write_json(marker, settings, indent=2)


class ShapesSource(generate_labelled.settings):
    """The generated pictures, written into `root` when they are not there yet."""

    format: Literal["shapes"]
    root: Path = Path("datasets/shapes32")

    def load(self, split: str, class_names: tuple[str, ...] | None = None) -> Pictures:
        """The "train" or "test" pictures."""
        settings = self.model_dump(exclude={"format", "root"})
        processes.from_main(lambda: generate_labelled(self.root, **settings))
        return replace(load_cifar(self.root, split, class_names=class_names), notes=())


def _clear(root: Path) -> None:
    """Empty `root` and mark it as ours. Files of another origin are a ValueError."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root}: a file, where the folder of the pictures should be")
    is_ours = (root / _SETTINGS_NAME).is_file()
    if is_ours:
        # A generation that was killed leaves them.
        remove_temporaries(root)
    present = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []
    if foreign := [name for name in present if not (is_ours and _OURS.fullmatch(name))]:
        raise ValueError(
            f"{root}: holds files that are not generated shapes ({foreign[0]}); name a new or empty folder"
        )
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / _SETTINGS_NAME, {})
    for name in present:
        if name.endswith(".bin"):
            (root / name).unlink()


def _write(path: Path, seeds: tuple[int, int], numbers: range) -> None:
    """Write pictures as CIFAR-10's records: a byte for the label, then red, green and blue planes."""
    records = np.empty((len(numbers), 1 + 3 * SIZE**2), np.uint8)
    for row, number in enumerate(numbers):
        picture, label = draw_labelled(np.random.default_rng((*seeds, number)))
        records[row, 0], records[row, 1:] = label, picture.transpose(2, 0, 1).ravel()
    write_atomically(path, records.tofile)


def draw_labelled(generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """One picture, (32, 32, 3) uint8 RGB, and its label: the index in CLASS_NAMES of its largest shape.

    The shape differs from the ground behind it by 20 to 160 grey levels in a random colour; noise has 2 to 12. Up to
    four smaller shapes of any class lie around and below it. All are turned by any angle and stretched by up to 1.2.
    """
    canvas = draw_background(generator, SIZE)
    label = int(generator.integers(len(CLASS_NAMES)))
    diameter = generator.uniform(14, 24)
    for _ in range(generator.integers(0, 5)):
        other = int(generator.integers(len(CLASS_NAMES)))
        _draw(generator, canvas, other, generator.uniform(0.25, 0.5) * diameter)
    _draw(generator, canvas, label, diameter)
    noise = generator.normal(0, generator.uniform(2, 12), canvas.shape)
    return np.clip(np.round(canvas + noise), 0, 255).astype(np.uint8), label


def _draw(generator: np.random.Generator, canvas: np.ndarray, label: int, diameter: float) -> None:
    """Lay a shape over the canvas (32, 32, 3) in place, anywhere and nearly whole."""
    outline = outline_of(CLASS_NAMES[label], generator.uniform(0, 2 * np.pi))
    outline[:, 0] *= generator.uniform(1, 1.2)
    turn = generator.uniform(0, 2 * np.pi)
    outline = outline @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    half = diameter / 2
    center = generator.uniform(0.8 * half, SIZE - 0.8 * half, 2)
    mask = cover(center + half * outline, SIZE)
    direction = generator.normal(size=3)
    behind = (canvas * mask[:, :, None]).sum(axis=(0, 1)) / max(1, int(mask.sum()))
    color = behind + direction / np.linalg.norm(direction) * np.exp(generator.uniform(*np.log(_CONTRAST)))
    blend(canvas, mask, color)
