"""A source of pictures and annotations in files, and what a recipe may say of any of them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from ..files import read_text
from ..settings import Count, Section
from .dataset import DetectionDataset
from .file_index import picture_key
from .records import Annotations

MAX_BYTES = 2 * 1024**3


Reader = Callable[["FileSource", Path], Annotations]


class FileSource(Section):
    """Pictures and annotations below data.root. A format says how they are read."""

    limit: Count | None = Field(
        None, description="use only this many images, the first that have a box to learn"
    )
    pictures: str | None = Field(
        None,
        description="a text file that lists the pictures to use, one path a line, relative to data.root or absolute",
    )
    max_bytes: int = Field(MAX_BYTES, gt=0, description="refuse an annotation file of more bytes")

    def read(self, root: Path) -> Annotations:
        """What the files say."""
        raise NotImplementedError

    def select(self, found: Annotations, root: Path, **options: Any) -> DetectionDataset:
        """The data set of what was read, with the pictures that this source uses.

        Options are those of `Annotations.to_dataset`. No picture is missed here: see `settle_sizes`.
        """
        used = read_list(root / self.pictures, root, self.max_bytes) if self.pictures else None
        return found.to_dataset(limit=self.limit, pictures=used, **options)


def read_once() -> Reader:
    """A function that reads the files of each source once. It keeps what they say for as long as it lives."""
    kept = cache(lambda source, root: source.read(root))
    return lambda source, root: kept(source.model_copy(update={"limit": None, "pictures": None}), root)


def read_list(path: Path, root: Path, max_bytes: int = MAX_BYTES) -> set[str]:
    """The pictures that a text file lists, one a line, as `picture_key` has them. ValueError: it lists none."""
    listed = {line.strip() for line in read_text(path, max_bytes).splitlines()} - {""}
    if not listed:
        raise ValueError(f"{path}: the list of pictures is empty")
    return {picture_key(root / line.replace("\\", "/")) for line in listed}
