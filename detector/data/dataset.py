"""The data set that every reader gives: images with boxes, held in a few flat arrays.

Letters: N images, M boxes, K classes with background.

Worker processes share the memory of flat arrays. They would copy lists of dicts: reading a Python object writes its
reference count, which copies its page of memory into each worker.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from .images import load_image

# name: (dtype, shape after the first axis). image_paths keeps the str width of its array.
_COLUMNS = {
    "category_ids": (np.int64, ()),
    "image_paths": (np.str_, ()),
    "image_ids": (np.int64, ()),
    "image_sizes": (np.int32, (2,)),
    "offsets": (np.int64, ()),
    "boxes": (np.float64, (4,)),
    "labels": (np.int64, ()),
    "areas": (np.float64, ()),
    "crowd": (np.bool_, ()),
    "difficult": (np.bool_, ()),
}
_IMAGE_COLUMNS = ("image_paths", "image_ids", "image_sizes")
_BOX_COLUMNS = ("boxes", "labels", "areas", "crowd", "difficult")


@dataclass(kw_only=True, eq=False, repr=False)
class DetectionDataset(Dataset):
    """Images with boxes; an item is torchvision's pair (image, target).

    A target has no crowd boxes, and has difficult boxes only if `use_difficult` is set. `to_coco` gives all boxes.
    """

    class_names: tuple[str, ...]  # (K-1,) foreground: class_names[label - 1]
    category_ids: np.ndarray  # (K-1,) int64: row i is the file's id of label i + 1
    image_paths: np.ndarray  # (N,) str
    image_ids: np.ndarray  # (N,) int64
    image_sizes: np.ndarray  # (N, 2) int32: height, width
    offsets: np.ndarray  # (N+1,) int64: the boxes of image i are rows offsets[i]:offsets[i+1]
    boxes: np.ndarray  # (M, 4) float64 xyxy, pixels
    labels: np.ndarray  # (M,) int64 in 1..K-1
    areas: np.ndarray  # (M,) float64, square pixels: the area that the file gives, or that of the box
    crowd: np.ndarray  # (M,) bool
    difficult: np.ndarray  # (M,) bool
    use_difficult: bool = True
    problems: tuple[str, ...] = ()  # a sentence for each skipped or odd object, with file and index
    notes: tuple[str, ...] = ()  # remarks that are no problems
    warnings: tuple[str, ...] = ()  # what is probably a mistake in the data
    left_out: tuple[str, ...] = ()  # a sentence for each picture that is left out, with its file

    def __post_init__(self) -> None:
        for name in ("class_names", "problems", "notes", "warnings", "left_out"):
            setattr(self, name, tuple(getattr(self, name)))
        for name, (dtype, row_shape) in _COLUMNS.items():
            column = np.asarray(getattr(self, name), dtype).reshape(-1, *row_shape)
            setattr(self, name, np.ascontiguousarray(column))
        self._check_lengths()

    def _check_lengths(self) -> None:
        """Raise a ValueError if lengths, offsets or labels do not fit together."""
        num_images, num_boxes, num_classes = len(self.image_ids), len(self.boxes), len(self.class_names)
        expected = dict.fromkeys(_IMAGE_COLUMNS, num_images) | dict.fromkeys(_BOX_COLUMNS, num_boxes)
        expected |= {"offsets": num_images + 1, "category_ids": num_classes}
        for name, length in expected.items():
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} has {len(getattr(self, name))} rows, {length} expected")
        if self.offsets[0] != 0 or self.offsets[-1] != num_boxes or np.any(np.diff(self.offsets) < 0):
            raise ValueError(f"offsets must rise from 0 to the number of boxes, {num_boxes}")
        if num_boxes and not 1 <= self.labels.min() <= self.labels.max() <= num_classes:
            raise ValueError(
                f"labels must be in 1..{num_classes}, got {self.labels.min()}..{self.labels.max()}"
            )

    def __repr__(self) -> str:
        return (
            f"DetectionDataset({len(self)} images, {len(self.boxes)} boxes, {len(self.class_names)} classes)"
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        """The image, (3, H, W) float32 RGB in [0, 1], and its target.

        target: boxes (M, 4) float32 xyxy pixels, labels (M,) int64, image_id int.
        """
        target = self.target(index)
        image = torch.from_numpy(self.image(index)).permute(2, 0, 1).contiguous().float().div_(255)
        tensors = {name: torch.from_numpy(target[name]) for name in ("boxes", "labels")}
        return image, tensors | {"image_id": target["image_id"]}

    def image(self, index: int) -> np.ndarray:
        """The decoded picture, (H, W, 3) uint8 RGB. A size other than that of the annotations is a ValueError."""
        path = str(self.image_paths[index])
        image = load_image(path)
        expected, got = tuple(self.image_sizes[index].tolist()), image.shape[:2]
        if got != expected:
            raise ValueError(size_message(path, expected, got))
        return image

    def target(self, index: int) -> dict:
        """The target of an image in numpy: boxes (M, 4) float32 xyxy pixels, labels (M,) int64, image_id int."""
        # The range raises an IndexError past the end, and makes a negative index positive.
        index = range(len(self))[index]
        rows = slice(self.offsets[index], self.offsets[index + 1])
        trained = self.trained(rows)
        return {
            "boxes": self.boxes[rows][trained].astype(np.float32),
            "labels": self.labels[rows][trained],
            "image_id": int(self.image_ids[index]),
        }

    def trained(self, rows: slice = slice(None)) -> np.ndarray:
        """(M,) bool mask of the boxes to learn: no crowds, and difficult boxes only if `use_difficult`."""
        return ~self.crowd[rows] & (self.use_difficult | ~self.difficult[rows])

    def subset(self, indices: Sequence[int] | np.ndarray | slice) -> "DetectionDataset":
        """The images at `indices` (numbers, a slice, or an (N,) mask), in that order."""
        if not isinstance(indices, slice):
            indices = np.asarray(indices)
            # numpy makes a float array of an empty list, and floats cannot index.
            indices = indices if indices.size else indices.astype(np.int64)
        indices = np.arange(len(self))[indices]
        counts = np.diff(self.offsets)[indices]
        offsets = offsets_of(counts)
        rows = np.repeat(self.offsets[indices] - offsets[:-1], counts) + np.arange(offsets[-1])
        columns = {name: getattr(self, name)[indices] for name in _IMAGE_COLUMNS}
        columns |= {name: getattr(self, name)[rows] for name in _BOX_COLUMNS}
        return replace(self, offsets=offsets, **columns)

    def first_annotated(self, limit: int | None) -> "DetectionDataset":
        """The first `limit` images that have a box to learn; None: all images. A limit below 1 is a ValueError."""
        if limit is None:
            return self
        if limit < 1:
            raise ValueError(f"limit must be at least 1, or None for all images, got {limit}")
        # (N+1,): boxes to learn in all images before each
        learned = np.concatenate([[0], np.cumsum(self.trained())])[self.offsets]
        return self.subset(np.flatnonzero(np.diff(learned))[:limit])

    def box_counts(self) -> dict[str, int]:
        """The number of boxes to learn in each class, by class name."""
        counts = np.bincount(self.labels[self.trained()], minlength=len(self.class_names) + 1)
        return dict(zip(self.class_names, counts[1:].tolist(), strict=True))

    def check_trainable(self) -> None:
        """ValueError: there is no box to learn."""
        if not self.trained().any():
            crowds = f": {self.crowd.sum()} are crowds; data.crowd=train trains on them"
            raise ValueError(f"the training data have no box to learn{crowds if self.crowd.any() else ''}")

    def aspect_ratios(self) -> np.ndarray:
        """Height over width of each image: (N,) float64."""
        return self.image_sizes[:, 0] / self.image_sizes[:, 1]

    def to_coco(self) -> dict:
        """The data set as COCO's ground-truth dict, with the file's category ids.

        All boxes are in it, crowd and difficult ones too. Annotation ids start at 1, because pycocotools reads 0 as
        "unmatched".
        """
        images = [
            {"id": image_id, "file_name": path, "height": height, "width": width}
            for image_id, path, (height, width) in zip(
                self.image_ids.tolist(), self.image_paths.tolist(), self.image_sizes.tolist(), strict=True
            )
        ]
        categories = [
            {"id": category_id, "name": name}
            for category_id, name in zip(self.category_ids.tolist(), self.class_names, strict=True)
        ]
        return {"images": images, "categories": categories, "annotations": self._coco_annotations()}

    def _coco_annotations(self) -> list[dict]:
        """COCO's annotations of all M boxes, with `bbox` as [x, y, width, height]."""
        corners = self.boxes[:, :2]
        columns = {
            "id": np.arange(1, len(self.boxes) + 1),
            "image_id": np.repeat(self.image_ids, np.diff(self.offsets)),
            "category_id": self.category_ids[self.labels - 1],
            "bbox": np.concatenate([corners, self.boxes[:, 2:] - corners], axis=1),
            "area": self.areas,
            "iscrowd": self.crowd.astype(np.int64),
            "difficult": self.difficult.astype(np.int64),
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]


