"""COCO's annotation JSON into a DetectionDataset."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from backbones.messages import nearest

from ..settings import Section
from .dataset import DetectionDataset, find_faulty_boxes, offsets_of, refuse_problems

_REQUIRED = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name"),
    "annotations": ("image_id", "category_id", "bbox"),
}


class _Annotation(NamedTuple):
    index: int  # in the file's list
    entry: dict
    row: int  # of its image, in ascending order of image ids
    label: int


class CocoSource(Section):
    """Pictures in `images`, boxes in the COCO JSON `annotations`; both below data.root."""

    format: Literal["coco"]
    images: str
    annotations: str
    limit: int | None = Field(None, gt=0, description="only the first so many annotated images")

    def load(self, root: Path, **options: Any) -> DetectionDataset:
        """The data set; options are those of `load_coco`."""
        return load_coco(root / self.images, root / self.annotations, limit=self.limit, **options)


def load_coco(
    images_dir: str | Path,
    annotations_path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
    strict: bool = False,
    use_difficult: bool = True,
    check_pictures: bool = True,
) -> DetectionDataset:
    """Read COCO JSON; images in ascending order of their ids, those without annotations too.

    Category ids may have gaps: labels 1..K-1 go in ascending order of them, or in the order of `class_names`.

    Args:
        class_names: the categories to keep, in this order; all of them by default.
        limit: only the first `limit` images with a box to learn.
        strict: refuse annotations that cannot be used, in place of skipping them with a line in `problems`.
        use_difficult: learn objects whose annotation says `"difficult": 1` (an extension of the format).
        check_pictures: refuse a set with absent pictures; False where only its annotations are used.

    Raises:
        FileNotFoundError: the JSON, the folder, or a picture that the JSON lists is missing.
        ValueError: the JSON is malformed; the message names the file and the entry.
    """
    images_dir, annotations_path = Path(images_dir), Path(annotations_path)
    content = _read_json(annotations_path)
    names, category_ids, notes = _select_classes(content, class_names, annotations_path)
    images = sorted(content["images"], key=lambda image: image["id"])
    columns, problems = _read_annotations(content, images, category_ids, annotations_path)
    if strict:
        refuse_problems(problems, annotations_path)
    dataset = DetectionDataset(
        class_names=names,
        category_ids=category_ids,
        image_paths=[os.path.join(images_dir, image["file_name"]) for image in images],
        image_ids=[image["id"] for image in images],
        image_sizes=[(image["height"], image["width"]) for image in images],
        use_difficult=use_difficult,
        problems=problems,
        notes=notes,
        **columns,
    ).first_annotated(limit)
    if check_pictures:
        _check_pictures_exist(dataset.image_paths.tolist(), images_dir, annotations_path)
    return dataset


def _read_json(path: Path) -> dict:
    """The parsed file, with every key that is read later present and every id a whole number."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotation file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected an object with images, annotations and categories, "
            f"got a {type(content).__name__} (a file of results is no ground truth)"
        )
    for section, keys in _REQUIRED.items():
        if not isinstance(content.get(section), list):
            raise ValueError(f"{path}: has no list {section!r}, its keys are {sorted(content)}")
        _check_entries(content[section], section, keys, path)
    _check_unique(content["images"], "images", "id", path)
    _check_unique(content["categories"], "categories", "id", path)
    _check_unique(content["categories"], "categories", "name", path)
    return content


def _check_entries(entries: list, section: str, keys: tuple[str, ...], path: Path) -> None:
    integers = [key for key in keys if key not in ("file_name", "name", "bbox")]
    strings = [key for key in keys if key in ("file_name", "name")]
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {section}[{index}] is a {type(entry).__name__}, not an object")
        for key in keys:
            if key not in entry:
                raise ValueError(f"{path}: {section}[{index}] has no {key!r}, its keys are {sorted(entry)}")
        for key in integers:
            if type(entry[key]) is not int:
                raise ValueError(
                    f"{path}: {section}[{index}] has {key} {entry[key]!r}, a whole number is expected"
                )
        for key in strings:
            if not isinstance(entry[key], str) or not entry[key]:
                raise ValueError(f"{path}: {section}[{index}] has {key} {entry[key]!r}, a name is expected")
        if section == "images" and (entry["width"] < 1 or entry["height"] < 1):
            raise ValueError(
                f"{path}: images[{index}] ({entry['file_name']}) is {entry['width']}x{entry['height']}: "
                "width and height are positive pixels"
            )


def _check_unique(entries: list[dict], section: str, key: str, path: Path) -> None:
    seen = {}
    for index, entry in enumerate(entries):
        first = seen.setdefault(entry[key], index)
        if first != index:
            raise ValueError(f"{path}: {section}[{first}] and {section}[{index}] share {key} {entry[key]!r}")


