"""Published weights, where they can be had."""

import socket

from backbones.weights import cached_path, fetch, is_whole, torchvision_entry

# torchvision's networks -> the name of their weights here.
_PUBLISHED = {"resnet18": "imagenet_v1", "resnet50": "imagenet_v2"}
_PATIENCE = 20  # seconds without an answer


def find_weights(name: str, offline: bool = False) -> tuple[str | None, str]:
    """The published weights of a network, downloaded if need be, or None; and where they are, or why there are none."""
    weights = _PUBLISHED[name]
    entry = torchvision_entry(name, weights)
    place = cached_path(entry)
    if is_whole(place):
        return weights, f"{weights}, in {place}"
    if offline:
        fault = "is damaged" if place.exists() else "does not hold the published ones"
        return None, f"{place} {fault}, and --offline fetches none"
    print(f"downloading {name}'s published weights from {entry.url} (--offline does without)", flush=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        fetch(entry, progress=False)
    except OSError as error:
        return None, f"the published ones cannot be downloaded ({error})"
    finally:
        socket.setdefaulttimeout(before)
    return weights, f"{weights}, now in {place}"
