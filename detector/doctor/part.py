"""What the doctor looks at: one source of a split in flat arrays. Letters: N pictures, M boxes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..data.dataset import DetectionDataset
from ..data.file_source import read_once
from ..data.records import Annotations, Object
from ..data.sources import DataConfig, build_dataset
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
    warnings: tuple[str, ...] = ()

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


def part_of_annotations(split: str, found: Annotations, crowd: str) -> Part:
    """The part that an annotation file holds. crowd: as data.crowd."""
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
        np.array([o.crowd and crowd == "ignore" for o in objects], bool),
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
    indices = np.arange(len(rows)) - dataset.offsets[rows]
    names = np.array([*dataset.class_names, ""], object)[dataset.labels - 1]

    def describe(row: int) -> tuple[str, str]:
        place = f"{dataset.image_paths[rows[row]]}: box {indices[row]} ({names[row]})"
        corners = zip(("x1", "y1", "x2", "y2"), dataset.boxes[row], strict=True)
        return place, ", ".join(f"{name} {value:g}" for name, value in corners)

    return Part(
        split,
        split,
        dataset.image_paths,
        dataset.image_ids,
        dataset.image_sizes,
        rows,
        dataset.boxes,
        names,
        indices,
        dataset.crowd,
        describe,
        dict(zip(dataset.class_names, dataset.category_ids.tolist(), strict=True)),
    )


def read_parts(data: DataConfig) -> tuple[list[Part], list[Finding]]:
    """Read each source of a recipe. A source or a split that a training refuses is a finding."""
    parts, findings, read = [], [], read_once()
    for split in SPLITS:
        sources, of_split = getattr(data, split) or [], []
        for source in sources:
            with _told(findings, split, data.root):
                of_split.append(part_of_annotations(split, read(source, data.root), data.crowd))
        if of_split and len(of_split) == len(sources):
            with _told(findings, split, data.root):
                whole = data.model_copy(update={"strict": False})
                dataset = build_dataset(whole, split, check_pictures=False, read=read, max_left_out=1)
                of_split = [_used(replace(part, notes=()), dataset, data.class_names) for part in of_split]
                of_split[0] = replace(of_split[0], notes=dataset.notes, warnings=dataset.warnings)
        parts += of_split
    return parts, findings


@contextmanager
def _told(findings: list[Finding], split: str, root: Path) -> Iterator[None]:
    """Make a finding of the error that annotations raise."""
    try:
        yield
    except (ValueError, OSError) as error:
        advice = "Mend the file, or the recipe's section data. Nothing else of this source was checked."
        what = f"{split}: {error}"
        findings.append(Finding("error", "annotations that cannot be read", str(root), None, what, advice))


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
