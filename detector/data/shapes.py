"""Generate a data set of shapes on textured backgrounds, as COCO JSON and pictures on disk.

    root/train/*.jpg  root/val/*.jpg  root/annotations/train.json  root/annotations/val.json  root/shapes.json

The data set is meant for a first run: it needs no download, and a small network learns it in minutes.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from .. import processes
from ..files import write_json
from ..settings import Count, checked
from .coco import read_coco
from .drawing import blend, cover, draw_background, outline_of, random_color
from .file_source import FileSource
from .records import Annotations

CLASS_NAMES = ("circle", "cross", "triangle", "star")

# Raise this when the drawing changes, so that older folders are written anew.
_VERSION = 2
_SETTINGS_NAME = "shapes.json"
_PARTIAL_NAME = "shapes.json.partial"  # marks a folder that is being written
_MAX_OBJECTS = 5
_HALF = 128  # a pixel belongs to a shape that covers at least half of it


@checked
def generate_shapes(
    root: str | Path,
    *,
    num_train: Count = 400,
    num_val: Count = 100,
    image_size: Annotated[int, Field(ge=64, le=4096)] = 160,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> None:
    """Write the data set into `root`, unless it is there already with the same settings.

    Each picture depends on (image_size, seed, split, number) only. A half-written folder, or a folder with other
    settings, is written anew. image_size is in pixels; pictures are square.

    Raises:
        ValueError: `root` holds files that this function did not write, or a setting is out of range.
    """
    root = Path(root)
    settings = {
        "version": _VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "image_size": image_size,
        "seed": seed,
    }
    if read_settings(root / _SETTINGS_NAME) == settings:
        return
    _clear(root)
    (root / "annotations").mkdir(parents=True)
    for split_index, (split, num_images) in enumerate((("train", num_train), ("val", num_val))):
        _write_split(root, split, num_images, image_size, (seed, split_index))
    # The settings are written last, so a folder that has them is complete.
    write_json(root / _SETTINGS_NAME, settings, indent=2)
    (root / _PARTIAL_NAME).unlink()


class ShapesSource(generate_shapes.settings, FileSource):
    """The generated shapes, written below data.root when they are not there yet."""

    format: Literal["shapes"]
    split: Literal["train", "val"]

    def read(self, root: Path) -> Annotations:
        """What the annotations say. The data set is generated if it is absent."""
        settings = self.model_dump(include=set(generate_shapes.settings.model_fields))
        processes.from_main(lambda: generate_shapes(root, **settings))
        return read_coco(root / self.split, root / "annotations" / f"{self.split}.json", root)


def read_settings(path: Path) -> dict | None:
    """The settings that a folder of generated pictures was written with, or None."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _clear(root: Path) -> None:
    """Empty `root` and mark it as unfinished. Files that this module did not write are a ValueError."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root}: a file, where the folder of the data set should be")
    ours = {"train", "val", "annotations", _SETTINGS_NAME, _PARTIAL_NAME}
    present = {entry.name for entry in root.iterdir()} if root.is_dir() else set()
    made_here = bool(present & {_SETTINGS_NAME, _PARTIAL_NAME})
    if present and (not made_here or present - ours):
        foreign = ", ".join(sorted(present - ours if made_here else present)[:5])
        raise ValueError(
            f"{root}: holds files that are not of a generated data set ({foreign}); "
            "name a new or empty folder, or remove them"
        )
    root.mkdir(parents=True, exist_ok=True)
    (root / _PARTIAL_NAME).touch()
    (root / _SETTINGS_NAME).unlink(missing_ok=True)
    for name in present & {"train", "val", "annotations"}:
        shutil.rmtree(root / name)


def _write_split(root: Path, split: str, num_images: int, size: int, seeds: tuple[int, int]) -> None:
    """Write the pictures of a split and its COCO JSON."""
    (root / split).mkdir()
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        picture, objects = draw_picture(np.random.default_rng((*seeds, image_id)), size)
        name = f"{image_id:06d}.jpg"
        Image.fromarray(picture).save(root / split / name, quality=95, subsampling=0)
        images.append({"id": image_id, "file_name": name, "width": size, "height": size})
        for label, (x1, y1, x2, y2), area in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": label, "name": name} for label, name in enumerate(CLASS_NAMES, start=1)]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


def draw_picture(
    generator: np.random.Generator, size: int
) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int], int]]]:
    """One picture, (size, size, 3) uint8 RGB, and its objects as (label, box, area).

    A box is xyxy in whole pixels. It is tight around the pixels that are covered at least half by the shape; the area
    is the number of these pixels.
    """
    canvas = draw_background(generator, size)
    objects, shadow_offset = [], size / 80
    num_objects = int(generator.integers(1, _MAX_OBJECTS + 1)) if generator.random() > 0.06 else 0
    boxes = np.empty((0, 4))
    for _ in range(num_objects):
        placed = _place(generator, size, boxes)
        if placed is None:
            continue
        label, outline, mask, box = placed
        blend(canvas, cover(outline + shadow_offset, size) // 4, np.zeros(3))
        _fill(generator, canvas, mask, box)
        boxes = np.concatenate([boxes, [box]])
        objects.append((label, box, int((mask >= _HALF).sum())))
    noise = generator.normal(0, generator.uniform(1, 5), canvas.shape)
    return np.clip(np.round(canvas + noise), 0, 255).astype(np.uint8), objects


def _place(
    generator: np.random.Generator, size: int, boxes: np.ndarray
) -> tuple[int, np.ndarray, np.ndarray, tuple[int, int, int, int]] | None:
    """Find a place for a random shape that hardly overlaps the others; None if 20 tries find no room.

    boxes: (M, 4), of the others. Returns label, outline (P, 2), coverage (size, size) uint8, and box xyxy.
    """
    label = int(generator.integers(1, len(CLASS_NAMES) + 1))
    for _ in range(20):
        diameter = size * np.exp(generator.uniform(np.log(0.14), np.log(0.5)))
        center = generator.uniform(0.04, 0.96, 2) * size
        outline = center + diameter / 2 * outline_of(CLASS_NAMES[label - 1], generator.uniform(-0.3, 0.3))
        mask = cover(outline, size)
        box = _tight_box(mask >= _HALF)
        whole = np.prod(np.ptp(outline, axis=0))
        if box is None or _largest_overlap(box, boxes) >= 0.1:
            continue
        # Keep the shape if its larger part lies inside the picture.
        if (box[2] - box[0]) * (box[3] - box[1]) / whole > 0.55:
            return label, outline, mask, box
    return None


def _tight_box(covered: np.ndarray) -> tuple[int, int, int, int] | None:
    """(H, W) bool -> the box, xyxy, around the True pixels; None if there are none."""
    columns, rows = np.flatnonzero(covered.any(axis=0)), np.flatnonzero(covered.any(axis=1))
    if not len(columns):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _largest_overlap(box: tuple[int, int, int, int], boxes: np.ndarray) -> float:
    """The largest intersection of `box` with one of `boxes` (M, 4), over the smaller area of the two; 0 if M = 0."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    common = np.prod(np.clip(sides, 0, None), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    own = (box[2] - box[0]) * (box[3] - box[1])
    return float(np.max(common / np.minimum(areas, own), initial=0))


def _fill(generator: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, box: tuple[int, ...]) -> None:
    """Paint a shape on the canvas in a strong colour, lighter at its top. The colour contrasts with the background.

    canvas: (size, size, 3) float32, changed in place; mask: (size, size) uint8 coverage; box: xyxy.
    """
    behind = canvas[mask >= _HALF].mean(axis=0)
    candidates = [random_color(generator, saturation=(0.65, 1), value=(0.45, 1)) for _ in range(4)]
    color = max(candidates, key=lambda candidate: float(np.abs(candidate - behind).sum()))
    height = np.linspace(1.12, 0.88, box[3] - box[1], dtype=np.float32)
    shade = np.ones(len(canvas), np.float32)
    shade[box[1] : box[3]] = height
    blend(canvas, mask, np.clip(color * shade[:, None, None], 0, 255))
