"""Write clean annotations: COCO JSON for each split and a recipe's section `data`. Pictures stay as they are."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from ..data.dataset import DetectionDataset, concatenate
from ..data.headers import scale_of
from ..data.likeness import equal_pictures
from ..data.opened import Opened
from ..data.records import Annotations, Picture
from ..files import write_atomically, write_json
from .box_format import convert
from .boxes import usable
from .duplicates import splits_of
from .part import Part, select


def write_clean(folder: Path, root: Path, parts: Sequence[Part], opened: Mapping[str, Opened]) -> list[str]:
    """Write SPLIT.json for each split, and data.yaml. Returns sentences on what was left out or changed.

    Left out are pictures that are absent, unreadable or of another size than annotated, training pictures that val or
    test holds too, and boxes that are faulty or repeated. Boxes are clipped to their pictures, and scaled if the
    picture was. Boxes that were read in a wrong format are converted. All splits get the same class list.

    ValueError: a split would be left without pictures, or boxes were filed in another format, and it is not clear in
        which.
    """
    converted = [convert(part) for part in parts]
    parts = [part for part, _ in converted]
    names = tuple(dict.fromkeys(name for part in parts for name in _class_names(part)))
    shared = _shared_with_validation(parts, opened)
    cleaned, told = {}, [sentence for _, sentences in converted for sentence in sentences]
    for split in dict.fromkeys(part.split for part in parts):
        of_split = [part for part in parts if part.split == split]
        datasets, dropped = _clean_split(of_split, opened, names, shared if split == "train" else set())
        if not datasets:
            raise ValueError(f"{split}: no picture would be left; left out are {' and '.join(dropped)}")
        dataset = cleaned[split] = concatenate(datasets)
        told += [f"{split}: left out {reason}" for reason in dropped]
        told.append(f"{split}: {len(dataset)} pictures, {len(dataset.boxes)} boxes")
    sources = {}
    for split, dataset in cleaned.items():
        content = dataset.to_coco()
        for image in content["images"]:
            image["file_name"] = Path(os.path.relpath(image["file_name"], root)).as_posix()
        write_json(folder / f"{split}.json", content)
        path = os.path.relpath(folder / f"{split}.json", root)
        sources[split] = {"format": "coco", "images": ".", "annotations": path}
    text = yaml.safe_dump({"data": {"root": str(root), **sources}}, sort_keys=False)
    write_atomically(folder / "data.yaml", lambda path: path.write_text(text, encoding="utf-8"))
    return told


def _clean_split(
    parts: Sequence[Part], opened: Mapping[str, Opened], names: tuple[str, ...], shared: set[str]
) -> tuple[list[DetectionDataset], list[str]]:
    """The clean data sets of a split's parts that keep a picture, and what was left out."""
    datasets, dropped = [], Counter()
    for part in parts:
        sizes = map(tuple, part.sizes.tolist())
        reasons = [_reason(*each, opened, shared) for each in zip(part.paths, sizes, strict=True)]
        pictures, boxes = np.array([reason is None for reason in reasons], bool), usable(part)
        dropped.update(filter(None, reasons))
        dropped["boxes that are faulty or repeated"] += int((pictures[part.rows] & ~boxes).sum())
        dropped["entries that cannot be used"] += len(part.problems)
        if pictures.any():
            datasets.append(_clean(select(part, pictures, boxes), opened, names))
    return datasets, [f"{count} {reason}" for reason, count in dropped.items() if count]


def _class_names(part: Part) -> list[str]:
    """The part's classes, in the order of their ids or of the alphabet."""
    return sorted(part.class_ids, key=part.class_ids.get) or sorted(set(part.names) - {""})


def _shared_with_validation(parts: Sequence[Part], opened: Mapping[str, Opened]) -> set[str]:
    """The training pictures that val or test holds too, by path or by content."""
    splits, same = splits_of(parts), equal_pictures(opened)
    elsewhere = {same.get(path, path) for path, found in splits.items() if set(found) - {"train"}}
    return {path for path, found in splits.items() if "train" in found and same.get(path, path) in elsewhere}


def _reason(path: str, filed: tuple[int, int], opened: Mapping[str, Opened], shared: set[str]) -> str | None:
    """Why a picture is left out; None if it is kept. filed: its (height, width) in the annotations."""
    if path not in opened:
        return "pictures that are absent"
    if opened[path].size is None:
        return "pictures that cannot be read"
    if scale_of(filed, opened[path].size) is None:
        return "pictures of another size than annotated"
    return "pictures of train that val or test holds too" if path in shared else None


def _clean(part: Part, opened: Mapping[str, Opened], names: tuple[str, ...]) -> DetectionDataset:
    """The data set of a part whose faults are gone: the pictures' true sizes, boxes scaled and clipped to them."""
    sizes = [opened[path].size for path in part.paths]
    scales = [scale_of(tuple(filed), size) for filed, size in zip(part.sizes.tolist(), sizes, strict=True)]
    factors, limits = (np.array(values)[part.rows][:, [1, 0, 1, 0]] for values in (scales, sizes))
    boxes, areas = (part.boxes * factors).clip(0, limits), factors[:, 0] * factors[:, 1]
    objects = [
        replace(o, picture=row, box=tuple(box), area=None if o.area is None else o.area * area)
        for o, row, box, area in zip(
            part.objects, part.rows.tolist(), boxes.tolist(), areas.tolist(), strict=True
        )
    ]
    pictures = list(map(Picture, part.paths, part.image_ids.tolist(), sizes))
    return Annotations(part.source, pictures, objects, lambda o: (part.source, str(o.box))).to_dataset(names)
