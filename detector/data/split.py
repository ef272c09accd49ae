"""Split a data set into training and validation pictures, and write lists of pictures.

Letters: G groups of equal or nearly equal pictures; K columns: the classes, "no object" and "any picture".
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..files import write_atomically
from .dataset import DetectionDataset
from .likeness import near_pictures
from .opened import open_pictures

# Of more pictures than these only equal files are found, since decoding them would take minutes.
_MOST_DECODED = 20_000
_RUNS = 10


def split_dataset(dataset: DetectionDataset, seed: int, val: float = 0.2) -> dict[str, np.ndarray]:
    """Rows of the pictures to train and to validate on, "train" and "val", in ascending order.

    The parts depend on the seed and on the pictures' bytes and classes alone. Equal and nearly equal pictures come into
    one part, such as the frames of a film. Every class with two different pictures has one in each part, where the
    classes allow it. val: the share of pictures.

    Raises:
        ValueError: `val` is not between 0 and 1, or there are no two different pictures.
    """
    if not 0 < val < 1:
        raise ValueError(f"val is {val}; accepted: a share between 0 and 1")
    groups = _group_alike(dataset, seed)
    if len(groups) < 2:
        raise ValueError(f"{len(groups)} different picture(s) cannot be split into two parts")
    present = np.stack([_classes_of(dataset, rows) for rows in groups])
    counts = present.sum(axis=0)
    share = np.array([[1 - val], [val]])
    # A class of two pictures has a whole one in each part; one of a single picture is trained on.
    wanted = np.where(counts > 1, np.clip(counts * share, 1, counts - 1), counts * [[1], [0]])
    in_val = _repair(present, _assign(present, wanted))
    val_of = np.repeat(in_val, list(map(len, groups)))
    rows = np.concatenate(groups)
    return {"train": np.sort(rows[~val_of]), "val": np.sort(rows[val_of])}


def write_split(
    folder: str | Path, dataset: DetectionDataset, parts: Mapping[str, np.ndarray], root: str | Path
) -> dict[str, str]:
    """Write the pictures of each part to `folder`/PART.txt, a path relative to data.root a line, so that data may move.

    Returns what a source's `pictures` is: the path of each file, relative to the root where it lies below.

    ValueError: a path has a line break, so a list cannot hold it.
    """
    written = {}
    for part, rows in parts.items():
        paths = [os.path.relpath(path, root) for path in dataset.image_paths[rows].tolist()]
        if broken := [path for path in paths if path.splitlines() != [path]]:
            raise ValueError(
                f"{broken[0]!r} has a line break in its name, so no list can hold it; rename the picture"
            )
        lines = "".join(f"{path}\n" for path in paths).encode("utf-8", "surrogateescape")
        file = Path(folder, f"{part}.txt").absolute()
        write_atomically(file, lambda temporary, lines=lines: temporary.write_bytes(lines))
        below = os.path.relpath(file, root)
        written[part] = str(file) if below.startswith("..") else below
    return written


def _group_alike(dataset: DetectionDataset, seed: int) -> list[np.ndarray]:
    """The rows of each group of pictures, in an order that depends on the seed and the pictures' bytes alone.

    A group of most of the pictures, such as one long film, is cut into runs of consecutive paths.
    """
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(lambda path: _digest(path, seed), dataset.image_paths.tolist()))
    rows_of = defaultdict(list)
    for row, digest in enumerate(digests):
        rows_of[digest].append(row)
    equal = [np.array(rows_of[digest]) for digest in sorted(rows_of)]
    paths = [str(dataset.image_paths[rows[0]]) for rows in equal]
    number_of = {path: number for number, path in enumerate(paths)}
    near = near_pictures(open_pictures(paths, decode=len(paths) <= _MOST_DECODED))
    pairs = np.array([(number_of[one], number_of[other]) for one, other in near], np.int64).reshape(-1, 2)
    linked = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(paths), len(paths)))
    group_of = connected_components(linked, directed=False)[1]  # (number of different pictures,)
    groups = defaultdict(list)
    for number in np.argsort(paths):
        groups[group_of[number]].append(number)
    runs = []
    for group in groups.values():
        runs += np.array_split(group, min(_RUNS, len(group)) if 2 * len(group) > len(paths) else 1)
    return [np.concatenate([equal[number] for number in run]) for run in sorted(runs, key=min)]


def _digest(path: str, seed: int) -> bytes:
    """A hash of the seed and a file's bytes, or its name where it cannot be read."""
    seen = hashlib.blake2b(str(seed).encode())
    try:
        seen.update(hashlib.blake2b(Path(path).read_bytes()).digest())
    except OSError:
        seen.update(Path(path).name.encode("utf-8", "surrogateescape"))
    return seen.digest()


def _classes_of(dataset: DetectionDataset, rows: np.ndarray) -> np.ndarray:
    """(K,) bool: the columns that equal pictures have."""
    labels = np.concatenate([dataset.labels[dataset.offsets[row] : dataset.offsets[row + 1]] for row in rows])
    present = np.zeros(len(dataset.class_names) + 2, bool)
    present[labels - 1 if len(labels) else -2] = True
    present[-1] = True
    return present


def _assign(present: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(G,) bool: the groups to validate on, by iterative stratification (Sechidis et al. 2011).

    The class with the fewest groups left is dealt out first, each group to the part that lacks most of it.
    present: (G, K) bool. wanted: (2, K), how many groups of each class a part should have.
    """
    lacking = wanted.astype(float)
    in_val = np.zeros(len(present), bool)
    left = np.ones(len(present), bool)
    while left.any():
        remaining = present[left].sum(axis=0)
        rarest = np.where(remaining > 0, remaining, np.inf).argmin()
        for group in np.flatnonzero(left & present[:, rarest]):
            needs = [(lacking[part, rarest], lacking[part, present[group]].sum()) for part in (0, 1)]
            part = int(needs[1] > needs[0])
            in_val[group] = part
            lacking[part, present[group]] -= 1
            left[group] = False
    return in_val


def _repair(present: np.ndarray, in_val: np.ndarray) -> np.ndarray:
    """The same with a group moved for each class that a part has none of, where no other class then lacks one."""
    in_val = in_val.copy()
    shared = present.sum(axis=0) > 1
    held = np.stack([present[~in_val].sum(axis=0), present[in_val].sum(axis=0)])  # (2, K)
    for part, label in np.argwhere((held == 0) & shared):
        others = np.flatnonzero(present[:, label] & (in_val != part))
        movable = [group for group in others if (held[1 - part, present[group] & shared] > 1).all()]
        if held[part, label] == 0 and movable:
            in_val[movable[0]] = part
            held[part, present[movable[0]]] += 1
            held[1 - part, present[movable[0]]] -= 1
    return in_val
