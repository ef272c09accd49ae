"""Work out the sources of a recipe from annotation files of a known format: folders, splits, class names."""

import contextlib
import json
import mmap
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..files import read_text
from .csv import read_rows
from .file_index import FileIndex, key, shared_folders
from .file_source import MAX_BYTES
from .yolo import read_yaml, swapped

Sources = dict[str, list[dict]]

_SPLITS = {"train": "train", "training": "train", "trainval": "train"}
_SPLITS |= {"val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}
_LISTS = ("train", "val", "test")


@dataclass
class Layout:
    """The files of a folder, its annotation files, and what was decided about them.

    overlaps: pairs of sources of one split that are about the same pictures.
    """

    index: FileIndex
    files: list[str]
    remarks: list[str] = field(default_factory=list)
    overlaps: list[tuple[dict, dict]] = field(default_factory=list)

    def path(self, file: str) -> Path:
        """The path of a file of the index."""
        return self.index.folder / file


def voc_sources(layout: Layout) -> Sources:
    """Sources of VOC folders with lists of their splits, or else of XML files anywhere."""
    base = {"format": "voc", "one_based": "auto"}
    sources: Sources = defaultdict(list)
    filed = [file for file in layout.files if "Annotations/" in file]
    for directory in sorted({file.rpartition("Annotations/")[0] for file in filed}):
        names = [path.stem for path in sorted(layout.path(directory).glob("ImageSets/Main/*.txt"))]
        inside = [file for file in filed if file.startswith(f"{directory}Annotations/")]
        images = os.path.relpath(_folder_of(layout.index, map(stem_of, inside)), directory or ".")
        for name, split in _splits_of_lists(names).items():
            source = {"split": name, "directory": os.path.normpath(directory or "."), "images": images}
            sources[split].append(base | source)
    if sources:
        return _in_order(sources)
    return _beside_pictures(layout, lambda folder, images: base | {"annotations": folder, "images": images})


def _splits_of_lists(names: list[str]) -> dict[str, str]:
    """The split that each list of a VOC folder is for. Lists of one class, such as cat_train, are left aside."""
    names = [name for name in names if "_" not in name] or names
    splits = {name: split_of(name) or "train" for name in names}
    if "train" in names:
        splits.pop("trainval", None)
    return splits if "train" in splits.values() else dict.fromkeys(splits, "train")


def labelme_sources(layout: Layout) -> Sources:
    """Sources of labelme's JSON files."""
    return _beside_pictures(
        layout, lambda folder, images: {"format": "labelme", "annotations": folder, "images": images}
    )


def coco_sources(layout: Layout) -> Sources:
    """Sources of COCO JSON files."""
    return _one_file_each(layout, "coco", _coco_names)


def csv_sources(layout: Layout) -> Sources:
    """Sources of CSV files."""
    return _one_file_each(layout, "csv", lambda path: {row["path"] for _, row in read_rows(path)})


def yolo_sources(layout: Layout) -> Sources:
    """Sources of what each data.yaml and obj.data describes, or else of text files of pictures.

    ValueError: the pictures to train on are not there.
    """
    if layout.files[0].lower().endswith(".txt"):
        base = {"format": "yolo"}
        return _beside_pictures(layout, lambda folder, images: base | {"images": images, "labels": folder})
    sources: Sources = defaultdict(list)
    for file in layout.files:
        if file.lower().endswith(".data"):
            lines = read_text(layout.path(file), MAX_BYTES).splitlines()
            pairs = (line.partition("=") for line in lines)
            values = {name.strip(): value.strip() for name, _, value in pairs}
            names = _inside(layout, file, values.get("names", ""))
        else:
            values, names = read_yaml(layout.path(file), MAX_BYTES), file
        for split, described in _described(layout, file, values, names).items():
            sources[split] += described
    if "train" not in sources:
        listed = "; ".join(layout.remarks)
        raise ValueError(
            f"{layout.path(layout.files[0])}: no pictures to train on below {layout.index.folder} ({listed})"
        )
    return _in_order(sources)


def _described(layout: Layout, file: str, values: dict, names: str | None) -> Sources:
    """Sources of the pictures that YOLO's data.yaml or obj.data names."""
    base = {"format": "yolo", "names": names} if names else {"format": "yolo"}
    base |= {"keypoints": True} if "kpt_shape" in values else {}
    sources: Sources = {}
    for word in ("train", "val", "valid", "validation", "test"):
        entries = values.get(word) or []
        for entry in [entries] if isinstance(entries, str) else entries:
            images = _inside(layout, file, str(entry), str(values.get("path", "")))
            if images is None:
                layout.remarks.append(f"{file} says {word}: {str(entry)[:100]}, which is not there")
            elif {**base, "images": images} in sources.get("train", []):
                layout.remarks.append(
                    f"{file} says {word}: {str(entry)[:100]}, which is trained on, and so left out"
                )
            else:
                sources.setdefault(_SPLITS[word], []).append({**base, "images": images})
    return sources


def _inside(layout: Layout, file: str, entry: str, path: str = "") -> str | None:
    """The folder or file below the root that an entry of `file` means; None: there is none.

    Folders in front of it may be those of another machine, and Roboflow's ../train means the folder beside data.yaml.
    """
    parts = [part for part in f"{path}/{entry}".replace("\\", "/").split("/") if part not in ("", ".", "..")]
    for front in (os.path.dirname(file), ""):
        for start in range(len(parts)):
            found = os.path.normpath(os.path.join(front, *parts[start:]))
            if os.path.exists(layout.path(found)):
                return found
    return None


def _beside_pictures(layout: Layout, source: Callable[[str, str], dict]) -> Sources:
    """A source(folder, folder of pictures) for each split's folder of files that are about one picture each."""
    groups: dict[tuple[str | None, str], list[str]] = defaultdict(list)
    for file in layout.files:
        folders = os.path.dirname(file).split("/")
        ends = [end for end in range(len(folders), 0, -1) if split_of(folders[end - 1])]
        folder = "/".join(folders[: ends[0]]) if ends else ""
        groups[split_of(folder), folder].append(file)
    if not any(split == "train" for split, _ in groups):
        groups = {("train", ""): layout.files}
    sources: Sources = defaultdict(list)
    for (split, _), files in groups.items():
        if split is None:
            layout.remarks.append(
                f"{len(files)} files in no folder of a split are left out, such as {files[0]}"
            )
            continue
        sources[split].append(source(_common(files), _folder_of(layout.index, map(stem_of, files))))
    return _in_order(sources)


def _one_file_each(layout: Layout, format: str, names_of: Callable[[Path], set[str]]) -> Sources:
    """A source for each file that is about many pictures."""
    splits = {file: split_of(file) for file in layout.files}
    if "train" not in splits.values():
        splits = dict.fromkeys(splits, "train")
    sources: Sources = defaultdict(list)
    first: dict[tuple[str, str, str], dict] = {}
    for file, split in splits.items():
        if split is None:
            layout.remarks.append(f"{file} has no split's name, and is left out")
            continue
        names = names_of(layout.path(file))
        images = _base_of(layout.index, names, file)
        source = {"format": format, "annotations": file, "images": images}
        others = [first.setdefault((split, images, name), source) for name in names]
        layout.overlaps += [(other, source) for other in sources[split] if other in others]
        sources[split].append(source)
    return _in_order(sources)


def _in_order(sources: Sources) -> Sources:
    return {split: sources[split] for split in _LISTS if sources.get(split)}


def split_of(path: str) -> str | None:
    """The split that the last part of a path with a split's name says: valid/a.json and val2017.json are "val"."""
    words = re.findall("[a-z]+", path.lower())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), None)


