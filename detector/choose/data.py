"""The section `data` of a recipe for a folder of pictures, with a split where the folder has none."""

from pathlib import Path
from typing import Any

from ..config import Config, parse_config
from ..data.file_source import FileSource
from ..data.find import Found, find_data
from ..data.sources import build_dataset
from ..data.split import split_dataset, write_split

VAL_SHARE = 0.2


def choose_data(
    path: str | Path, folder: str | Path, format: str | None = None, seed: int = 0
) -> tuple[dict[str, Any], list[str]]:
    """The section `data` for the pictures at `path`, and a sentence for each decision.

    A split that has to be made is written to `folder` as train.txt and val.txt.

    Raises:
        ValueError, FileNotFoundError: as `find_data` and `build_dataset`.
    """
    found = find_data(path, format)
    data: dict[str, Any] = {"root": str(found.root.absolute()), **found.splits}
    if names := found.class_names or _names(found):
        data["class_names"] = list(names)
    remarks = list(found.remarks)
    if "val" in found.splits:
        return data, remarks
    dataset = build_dataset(parse_config(_with_model(data)).data, "train")
    parts = split_dataset(dataset, seed, VAL_SHARE)
    lists = write_split(folder, dataset, parts)
    sources = found.splits["train"]
    for part, listed in lists.items():
        data[part] = [{**source, "pictures": str(listed.absolute())} for source in sources]
    counts = " and ".join(
        f"{len(rows)} to {kind}" for kind, rows in zip(("train", "validate"), parts.values(), strict=True)
    )
    remarks.append(f"no validation split: made one by content, class and seed {seed}, {counts}, in {folder}")
    return data, remarks


def _with_model(data: dict[str, Any]) -> dict[str, Any]:
    """The smallest recipe with these data."""
    return {"model": {"backbone": "resnet18"}, "data": data}


def _names(found: Found) -> tuple[str, ...] | None:
    """The names of all sources' objects, or None where a source has a list of classes of its own."""
    config: Config = parse_config(_with_model({"root": str(found.root), **found.splits}))
    names: set[str] = set()
    for split in found.splits:
        for source in getattr(config.data, split):
            if not isinstance(source, FileSource):
                return None
            read = source.read(config.data.root)
            if read.category_ids is not None:
                return None
            names |= {o.name.strip() for o in read.objects if o.name.strip()}
    return tuple(sorted(names)) or None
