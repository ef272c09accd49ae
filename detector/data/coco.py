"""Read COCO's annotation JSON into a DetectionDataset."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from ..files import read_text
from .dataset import DetectionDataset
from .file_index import FileIndex, key
from .file_source import MAX_BYTES, FileSource
from .filed import number, size_or_none, sizes_of
from .memory import check_memory
from .records import Annotations, Object, Picture, refuse_unknown

# Ids are whole numbers that numpy and pycocotools can hold, and seeds can be made of. They may be text or 160.0.
_Id = Annotated[int, Field(ge=0, lt=2**63)]
_Name = Annotated[str, Field(min_length=1, pattern=r"\S")]
_any_spelling = with_config(ConfigDict(coerce_numbers_to_str=True))


@_any_spelling
class _Image(TypedDict):
    id: _Id
    file_name: _Name
    width: NotRequired[Any]
    height: NotRequired[Any]


@_any_spelling
class _Category(TypedDict):
    id: _Id
    name: _Name


class _Annotation(TypedDict):
    id: NotRequired[Any]
    image_id: _Id
    category_id: _Id
    bbox: NotRequired[Any]
    area: NotRequired[Any]
    iscrowd: NotRequired[int | None]
    difficult: NotRequired[int | None]


class _Outlined(_Annotation):
    segmentation: NotRequired[Any]


class _Content(TypedDict):
    """The keys that are read. Other keys of the file are ignored."""

    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


class _OutlinedContent(_Content):
    annotations: list[_Outlined]


_CONTENT = TypeAdapter(_Content)
_OUTLINED_CONTENT = TypeAdapter(_OutlinedContent)


class CocoSource(FileSource):
    """Pictures in `images`, boxes in the COCO JSON `annotations`; both below data.root."""

    format: Literal["coco"]
    images: str
    annotations: str

    def read(self, root: Path) -> Annotations:
        """What the JSON says."""
        return read_coco(root / self.images, root / self.annotations, root, self.max_bytes)


def load_coco(
    images_dir: str | Path,
    annotations_path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    check_pictures: bool = True,
    **options: Any,
) -> DetectionDataset:
    """Read COCO JSON. Images come in ascending order of their ids, and images without annotations are kept.

    Labels 1..K-1 follow the ascending category ids, which may have gaps, or the order of `class_names`.
    An annotation may say `"difficult": 1`, which is an extension of the format. One without a box has that of its
    polygons.

    Args:
        class_names: the categories to keep, in the order of their labels; all of them by default.
        check_pictures: check that the folder of pictures exists. False serves callers that use only the annotations.
        options: `limit`, `strict` and `use_difficult` of `Annotations.to_dataset`.

    Raises:
        FileNotFoundError: the JSON or the folder is missing.
        ValueError: the JSON is malformed (the message names the file and the entry), a picture is outside the folder,
            or `Annotations.to_dataset` refuses the data.
    """
    found = read_coco(Path(images_dir), Path(annotations_path))
    refuse_unknown(class_names or (), found.list_classes(), found.source)
    if check_pictures and not Path(images_dir).is_dir():
        raise FileNotFoundError(f"{images_dir}: no such folder of images")
    return found.to_dataset(class_names, **options)


def read_coco(
    images_dir: Path, path: Path, root: Path | None = None, max_bytes: int = MAX_BYTES
) -> Annotations:
    """What a COCO JSON says of the pictures in `images_dir`, and in no folder outside `root`."""
    content = _read_json(path, max_bytes)
    images = sorted(content["images"], key=lambda image: image["id"])
    pictures, notes = _find_pictures(images, FileIndex(images_dir, root), path)
    notes += _shared_ids(content["annotations"], path) + _shared_names(content["categories"], path)
    names = {category["id"]: category["name"] for category in content["categories"]}
    objects, problems = _match(content["annotations"], images, names, path)
    unknown = sorted({entry["category_id"] for entry in content["annotations"]} - set(names))

    def describe(found: Object) -> tuple[str, str]:
        name = Path(pictures[found.picture].path).name
        filed = content["annotations"][found.index].get("bbox")
        return f"{path}: annotations[{found.index}] ({name})", f"bbox {filed} (x, y, width, height)"

    ids = {name: id for id, name in names.items()}
    return Annotations(str(path), pictures, objects, describe, ids, problems, notes, unknown_ids=unknown)


def _find_pictures(images: list[_Image], files: FileIndex, path: Path) -> tuple[list[Picture], list[str]]:
    """The pictures, and a note on those that are elsewhere than the file says."""
    found, moved = [], []
    for image in images:
        try:
            picture = files.path_of(image["file_name"])
        except ValueError as error:
            raise ValueError(f"{path}: images with id {image['id']}: {error}") from None
        found.append((picture, size_or_none(image.get("height"), image.get("width"))))
        if not key(picture).endswith(key(image["file_name"])):
            moved.append(f"{image['file_name']!r} is {picture}")
    pictures = [
        Picture(picture, image["id"], size)
        for image, (picture, _), size in zip(images, found, sizes_of(found), strict=True)
    ]
    if not moved:
        return pictures, []
    return pictures, [f"{path}: {len(moved)} pictures have other paths than the file says: {moved[0]}"]


def _shared_ids(annotations: list[_Annotation], path: Path) -> list[str]:
    """A note if annotations share ids. Nothing here needs these ids, but other programs keep one annotation of each."""
    ids = [entry["id"] for entry in annotations if type(entry.get("id")) is int]
    if (num_shared := len(ids) - len(set(ids))) == 0:
        return []
    id = next(id for id, count in Counter(ids).items() if count > 1)
    rows = [row for row, entry in enumerate(annotations) if entry.get("id") == id]
    return [
        f"{path}: annotations[{rows[0]}] and annotations[{rows[1]}] share id {id}, "
        f"and {num_shared} of {len(ids)} repeat one in all; both are used"
    ]


def _shared_names(categories: list[_Category], path: Path) -> list[str]:
    """A note for each name of several categories. Roboflow lists the group of the classes among them."""
    counts = Counter(category["name"] for category in categories)
    return [
        f"{path}: {count} categories are called {name!r}, and are taken as one class"
        for name, count in counts.items()
        if count > 1
    ]


def _read_json(path: Path, max_bytes: int) -> _Content:
    """Parse the file, and check the type of every key that is read later.

    Image ids and category ids must be unique. A fault is a ValueError.
    """
    text = read_text(path, max_bytes)
    # Measured on files of 300 MB, with polygons and without.
    check_memory(path, 5 * len(text) + 1000 * text.count('"image_id"'))
    try:
        content = _CONTENT.validate_json(text)
        if any("bbox" not in entry for entry in content["annotations"]):
            # Outlines are read only where they are needed, because they take ten times the memory.
            content = _OUTLINED_CONTENT.validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{path}: {_sentence(error.errors()[0])}") from None
    for section in ("images", "categories"):
        seen: dict[int, int] = {}
        for index, entry in enumerate(content[section]):
            first = seen.setdefault(entry["id"], index)
            if first != index:
                raise ValueError(f"{path}: {section}[{first}] and {section}[{index}] share id {entry['id']}")
    return content


def _sentence(error: dict[str, Any]) -> str:
    """One of pydantic's errors as a sentence: where it is, what is there, what is expected."""
    if error["type"] == "json_invalid":
        return f"not valid JSON ({error['ctx']['error']})"
    *parents, last = error["loc"] or ("",)
    place = "".join(f"[{part}]" if isinstance(part, int) else part for part in parents)
    if error["type"] == "missing":
        return f"{place or 'it'} has no {last!r}"
    if not error["loc"]:
        kind = type(error["input"]).__name__
        return f"expected an object with images, annotations and categories, got a {kind} (a file of results is no ground truth)"
    place = f"{place}[{last}] is" if isinstance(last, int) else f"{place or 'it'} has {last}"
    return f"{place} {repr(error['input'])[:60]}: {error['msg']}"