def stem_of(file: str) -> str:
    """The path, without suffix, that the picture of an annotation file may have."""
    return swapped(os.path.splitext(file)[0], "labels", "images")


def _common(files: Iterable[str]) -> str:
    return os.path.commonpath([os.path.dirname(file) for file in files]) or "."


def _folder_of(index: FileIndex, stems: Iterable[str]) -> str:
    """The folder that holds the pictures of these paths without suffix; the root if there are none."""
    found = [picture for path in stems if (picture := index.find(path))]
    return _common(found) if found else "."


def _base_of(index: FileIndex, names: set[str], file: str) -> str:
    """The folder that the names in an annotation file are relative to: the one that most of them are found below."""
    bases: Counter[str] = Counter()
    num_found = 0
    for name in names:
        parts = key(name).split("/")
        fitting = [f.split("/") for f in index.named(name) if key(f).split("/")[-len(parts) :] == parts]
        bases.update({"/".join(f[: -len(parts)]) or "." for f in fitting})
        num_found += bool(fitting)
    if not bases:
        return "."
    best = [base for base, count in bases.items() if count == max(bases.values())]
    if bases[best[0]] < num_found:
        return os.path.commonpath([base.removeprefix(".") for base in bases]) or "."
    # The same names may be below several folders, such as train and val.
    place = os.path.dirname(file)

    def distance(base: str) -> tuple[bool, int, bool, str]:
        return split_of(base) != split_of(file), -shared_folders(base, place), base != place, base

    return min(best, key=distance)


def _coco_names(path: Path) -> set[str]:
    """The file names in a COCO JSON, searched where it lies."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = [match[1] for match in re.finditer(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', data)]
    names = set()
    for name in found:
        # Whoever reads the whole file says what is wrong with it.
        with contextlib.suppress(ValueError):
            names.add(json.loads(name, strict=False))
    return names
