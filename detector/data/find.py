"""Find out which format the annotations below a folder have, where they are, and how they are split."""

import contextlib
import mmap
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..files import read_head
from .csv import read_rows
from .dataset import DetectionDataset, first_difference
from .file_index import FileIndex, is_picture
from .file_source import MAX_BYTES, read_once
from .layouts import Layout, Sources, coco_sources, csv_sources, labelme_sources, voc_sources, yolo_sources
from .sources import DataConfig, build_dataset
from .yolo import is_object_text, read_yaml, swapped


@dataclass(frozen=True)
class Found:
    """Where the annotations are.

    root: becomes data.root. splits: "train", "val" and "test" -> sources, as in a recipe's section `data`; only "train"
    where the data have no split. remarks: a sentence for each decision.
    """

    format: str
    root: Path
    splits: Sources
    remarks: tuple[str, ...]


def find_data(path: str | Path, format: str | None = None) -> Found:
    """Find the annotations in a folder, or those of one file: a COCO JSON, a CSV, YOLO's data.yaml or obj.data.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: there are no annotations, or two formats or files contradict each other and `format` names none.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder or file")
    if format is not None and format not in FORMATS:
        raise ValueError(f"format is {format!r}; accepted: {', '.join(FORMATS)}")
    index, names = _index(path)
    asked = [format] if format else list(FORMATS)
    found = {name: files for name in asked if (files := FORMATS[name][0](index, names))}
    kinds = {name: f"{len(files)} {FORMATS[name][2]}" for name, files in found.items()}
    if not found:
        looked_for = ", ".join(FORMATS[name][2] for name in asked)
        raise ValueError(
            f"{path}: no annotations found; looked for {looked_for}; found {_held(names)}; "
            f"save the annotations in one of these formats{_refused_table(index, names)}"
        )
    layouts = {name: Layout(index, files) for name, files in found.items()}
    splits_of = {name: FORMATS[name][1](layout) for name, layout in layouts.items()}
    remarks = [f"{count} {kind} are passed over" for kind, count in index.passed_over.items()]
    for name, layout in layouts.items():
        remarks.append(
            f"{path}: format {name}, {kinds[name]}, such as {layout.files[0]}; {len(index.pictures)} pictures"
        )
        remarks += layout.remarks
        for first, second in layout.overlaps:
            _refuse_contradiction(path, index, {each["annotations"]: [each] for each in (first, second)})
    name, told = _join_formats(path, index, splits_of)
    splits = splits_of[name]
    remarks += [*told, "there is no split" if list(splits) == ["train"] else f"splits: {', '.join(splits)}"]
    return Found(name, index.folder, splits, tuple(remarks))


def _join_formats(path: Path, index: FileIndex, splits_of: dict[str, Sources]) -> tuple[str, list[str]]:
    """The format that says most: objects, then pictures, then splits; and a sentence on each other one.

    It gets the sources of another format that has more pictures. ValueError: two contradict each other, or a picture of
    one would come into another split.
    """
    if len(splits_of) == 1:
        return next(iter(splits_of)), []
    said = _refuse_contradiction(path, index, {name: sum(s.values(), []) for name, s in splits_of.items()})
    amounts = {name: (len(each.boxes), len(each), len(splits_of[name])) for name, each in said.items()}
    first, *others = sorted(said, key=amounts.get, reverse=True)
    own, remarks = set(said[first].image_paths.tolist()), []
    for name in others:
        pictures = set(said[name].image_paths.tolist())
        if pictures <= own:
            remarks.append(f"{name} agrees with {first}, which says all that it says, and is left out")
            continue
        if pictures & own and not splits_of[first].keys() == splits_of[name].keys() == {"train"}:
            raise ValueError(
                f"{path}: {name} has pictures that {first} lacks, such as {min(pictures - own)}, and both have a split "
                "of others; choose a format with --format"
            )
        remarks.append(f"{name} agrees with {first} and has other pictures too: both are used")
        for split, sources in splits_of[name].items():
            splits_of[first].setdefault(split, []).extend(sources)
    return first, remarks


def _refuse_contradiction(
    path: Path, index: FileIndex, sources: dict[str, list[dict]]
) -> dict[str, DetectionDataset]:
    """The data sets of sources by name. ValueError: one says something else of a picture than the first."""
    read = read_once()
    configs = {name: DataConfig(root=index.folder, train=each) for name, each in sources.items()}
    listed = [read(source, index.folder).list_classes() for each in configs.values() for source in each.train]
    options = {"class_names": tuple(dict.fromkeys(sum(listed, []))), "check_pictures": False, "read": read}
    said = {name: build_dataset(config, "train", **options) for name, config in configs.items()}
    (first, dataset), *others = said.items()
    for name, other in others:
        if difference := first_difference(dataset, other):
            raise ValueError(
                f"{path}: {first} and {name} contradict each other: {difference}; remove one, or choose a format with --format"
            )
    return said


def is_recipe(path: str | Path) -> bool:
    """Whether a path names a recipe of this project: YAML, and not YOLO's data.yaml. It need not exist."""
    path = Path(path)
    if path.suffix.lower() not in (".yaml", ".yml") or path.is_dir():
        return False
    return not (path.is_file() and _is_yolo_yaml(path))


