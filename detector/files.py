"""Write files whole or not at all, and read JSON and text."""

import codecs
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: `write(temporary_path)` makes it, then it is renamed to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Write `value` as a JSON file, whole or not at all. ValueError: it holds NaN or an infinity."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a .safetensors file, whole or not at all."""
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda temporary: save_file(on_cpu, temporary, metadata=metadata))


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
        raise FileNotFoundError(f"{path}: no such annotation file")
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path}: the file has {size} bytes; max_bytes accepts {max_bytes}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: the file cannot be read ({error.strerror})") from None


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
