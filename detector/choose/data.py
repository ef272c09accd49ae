"""The section `data` of a recipe for a folder of pictures, with a split where the folder has none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import parse_config
from ..data.file_source import Reader
from ..data.find import find_data
from ..data.sources import build_dataset
from ..data.split import split_dataset, write_split

# A tenth of the pictures to validate on, but these where there are few, and never more than a fifth.
_SHARE, _FEWEST, _MOST_SHARE = 0.1, 30, 0.2


def choose_data(
    path: str | Path,
    folder: str | Path,
    read: Reader,
    format: str | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """The section `data` for the pictures at `path`, and a sentence for each decision.

    A split that has to be made is written to `folder` as train.txt and val.txt. read: reads the annotations.

    Raises:
        ValueError, FileNotFoundError: as `find_data` and `build_dataset`.
    """
    found = find_data(path, format)
    data: dict[str, Any] = {"root": str(found.root.absolute()), **found.splits}
    remarks = list(found.remarks)
    if "val" in found.splits:
        return data, remarks
    dataset = build_dataset(parse_config(recipe_of(data), overrides).data, "train", read=read)
    share = min(max(_SHARE, _FEWEST / len(dataset)), _MOST_SHARE)
    parts = split_dataset(dataset, seed, share)
    lists = write_split(folder, dataset, parts, found.root)
    sources = found.splits["train"]
    for part, listed in lists.items():
        data[part] = [{**source, "pictures": listed} for source in sources]
    counts = " and ".join(
        f"{len(rows)} to {kind}" for kind, rows in zip(("train", "validate"), parts.values(), strict=True)
    )
    remarks.append(
        f"no validation split: made one by content, class and seed {seed}, with nearly equal pictures in one part: {counts}, "
        f"in {folder}"
    )
    return data, remarks


def recipe_of(data: dict[str, Any]) -> dict[str, Any]:
    """The smallest recipe with these data."""
    return {"model": {"backbone": "resnet18"}, "data": data}
