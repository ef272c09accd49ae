"""Write files whole or not at all, and read JSON and text."""

import codecs
import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from backbones.messages import first_line

# A mark of this name, or the state of a run.
_OUTPUT_MARKS = (".fasterrcnn_c4", "training_state.pt", "training_state.previous.pt")


def write_atomically(
    path: str | Path, write: Callable[[Path], object], *, durable: bool = False, previous: Path | None = None
) -> None:
    """Write a file whole or not at all: `write(temporary_path)` makes it, then it is renamed to `path`.

    durable: return only when the file is on the disk, so that a power failure leaves it whole too.
    previous: where the file that was there before goes. `path` holds a whole file all the time, the old or the new one.

    OSError: the file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two machines may write into one folder, and have equal process ids.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        write(temporary)
        if durable:
            _sync(temporary, os.O_RDWR)
        if previous is not None and path.exists():
            write_atomically(previous, partial(_link_or_copy, path), durable=durable)
        os.replace(temporary, path)
        if durable:
            # Not every system opens a folder, or syncs one.
            with contextlib.suppress(OSError):
                _sync(path.parent, os.O_RDONLY)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {_reason(error)}; what was there is unchanged") from error
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """What the system said, for example that the disk is full. torch raises an error of its own after it."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__context__
    return getattr(seen, "strerror", None) or first_line(error)


def mark_output(folder: str | Path) -> None:
    """Mark a folder as one of outputs, if it is new or empty, so that nobody takes its pictures for data."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        (folder / _OUTPUT_MARKS[0]).touch()


def is_output(folder: str | Path) -> bool:
    """Whether a folder is marked as one of outputs, or holds a run."""
    return any(os.path.exists(os.path.join(folder, mark)) for mark in _OUTPUT_MARKS)


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a folder. No other process may write there."""
    for path in folder.glob(".*.[0-9a-f]*.tmp*"):
        path.unlink(missing_ok=True)


def _link_or_copy(path: Path, other: Path) -> None:
    """Give a file another name as well, or copy it where the file system has no links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def _sync(path: Path, flags: int) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Write `value` as a JSON file, whole or not at all. ValueError: it holds NaN or an infinity."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    # A file name may hold bytes that are not UTF-8. They are written as JSON's \udcXX, and read back as the same name.
    content = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a .safetensors file, whole or not at all, on the disk when this returns."""
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def write(temporary: Path) -> None:
        # safetensors makes files that only their owner can read. Those of a run have the mode that others have.
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(on_cpu, temporary, metadata=metadata)
        temporary.chmod(mode)

    write_atomically(path, write, durable=True)


def read_json(path: str | Path) -> Any:
    """Read a JSON file. FileNotFoundError and ValueError name the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FileNotFoundError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None


def read_bytes(path: str | Path, max_bytes: int) -> bytes:
    """A file's bytes. FileNotFoundError: it is absent or no plain file. ValueError: it is larger, or unreadable."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path}: the file has {size} bytes; max_bytes accepts {max_bytes}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: the file cannot be read ({error.strerror})") from None


def read_head(path: Path) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    if not path.is_file():
        return b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(4096)
    return b""


def read_text(path: str | Path, max_bytes: int) -> str:
    """The text of a file in UTF-8, UTF-16 with its mark, or else the encoding of Western Windows."""
    data = read_bytes(path, max_bytes)
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for encoding in ("utf-16",) if utf16 else ("utf-8-sig", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            reason = error.reason
    raise ValueError(f"{path}: not a text in UTF-8, UTF-16 or Windows-1252 ({reason})")
