"""Find pictures that are the same or nearly the same, by their bytes and by a hash of what they show."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import cv2
import numpy as np

from .opened import Opened

# Near-duplicates differ in at most this many of the hash's 64 bits, and on average by this many grey levels.
_MAX_BITS = 4
_MAX_LEVELS = 6.0
# Two hashes that differ in _MAX_BITS places agree in one of _MAX_BITS + 1 bands. Each picture is compared with at
# most this many others of a band, so that a set of equal pictures takes no quadratic time.
_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))
_MAX_COMPARED = 256


def equal_pictures(opened: Mapping[str, Opened]) -> dict[str, str]:
    """path -> the first picture that equals it, for each picture that has an equal.

    Files of equal bytes are equal, and so are pictures of the same size with the same thumbnail.
    """
    by_length: dict[int, list[str]] = defaultdict(list)
    by_look: dict[tuple, list[str]] = defaultdict(list)
    for path, picture in opened.items():
        if picture.size is not None:
            by_length[picture.num_bytes].append(path)
            if picture.thumbnail is not None:
                by_look[picture.size, picture.thumbnail.tobytes()].append(path)
    groups = list(by_look.values())
    for paths in by_length.values():
        if len(paths) > 1:
            by_hash: dict[bytes, list[str]] = defaultdict(list)
            for path in paths:
                by_hash[hashlib.sha256(Path(path).read_bytes()).digest()].append(path)
            groups += by_hash.values()
    first_of: dict[str, str] = {}
    for group in groups:
        if len(group) > 1:
            first = first_of.get(group[0], group[0])
            first_of |= dict.fromkeys(group, first)
    return first_of


def near_pictures(opened: Mapping[str, Opened]) -> Iterable[tuple[str, str]]:
    """Pairs of paths whose pictures look nearly the same, in the order of `opened`."""
    paths = [path for path, picture in opened.items() if picture.thumbnail is not None]
    if len(paths) < 2:
        return []
    thumbnails = np.stack([opened[path].thumbnail for path in paths])
    pairs = _close_pairs(perceptual_hashes(thumbnails))
    difference = np.array(
        [np.abs(thumbnails[a].astype(np.int16) - thumbnails[b]).mean() for a, b in pairs], np.float64
    )
    return [(paths[a], paths[b]) for a, b in pairs[difference <= _MAX_LEVELS]]


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """(N, 16, 16, 3) uint8 RGB -> (N,) uint64: a bit for each of 64 low frequencies, set above their median."""
    grey = thumbnails.astype(np.float32) @ np.float32([0.299, 0.587, 0.114])
    low = np.stack([cv2.dct(picture)[:8, :8].ravel() for picture in grey])
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    # The first is the mean brightness, which is no bit of the pattern.
    bits[:, 0] = False
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _close_pairs(hashes: np.ndarray) -> np.ndarray:
    """(P, 2) rows a < b, in ascending order, of hashes (N,) that differ in at most _MAX_BITS bits."""
    found = [np.empty((0, 2), np.int64)]
    for shift, width in _BANDS:
        band = hashes >> np.uint64(shift) & np.uint64(2**width - 1)
        order = np.argsort(band, kind="stable")
        for step in range(1, min(_MAX_COMPARED, len(order) - 1) + 1):
            a, b = order[:-step], order[step:]
            in_band = band[a] == band[b]
            if not in_band.any():
                break
            a, b = a[in_band], b[in_band]
            differing = (hashes[a] ^ hashes[b])[:, None].view(np.uint8)
            close = np.unpackbits(differing, axis=1).sum(axis=1) <= _MAX_BITS
            found.append(np.column_stack([a[close], b[close]]))
    return np.unique(np.concatenate(found), axis=0)