def concatenate(datasets: Sequence[DetectionDataset]) -> DetectionDataset:
    """Join data sets that have the same classes, such as VOC 2007 and 2012.

    A picture with several entries becomes one, with the objects of all. Image ids are kept if all differ, and are
    renumbered 1..N otherwise. Category ids are those of the first data set.

    Raises:
        ValueError: no data set is given, or two differ in `class_names` or `use_difficult`.
    """
    if not datasets:
        raise ValueError("no data set was given: concatenate takes at least one")
    first, notes = datasets[0], [note for dataset in datasets for note in dataset.notes]
    for number, other in enumerate(datasets[1:], start=1):
        _check_same_classes(first, other, number)
        if not np.array_equal(other.category_ids, first.category_ids):
            notes.append(f"datasets[{number}] has other category ids than datasets[0], whose ids are used")
    columns = {
        name: np.concatenate([getattr(dataset, name) for dataset in datasets])
        for name in _IMAGE_COLUMNS + _BOX_COLUMNS
    }
    told = {
        name: tuple(sentence for dataset in datasets for sentence in getattr(dataset, name))
        for name in ("problems", "warnings", "left_out")
    }
    offsets = offsets_of(np.concatenate([np.diff(dataset.offsets) for dataset in datasets]))
    joined = join_entries(replace(first, offsets=offsets, notes=notes, **told, **columns))
    if len(np.unique(joined.image_ids)) == len(joined):
        return joined
    renumbered = f"the data sets share image ids: images are renumbered 1..{len(joined)}"
    return replace(joined, image_ids=np.arange(1, len(joined) + 1), notes=(*joined.notes, renumbered))


