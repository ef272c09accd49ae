"""Read labelme's JSON files, one a picture, into a DetectionDataset."""

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from ..files import read_text
from .file_index import FileIndex
from .file_source import FileSource
from .filed import Filed, gather, read_each, size_or_none
from .records import Annotations, Object

_NO_BOX = ("point", "points", "line", "linestrip")
_Point = Annotated[list[float], Field(min_length=2, max_length=2)]


@with_config(ConfigDict(coerce_numbers_to_str=True))
class _Shape(TypedDict):
    label: str
    points: list[_Point]
    shape_type: NotRequired[str | None]


class _Content(TypedDict):
    """The keys that are read. The picture's own bytes, `imageData`, are ignored."""

    shapes: list[_Shape]
    imagePath: NotRequired[str | None]
    imageHeight: NotRequired[Any]
    imageWidth: NotRequired[Any]


_CONTENT = TypeAdapter(_Content)


class LabelmeSource(FileSource):
    """labelme's JSON files in `annotations`, and pictures in `images`; both below data.root.

    A polygon and a circle have the box around them. Points and lines have none.
    """

    format: Literal["labelme"]
    annotations: str = "."
    images: str = "."

    def read(self, root: Path) -> Annotations:
        """What the JSON files say."""
        folder = root / self.annotations
        files = [folder / file for file in FileIndex(folder).files if file.lower().endswith(".json")]
        if not files:
            raise FileNotFoundError(f"{folder}: no such folder, or no JSON file in it")
        parse = partial(_parse, root, FileIndex(root / self.images, root), self.max_bytes)
        filed, problems = read_each(files, parse)
        return gather(str(folder), filed, "shapes[{}]", problems=problems)


def _parse(root: Path, images: FileIndex, max_bytes: int, path: Path) -> Filed:
    """Read one JSON file. A file that is not labelme's is a ValueError."""
    try:
        content = _CONTENT.validate_json(read_text(path, max_bytes))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path}: {place} is not labelme's: {first['msg']}") from None
    try:
        picture = images.picture_of(path.relative_to(root), content.get("imagePath"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    size = size_or_none(content.get("imageHeight"), content.get("imageWidth"))
    return Filed(path, picture, size, [_object(*each) for each in enumerate(content["shapes"])])


def _object(index: int, shape: _Shape) -> Object:
    kind = shape.get("shape_type") or "polygon"
    fault = f"is a {kind[:20]}, which has no box" if kind in _NO_BOX else None
    return Object(-1, index, shape["label"], _box(kind, shape["points"]), fault=fault)


def _box(kind: str, points: list[list[float]]) -> tuple[float, ...]:
    """The xyxy box around a shape, whatever the order of its points; four NaN without points."""
    if kind == "circle" and len(points) == 2:
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        return x - radius, y - radius, x + radius, y + radius
    if not points:
        return (math.nan,) * 4
    x, y = zip(*points, strict=True)
    return min(x), min(y), max(x), max(y)
