"""Published weights, where they can be had."""

import socket
from pathlib import Path

import torch

from backbones.weights import torchvision_entry

# torchvision's networks -> the name of their weights here.
_PUBLISHED = {"resnet18": "imagenet_v1", "resnet50": "imagenet_v2"}
_PATIENCE = 20  # seconds without an answer


def find_weights(name: str, offline: bool = False) -> tuple[str | None, str]:
    """The published weights of a network, downloaded if need be, or None; and where they are, or why there are none."""
    weights = _PUBLISHED[name]
    entry = torchvision_entry(name, weights)
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    if place.exists():
        return weights, f"{weights}, in {place}"
    if offline:
        return None, f"the published ones are not in {place}, and --offline fetches none"
    print(f"downloading {name}'s published weights from {entry.url} (--offline does without)", flush=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        entry.get_state_dict(progress=False, check_hash=True)
    # A network that is not there fails with an OSError, a damaged download with a RuntimeError.
    except (OSError, RuntimeError) as error:
        return None, f"the published ones cannot be downloaded ({error})"
    finally:
        socket.setdefaulttimeout(before)
    return weights, f"{weights}, now in {place}"