def _match(
    annotations: list[_Annotation], images: list[_Image], names: dict[int, str], path: Path
) -> tuple[list[Object], list[str]]:
    """The annotations as objects, sorted by image, and a sentence for each one whose image or category is unknown."""
    row_of = {image["id"]: row for row, image in enumerate(images)}
    objects, problems = [], []
    for index, entry in enumerate(annotations):
        row, name = row_of.get(entry["image_id"]), names.get(entry["category_id"])
        if row is None or name is None:
            key, section = ("image_id", "images") if row is None else ("category_id", "categories")
            problems.append(f"{path}: annotations[{index}] has {key} {entry[key]}, which {section} lacks")
            continue
        objects.append(
            Object(
                picture=row,
                index=index,
                name=name,
                box=_xyxy(entry),
                crowd=bool(entry.get("iscrowd")),
                difficult=bool(entry.get("difficult")),
                area=number(entry.get("area")),
            )
        )
    # The sort is stable: an image's objects keep the order of the file.
    objects.sort(key=lambda found: found.picture)
    return objects, problems


def _xyxy(entry: _Outlined) -> tuple[float, ...]:
    """COCO's [x, y, width, height] as xyxy, or the box of the polygons where there is none; four NaN for neither."""
    if "bbox" not in entry:
        return _around(entry.get("segmentation"))
    bbox = entry["bbox"]
    if not isinstance(bbox, list) or len(bbox) != 4:
        return (math.nan,) * 4
    x, y, width, height = map(number, bbox)
    return x, y, x + width, y + height


def _around(polygons: Any) -> tuple[float, ...]:
    """The box of polygons, lists of x, y, x, y...; four NaN for anything else, such as run lengths."""
    flat = polygons if isinstance(polygons, list) else []
    numbers = [number(value) for polygon in flat if isinstance(polygon, list) for value in polygon]
    if not numbers or len(numbers) % 2 or any(map(math.isnan, numbers)):
        return (math.nan,) * 4
    x, y = numbers[::2], numbers[1::2]
    return min(x), min(y), max(x), max(y)
