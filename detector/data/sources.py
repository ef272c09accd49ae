"""A recipe's section `data`, and the formats that it may name.

A format is one file of this folder: a settings section with a `read` method, listed in `AnySource`.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ..settings import Section
from .coco import CocoSource
from .csv import CsvSource
from .dataset import DetectionDataset, concatenate
from .file_source import Reader
from .headers import settle_sizes
from .images import MAX_PIXELS
from .labelme import LabelmeSource
from .records import refuse_unknown
from .shapes import ShapesSource
from .tolerance import MAX_LEFT_OUT
from .voc import VocSource
from .yolo import YoloSource

AnySource = CocoSource | VocSource | YoloSource | CsvSource | LabelmeSource | ShapesSource
Source = Annotated[AnySource, Field(discriminator="format")]


class DataConfig(Section):
    """The data sets. A split is one source or a list of them, read one after another."""

    root: Path = Path(".")
    train: list[Source] | None = None
    val: list[Source] | None = None
    test: list[Source] | None = None
    class_names: tuple[str, ...] | None = Field(
        None, description="foreground names; None: as the data have them"
    )
    difficult: bool = Field(True, description="train on objects that VOC marks difficult")
    crowd: Literal["ignore", "train"] = Field(
        "ignore",
        description="boxes that are marked as crowds (iscrowd, IsGroupOf), as CVAT marks masks: left out of training and of scores, or trained on like others",
    )
    strict: bool = Field(
        False, description="refuse bad boxes and pictures instead of skipping, mending or replacing them"
    )
    max_pixels: int = Field(
        MAX_PIXELS, gt=0, le=MAX_PIXELS, description="pictures with more pixels are not decoded"
    )

    @field_validator("train", "val", "test", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        """Make a list of a single source."""
        return [value] if isinstance(value, dict) else value


def build_dataset(
    data: DataConfig,
    split: str,
    class_names: tuple[str, ...] | None = None,
    *,
    check_pictures: bool = True,
    read: Reader = lambda source, root: source.read(root),
    max_left_out: float = MAX_LEFT_OUT,
) -> DetectionDataset:
    """The "train", "val" or "test" data of a configuration.

    class_names: foreground names in the order of their labels; None: those of the configuration, or else all names of
        the sources, in the order of the first. Pass the names of the first split read, so that all splits agree.
    check_pictures: read the headers of all pictures, and settle their sizes; False if only annotations are used.
    read: what `read_once` gives; by default, the files are read anew.
    max_left_out: the share of objects that may be left out.

    Raises:
        ValueError: the configuration has no such split, a source cannot be read, the configuration names a class that
            the sources lack, or `settle_sizes` refuses pictures.
        FileNotFoundError: a file of a source is missing.
    """
    sources = getattr(data, split)
    if not sources:
        raise ValueError(f"the config has no data.{split}")
    found = [read(source, data.root) for source in sources]
    known = list(dict.fromkeys(name for each in found for name in each.list_classes()))
    if split == "train" and class_names is None and all(each.category_ids is not None for each in found):
        refuse_unknown(data.class_names or (), known, ", ".join(each.source for each in found))
    names = class_names or data.class_names or known or None
    options = {
        "class_names": names,
        "strict": data.strict,
        "use_difficult": data.difficult,
        "use_crowd": data.crowd == "train",
        "max_left_out": max_left_out,
    }
    pairs = zip(sources, found, strict=True)
    dataset = concatenate([source.select(each, data.root, **options) for source, each in pairs])
    if class_names is not None and data.class_names is None:
        counts = Counter(o.name for each in found for o in each.objects if o.name and o.name not in names)
        lacking = [
            f"data.{split} has {count} objects of {name!r}, a class that training lacks"
            for name, count in counts.items()
        ]
        dataset = replace(dataset, warnings=(*dataset.warnings, *lacking))
    if not len(dataset):
        told = "; ".join((*dataset.problems, *dataset.notes))
        unshared = "the annotations and lists of pictures have none in common"
        raise ValueError(f"data.{split} has no picture: {told or unshared}")
    if not check_pictures:
        return dataset
    return settle_sizes(dataset, strict=data.strict, max_pixels=data.max_pixels)


def build_datasets(data: DataConfig, **options: Any) -> tuple[DetectionDataset, DetectionDataset | None]:
    """The data to train and to validate on, with the same classes; None where there is no data.val.

    Options and errors are those of `build_dataset`.
    """
    train_set = build_dataset(data, "train", **options)
    val_set = build_dataset(data, "val", train_set.class_names, **options) if data.val else None
    return train_set, val_set
