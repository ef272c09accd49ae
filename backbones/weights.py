"""Named and file weights into a backbone."""

import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .backbone import Backbone, Preprocessing

DEFERRED = "deferred"
NameTable = tuple[tuple[str, str], ...]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or of a torch file, read without running code from it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a file of plain tensors (it may hold code, which is never run): {_first_line(error)}"
        ) from error
    except Exception as error:
        raise ValueError(f"{path} cannot be read as weights: {_first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds {type(state).__name__}, not a state dict of tensors")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def rename(state: dict[str, Tensor], names: NameTable) -> dict[str, Tensor]:
    """The state dict with every (pattern, replacement) of `names` applied to its keys in order."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _published(name: str, weights: str) -> tuple[dict[str, Tensor], Preprocessing] | None:
    """torchvision's weights enum entry of that name ("imagenet_v1" -> IMAGENET1K_V1), or None if it has none."""
    from torchvision.models import get_model_weights

    try:
        published = get_model_weights(name)
    except ValueError:
        return None
    entry = getattr(published, weights.replace("imagenet_", "IMAGENET1K_").upper(), None)
    if entry is None:
        return None
    transforms = entry.transforms()
    return entry.get_state_dict(progress=True, check_hash=True), Preprocessing(
        tuple(transforms.mean), tuple(transforms.std)
    )


def published_weights(name: str) -> list[str]:
    """Names that `weights=` takes for a backbone, the publisher's, never a moving default."""
    from torchvision.models import get_model_weights

    try:
        entries = get_model_weights(name).__members__
    except ValueError:
        return []
    return sorted(
        {entry.replace("IMAGENET1K_", "imagenet_").lower() for entry in entries if entry != "DEFAULT"}
    )


def is_published(weights: object) -> bool:
    """Whether `weights` names a publisher's weights, as "imagenet_v1" does, and not a file."""
    return isinstance(weights, str) and re.fullmatch(r"imagenet_\w+", weights) is not None


def load_weights(backbone: Backbone, weights: str | Path | None, published: NameTable) -> None:
    """Fill `backbone` from a published name or a file; `published` maps the publisher's keys to ours."""
    if weights is None or weights == DEFERRED:
        return
    if is_published(weights):
        found = _published(backbone.name, str(weights))
        if found is None:
            accepted = ", ".join(published_weights(backbone.name)) or "none are published"
            raise ValueError(f"{backbone.name} has no weights {weights!r}; accepted: {accepted}, or a file")
        state, backbone.preprocessing = found
    else:
        state = read_state_dict(weights)
    load_into(backbone, state, published, source=str(weights))


def load_into(backbone: Backbone, state: dict[str, Tensor], published: NameTable, source: str) -> None:
    """Load a state dict of our keys or of the publisher's; refuse another architecture by its first differences."""
    if not any(key.startswith(("trunk.", "roi_head.")) for key in state):
        state = rename(
            {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier.", "last_linear."))},
            published,
        )
    wanted = backbone.state_dict()
    counters = "num_batches_tracked"  # absent from weights of old versions, and from frozen norms
    missing = [k for k in wanted if k not in state and not k.endswith(counters)]
    unexpected = [k for k in state if k not in wanted and not k.endswith(counters)]
    shapes = [
        f"{k} is {tuple(state[k].shape)}, wanted {tuple(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{label}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
            for label, keys in (("missing", missing), ("unknown", unexpected), ("of another shape", shapes))
            if keys
        ]
        raise ValueError(f"{source} does not fit {backbone.name}; " + "; ".join(parts))
    backbone.load_state_dict({**wanted, **{k: v for k, v in state.items() if k in wanted}})
