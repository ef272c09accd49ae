"""Pictures and objects as read from annotation files of any format, and their conversion to a DetectionDataset."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from backbones.messages import nearest

from .dataset import DetectionDataset, join_entries, offsets_of
from .file_index import picture_key
from .tolerance import MAX_LEFT_OUT, first_few, refuse_many


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that annotations name; `size` is (height, width) in pixels, or 0, 0 if it is unknown."""

    path: str
    image_id: int
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Object:
    """An object as its annotation file describes it.

    picture: row of its picture in `Annotations.pictures`. index: its number in the file.
    box: (4,) xyxy pixels, NaN where the file has no number. Its corners may be in any order. area: square pixels; None
    or NaN: that of the box.
    fault: the reason why it cannot be used, if the reader knows one. remark: a note on an odd object that is kept.
    """

    picture: int
    index: int
    name: str
    box: tuple[float, float, float, float]
    crowd: bool = False
    difficult: bool = False
    area: float | None = None
    fault: str | None = None
    remark: str | None = None


@dataclass
class Annotations:
    """Pictures, and objects sorted by picture.

    source: the name of the data in messages. describe: gives an object's place in the files and its box as filed, for
    messages. category_ids: the file's list of classes, name -> id; None: the classes are the names of the objects.
    problems, notes, warnings: sentences for `DetectionDataset`.
    """

    source: str
    pictures: list[Picture]
    objects: list[Object]
    describe: Callable[[Object], tuple[str, str]]
    category_ids: dict[str, int] | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unknown_ids: list[int] = field(default_factory=list)

    def to_dataset(
        self,
        class_names: Sequence[str] | None = None,
        *,
        limit: int | None = None,
        pictures: Collection[str] | None = None,
        strict: bool = False,
        use_difficult: bool = True,
        use_crowd: bool = False,
        max_left_out: float = MAX_LEFT_OUT,
    ) -> DetectionDataset:
        """Make the data set. Objects that cannot be used are left out, with a sentence each in `problems`.

        class_names: the classes to keep, in the order of their labels; None: all of them.
        limit: keep only this many images, the first ones that have a box to learn; None: keep all images.
        pictures: keep only these, as `picture_key` has their paths. Classes are still those of all pictures.
        strict: raise a ValueError if there is any problem. use_difficult: train on difficult objects too.
        use_crowd: take crowds as objects like others. max_left_out: the share of objects that may be left out.

        Raises:
            ValueError: a class is named twice, there is none, `strict` finds a problem, or too many objects cannot be used.
        """
        names, notes = self._select_classes(class_names)
        label_of = {name: label for label, name in enumerate(names, start=1)}
        used = [pictures is None or picture_key(p.path) in pictures for p in self.pictures]
        objects = [o for o in self.objects if used[o.picture] and (o.name in label_of or not o.name)]
        boxes = np.array([o.box for o in objects], np.float64).reshape(-1, 4)
        rows = np.array([o.picture for o in objects], np.int64)
        sizes = np.array([p.size for p in self.pictures], np.int64).reshape(-1, 2)
        if not strict and (inverted := find_inverted_boxes(boxes, sizes[rows])):
            boxes = in_order(boxes)
            notes.append(
                f"{self.source}: {len(inverted)} of {len(boxes)} boxes were drawn from right to left or upwards, and "
                f"their corners are put in order; the first: {' '.join(self.describe(objects[inverted[0]]))}"
            )
        faults = find_faulty_boxes(boxes, sizes[rows])
        faults |= {row: "has no class name" for row, o in enumerate(objects) if not o.name}
        faults |= {row: o.fault for row, o in enumerate(objects) if o.fault}
        told = self._tell(objects, faults)
        problems = [*self.problems, *told.values()]
        if strict and problems:
            refused = f"{self.source}: {len(problems)} problem(s), and strict=True refuses any:"
            raise ValueError("\n".join([refused, *first_few(problems)]))
        # A list of pictures or classes takes a part of the objects. What counts is the share of all that the files hold.
        lost = [*self.problems, *(told[row] for row in sorted(faults))]
        refuse_many(lost, len(self.objects) + len(self.problems), max_left_out, "objects")

        sound = np.ones(len(objects), bool)
        sound[list(faults)] = False
        kept, boxes = [o for o, is_sound in zip(objects, sound, strict=True) if is_sound], boxes[sound]
        if num_crowds := sum(o.crowd for o in kept):
            ignored = "not trained on, and evaluation ignores them; data.crowd=train trains on them"
            fate = "trained on like others" if use_crowd else ignored
            notes.append(f"{self.source}: {num_crowds} of {len(kept)} boxes are crowds, and are {fate}")
        areas = np.array([np.nan if o.area is None else o.area for o in kept], np.float64)
        ids = number_classes(self.category_ids or {}, names)
        dataset = DetectionDataset(
            class_names=names,
            category_ids=[ids[name] for name in names],
            image_paths=[p.path for p in self.pictures],
            image_ids=[p.image_id for p in self.pictures],
            image_sizes=sizes,
            offsets=offsets_of(np.bincount(rows[sound], minlength=len(sizes))),
            boxes=boxes,
            labels=[label_of[o.name] for o in kept],
            areas=np.where(np.isnan(areas), np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), areas),
            crowd=[o.crowd and not use_crowd for o in kept],
            difficult=[o.difficult for o in kept],
            use_difficult=use_difficult,
            problems=problems,
            notes=self.notes + notes,
            warnings=self.warnings,
        )
        return join_entries(dataset.subset(np.array(used, bool))).first_annotated(limit)

    def list_classes(self) -> list[str]:
        """The names of the classes: those of the file's list by their ids, or else those of the objects, sorted."""
        self._strip_names()
        if self.category_ids is None:
            return sorted({o.name for o in self.objects} - {""})
        return sorted(self.category_ids, key=self.category_ids.get)

    def _strip_names(self) -> None:
        """Drop the blanks around class names, with a note."""
        names = {o.name for o in self.objects} | set(self.category_ids or ())
        if padded := sorted(name for name in names if name != name.strip()):
            self.objects = [replace(o, name=o.name.strip()) for o in self.objects]
            if self.category_ids is not None:
                self.category_ids = {name.strip(): id for name, id in self.category_ids.items()}
            listed = ", ".join(map(repr, padded[:5]))
            self.notes.append(f"{self.source}: blanks around class names are dropped: {listed}")

    def _select_classes(self, wanted: Sequence[str] | None) -> tuple[tuple[str, ...], list[str]]:
        """The class names in the order of their labels, and notes on classes left out or without objects."""
        known = self.list_classes()
        counts = Counter(o.name for o in self.objects if o.name)
        names = tuple(known if wanted is None else wanted)
        if not names:
            unlisted = f"{self.source}: has no object, so no class names"
            given = unlisted if wanted is None else "class_names is empty"
            raise ValueError(f"{given}: there is no class to detect")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"class_names holds {name!r} twice")
        notes = []
        if others := [f"{count} {name}" for name, count in counts.most_common() if name not in names]:
            notes.append(f"{self.source}: left out, as class_names does not name them: {', '.join(others)}")
        if absent := [name for name in names if not counts[name]]:
            more = f" and {len(absent) - 5} other classes" if len(absent) > 5 else ""
            notes.append(f"{self.source} has no object of {', '.join(absent[:5])}{more}")
        return names, notes

    def _tell(self, objects: list[Object], faults: dict[int, str]) -> dict[int, str]:
        """A sentence for each object that is left out or odd, by its row in `objects`, in ascending order."""
        remarks = {row: o.remark for row, o in enumerate(objects) if o.remark}
        remarks |= {row: f"{fault}, and is skipped" for row, fault in faults.items()}
        told = {}
        for row in sorted(remarks):
            place, filed = self.describe(objects[row])
            told[row] = f"{place} {remarks[row]}: {filed}"
        return told


