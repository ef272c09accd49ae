"""COCO's detection metric of stored results, by pycocotools or by faster-coco-eval, which is several times faster.

Definition of the twelve numbers: https://cocodataset.org/#detection-eval.
"""

import contextlib
import importlib.util
import io
import math
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from backbones.messages import shown

from ..files import read_json
from ..tables import format_percent, format_table

COCO_METRICS = {
    "AP": "IoU 0.50:0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "area < 32^2",
    "APm": "32^2 < area < 96^2",
    "APl": "area > 96^2",
    "AR1": "1 detection per image",
    "AR10": "10 detections per image",
    "AR100": "100 detections per image",
    "ARs": "area < 32^2",
    "ARm": "32^2 < area < 96^2",
    "ARl": "area > 96^2",
}
"""The twelve numbers in the order of `COCOeval.stats`, and the condition that each adds."""

# The ids of a result, and the section of COCO's file that names them.
_NAMED = {"image_id": ("images", "file_name"), "category_id": ("categories", "name")}
RESULT_KEYS = ("image_id", "category_id", "bbox", "score")
_ANNOTATION_KEYS = ("image_id", "category_id", "bbox", "area", "iscrowd")


def evaluate_coco(
    ground_truth: dict, results: list[dict], *, backend: str = "auto", detections_per_img: int = 100
) -> dict[str, Any]:
    """Compute COCO's twelve numbers, and AP and AP50 of each class, over all images of the ground truth.

    Args:
        ground_truth: COCO-format dict, `bbox` as xywh in pixels. Annotations may have any ids. A missing
            `area` is w * h, and a missing `iscrowd` is 0. A missed crowd costs nothing, and a detection matched to
            a crowd is not counted. `difficult` is ignored.
        results: COCO results, `bbox` as xywh in pixels of the original image. May be empty.
        backend: "pycocotools", "faster" (faster-coco-eval), or "auto", which takes the faster one if it is
            installed.
        detections_per_img: the most that the detector gives. Where it is above 100, all numbers but AR1, AR10 and AR100
            count so many detections of a class and image. Published numbers count 100.

    Returns:
        The keys of `COCO_METRICS`, each in [0, 1]; `per_class`: class name -> {"AP", "AP50"}; `max_detections`: how
        many of a class and image were counted. More objects or detections than that are a warning. A class or a
        size without ground truth is None, so the dict can be written as JSON.

    Raises:
        ValueError: the ground truth, the results or the backend cannot be used.
    """
    names = class_names_by_id(ground_truth)
    check_results(results, ground_truth)
    max_detections = max(100, detections_per_img)
    for what, boxes in (("objects", ground_truth["annotations"]), ("detections", results)):
        _warn_of_many(what, boxes, max_detections)
    coco_class, eval_class = _load_backend(backend)
    with contextlib.redirect_stdout(io.StringIO()):
        annotated = _index(coco_class, ground_truth, ground_truth["annotations"], _ANNOTATION_KEYS)
        detected = _index(coco_class, ground_truth, results, RESULT_KEYS)
        coco_eval = eval_class(annotated, detected, "bbox")
        coco_eval.params.maxDets = sorted({1, 10, 100, max_detections})
        coco_eval.evaluate()
        coco_eval.accumulate()
    # (IoU thresholds, recalls, classes, areas, maxDets) and the same without recalls; -1 without ground truth
    precision, recall = coco_eval.eval["precision"], coco_eval.eval["recall"]
    at_50, at_75 = (int(np.abs(coco_eval.params.iouThrs - iou).argmin()) for iou in (0.5, 0.75))
    cells = [
        *(precision[rows, ..., 0, -1] for rows in (slice(None), at_50, at_75)),
        *(precision[..., area, -1] for area in (1, 2, 3)),
        *(recall[..., 0, column] for column in (0, 1, 2)),
        *(recall[..., area, -1] for area in (1, 2, 3)),
    ]
    numbers = {name: _mean(cell) for name, cell in zip(COCO_METRICS, cells, strict=True)}
    # Both have the classes by ascending id.
    per_class = {
        name: {"AP": _mean(cells[0][..., column]), "AP50": _mean(cells[1][..., column])}
        for column, name in enumerate(names.values())
    }
    return {**numbers, "max_detections": max_detections, "per_class": per_class}


