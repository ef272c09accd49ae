"""Read the file of any program's checkpoint as named tensors, without running code from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.reading import PICKLE, ZIP, load_tensors, read
from backbones.weights import NETWORKS, find_network, unwrap

from .unpickler import load_plain

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a torch file from before torch 1.6


@dataclass(frozen=True)
class ForeignFile:
    """The tensors of a file under its own names, floats as float32.

    rest: the other entries of the file. note: what was stripped from all names, or "".
    """

    path: Path
    tensors: dict[str, Tensor]
    rest: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def read_foreign(path: str | Path) -> ForeignFile:
    """Read a .pkl, .pth or .safetensors file. Torch files and pickles are told apart by their first bytes.

    ValueError: the file cannot be read, or holds no dictionary of tensors.
    """
    path = Path(path)
    content = read(path, _load)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, no dictionary of tensors")
    network = find_network(content)
    rest = {k: v for k, v in content.items() if network is not content and k not in NETWORKS}
    tensors, note = unwrap(_tensors(network))
    if not tensors:
        raise ValueError(f"{path} holds no tensors; its entries: {', '.join(map(str, list(content)[:5]))}")
    return ForeignFile(path, tensors, rest, note)


def _load(path: Path) -> Any:
    with open(path, "rb") as file:
        head = file.read(12)
    is_pickle = head.startswith(PICKLE) or path.suffix in (".pkl", ".pickle")
    if is_pickle and path.suffix != ".safetensors" and not head.startswith(ZIP):
        first = load_plain(path)
        if first != _TORCH_MAGIC:
            return first
    return load_tensors(path)


def _tensors(network: dict) -> dict[str, Tensor]:
    """The arrays and tensors of a dictionary as tensors, floats as float32. Momenta of a training are left out."""
    found = {
        str(name): torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in network.items()
        if isinstance(value, (Tensor, np.ndarray)) and not str(name).endswith("_momentum")
    }
    return {name: v.float() if v.is_floating_point() else v for name, v in found.items()}
