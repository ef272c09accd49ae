"""Read picture files as upright 8-bit RGB arrays."""

import glob
import io
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar

import cv2
import numpy as np
from PIL import Image, ImageChops

from ..files import is_output

_Read = TypeVar("_Read")

MAX_PIXELS = 178_956_970
"""The most pixels that Pillow decodes: 512 MiB as RGB."""

Image.init()
# Pillow hands PostScript to another program, so formats are listed. Old versions of Pillow lack AVIF.
_FORMATS = [
    name
    for name in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN
]
# Pillow opens .mpo as JPEG.
IMAGE_SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in (*_FORMATS, "MPO")
)
_LFS_POINTER = b"version https://git-lfs"
_EXIF_ORIENTATION, _BITS_PER_SAMPLE, _MAX_SAMPLE_VALUE = 0x0112, 258, 281
_FEW_LEVELS = 32
_warned: list[str | Path] = []  # of few levels: the first picture
# For each EXIF orientation, the operation that turns the stored picture upright.
_UPRIGHT = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image, 1),
}


def load_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a picture to upright RGB: (H, W, 3) uint8, C-contiguous and writable.

    An animation gives its first picture.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as in `to_rgb`. The file is empty, or not a picture. The picture has over `max_pixels` pixels.
    """
    with _open_file(path) as file:
        data = file.read()
    with _open(io.BytesIO(data), path, max_pixels) as picture:
        return to_rgb(picture, path, data)


def to_rgb(picture: Image.Image, name: str | Path, data: bytes = b"") -> np.ndarray:
    """Convert Pillow's picture to upright RGB: (H, W, 3) uint8, C-contiguous and writable.

    Greyscale, palette, CMYK and 16-bit pictures are converted, alpha is dropped, and the EXIF orientation
    is applied. Grey of 16 bits uses the range that the file states. Few levels left are a warning, once a process.

    name: of the picture in messages. data: the bytes of its file, if known.
    ValueError: the picture is cut short or damaged, or has values of more than 16 bits.
    """
    is_deep = "16" in str([tile[-1] for tile in getattr(picture, "tile", ())])
    try:
        image, bits = _decode(picture, data), _stated_bits(picture)
    # Pillow's decoders raise nearly any exception on damaged data.
    except Exception as error:
        raise ValueError(f"{name}: the picture is damaged or cut short ({_reason(error)})") from None
    if image.ndim == 2:
        image = np.repeat(_high_bits(image, bits, name)[:, :, None], 3, axis=2)
    elif is_deep:
        _warn_of_few_levels(image, name)
    return np.ascontiguousarray(_UPRIGHT[_orientation(picture)](image))


def load_image_size(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The (height, width) that `load_image` would give. Only the header is read, so damaged pixels pass.

    Raises what `load_image` raises on a header.
    """
    return load_header(path, max_pixels)[0]


