"""Gather what many annotation files, or the rows of a table, say of one picture each."""

import itertools
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from .images import read_sizes
from .records import Annotations, Object, Picture
from .tolerance import refuse_many

_File, _Read = TypeVar("_File"), TypeVar("_Read")


@dataclass(frozen=True, slots=True)
class Filed:
    """What a file says of one picture.

    size: (height, width); None: as the picture has it. origin: the data set that the file says it is of.
    """

    file: Path
    path: str
    size: tuple[int, int] | None
    objects: list[Object]
    origin: str = ""


def gather(
    source: str,
    filed: Iterable[Filed],
    entry: str,
    *,
    fractions: bool = False,
    category_ids: dict[str, int] | None = None,
    problems: Iterable[str] = (),
) -> Annotations:
    """Join what was filed, in its order. A file that names the picture of another file is left out, with a problem.

    entry: how messages name an object, such as "line {}". fractions: boxes are fractions of the picture's sides.
    """
    kept, stray = _without_strays(list(filed))
    paths = [each.path for each in kept]
    sizes = sizes_of([(each.path, each.size) for each in kept])
    pictures = [Picture(*row) for row in zip(paths, image_ids(paths), sizes, strict=True)]
    objects = [
        replace(found, picture=row, box=_scaled(found.box, sizes[row]) if fractions else found.box)
        for row, each in enumerate(kept)
        for found in each.objects
    ]

    def describe(found: Object) -> tuple[str, str]:
        place = f"{kept[found.picture].file}: {entry.format(found.index)} ({found.name})"
        corners = zip(("xmin", "ymin", "xmax", "ymax"), found.box, strict=True)
        return place, ", ".join(f"{name} {value:g}" for name, value in corners)

    return Annotations(source, pictures, objects, describe, category_ids, [*problems, *stray])


def _without_strays(filed: list[Filed]) -> tuple[list[Filed], list[str]]:
    """What was filed without files of another name than their picture, where that has a file of its own name."""
    own = {each.path: each.file for each in filed if each.file.stem == Path(each.path).stem}
    is_stray = [own.get(each.path, each.file).stem != each.file.stem for each in filed]
    strays = list(itertools.compress(filed, is_stray))
    problems = [
        f"{each.file}: is left out, because {own[each.path]} has its picture {each.path}" for each in strays
    ]
    return [each for each, stray in zip(filed, is_stray, strict=True) if not stray], problems


def sizes_of(pictures: list[tuple[str, tuple[int, int] | None]]) -> list[tuple[int, int]]:
    """The (height, width) of each path and size; None: that of the picture, or 0, 0 where it cannot be read."""
    unknown = [path for path, size in pictures if size is None]
    read = iter(read_sizes(unknown)[0].clip(0).tolist() if unknown else [])
    return [size or tuple(next(read)) for _, size in pictures]


def read_each(files: Collection[_File], read: Callable[[_File], _Read]) -> tuple[list[_Read], list[str]]:
    """read(file) of each file, and a sentence for each that cannot be read. ValueError: too many, or none can be."""
    done, problems = [], []
    for file in files:
        try:
            done.append(read(file))
        except ValueError as error:
            problems.append(str(error))
    if problems and not done:
        raise ValueError(problems[0])
    refuse_many(problems, len(files), kind="files")
    return done, [f"{problem}; the file is left out" for problem in problems]


def image_ids(paths: list[str]) -> list[int]:
    """The pictures' stems as numbers if all are different numbers, else 1..N."""
    stems = [Path(path).stem for path in paths]
    ids = [int(stem) for stem in stems if stem.isascii() and stem.isdigit() and len(stem) <= 18]
    return ids if len(set(ids)) == len(stems) else list(range(1, len(stems) + 1))


def size_or_none(height: Any, width: Any) -> tuple[int, int] | None:
    """(height, width) as whole pixels, or None where what a file gives is no size, such as 0 or null."""
    sides = (number(height), number(width))
    return (int(sides[0]), int(sides[1])) if all(1 <= side < 2**31 for side in sides) else None


def number(value: Any) -> float:
    """The number that a file gives as a number or as text, or NaN."""
    try:
        return float(value)
    # JSON's whole numbers may be larger than any float.
    except (TypeError, ValueError, OverflowError):
        return math.nan


def is_set(value: Any) -> bool:
    """Whether a file says 1 or true."""
    return number(value) == 1 or str(value).lower() == "true"


def _scaled(box: tuple[float, ...], size: tuple[int, int]) -> tuple[float, ...]:
    # The size of a picture that cannot be read is 0.
    height, width = size if any(size) else (1, 1)
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height
