"""The whole examination of a recipe's data, and a short form for the start of a training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..config import Config
from ..data.dataset import DetectionDataset
from ..data.opened import Opened, open_pictures
from .anchors import AnchorFit, check_anchors, fit
from .box_format import check_box_format
from .boxes import check_boxes
from .classes import check_classes
from .duplicates import check_duplicates
from .findings import Finding, sort_findings
from .part import SPLITS, Part, part_of_dataset, read_parts
from .pictures import check_empty, check_files, check_opened, list_folders, present

_QUICK_PICTURES = 5000


@dataclass(frozen=True)
class Examination:
    """What was looked at and what was found. opened: by path; empty if no picture was opened."""

    parts: list[Part]
    findings: list[Finding]
    opened: Mapping[str, Opened] = field(default_factory=dict)
    anchors: AnchorFit | None = None


def examine(config: Config, *, pictures: str = "decode") -> Examination:
    """Check the data of a recipe. ValueError: it names none.

    pictures: "decode" reads all pixels, "headers" only the sizes, "none" not even whether the files exist.
    """
    if not any(getattr(config.data, split) for split in SPLITS):
        raise ValueError(f"the recipe names no data; accepted: data.{', data.'.join(SPLITS)}")
    parts, findings = read_parts(config.data)
    anchors = fit(parts, config.model)
    findings += check_annotations(parts, anchors)
    opened: Mapping[str, Opened] = {}
    if pictures != "none":
        folders = list_folders(parts)
        findings += check_files(parts, folders)
        paths = dict.fromkeys(path for part in parts for path in part.paths[present(part.paths, folders)])
        opened = open_pictures(list(paths), decode=pictures == "decode")
        findings += check_opened(parts, opened) + check_duplicates(parts, opened)
    # Two splits may read one file, and then they find the same.
    return Examination(parts, sort_findings(dict.fromkeys(findings)), opened, anchors)


def check_annotations(parts: Sequence[Part], anchors: AnchorFit | None) -> list[Finding]:
    """What annotations alone can say."""
    findings = check_classes(parts) + check_empty(parts) + _check_boxes(parts)
    return findings if anchors is None else findings + check_anchors(anchors, "train")


def _check_boxes(parts: Sequence[Part]) -> list[Finding]:
    # In a wrong format each box is faulty, and one finding says it all.
    return [finding for part in parts for finding in check_box_format(part) or check_boxes(part)]


def quick_check(
    train_set: DetectionDataset, val_set: DetectionDataset | None, config: Config
) -> list[Finding]:
    """What can be said of data that a training has read. No picture is opened.

    The boxes of a large set are checked in 5,000 of its pictures, evenly spaced, so that it takes a second at most.
    """
    datasets = {"train": train_set} | ({} if val_set is None else {"val": val_set})
    whole = [part_of_dataset(split, dataset) for split, dataset in datasets.items()]
    sample = [part_of_dataset(split, _spaced(dataset)) for split, dataset in datasets.items()]
    findings = check_classes(whole) + _check_boxes(sample) + check_duplicates(whole, opened={})
    if (anchors := fit(sample, config.model)) is not None:
        findings += check_anchors(anchors, "train")
    return sort_findings(findings)


def _spaced(dataset: DetectionDataset) -> DetectionDataset:
    """At most 5,000 of the pictures, evenly spaced."""
    count = min(len(dataset), _QUICK_PICTURES)
    return dataset.subset(np.linspace(0, len(dataset) - 1, count).astype(np.int64))