def format_coco(metrics: Mapping[str, Any]) -> str:
    """Format the result of `evaluate_coco` as two tables in percent: the twelve numbers, then the classes."""
    numbers = format_table(
        [(name, format_percent(metrics[name]), condition) for name, condition in COCO_METRICS.items()],
        header=("COCO, %", "", f"over the best {metrics['max_detections']} detections of a class and image"),
    )
    classes = format_table(
        [
            (name, format_percent(row["AP"]), format_percent(row["AP50"]))
            for name, row in metrics["per_class"].items()
        ],
        header=("class", "AP", "AP50"),
    )
    return f"{numbers}\n\n{classes}"


def load_results(path: str | Path, ground_truth: dict | None = None) -> list[dict]:
    """Read a JSON file in COCO's results format, and check it as `check_results` does.

    Where a result has a file name, its stem or a class name in place of an id of `ground_truth`, it gets the id. An
    `images.json` beside the file says what its ids stand for.
    """
    results = read_json(path)
    if ground_truth is not None and isinstance(results, list):
        _set_ids(results, ground_truth, names_beside(path))
    try:
        check_results(results, ground_truth)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return results


def names_beside(path: str | Path) -> dict[str, dict]:
    """What the ids of a results file stand for, by the `images.json` beside it: key -> id -> name. {}: there is none."""
    beside = Path(path).with_name("images.json")
    if not beside.is_file():
        return {}
    content = read_json(beside)
    try:
        return {key: {e["id"]: e[name] for e in content[section]} for key, (section, name) in _NAMED.items()}
    except (KeyError, TypeError):
        raise ValueError(f"{beside}: accepted are COCO's images with file_name and its categories") from None


def _accepted_ids(ground_truth: dict) -> dict[str, dict]:
    """The ids that results may have: key -> id -> name, or None where an id has no name."""
    return {key: {e["id"]: e.get(name) for e in ground_truth[part]} for key, (part, name) in _NAMED.items()}


def _set_ids(results: list, ground_truth: dict, beside: dict[str, dict]) -> None:
    """Replace names in results, which are changed, by ids of the ground truth. A name that it lacks stays."""
    for key, entries in _accepted_ids(ground_truth).items():
        name = _NAMED[key][1]
        rows = [r for r in results if isinstance(r, dict) and isinstance(r.get(key), (int, str))]
        names = [beside[key].get(row[key]) if beside else row.get(name, row[key]) for row in rows]
        if not any(isinstance(each, str) for each in names) and all(each in entries for each in names):
            continue
        ids: dict[str, Any] = {}
        for number, text in entries.items():
            stem = Path(str(text)).stem
            as_number = str(int(stem)) if stem.isdecimal() else stem
            for each in {*_endings(text), stem, as_number} if key == "image_id" else {text}:
                # None: several have it.
                ids[each] = None if each in ids else number
        for row, text in zip(rows, names, strict=True):
            row[key] = next((ids[each] for each in _endings(text) if ids.get(each) is not None), text)


def _endings(path: Any) -> list[str]:
    """A path, and what is left of it without its first folders: a/b.jpg, b.jpg."""
    parts = Path(str(path)).parts
    return ["/".join(parts[i:]) for i in range(len(parts))]


def check_results(results: list[dict], ground_truth: dict | None = None) -> None:
    """Check a list of COCO results, and that the ids are in `ground_truth` if that is given.

    A negative width or height is a warning.

    Raises:
        ValueError: a result is not in COCO's format, or has an unknown id. The message gives the first such index.
    """
    if not isinstance(results, list):
        keys = ", ".join(RESULT_KEYS)
        raise ValueError(f"results are a {type(results).__name__}; accepted is a list of dicts with {keys}")
    accepted = {} if ground_truth is None else _accepted_ids(ground_truth)
    for index, result in enumerate(results):
        fault = _fault(result, accepted)
        if fault:
            raise ValueError(f"results[{index}]: {fault}")
    negative = sum(result["bbox"][2] < 0 or result["bbox"][3] < 0 for result in results)
    if negative:
        warnings.warn(
            f"{negative} of {len(results)} detections have a negative width or height. They are scored as they are, as the "
            "official evaluators do. A bbox is [x, y, width, height]; are these [x1, y1, x2, y2]?",
            stacklevel=2,
        )