def _held(names: list[str]) -> str:
    """How many files have each suffix, and an example of each that is no picture."""
    suffix_of = {name: os.path.splitext(name)[1].lower() or "without suffix" for name in names}
    example = {suffix_of[name]: f" ({name})" for name in reversed(names) if not is_picture(name)}
    held = Counter(suffix_of.values()).most_common(6)
    return ", ".join(f"{count} {suffix}{example.get(suffix, '')}" for suffix, count in held) or "no file"


def _refused_table(index: FileIndex, names: list[str]) -> str:
    """Why the first of the CSV files is no table of objects: often its columns have other names."""
    for name in _ending(names, ".csv"):
        try:
            next(read_rows(index.folder / name), None)
        except ValueError as error:
            return f"; {error}"
    return ""


def _index(path: Path) -> tuple[FileIndex, list[str]]:
    """The files around a path, and those of them that may be annotations."""
    if path.is_dir():
        index = FileIndex(path)
        return index, index.files
    index = FileIndex(path.parent)
    if not index.pictures:
        # A JSON in `annotations` lies beside the folder of pictures.
        index = FileIndex(path.absolute().parent.parent)
    return index, [Path(os.path.relpath(path, index.folder)).as_posix()]


def _ending(names: list[str], *suffixes: str) -> list[str]:
    return [name for name in names if name.lower().endswith(suffixes)]


def _voc_files(index: FileIndex, names: list[str]) -> list[str]:
    # Without zeros, UTF-16 reads like ASCII.
    heads = ((name, read_head(index.folder / name).replace(b"\0", b"")) for name in _ending(names, ".xml"))
    return [name for name, head in heads if re.search(rb"<annotation[\s>]", head)]


def _coco_files(index: FileIndex, names: list[str]) -> list[str]:
    wanted = [rb'"%s"\s*:\s*\[' % section for section in (b"images", b"annotations", b"categories")]
    found = [name for name in _ending(names, ".json") if _holds(index.folder / name, *wanted)]
    # COCO's own folder has files of keypoints and captions for the same pictures.
    return [name for name in found if os.path.basename(name).startswith("instances")] or found


def _labelme_files(index: FileIndex, names: list[str]) -> list[str]:
    wanted = rb'"shapes"\s*:\s*\[', rb'"imagePath"\s*:'
    return [name for name in _ending(names, ".json") if _holds(index.folder / name, *wanted)]


def _csv_files(index: FileIndex, names: list[str]) -> list[str]:
    found = []
    for name in _ending(names, ".csv") + [name for name in _ending(names, ".txt") if _is_table(index, name)]:
        with contextlib.suppress(ValueError):
            if next(read_rows(index.folder / name), None):
                found.append(name)
    return found


def _is_table(index: FileIndex, text: str) -> bool:
    """Whether a text of no one picture begins with the name of a picture and another cell."""
    if index.find(swapped(text[:-4], "labels", "images")):
        return False
    name, *others = re.split(
        "[,;]", read_head(index.folder / text).decode("utf-8-sig", "replace"), maxsplit=1
    )
    return bool(others) and is_picture(name.strip())


def _yolo_files(index: FileIndex, names: list[str]) -> list[str]:
    """The data.yaml and obj.data files; without any, the text files of pictures."""
    described = [name for name in _ending(names, ".yaml", ".yml") if _is_yolo_yaml(index.folder / name)]
    described += [name for name in _ending(names, ".data") if _holds(index.folder / name, rb"train\s*=")]
    if described:
        return described
    texts = [name for name in _ending(names, ".txt") if index.find(swapped(name[:-4], "labels", "images"))]
    kinds = {name: is_object_text(index.folder / name) for name in texts}
    return [name for name, fits in kinds.items() if fits is not False] if True in kinds.values() else []


def _is_yolo_yaml(path: Path) -> bool:
    try:
        values = read_yaml(path, MAX_BYTES)
    except ValueError:
        return False
    return "names" in values and "model" not in values and isinstance(values.get("train", ""), str | list)


def _holds(path: Path, *patterns: bytes) -> bool:
    """Whether a file holds all patterns. It is searched where it lies, because it may be larger than the memory."""
    if not read_head(path):
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return all(re.search(pattern, data) for pattern in patterns)


# The formats by name: what finds their files, what makes sources of those, what they are called.
FORMATS = {
    "voc": (_voc_files, voc_sources, "XML files"),
    "coco": (_coco_files, coco_sources, "COCO JSON files"),
    "yolo": (_yolo_files, yolo_sources, "YOLO files (data.yaml, obj.data or texts beside pictures)"),
    "csv": (_csv_files, csv_sources, "CSV tables"),
    "labelme": (_labelme_files, labelme_sources, "labelme JSON files"),
}