def _select_classes(
    content: dict, class_names: Sequence[str] | None, path: Path
) -> tuple[tuple[str, ...], np.ndarray, list[str]]:
    """Names, category ids (K-1,) in the order of the labels, and notes on what was left out."""
    id_of = {category["name"]: category["id"] for category in content["categories"]}
    if class_names is None:
        names = sorted(id_of, key=id_of.get)
    else:
        names = list(class_names)
        _check_names(names, list(id_of), path)
    if not names:
        raise ValueError(f"{path}: no class to detect, its list of categories is empty")
    ids = np.array([id_of[name] for name in names], np.int64)
    dropped_ids = {id_of[name]: name for name in id_of if name not in names}
    dropped = Counter(
        dropped_ids[annotation["category_id"]]
        for annotation in content["annotations"]
        if annotation["category_id"] in dropped_ids
    )
    counts = ", ".join(f"{count} {name}" for name, count in dropped.most_common())
    notes = [f"{path}: left out, as class_names does not name them: {counts}"] if dropped else []
    return tuple(names), ids, notes


def _check_names(names: list[str], known: list[str], path: Path) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"class_names holds {name!r} twice")
        if name not in known:
            raise ValueError(f"{path}: has no category {name!r}; {nearest(name, known)}")


def _read_annotations(
    content: dict, images: list[dict], category_ids: np.ndarray, path: Path
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The columns of the boxes, image after image, and a sentence for each annotation that cannot be used."""
    annotations, problems = _match_annotations(content, images, category_ids, path)
    entries = [annotation.entry for annotation in annotations]
    rows = np.array([annotation.row for annotation in annotations], np.int64)
    sizes = np.array([(image["height"], image["width"]) for image in images]).reshape(-1, 2)
    boxes = _xyxy([entry["bbox"] for entry in entries])
    faults = find_faulty_boxes(boxes, sizes[rows])
    problems += [
        f"{path}: annotations[{annotations[number].index}] ({images[rows[number]]['file_name']}) "
        f"has a box that {reason}: bbox {entries[number]['bbox']} (x, y, width, height)"
        for number, reason in faults.items()
    ]
    columns = {
        "boxes": boxes,
        "labels": np.array([annotation.label for annotation in annotations], np.int64),
        "areas": _areas(entries, boxes),
        "crowd": np.array([bool(entry.get("iscrowd", 0)) for entry in entries], bool),
        "difficult": np.array([bool(entry.get("difficult", 0)) for entry in entries], bool),
    }
    sound = np.ones(len(boxes), bool)
    sound[list(faults)] = False
    columns = {name: column[sound] for name, column in columns.items()}
    return columns | {"offsets": offsets_of(np.bincount(rows[sound], minlength=len(images)))}, problems


def _match_annotations(
    content: dict, images: list[dict], category_ids: np.ndarray, path: Path
) -> tuple[list[_Annotation], list[str]]:
    """The wanted classes' annotations, image after image, and a sentence for each that belongs nowhere."""
    annotations, problems = [], []
    row_of = {image["id"]: row for row, image in enumerate(images)}
    label_of = {category_id: label for label, category_id in enumerate(category_ids.tolist(), start=1)}
    known_categories = {category["id"] for category in content["categories"]}
    for index, entry in enumerate(content["annotations"]):
        row, label = row_of.get(entry["image_id"]), label_of.get(entry["category_id"])
        if row is None:
            problems.append(
                f"{path}: annotations[{index}] is for image_id {entry['image_id']}, which images lacks"
            )
        elif entry["category_id"] not in known_categories:
            problems.append(
                f"{path}: annotations[{index}] ({images[row]['file_name']}) has category_id "
                f"{entry['category_id']}, which categories lacks"
            )
        elif label is not None:
            annotations.append(_Annotation(index, entry, row, label))
    annotations.sort(key=lambda annotation: annotation.row)  # stable: the file's order within an image
    return annotations, problems


def _xyxy(bboxes: list) -> np.ndarray:
    """COCO's [x, y, width, height] as (M, 4) xyxy; NaN where an entry is not four numbers."""
    rows = [bbox if _is_four_numbers(bbox) else [np.nan] * 4 for bbox in bboxes]
    boxes = np.array(rows, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _is_four_numbers(bbox: object) -> bool:
    return isinstance(bbox, list) and len(bbox) == 4 and all(type(value) in (int, float) for value in bbox)


def _areas(entries: list[dict], boxes: np.ndarray) -> np.ndarray:
    """Each object's area as filed, else its box's: (M,) float64."""
    box_areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).tolist()
    filed = [entry.get("area") for entry in entries]
    return np.array(
        [area if type(area) in (int, float) else own for area, own in zip(filed, box_areas, strict=True)],
        np.float64,
    )


def _check_pictures_exist(image_paths: list[str], images_dir: Path, annotations_path: Path) -> None:
    """One listing of each folder, not a look-up of each file: sets are large and file systems far."""
    if not images_dir.is_dir():
        raise FileNotFoundError(f"{images_dir}: no such folder of images")
    listings = {}
    missing = []
    for path in image_paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listings[folder]:
            missing.append(path)
    if missing:
        names = ", ".join(os.path.relpath(path, images_dir) for path in missing[:5])
        raise FileNotFoundError(
            f"{images_dir}: {len(missing)} of the {len(image_paths)} images that {annotations_path} lists "
            f"are missing: {names}{', ...' if len(missing) > 5 else ''}"
        )
