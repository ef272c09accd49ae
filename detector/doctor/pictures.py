"""Check the picture files: absent, in no split, damaged, of another size, turned, without objects."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from ..data.file_index import is_picture
from ..data.headers import scale_of
from ..data.opened import Opened
from .findings import Finding
from .part import Part


def list_folders(parts: Sequence[Part]) -> dict[str, set[str]]:
    """The file names in each folder that holds a named picture. One listing is faster than a look-up of each file."""
    folders = {os.path.dirname(path) for part in parts for path in part.paths}
    return {folder: set(os.listdir(folder)) if os.path.isdir(folder) else set() for folder in folders}


def present(paths: Sequence[str], folders: Mapping[str, set[str]]) -> np.ndarray:
    """(N,) bool: which of the pictures exist."""
    places = map(os.path.split, paths)
    return np.array([name in folders[folder] for folder, name in places], bool)


def check_files(parts: Sequence[Part], folders: Mapping[str, set[str]]) -> list[Finding]:
    """Findings about pictures that are named and absent, or that no split names."""
    findings, named = [], {path for part in parts for path in part.paths}
    advice = "Add the picture, correct its name, or remove its annotations."
    for part in parts:
        for path in part.paths[~present(part.paths, folders)]:
            what = f"{path} is named by {part.source} and absent"
            findings.append(Finding("error", "picture that is absent", path, None, what, advice))
    advice = "Training and evaluation do not use it. Add it to a split, or leave it."
    kind = "picture that no split names"
    for folder, names in sorted(folders.items()):
        paths = [os.path.join(folder, name) for name in sorted(names) if is_picture(name)]
        unnamed = [path for path in paths if path not in named]
        findings += [Finding("note", kind, path, None, f"{path} is in no split", advice) for path in unnamed]
    return findings


def check_opened(parts: Sequence[Part], opened: Mapping[str, Opened]) -> list[Finding]:
    """Findings about pictures that are damaged, turned by EXIF, or not of the size in their annotations."""
    advice = "Replace the file, or remove the picture and its annotations."
    findings = [
        Finding("error", "picture that cannot be read", path, None, picture.error, advice)
        for path, picture in opened.items()
        if picture.error is not None
    ]
    for part in parts:
        for path, size in zip(part.paths, part.sizes.tolist(), strict=True):
            picture = opened.get(path)
            if picture is not None and picture.size is not None:
                findings += [*_size(path, tuple(size), picture), *_turned(path, tuple(size), picture)]
    return findings + _grey(opened)


def _grey(opened: Mapping[str, Opened]) -> list[Finding]:
    """Notes on grey pictures, if most are in colour."""
    seen = {path: picture.thumbnail for path, picture in opened.items() if picture.thumbnail is not None}
    grey = [path for path, pixels in seen.items() if (pixels == pixels[:, :, :1]).all()]
    if len(grey) > len(seen) / 2:
        return []
    advice = "Nothing, if grey pictures are to be expected later too. They are read as RGB."
    return [Finding("note", "grey picture", path, None, f"{path} has no colour", advice) for path in grey]


def _size(path: str, filed: tuple[int, int], picture: Opened) -> list[Finding]:
    if filed == picture.size:
        return []
    what = f"{path} has {_shown(picture.size)} pixels (width x height), its annotations say {_shown(filed)}"
    if filed == picture.size[::-1]:
        advice = "Width and height are swapped. Annotate the picture upright, or save it again without its EXIF orientation."
        return [Finding("error", "picture of another size", path, None, what, advice)]
    if scale_of(filed, picture.size) is not None:
        advice = "Correct the size in the annotations; if the picture was scaled, scale its boxes too."
        return [Finding("warning", "picture of nearly the annotated size", path, None, what, advice)]
    advice = "The annotations are probably those of another picture. Correct them, or remove the picture."
    return [Finding("error", "picture of another size", path, None, what, advice)]


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _turned(path: str, filed: tuple[int, int], picture: Opened) -> list[Finding]:
    """A finding about a picture that EXIF turns: a tool that ignores the orientation draws its boxes elsewhere.

    Orientations from 5 on swap the sides, so sides that agree show that the tool saw the picture upright.
    """
    if picture.orientation == 1:
        return []
    proven = picture.orientation >= 5 and filed == picture.size and filed[0] != filed[1]
    what = f"{path} has EXIF orientation {picture.orientation}"
    advice = "The picture is turned upright when it is read. Check that its boxes are those of the upright picture."
    severity = "note" if proven else "warning"
    return [Finding(severity, "picture with an EXIF orientation", path, None, what, advice)]


def check_empty(parts: Sequence[Part]) -> list[Finding]:
    """Notes on pictures without objects. Training takes all of such a picture as background."""
    advice = "Check that the picture shows no object of any class. Then keep it: it teaches the background."
    return [
        Finding("note", "picture without objects", path, None, f"{path} ({part.split}) has no object", advice)
        for part in parts
        for path in part.paths[np.bincount(part.rows, minlength=len(part.paths)) == 0]
    ]