def number_classes(ids: Mapping[str, int], names: Iterable[str]) -> dict[str, int]:
    """The ids of a list of classes, and the next free ones for the names that it lacks."""
    numbered = dict(ids)
    for name in names:
        numbered.setdefault(name, max(numbered.values(), default=0) + 1)
    return numbered


def refuse_unknown(wanted: Sequence[str], known: Sequence[str], source: str) -> None:
    """Raise a ValueError for the first class that somebody wants and that no list of classes has."""
    for name in wanted:
        if name not in known:
            raise ValueError(f"{source} has no category {name!r}; {nearest(name, known)}")


def around(x: Any, y: Any, width: Any, height: Any) -> tuple[Any, Any, Any, Any]:
    """The xyxy box around a centre x, y, of numbers or arrays."""
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def in_order(boxes: np.ndarray) -> np.ndarray:
    """(M, 4) corners in any order -> xyxy."""
    return np.hstack([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])])


def find_inverted_boxes(boxes: np.ndarray, image_sizes: np.ndarray) -> list[int]:
    """The rows of boxes, (M, 4), that were drawn from right to left or upwards.

    There are none where many are so and all would fit as x, y, width and height. image_sizes: as below.
    """
    inverted = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    sides = np.where(image_sizes > 0, image_sizes, np.inf)[:, ::-1]
    with np.errstate(invalid="ignore"):
        as_sized = (boxes[:, :2] + boxes[:, 2:] <= sides + 1.5).all(axis=1)
    is_sized = len(boxes) >= 5 and inverted.mean() > 0.2 and as_sized.mean() >= 0.98
    return [] if is_sized else np.flatnonzero(inverted).tolist()


def find_faulty_boxes(boxes: np.ndarray, image_sizes: np.ndarray) -> dict[int, str]:
    """Find the boxes that cannot be used: {row: reason}, in ascending order of rows.

    boxes: (M, 4) float xyxy pixels; image_sizes: (M, 2) height, width of each box's image.
    A box that is partly inside its image can be used. A size of 0 is unknown, and holds every box.
    """
    # If several faults hold, the last one is given, because it causes the others.
    found = {
        int(row): f"has a box that {fault}"
        for fault, rows in box_faults(boxes, image_sizes).items()
        for row in np.flatnonzero(rows)
    }
    return dict(sorted(found.items()))


def box_faults(boxes: np.ndarray, image_sizes: np.ndarray) -> dict[str, np.ndarray]:
    """(M,) bool for each fault of boxes, the last one causing the others. Arguments: as above."""
    x1, y1, x2, y2 = boxes.T
    height, width = np.where(image_sizes > 0, image_sizes, np.inf).T
    with np.errstate(invalid="ignore"):
        return {
            "lies outside the image": (x1 >= width) | (y1 >= height) | (x2 <= 0) | (y2 <= 0),
            "has no area": (x2 == x1) | (y2 == y1),
            "ends before it starts": (x2 < x1) | (y2 < y1),
            "is not four finite numbers": ~np.isfinite(boxes).all(axis=1),
        }
