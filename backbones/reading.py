"""Files of tensors, read without running code from them."""

import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .messages import first_line

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
_LFS_POINTER = b"version https://git-lfs"


# Objects that training scripts store beside the weights. A file that names others is refused.
NOTHING = (
    "argparse.Namespace",
    *(
        f"{m}.{kind}Path"
        for m in ("pathlib", "pathlib._local")
        for kind in ("", "Pure", "Posix", "PurePosix", "Windows")
    ),
    *(f"numpy.{name}" for name in ("dtype", "ndarray")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)


class Nothing:
    """Stands for such an object. It is made and filled by any values, keeps none of them, and runs nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def load_with_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file; no tensor is read."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def load_tensors(path: Path) -> Any:
    """The contents of a .safetensors or torch file: tensors, numbers, text and containers; `Nothing` for other objects."""
    if path.suffix == ".safetensors":
        return load_with_metadata(path)[0]
    with torch.serialization.safe_globals([(Nothing, name) for name in NOTHING]):
        return torch.load(path, map_location="cpu", weights_only=True)


def read(path: str | Path, load: Callable[[Path], Any] = load_tensors) -> Any:
    """load(path), with every failure as one sentence.

    A missing file is a FileNotFoundError. A folder, a damaged file and a file that asks to run code are ValueErrors.
    """
    path = Path(path)
    if path.is_dir():
        inside = next(iter(sorted(path.glob("*.safetensors"))), None)
        raise ValueError(f"{path} is a folder; give a file" + (f", such as {inside}" if inside else ""))
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with warnings.catch_warnings():
            # torch warns of what its own reader does with odd pickles.
            warnings.simplefilter("ignore")
            return load(path)
    # torch and safetensors raise nearly any exception on damaged data.
    except Exception as error:
        asked = re.search(r"(?:GLOBAL|asks for) (\S+)", str(error))
        if asked and isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path} asks for {asked[1][:80]}, which is never run or loaded: accepted are arrays, tensors and plain "
                "containers (of a training checkpoint, save the weights alone)"
            ) from None
        raise ValueError(
            f"{path} is damaged, cut short, or no file of tensors: {_reason(path, error)}"
        ) from None


def _reason(path: Path, error: Exception) -> str:
    """Why a file cannot be read: by its first bytes if these are another file's, else by the error."""
    with open(path, "rb") as file:
        head = file.read(len(_LFS_POINTER))
    if head == _LFS_POINTER:
        return "it is a Git LFS pointer; get the file that it points to with: git lfs pull"
    if path.suffix not in (".safetensors", ".pkl") and not head.startswith((ZIP, PICKLE)):
        return f"neither a torch file nor a pickle nor .safetensors; it begins with {head[:12]!r}"
    # torch's own message explains how to run the code in such a file, so it is not repeated.
    if "weights_only" in str(error):
        return "it may hold code, which is never run"
    return first_line(error).split(". ")[0].rstrip(".")[:300]
