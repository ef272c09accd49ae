"""Batches for training and evaluation. Their content and order do not depend on the number of workers."""

import atexit
import os
import re
import weakref
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .. import processes
from ..draws import tagged
from .dataset import DetectionDataset
from .transforms import EvalTransform, Key

Batch = tuple[list[torch.Tensor], list[dict]]

# So many pictures are tried in place of one that cannot be decoded.
_TRIES = 20
_FROM_WORKER = re.compile(r"Caught (\w+) in DataLoader worker process .*\n(?:[\w.]+\.)?\1: (.*)", re.DOTALL)


class TransformedDataset(Dataset):
    """A data set with a transform. The key of an item is (epoch, index).

    Workers live through all epochs, so they learn the epoch from the key.

    unreadable: what becomes of a picture that cannot be decoded. "raise" raises its ValueError. "replace" gives another
        picture, chosen by (seed, epoch, image id). "drop" gives an image without pixels. Both put the error's message into
        `target["unreadable"]`.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        transform: EvalTransform,
        seed: int,
        unreadable: Literal["raise", "replace", "drop"] = "raise",
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, dict]:
        """The image (3, h, w) uint8 and the target that the transform gives."""
        epoch, index = key
        target = self.dataset.target(index)
        draw = (self.seed, epoch, target["image_id"])
        mark = {}
        try:
            image = self.dataset.image(index)
        except (ValueError, OSError) as error:
            if self.unreadable == "raise":
                raise
            mark = {"unreadable": str(error)}
            if self.unreadable == "drop":
                return torch.empty(3, 0, 0, dtype=torch.uint8), target | mark
            image, target = self._another(draw, error)
        image, target = self.transform(image, target, draw)
        return image, target | mark

    def _another(self, draw: Key, error: Exception) -> tuple[np.ndarray, dict]:
        """The first picture that decodes, with its target, in an order that `draw` seeds."""
        index, image = first_readable(draw, len(self), self.dataset.image, error)
        return image, self.dataset.target(index)


def first_readable(
    draw: Key, num_pictures: int, read: Callable[[int], np.ndarray], error: Exception
) -> tuple[int, np.ndarray]:
    """The index and the image of the first picture that `read` gives, of some in an order that `draw` seeds.

    error: of the picture that it stands for. ValueError: the others fail too.
    """
    order = np.random.default_rng(tagged("replacement", *draw)).permutation(num_pictures)
    for index in order[:_TRIES].tolist():
        try:
            return index, read(index)
        except (ValueError, OSError):
            continue
    raise ValueError(f"{error}; nor can the {min(_TRIES, num_pictures)} tried in its place be read")


class TrainBatches(Sampler):
    """Shuffled batches of an epoch, or of some one after another, as lists of (epoch, index).

    With `group`, a batch holds only tall or only wide images, except for the images left over. Padding makes a mixed
    batch square. The order depends on (seed, epoch) only. A resumed epoch skips its first `start` batches.

    Where there are several processes, a batch is made for all of them, with `batch_size` images for each, and dealt out.
    The short batch of an epoch is then filled up with the epoch's first images. On one process it is filled up to
    `least` images.
    """

    def __init__(
        self, aspect_ratios: np.ndarray, batch_size: int, seed: int, group: bool = True, least: int = 1
    ) -> None:
        self.tall = aspect_ratios > 1 if group else np.zeros(len(aspect_ratios), dtype=bool)
        self.batch_size = batch_size * processes.world_size()
        self.own = slice(processes.rank() * batch_size, (processes.rank() + 1) * batch_size)
        missing, last = -len(aspect_ratios) % self.batch_size, len(aspect_ratios) % self.batch_size
        alone = processes.world_size() == 1
        self.num_repeated = min(missing, max(0, least - last)) if alone else missing
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0, until: int | None = None) -> None:
        """Give the batches of `epoch` from number `start` on, and then those of the epochs before `until`."""
        self.epoch, self.start, self.until = epoch, start, epoch + 1 if until is None else until

    def __len__(self) -> int:
        """The number of batches in a whole epoch, whatever `start` is."""
        return -(-len(self.tall) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        yield from islice(
            chain.from_iterable(map(self._shuffled, range(self.epoch, self.until))), self.start, None
        )

    def _shuffled(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng(tagged("order", self.seed, epoch))
        order = rng.permutation(len(self.tall))
        tall = self.tall[order]
        groups = [order[tall], order[~tall]]
        whole = [len(g) // self.batch_size * self.batch_size for g in groups]
        repeated = np.resize(order, self.num_repeated)
        rest = np.concatenate([*(g[n:] for g, n in zip(groups, whole, strict=True)), repeated])
        full = np.concatenate([g[:n] for g, n in zip(groups, whole, strict=True)])
        batches = [
            c[i : i + self.batch_size] for c in (full, rest) for i in range(0, len(c), self.batch_size)
        ]
        for i in rng.permutation(len(batches)):
            yield [(epoch, int(index)) for index in batches[i][self.own]]


class EvalBatches(Sampler):
    """Batches of every image once, as lists of (0, index). They are sorted by aspect ratio to save padding.

    Several processes deal the batches out.
    """

    def __init__(self, aspect_ratios: np.ndarray, batch_size: int) -> None:
        order = np.argsort(aspect_ratios, kind="stable")
        self.batches = processes.share([order[i : i + batch_size] for i in range(0, len(order), batch_size)])

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(0, int(index)) for index in batch] for batch in self.batches)


def collate(samples: list[tuple[torch.Tensor, dict]]) -> Batch:
    """N pairs (image, target) -> a list of N images (3, h, w), each of its own size, and a list of N targets."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def _set_up_worker(worker: int) -> None:
    """Give a worker one thread, and leave the signals that stop a run to the main process."""
    import cv2

    # torch runs one thread in each worker. OpenCV would take every core in every worker.
    cv2.setNumThreads(0)
    # They reach every process of the group: Ctrl-C, a closed terminal, the SIGTERM of `timeout` or torchrun. The main
    # process ends the workers, by a SIGTERM to each.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


class _Loader(DataLoader):
    """A loader whose workers' errors arrive as they were raised there, and end first when the process ends."""

    def __iter__(self) -> Iterator[Any]:
        is_first = self.num_workers > 0 and self._iterator is None
        try:
            batches = super().__iter__()
            if is_first:
                # Where batches are pinned, torch 2.11 waits at exit five seconds for each worker, which nothing has told
                # to end. What is registered later runs earlier.
                atexit.register(_end_workers, weakref.ref(self))
            yield from batches
        except (ValueError, OSError) as error:
            # torch puts the worker's traceback into the message.
            found = _FROM_WORKER.match(str(error))
            if found is None:
                raise
            raise type(error)(found[2].strip()) from None


def _end_workers(reference: weakref.ref) -> None:
    """End the workers of a loader, if it still lives and has any."""
    iterator = getattr(reference(), "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()


def build_loader(
    dataset: Dataset,
    batches: Sampler,
    num_workers: int,
    pin_memory: bool,
    collate: Callable[[Any], Any] = collate,
) -> DataLoader:
    """Read `batches` of `dataset` in `num_workers` processes that live as long as the loader."""
    return _Loader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_set_up_worker,
        # The loader draws a seed each time it starts. From torch's global state, a resumed epoch would draw once more.
        generator=torch.Generator(),
    )
