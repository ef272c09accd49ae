"""Read pickles as data: arrays of numbers, text and plain containers. No function that a pickle names is imported.

A pickle rebuilds an object by calling a function that it names. Here, each name that a checkpoint needs stands for a
harmless class or function of this file, or for OrderedDict. Any other name is refused before it is looked up.
"""

import math
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from backbones.reading import NOTHING, Nothing


class _Dtype:
    """Stands for numpy.dtype(name, align, copy). Its state in a pickle is (version, byte order, ...)."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def read(self) -> np.dtype:
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", str(self.name)) or self.order not in tuple("<>=|"):
            raise pickle.UnpicklingError(f"an array holds {self.name!r}, no plain numbers")
        return np.dtype(("" if self.order == "|" else self.order) + self.name)


class _Array:
    """Stands for numpy.ndarray. Its state in a pickle is (version, shape, dtype, whether in Fortran's order, bytes)."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple | None = None
        self.axes: tuple[int, ...] | None = None

    def __setstate__(self, state: tuple) -> None:
        self.state = state[-4:]

    def read(self) -> np.ndarray:
        if self.state is None:
            raise pickle.UnpicklingError("an array has no content")
        shape, dtype, is_fortran, data = self.state
        data = data.encode("latin1") if isinstance(data, str) else data  # Python 2's bytes
        numbers = dtype.read()
        if not isinstance(data, (bytes, bytearray)) or len(data) != math.prod(shape) * numbers.itemsize:
            raise pickle.UnpicklingError(f"an array of shape {shape} does not hold as many numbers")
        array = np.frombuffer(data, numbers).reshape(shape, order="F" if is_fortran else "C")
        return (array if self.axes is None else array.transpose(self.axes)).copy()


def _frombuffer(
    data: bytes, dtype: _Dtype, shape: tuple, order: str = "C", axes: tuple[int, ...] | None = None
) -> _Array:
    """An array as protocol 5 writes it. axes: the order of its axes, if its memory has neither C's nor Fortran's."""
    array = _Array()
    array.axes = axes
    array.state = (shape, dtype, order == "F", data)
    return array


def _scalar(dtype: _Dtype, data: bytes) -> _Array:
    return _frombuffer(data, dtype, ())


def _no_bytes() -> bytes:
    """Empty bytes, as Python 3 writes them in Python 2's protocols."""
    return b""


def _encode(text: str, encoding: str) -> bytes:
    """Other bytes in the same protocols, which Python 3 writes as Latin-1 text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"a text has the encoding {encoding!r}")
    return text.encode("latin1")


_STANDS_FOR: dict[tuple[str, str], Any] = {
    **{tuple(name.rsplit(".", 1)): Nothing for name in NOTHING},
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _STANDS_FOR[f"{_core}.multiarray", "_reconstruct"] = _Array
    _STANDS_FOR[f"{_core}.multiarray", "scalar"] = _scalar
    _STANDS_FOR[f"{_core}.numeric", "_frombuffer"] = _frombuffer


class PlainUnpickler(pickle._Unpickler):
    """Reads numbers, text, containers and numpy arrays; a pickle that names anything else is refused.

    The base is pickle's unpickler in Python. A few bytes of a pickle make the one in C take gigabytes for its memo.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STANDS_FOR[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def load_plain(path: str | Path) -> Any:
    """Read the first object of a pickle. Arrays in its dictionaries become numpy's. UnpicklingError: it is refused."""
    with open(path, "rb") as file:
        value = PlainUnpickler(file, encoding="latin1").load()
    pending, seen = [value], set()
    while pending:
        container = pending.pop()
        if not isinstance(container, dict) or id(container) in seen:
            continue
        seen.add(id(container))
        for key, item in container.items():
            if isinstance(item, _Array):
                container[key] = item.read()
        pending.extend(container.values())
    return value
