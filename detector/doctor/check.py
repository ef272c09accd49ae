"""The whole examination of a recipe's data, and a short form for the start of a training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..config import Config
from ..data.dataset import DetectionDataset
from .anchors import AnchorFit, check_anchors, fit
from .box_format import check_box_format
from .boxes import check_boxes
from .classes import check_classes
from .duplicates import check_duplicates
from .findings import Finding, sort_findings
from .opened import Opened, open_pictures
from .part import Part, part_of_dataset, read_parts
from .pictures import check_empty, check_files, check_opened, list_folders, present


@dataclass(frozen=True)
class Examination:
    """What was looked at and what was found. opened: by path; empty if no picture was opened."""

    parts: list[Part]
    findings: list[Finding]
    opened: Mapping[str, Opened] = field(default_factory=dict)
    anchors: AnchorFit | None = None


def examine(
    config: Config,
    *,
    pictures: str = "decode",
) -> Examination:
    """Check the data of a recipe.

    pictures: "decode" reads all pixels, "headers" only the sizes, "none" not even whether the files exist.
    """
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
    findings = check_classes(parts) + check_empty(parts)
    for part in parts:
        # In a wrong format each box is faulty, and one finding says it all.
        findings += check_box_format(part) or check_boxes(part)
    return findings if anchors is None else findings + check_anchors(anchors, "train")


def quick_check(
    train_set: DetectionDataset, val_set: DetectionDataset | None, config: Config
) -> list[Finding]:
    """Errors and warnings about data that a training has read, without opening a picture."""
    datasets = {"train": train_set} | ({} if val_set is None else {"val": val_set})
    parts = [part_of_dataset(split, dataset) for split, dataset in datasets.items()]
    findings = check_annotations(parts, fit(parts, config.model))
    return [finding for finding in sort_findings(findings) if finding.severity != "note"]
