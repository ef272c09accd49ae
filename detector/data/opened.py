"""Open pictures in threads, and keep what the checks need of each."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from ..progress import Progress
from .images import load_header, load_or_reason

# Decoders release Python's lock. More threads than this wait for the disk together.
_THREADS = 4
THUMBNAIL = 16


@dataclass(frozen=True, slots=True)
class Opened:
    """A picture that was opened.

    size: upright (height, width); None if it cannot be read, for the reason in `error`. num_bytes: of the file.
    orientation: as in EXIF, 1 for upright. thumbnail: (16, 16, 3) uint8; None if only the header was read.
    """

    size: tuple[int, int] | None
    error: str | None = None
    num_bytes: int = 0
    orientation: int = 1
    thumbnail: np.ndarray | None = None


def open_pictures(paths: Sequence[str], *, decode: bool) -> dict[str, Opened]:
    """Open each picture once, and show the progress. decode: read all pixels, not only the headers."""
    opened: dict[str, Opened] = {}
    read = _decode if decode else _read_header
    with ThreadPoolExecutor(_THREADS) as pool, Progress(len(paths), "open pictures") as progress:
        for path, result in zip(paths, pool.map(read, paths), strict=True):
            opened[path] = result
            progress.update(1)
    return opened


def _decode(path: str) -> Opened:
    image = load_or_reason(path)
    if isinstance(image, str):
        return Opened(None, image)
    thumbnail = cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    return replace(_read_header(path), thumbnail=thumbnail)


def _read_header(path: str) -> Opened:
    try:
        size, orientation = load_header(path)
    except (ValueError, OSError) as error:
        return Opened(None, str(error))
    return Opened(size, None, Path(path).stat().st_size, orientation)
