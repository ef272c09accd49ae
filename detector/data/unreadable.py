"""The count of pictures that fail on decoding while a run goes on."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from .. import processes
from .loader import Batch
from .tolerance import MAX_TOLD, refuse_many

# So few failures never stop a run, and the share is not taken of fewer pictures than these for each process.
_FEW = 2
_EARLIEST = 100


class Unreadable:
    """The pictures of a data set that failed on decoding in a pass over it: a sentence each, with the file's name.

    A sample of such a picture has that sentence in `target["unreadable"]`: see `TransformedDataset`. An epoch and an
    evaluation are passes. A picture may fail in one of them and not in the next, on a network's disk for example.

    num_pictures: of the data set. fate: what becomes of such a picture, in what is printed of the first few.
    """

    def __init__(self, num_pictures: int, fate: str) -> None:
        self.num_pictures = num_pictures
        self.fate = fate
        self.told: set[str] = set()
        self.begin()

    def begin(self) -> None:
        """Begin a pass. What was told before is not told again."""
        self.num_seen = 0
        self.image_ids: dict[str, int | None] = {}  # by sentence

    def watch(
        self, batches: Iterable[Batch], on_new: Callable[[str], object] = lambda sentence: None
    ) -> Iterator[Batch]:
        """The same batches, counted, without samples that have no image. `on_new` is called with each new sentence.

        ValueError: more pictures failed than `refuse_many` allows.
        """
        for images, targets in batches:
            failed = {t["unreadable"]: t["image_id"] for t in targets if t.get("unreadable")}
            self.count(failed, len(targets), on_new)
            kept = [row for row, image in enumerate(images) if image.numel()]
            if kept:
                yield [images[row] for row in kept], [targets[row] for row in kept]

    def count(
        self,
        failed: Mapping[str, int | None],
        num_pictures: int,
        on_new: Callable[[str], object] = lambda sentence: None,
    ) -> None:
        """Count a batch of so many pictures. failed: sentence -> image id, where there are ids. ValueError: as `watch`."""
        self.image_ids |= failed
        self.num_seen += num_pictures
        for sentence in failed:
            if sentence not in self.told:
                self.told.add(sentence)
                if len(self.told) <= MAX_TOLD:
                    print(f"{self.fate}: {sentence}", flush=True)
                on_new(sentence)
        if len(self.image_ids) > _FEW:
            # In the middle of a pass, each process knows of its own pictures alone.
            judged = min(self.num_pictures, max(self.num_seen, _EARLIEST * processes.world_size()))
            refuse_many(list(self.image_ids), judged)

    def collect(self) -> None:
        """Learn at the end of a pass what other processes saw, and which pictures failed there."""
        counts, found = zip(*processes.gather((self.num_seen, self.image_ids)), strict=True)
        self.num_seen = 0
        self.count({sentence: id for failed in found for sentence, id in failed.items()}, sum(counts))
