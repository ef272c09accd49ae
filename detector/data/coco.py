"""Read COCO's annotation JSON into a DetectionDataset."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from ..settings import Section
from .dataset import DetectionDataset
from .records import Annotations, Object, Picture

# Ids and sizes are whole numbers that numpy and pycocotools can hold.
_Id = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Side = Annotated[int, Field(ge=1, lt=2**31)]
_Name = Annotated[str, Field(min_length=1)]
_Flag = Annotated[int, Strict(False)]


@with_config(ConfigDict(strict=True))
class _Image(TypedDict):
    id: _Id
    file_name: _Name
    width: _Side
    height: _Side


@with_config(ConfigDict(strict=True))
class _Category(TypedDict):
    id: _Id
    name: _Name


@with_config(ConfigDict(strict=True))
class _Annotation(TypedDict):
    image_id: _Id
    category_id: _Id
    bbox: Any
    area: NotRequired[Any]
    iscrowd: NotRequired[_Flag]
    difficult: NotRequired[_Flag]


class _Content(TypedDict):
    """The keys that are read. Other keys of the file are ignored."""

    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


_CONTENT = TypeAdapter(_Content)


class CocoSource(Section):
    """Pictures in `images`, boxes in the COCO JSON `annotations`; both below data.root."""

    format: Literal["coco"]
    images: str
    annotations: str
    limit: int | None = Field(
        None, gt=0, description="use only this many images, the first that have a box to learn"
    )

    def load(self, root: Path, **options: Any) -> DetectionDataset:
        """The data set; options are those of `load_coco`."""
        return load_coco(root / self.images, root / self.annotations, limit=self.limit, **options)


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
    An annotation may say `"difficult": 1`, which is an extension of the format.

    Args:
        class_names: the categories to keep, in the order of their labels; all of them by default.
        check_pictures: check that every picture exists. False serves callers that use only the annotations.
        options: `limit`, `strict` and `use_difficult` of `Annotations.to_dataset`.

    Raises:
        FileNotFoundError: the JSON, the folder, or a picture that the JSON lists is missing.
        ValueError: the JSON is malformed (the message names the file and the entry), or `Annotations.to_dataset`
            refuses the data.
    """
    images_dir, path = Path(images_dir), Path(annotations_path)
    content = _read_json(path)
    images = sorted(content["images"], key=lambda image: image["id"])
    names = {category["id"]: category["name"] for category in content["categories"]}
    objects, problems = _match(content["annotations"], images, names, path)
    unknown = sorted({entry["category_id"] for entry in content["annotations"]} - set(names))

    def describe(found: Object) -> tuple[str, str]:
        place = f"{path}: annotations[{found.index}] ({images[found.picture]['file_name']})"
        return place, f"bbox {content['annotations'][found.index]['bbox']} (x, y, width, height)"

    pictures = [
        Picture(os.path.join(images_dir, i["file_name"]), i["id"], (i["height"], i["width"])) for i in images
    ]
    ids = {name: id for id, name in names.items()}
    found = Annotations(str(path), pictures, objects, describe, ids, problems, unknown_ids=unknown)
    dataset = found.to_dataset(class_names, **options)
    if check_pictures:
        _check_pictures_exist(dataset.image_paths.tolist(), images_dir, path)
    return dataset


def _read_json(path: Path) -> _Content:
    """Parse the file, and check the type of every key that is read later.

    Image ids, category ids and category names must be unique. A fault is a ValueError.
    """
    try:
        content = _CONTENT.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotation file") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {_sentence(error.errors()[0])}") from None
    for section, key in (("images", "id"), ("categories", "id"), ("categories", "name")):
        seen: dict[Any, int] = {}
        for index, entry in enumerate(content[section]):
            first = seen.setdefault(entry[key], index)
            if first != index:
                raise ValueError(
                    f"{path}: {section}[{first}] and {section}[{index}] share {key} {entry[key]!r}"
                )
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
        area = entry.get("area")
        objects.append(
            Object(
                picture=row,
                index=index,
                name=name,
                box=_xyxy(entry["bbox"]),
                crowd=bool(entry.get("iscrowd", 0)),
                difficult=bool(entry.get("difficult", 0)),
                area=area if type(area) in (int, float) else None,
            )
        )
    # The sort is stable: an image's objects keep the order of the file.
    objects.sort(key=lambda found: found.picture)
    return objects, problems


def _xyxy(bbox: Any) -> tuple[float, ...]:
    """COCO's [x, y, width, height] as xyxy; four NaN if `bbox` is not a list of four numbers."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(type(v) in (int, float) for v in bbox):
        return (float("nan"),) * 4
    x, y, width, height = bbox
    return x, y, x + width, y + height


def _check_pictures_exist(image_paths: list[str], images_dir: Path, annotations_path: Path) -> None:
    """Raise a FileNotFoundError if a picture is missing.

    Each folder is listed once, because a look-up of each file is slow for large sets on a network file system.
    """
    if not images_dir.is_dir():
        raise FileNotFoundError(f"{images_dir}: no such folder of images")
    listings: dict[str, set[str]] = {}
    missing = []
    for path in image_paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listings[folder]:
            missing.append(path)
    if missing:
        names = ", ".join(os.path.relpath(path, images_dir) for path in missing[:5])
        raise FileNotFoundError(
            f"{images_dir}: {len(missing)} of the {len(image_paths)} images that {annotations_path} lists "
            f"are missing: {names}{', ...' if len(missing) > 5 else ''}"
        )
