"""The seeds of random draws. Each use has a stream of its own."""

import zlib


def tagged(use: str, *key: int) -> tuple[int, ...]:
    """The seed of what `use` draws at `key`, for `numpy.random.default_rng`: a tag of the use, then the key.

    numpy pads seeds with zeros, so (0, 3) and (0, 3, 0) seed one stream. The tag keeps uses apart whose keys differ by
    such a zero. Generated pictures have no tag, since their sets must stay as they are.
    """
    return zlib.crc32(use.encode()), *key
