"""A foreign checkpoint's file as named tensors, whatever wrote it, without running code from it."""

import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from .unpickler import ForbiddenNameError, load_plain

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a torch file from before torch 1.6
# Where the makers of checkpoints put the network beside the rest: Detectron2 and jwyang, MMDetection, Caffe2.
_NETWORKS = ("model", "state_dict", "blobs")


@dataclass(frozen=True)
class ForeignFile:
    """Tensors by their maker's names, floats as float32, and what else stood beside them."""

    path: Path
    tensors: dict[str, Tensor]
    rest: dict[str, Any] = field(default_factory=dict)


def read_foreign(path: str | Path) -> ForeignFile:
    """Read a .pkl, .pth or .safetensors file; what it is is read from its first bytes, not from its name."""
    path = Path(path)
    content = _read(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, no dictionary of tensors")
    network = next((content[key] for key in _NETWORKS if isinstance(content.get(key), dict)), None)
    rest = {} if network is None else {k: v for k, v in content.items() if k not in _NETWORKS}
    tensors = _tensors(content if network is None else network)
    if not tensors:
        raise ValueError(f"{path} holds no tensors; its entries: {', '.join(map(str, list(content)[:5]))}")
    return ForeignFile(path, tensors, rest)


def _read(path: Path) -> Any:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb") as file:
        head = file.read(12)
    if path.suffix == ".safetensors":
        return _readable(path, load_file)
    if head.startswith(ZIP):
        return _readable(path, _load_torch)
    if head.startswith(PICKLE) or path.suffix in (".pkl", ".pickle"):
        first = _readable(path, load_plain)
        return _readable(path, _load_torch) if first == _TORCH_MAGIC else first
    raise ValueError(
        f"{path} is neither a torch file nor a pickle nor .safetensors"
        + (f": it begins with {head!r}" if head else ": it is empty")
    )


def _load_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _readable(path: Path, load: Any) -> Any:
    """load(path), its failure as one sentence: what a hostile file asks for, or how it is damaged."""
    try:
        return load(path)
    except ForbiddenNameError as error:
        raise ValueError(_forbidden(path, error.name)) from None
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(_forbidden(path, asked[1]) if asked else _damaged(path, error)) from None
    except Exception as error:
        raise ValueError(_damaged(path, error)) from None


def _forbidden(path: Path, name: str) -> str:
    return (
        f"{path} asks for {name}, which is never run or loaded: accepted are arrays, tensors and plain containers "
        "(of a training checkpoint, save the weights alone)"
    )


def _damaged(path: Path, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{path} is cut short or damaged: {reason.rstrip('.')}"


def _tensors(network: dict) -> dict[str, Tensor]:
    """The arrays and tensors, without a training's momenta and a wrapper's "module." before every name."""
    found = {
        str(name): torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in network.items()
        if isinstance(value, (Tensor, np.ndarray)) and not str(name).endswith("_momentum")
    }
    if found and all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return {name: v.float() if v.is_floating_point() else v for name, v in found.items()}
