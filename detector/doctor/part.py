"""What the doctor looks at: one source of a split in flat arrays. Letters: N pictures, M boxes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from ..data.dataset import DetectionDataset
from ..data.records import Annotations, Object
from ..data.sources import DataConfig
from .findings import Finding

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Part:
    """A source of a split as filed, with the objects that training leaves out.

    split: "train", "val" or "test". describe: a box's row -> its place and its numbers as filed.
    class_ids: the file's list of classes, name -> id; empty: the classes are the names of the objects.
    unknown_ids: class ids that the list lacks. objects: the M records; empty for a `DetectionDataset`.
    """

    split: str
    source: str
    paths: np.ndarray  # (N,) str
    image_ids: np.ndarray  # (N,)
    sizes: np.ndarray  # (N, 2) height, width
    rows: np.ndarray  # (M,) the picture of each box
    boxes: np.ndarray  # (M, 4) xyxy
    names: np.ndarray  # (M,) class names
    indices: np.ndarray  # (M,) the object's number in its file
    crowd: np.ndarray  # (M,) bool
    describe: Callable[[int], tuple[str, str]]
    class_ids: dict[str, int] = field(default_factory=dict)
    unknown_ids: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    objects: tuple[Object, ...] = ()

    @property
    def refused(self) -> np.ndarray:
        """(M,) bool: the objects that their reader cannot use, whatever their box is."""
        faults = [bool(o.fault) for o in self.objects] or [False] * len(self.boxes)
        return np.array(faults, bool)

    def find(self, row: int, severity: str, kind: str, fault: str, advice: str) -> Finding:
        """A finding about the box at `row`: its place, then `fault`, then its numbers."""
        place, filed = self.describe(row)
        return Finding(
            severity,
            kind,
            str(self.paths[self.rows[row]]),
            int(self.indices[row]),
            f"{place} {fault}: {filed}",
            advice,
            tuple(self.boxes[row].tolist()),
        )


def part_of_annotations(split: str, found: Annotations) -> Part:
    """The part that an annotation file holds."""
    objects = found.objects
    return Part(
        split,
        found.source,
        np.array([p.path for p in found.pictures], object),
        np.array([p.image_id for p in found.pictures], np.int64),
        np.array([p.size for p in found.pictures], np.int64).reshape(-1, 2),
        np.array([o.picture for o in objects], np.int64),
        np.array([o.box for o in objects], np.float64).reshape(-1, 4),
        np.array([o.name for o in objects], object),
        np.array([o.index for o in objects], np.int64),
        np.array([o.crowd for o in objects], bool),
        lambda row: found.describe(objects[row]),
        found.category_ids or {},
        tuple(found.unknown_ids),
        tuple(found.problems),
        tuple(found.notes),
        tuple(objects),
    )


def part_of_dataset(split: str, dataset: DetectionDataset) -> Part:
    """The part that a loaded data set holds, without the objects that were left out."""
    rows = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    names = np.array([*dataset.class_names, ""], object)[dataset.labels - 1]

    def describe(row: int) -> tuple[str, str]:
        number = row - dataset.offsets[rows[row]]
        return f"{dataset.image_paths[rows[row]]}: box {number} ({names[row]})", _xyxy(dataset.boxes[row])

    return Part(
        split,
        split,
        dataset.image_paths,
        dataset.image_ids,
        dataset.image_sizes,
        rows,
        dataset.boxes,
        names,
        np.arange(len(rows)) - dataset.offsets[rows],
        dataset.crowd,
        describe,
        dict(zip(dataset.class_names, dataset.category_ids.tolist(), strict=True)),
    )


def read_parts(data: DataConfig) -> tuple[list[Part], list[Finding]]:
    """Read each source of a recipe. A source that cannot be read is a finding."""
    parts, findings = [], []
    for split in SPLITS:
        for source in getattr(data, split) or ():
            try:
                found = source.read(data.root)
                # The data set leaves objects out of what was read.
                part = part_of_annotations(split, found)
                options = {"class_names": data.class_names, "use_crowd": data.crowd == "train"}
                dataset = source.select(found, data.root, **options, max_left_out=1)
            except (ValueError, OSError) as error:
                findings.append(_unread(split, str(data.root), error))
            else:
                crowd = part.crowd & (data.crowd == "ignore")
                part = replace(part, crowd=crowd, notes=dataset.notes)
                parts.append(_used(part, dataset, data.class_names))
    return parts, findings


def _unread(split: str, file: str, error: Exception) -> Finding:
    advice = "Mend the file, or the recipe's section data. Nothing else of this source was checked."
    return Finding("error", "annotations that cannot be read", file, None, f"{split}: {error}", advice)


def _used(part: Part, dataset: DetectionDataset, class_names: tuple[str, ...] | None) -> Part:
    """The pictures and classes of a part that a training uses: a source may have a limit, a recipe its own classes."""
    pictures = _is_in(part.paths, set(dataset.image_paths.tolist()))
    boxes = pictures[part.rows]
    if class_names is not None:
        boxes &= _is_in(part.names, {*class_names, ""})
    return part if pictures.all() and boxes.all() else select(part, pictures, boxes)


def _is_in(texts: np.ndarray, accepted: set[str]) -> np.ndarray:
    """(N,) bool. numpy's `isin` takes minutes for arrays of objects."""
    return np.array([text in accepted for text in texts], bool)


def select(part: Part, pictures: np.ndarray, boxes: np.ndarray) -> Part:
    """The part with the pictures, (N,) bool, and of their boxes those in `boxes`, (M,) bool."""
    boxes = boxes & pictures[part.rows]
    old_rows = np.flatnonzero(boxes)
    columns = {name: getattr(part, name)[boxes] for name in ("boxes", "names", "indices", "crowd")}
    return replace(
        part,
        paths=part.paths[pictures],
        image_ids=part.image_ids[pictures],
        sizes=part.sizes[pictures],
        rows=(np.cumsum(pictures) - 1)[part.rows[boxes]],
        describe=lambda row: part.describe(old_rows[row]),
        objects=tuple(part.objects[row] for row in old_rows) if part.objects else (),
        **columns,
    )


def _xyxy(box: np.ndarray) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in zip(("x1", "y1", "x2", "y2"), box, strict=True))