def load_header(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[tuple[int, int], int]:
    """The size as `load_image_size` gives it, and the EXIF orientation; 1 where it is absent or unknown."""
    with _open_file(path) as file, _open(file, path, max_pixels) as picture:
        width, height = picture.size
        orientation = _orientation(picture)
        # Pillow swaps the sides of a TIFF itself.
        is_turned = picture.format != "TIFF" and orientation >= 5
        return (width, height) if is_turned else (height, width), orientation


def load_or_reason(path: str | Path) -> np.ndarray | str:
    """The picture as `load_image` gives it, or why it cannot be read."""
    return _or_reason(load_image, path)


def _or_reason(read: Callable[..., _Read], *args: Any) -> _Read | str:
    """What `read` gives of a picture, or why it cannot be read."""
    try:
        return read(*args)
    except (ValueError, OSError) as error:
        return str(error)


def read_sizes(
    paths: Sequence[str | Path], *, num_threads: int = 4, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, dict[int, str]]:
    """Read the headers of N pictures in threads.

    Returns sizes (N, 2) int64 of height and width, and {row: reason} of unreadable pictures. Their sizes are -1.
    """

    def read(chunk: Sequence[str | Path]) -> list[tuple[int, int] | str]:
        return [_or_reason(load_image_size, path, max_pixels) for path in chunk]

    chunks = [paths[i : i + 64] for i in range(0, len(paths), 64)]
    with ThreadPoolExecutor(num_threads) as pool:
        found = list(chain.from_iterable(pool.map(read, chunks)))
    reasons = {row: reason for row, reason in enumerate(found) if isinstance(reason, str)}
    sizes = [(-1, -1) if isinstance(size, str) else size for size in found]
    return np.array(sizes, np.int64).reshape(-1, 2), reasons


def list_images(
    paths: str | Path | Iterable[str | Path],
    unreadable: list[str] | None = None,
    passed_over: Counter[str] | None = None,
) -> list[Path]:
    """List the pictures that files, folders and glob patterns name, in the given order and without repeats.

    A file is taken whatever its suffix. Folders are searched as `walk` does. Folders and patterns give the files with a
    picture's suffix, in sorted order and without hidden files.

    unreadable: gets a sentence for each folder that cannot be listed and each link that leads nowhere.
    passed_over: counts the files without a picture's suffix by their suffix, and what `walk` passes over.

    Raises:
        FileNotFoundError: a path without wildcards names no file or folder.
        ValueError: a folder or a pattern holds no picture, or no path was given.
    """
    unreadable = [] if unreadable is None else unreadable
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise ValueError("no path was given: name picture files, folders or glob patterns")
    passed_over = Counter() if passed_over is None else passed_over
    return list(dict.fromkeys(image for path in paths for image in _expand(path, unreadable, passed_over)))


def _expand(path: str | Path, unreadable: list[str], passed_over: Counter[str]) -> list[Path]:
    """The pictures that one file, folder or glob pattern names."""
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        found = [Path(path, file) for file in walk(path, unreadable, passed_over)]
    elif glob.has_magic(str(path)):
        found = list(map(Path, glob.glob(str(path), recursive=True)))
        if "**" in str(path):
            found = [file for file in found if not is_output(file.parent)]
    else:
        raise FileNotFoundError(f"{path}: no such file or folder")
    named = sorted(f for f in found if f.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(f.name))
    others = {*found} - {*named}
    passed_over.update(file.suffix.lower() or "without suffix" for file in others if file.is_file())
    images = [file for file in named if file.is_file()]
    unreadable += dead_links(named)
    if not images:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError("; ".join([f"{path}: no picture found (looked for {suffixes})", *unreadable]))
    return images


def dead_links(paths: Iterable[Path]) -> list[str]:
    """A sentence for each of the paths that is a link to nothing."""
    return [f"{path}: a link to nothing" for path in paths if path.is_symlink() and not path.exists()]


def walk(folder: str | Path, unreadable: list[str], passed_over: Counter[str]) -> Iterator[str]:
    """The paths of files below a folder, through links too, each folder once even where links make a circle.

    Hidden files and folders are left out, and folders of outputs below it, which `passed_over` counts. unreadable: as
    for `list_images`.
    """

    def note(error: OSError) -> None:
        unreadable.append(f"{error.filename}: the folder cannot be listed ({error.strerror})")

    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=note, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        outputs = {name for name in folders if is_output(os.path.join(place, name))}
        passed_over.update(["folders of outputs"] * len(outputs))
        folders[:] = sorted(name for name in folders if name not in outputs and not _is_hidden(name))
        below = os.path.relpath(place, folder)
        yield from (os.path.normpath(os.path.join(below, name)) for name in files if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _open_file(path: str | Path) -> IO[bytes]:
    """Open a file that is not empty."""
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise ValueError("a folder, where a picture file is expected")
        # To open a named pipe would wait for whoever writes to it.
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("a device or pipe, where a picture file is expected")
        if not found.st_size:
            raise ValueError("the file is empty (0 bytes)")
        return open(path, "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such picture file") from None
    except OSError as error:
        raise ValueError(f"{path}: the file cannot be read ({error.strerror})") from None
    # A name may hold a zero byte or a lone surrogate.
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _open(file: IO[bytes], path: str | Path, max_pixels: int) -> Image.Image:
    """Read the picture's header by Pillow. No pixel is decoded."""
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of what it refuses. The limit here is `max_pixels`.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(file, formats=_FORMATS)
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path}: {_no_picture(file)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: the picture is too large ({_reason(error)})") from None
    except Exception as error:
        raise ValueError(f"{path}: the picture's header cannot be read ({_reason(error)})") from None
    width, height = picture.size
    if width * height > max_pixels:
        raise ValueError(
            f"{path}: the picture is too large ({width}x{height} pixels; data.max_pixels is {max_pixels})"
        )
    return picture


def _no_picture(file: IO[bytes]) -> str:
    """Say what a file holds in place of a picture."""
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        return "not the picture but a Git LFS pointer to it; `git lfs pull` fetches the picture"
    return f"not a picture in an accepted format, {', '.join(_FORMATS)} (its {length} bytes begin {start[:12]!r})"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _decode(picture: Image.Image, data: bytes) -> np.ndarray:
    """Decode to (H, W, 3) uint8 RGB in the stored orientation; grey of more than 8 bits to (H, W)."""
    # JPEG's end marker may have zero bytes after it.
    is_whole = data[-64:].rstrip(b"\0").endswith(b"\xff\xd9")
    if picture.format == "JPEG" and picture.mode in ("RGB", "L") and is_whole:
        # OpenCV is 5 to 20 % faster than Pillow. It may decode a file that is cut short to a half-grey picture.
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is not None:
            return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    picture.load()
    if picture.mode.startswith(("I", "F")):
        return np.asarray(picture)
    # A copy, because Pillow's memory is read-only.
    return np.array(_convert_to_rgb(picture))


def _stated_bits(picture: Image.Image) -> int:
    """The bits of a grey value that the file states. Pillow scales those of PGM and JPEG 2000 to 16, but not a TIFF's."""
    tags = getattr(picture, "tag_v2", {})
    (bits, *_), largest = tags.get(_BITS_PER_SAMPLE, (16,)), np.max(tags.get(_MAX_SAMPLE_VALUE, 0))
    # Other largest values than 2^n - 1 are those of one picture (TIFF 6.0, p. 37).
    return int(largest).bit_length() if largest > 0xFF and not largest & (largest + 1) else bits


def _high_bits(grey: np.ndarray, bits: int, name: str | Path) -> np.ndarray:
    """Scale grey (H, W) of 9 to 16 `bits` to uint8, as Pillow and libpng scale 16-bit colour.

    Floats and values outside 16 bits are a ValueError.
    """
    if grey.dtype.kind == "f" or grey.min() < 0 or grey.max() > 0xFFFF:
        raise ValueError(
            f"{name}: its values are {grey.min()} to {grey.max()} in {8 * grey.itemsize} bits; "
            "8-bit and 16-bit pictures are accepted"
        )
    # Values above the stated range show that it is not the range.
    image = (grey >> (bits if grey.max() < 1 << bits <= 0x10000 else 16) - 8).astype(np.uint8)
    if grey.min() < grey.max():
        _warn_of_few_levels(image, name)
    return image


def _warn_of_few_levels(image: np.ndarray, name: str | Path) -> None:
    """Warn of an array that holds few of the 256 levels. Only the first picture of a process is named."""
    levels = int(image.max()) - int(image.min()) + 1
    if levels < _FEW_LEVELS and not _warned:
        _warned.append(name)
        warnings.warn(
            f"{name}: {levels} of 256 levels are left of its 16 bits, since the values fill a small part of them. "
            "Other pictures like it are not named. Scale the values to 16 bits, or to 8, before",
            stacklevel=2,
        )


def _convert_to_rgb(picture: Image.Image) -> Image.Image:
    """Convert palette, grey and CMYK pictures to RGB, and drop alpha."""
    if picture.mode == "CMYK" and picture.format == "JPEG" and "adobe" not in picture.info:
        # Pillow reads every CMYK JPEG as inverted. Without Adobe's marker, 0 means no ink (ITU-T T.872, 6.1).
        picture = ImageChops.invert(picture)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) if it is absent or unknown, or if the EXIF block is damaged."""
    try:
        # The method of PNGs decodes all pixels to find EXIF behind them.
        orientation = Image.Image.getexif(picture).get(_EXIF_ORIENTATION, 1)
    # Only the EXIF block is damaged; the picture may be sound.
    except Exception:
        return 1
    return orientation if orientation in _UPRIGHT else 1