def join_entries(dataset: DetectionDataset) -> DetectionDataset:
    """The same with one entry a picture. An object that an earlier entry has, to a pixel, is taken once."""
    _, firsts, numbers = np.unique(dataset.image_paths, return_index=True, return_inverse=True)
    if len(firsts) == len(dataset):
        return dataset
    first_of = firsts[numbers]
    entries = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    pictures, kept = first_of[entries], np.ones(len(entries), bool)
    later = np.flatnonzero(first_of != np.arange(len(dataset)))
    order = np.argsort(pictures, kind="stable")
    by_picture = pictures[order]
    for picture in np.unique(first_of[later]):
        rows = order[slice(*np.searchsorted(by_picture, (picture, picture + 1)))]
        for row in rows[entries[rows] > picture]:
            earlier = rows[(entries[rows] < entries[row]) & (dataset.labels[rows] == dataset.labels[row])]
            kept[row] = not (np.abs(dataset.boxes[earlier] - dataset.boxes[row]) <= 1).all(axis=1).any()
    order = order[kept[order]]
    columns = {name: getattr(dataset, name)[order] for name in _BOX_COLUMNS}
    columns |= {name: getattr(dataset, name)[np.sort(firsts)] for name in _IMAGE_COLUMNS}
    counts = np.bincount(pictures[kept], minlength=len(dataset))[np.sort(firsts)]
    note = (
        f"{len(np.unique(first_of[later]))} pictures have several entries, such as {dataset.image_paths[later[0]]}: "
        f"each is taken as one picture with the objects of all; {(~kept).sum()} objects are in two entries and taken once"
    )
    return replace(dataset, offsets=offsets_of(counts), notes=(*dataset.notes, note), **columns)


def first_difference(first: DetectionDataset, second: DetectionDataset) -> str | None:
    """A sentence on the first picture of which two data sets with the same classes have different objects, or None."""
    sets = (first, second, concatenate([first, second]))
    counts = [
        dict(zip(each.image_paths.tolist(), np.diff(each.offsets).tolist(), strict=True)) for each in sets
    ]
    for path, mine in counts[0].items():
        its, both = counts[1].get(path), counts[2][path]
        if its is not None and both > min(mine, its):
            return f"{path} has {mine} objects in one and {its} in the other, and {2 * both - mine - its} are in one only"
    return None


def _check_same_classes(first: DetectionDataset, other: DetectionDataset, number: int) -> None:
    """Raise a ValueError if `other`, which is datasets[number], does not fit `first`."""
    if other.use_difficult != first.use_difficult:
        raise ValueError(f"datasets[{number}] and datasets[0] differ in use_difficult: give both the same")
    if other.class_names == first.class_names:
        return
    missing = [name for name in first.class_names if name not in other.class_names]
    added = [name for name in other.class_names if name not in first.class_names]
    difference = f"lacks {missing} and adds {added}" if missing or added else "has them in another order"
    raise ValueError(
        f"datasets[{number}] has other classes than datasets[0]: it {difference}; "
        "read both with the same class_names"
    )


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """(N,) box counts -> (N+1,) int64 offsets: the boxes of image i are rows offsets[i]:offsets[i+1]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def size_message(path: str, expected: tuple[int, int], got: tuple[int, int]) -> str:
    """The error for a picture whose (height, width) is not that of its annotations."""
    message = (
        f"{path}: the picture is {got[1]}x{got[0]} (width x height), "
        f"its annotations say {expected[1]}x{expected[0]}"
    )
    if got == expected[::-1]:
        message += (
            "; the two are swapped, as happens where a picture was annotated without its EXIF orientation: "
            "save it again without the orientation tag, or annotate it upright"
        )
    return message
