"""Check what a file has in place of our own state, before torch takes it: torch looks at few of its kinds and shapes."""

from types import NoneType
from typing import Any

import torch
from torch import Tensor

_KINDS = ((bool, NoneType), (int, float), (list, tuple), (dict,))


def check_fit(saved: Any, own: Any) -> None:
    """Check that `saved` may replace `own`, item by item. ValueError: a key is missing, or a value is of another kind."""
    kind = next((kinds for kinds in _KINDS if isinstance(own, kinds)), type(own))
    if not isinstance(saved, kind):
        raise ValueError(f"a {type(saved).__name__} in place of a {type(own).__name__}")
    if isinstance(own, dict):
        for key, value in own.items():
            if key not in saved:
                raise ValueError(f"{key} is missing")
            check_fit(saved[key], value)
    if isinstance(own, (list, tuple)):
        for one, other in zip(saved, own, strict=True):
            check_fit(one, other)


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Check the shapes of an optimizer's averages. ValueError: one is of another shape than its parameter.

    A fused step would read past the end of such an average.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            shape = () if name == "step" else parameter.shape
            if value is not None and not (isinstance(value, Tensor) and value.shape == shape):
                raise ValueError(f"{name} is of another shape than its parameter")
