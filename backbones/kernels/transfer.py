"""Copies to a device that the host does not wait for."""

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to `device`. From pinned memory, a GPU copies it while the host goes on."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