def class_names_by_id(ground_truth: dict) -> dict[int, str]:
    """Category id -> name of a COCO-format dict, by ascending id.

    Raises:
        ValueError: a section is missing, or two categories share an id or a name.
    """
    missing = [key for key in ("images", "categories", "annotations") if key not in ground_truth]
    if missing:
        raise ValueError(f"the ground truth has no {', '.join(missing)}; it is a dict in COCO's format")
    names = {c["id"]: c["name"] for c in sorted(ground_truth["categories"], key=lambda c: c["id"])}
    if len(set(names.values())) < len(ground_truth["categories"]):
        raise ValueError(f"ids and names of categories must be unique, got {ground_truth['categories']}")
    return names


def _fault(result: Any, accepted: Mapping[str, dict]) -> str | None:
    """What is wrong with one result, or None."""
    if not isinstance(result, Mapping):
        return f"is a {type(result).__name__}; accepted is a dict with the keys {', '.join(RESULT_KEYS)}"
    missing = [key for key in RESULT_KEYS if key not in result]
    if missing:
        return f"has no {', '.join(missing)}; it has {', '.join(map(str, result))[:200] or 'no keys'}"
    for key, ids in accepted.items():
        if not isinstance(result[key], Hashable) or result[key] not in ids:
            named = [f"{number!r} ({name})" if name else repr(number) for number, name in ids.items()]
            some = ", ".join(named[:5]) + ", ..." * (len(ids) > 5)
            return f"unknown {key} {shown(result[key])}; the ground truth has {len(ids)}: {some}"
    if not _is_finite(result["score"]):
        return f"score is {shown(result['score'])}; accepted is a finite number"
    bbox = result["bbox"]
    if not (isinstance(bbox, (list, tuple)) and len(bbox) == 4 and all(map(_is_finite, bbox))):
        return f"bbox is {shown(bbox)}; accepted are four finite numbers [x, y, width, height]"
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _load_backend(name: str) -> tuple[type, type]:
    """The classes `COCO` and `COCOeval` of a backend."""
    if name == "auto":
        name = "faster" if importlib.util.find_spec("faster_coco_eval") else "pycocotools"
    if name == "faster":
        try:
            from faster_coco_eval import COCO, COCOeval_faster
        except ImportError as error:
            raise ValueError(
                'backend "faster" needs the package faster-coco-eval; "auto" does without it'
            ) from error
        return COCO, COCOeval_faster
    if name == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    raise ValueError(f'unknown backend {name!r}; accepted are "auto", "pycocotools", "faster"')


def _index(coco_class: type, ground_truth: dict, boxes: list[dict], keys: tuple[str, ...]) -> Any:
    """Make a backend's COCO object from annotations or from results.

    Only `keys`, which the metric reads, are copied. Boxes are numbered from 1, because both backends read an
    id of 0 as "unmatched". Unlike `COCO.loadRes`, this takes an empty list and makes no polygon for each box.
    """
    coco = coco_class()
    coco.dataset = {
        "images": [{"id": image["id"]} for image in ground_truth["images"]],
        "categories": [{"id": category["id"]} for category in ground_truth["categories"]],
        "annotations": [
            {"id": number, "area": box["bbox"][2] * box["bbox"][3], "iscrowd": 0, "score": 0.0}
            | {key: box[key] for key in keys if key in box}
            for number, box in enumerate(boxes, start=1)
        ],
    }
    coco.createIndex()
    return coco


def _warn_of_many(what: str, boxes: list[dict], max_detections: int) -> None:
    """Warn where an image has more boxes of a class than the metric counts detections."""
    counts = Counter((box["image_id"], box["category_id"]) for box in boxes)
    (image_id, category_id), most = max(counts.items(), key=lambda item: item[1], default=((0, 0), 0))
    if most > max_detections:
        warnings.warn(
            f"image {image_id} has {most} {what} of category {category_id}, and COCO's numbers count the best "
            f"{max_detections} detections of a class and image: raise model.box_detections_per_img, which they follow",
            stacklevel=3,
        )


def _mean(cell: np.ndarray) -> float | None:
    """The mean of a part of a backend's tables. None where all is -1: there was no ground truth."""
    measured = cell[cell > -1]
    return float(measured.mean()) if measured.size else None
