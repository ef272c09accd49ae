"""Load published weights by name, or weights from a file, into a backbone."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights

from .backbone import Backbone, Preprocessing
from .messages import first_line, misfit
from .reading import load_metadata, read

T = TypeVar("T")
DEFERRED = "deferred"
NameTable = tuple[tuple[str, str], ...]

# Our names -> timm's names for the same network. The weights are "timm/TAG", with the tag in timm's full name
# (legacy_seresnet50.in1k). Without a tag timm takes its default, which may change between versions.
TIMM_ARCHITECTURES = {"se_resnet": "legacy_seresnet", "preact_resnet": "resnetv2_"}
# The entries under which checkpoints hold the network. "blobs" is Caffe2's.
NETWORKS = ("state_dict", "model", "model_state_dict", "net", "network", "blobs")
# What DataParallel, torch.compile and Lightning put before every name, and what methods call the network that they train.
WRAPPERS = ("module.", "_orig_mod.", "model.", "network.", "net.")
ENCODERS = ("encoder_q.", "base_encoder.", "backbone.", "encoder.", *WRAPPERS)
_CLASSIFIERS = ("fc.", "classifier.", "last_linear.", "head.", "projection_head.", "prototypes.")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or torch file, read without running code from it.

    Raises a ValueError where the file holds anything but a state dict of tensors.
    """
    state = find_network(read(path))
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds {type(state).__name__}, not a state dict of tensors")
    return state


def find_network(content: Any) -> Any:
    """The dictionary of tensors in a checkpoint: under one of the usual names, or the whole."""
    for key in NETWORKS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            return find_network(content[key])
    return content


def unwrap(
    state: dict[str, T], prefixes: tuple[str, ...] = WRAPPERS, holds: Callable[..., bool] = all
) -> tuple[dict[str, T], str]:
    """A state dict without the prefixes that wrap its names, and a note that says so, or ''.

    holds: `all` strips what wraps all names, `any` takes the names below a prefix and leaves out the others. Names
    without a dot, such as a counter or a queue, belong to the wrapper.
    """
    inside, stripped = state, ""
    while names := [name for name in inside if "." in name]:
        prefix = next((p for p in prefixes if holds(name.startswith(p) for name in names)), None)
        if prefix is None:
            break
        inside = {k.removeprefix(prefix): v for k, v in inside.items() if k.startswith(prefix)}
        stripped += prefix
    left = f", {len(state) - len(inside)} other tensors left out" if len(inside) < len(state) else ""
    return inside, f"stripped from the names: {stripped}{left}" if stripped else ""


def read_network(path: str | Path) -> dict[str, Tensor]:
    """`read_state_dict`, without what a training script or a self-supervised method wraps around a network.

    It prints what was stripped.
    """
    state, note = unwrap(read_state_dict(path), ENCODERS, any)
    if note:
        print(f"{path}: {note}", flush=True)
    return state


def stored_preprocessing(path: str | Path) -> Preprocessing | None:
    """The preprocessing that tools/convert_weights.py stored in the file's metadata, or None."""
    if Path(path).suffix != ".safetensors":
        return None
    return read(path, _load_preprocessing)


def _load_preprocessing(path: Path) -> Preprocessing | None:
    text = load_metadata(path).get("preprocessing")
    return None if text is None else Preprocessing(**json.loads(text))


def rename(state: dict[str, Tensor], names: NameTable) -> dict[str, Tensor]:
    """The state dict with renamed keys: every (pattern, replacement) of `names` is applied in order."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


@contextmanager
def downloading(source: str, place: str) -> Iterator[None]:
    """When a download fails, raise an OSError that says what to fetch by hand and where to put it."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the weights cannot be downloaded ({first_line(error)}). Fetch {source} by hand and {place}"
        ) from error


def torchvision_entry(name: str, weights: str) -> WeightsEnum:
    """torchvision's entry of a network's weights: "imagenet_v1" is IMAGENET1K_V1."""
    return get_model_weights(name)[weights.replace("imagenet_", "IMAGENET1K_").upper()]


def cached_path(entry: WeightsEnum) -> Path:
    """Where torch.hub keeps the file of torchvision's weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name


def is_whole(path: Path) -> bool:
    """Whether a published file is there, and its bytes have the hash that its name ends with."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest().startswith(_hash_of(path))


def _hash_of(path: Path) -> str:
    found = torch.hub.HASH_REGEX.search(path.name)
    return found[1] if found else ""


def fetch(entry: WeightsEnum, progress: bool = True) -> Path:
    """The file of torchvision's weights in torch.hub's folder, downloaded if it is not there or damaged.

    OSError: it cannot be downloaded, or arrives damaged.
    """
    path = cached_path(entry)
    if not is_whole(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(entry.url, str(path), _hash_of(path), progress)
        except (RuntimeError, HTTPException) as error:
            raise OSError(first_line(error)) from error
    return path


def from_torchvision(name: str, weights: str, load: Callable[[WeightsEnum], T]) -> tuple[T, Preprocessing]:
    """load(entry) for torchvision's weights of a network, and their preprocessing.

    An OSError says what to fetch where the download fails.
    """
    entry = torchvision_entry(name, weights)
    with downloading(entry.url, f"put it into {cached_path(entry).parent}"):
        fetch(entry)
    loaded, transforms = load(entry), entry.transforms()
    return loaded, Preprocessing(transforms.mean, transforms.std)


def _timm_architecture(name: str) -> str | None:
    family, depth = re.fullmatch(r"(.*?)(\d*)", name).groups()
    return f"{TIMM_ARCHITECTURES[family]}{depth}" if family in TIMM_ARCHITECTURES else None


def import_timm() -> ModuleType:
    """The timm package; an ImportError that says how to install it where it is missing."""
    try:
        import timm
    except ImportError as error:
        raise ImportError('networks and weights "timm/..." need timm; run: pip install timm') from error
    return timm


def timm_network(full_name: str, pretrained: bool) -> tuple[nn.Module, Preprocessing]:
    """timm's network with this name, which includes the tag, and its preprocessing."""
    timm = import_timm()
    config = timm.get_pretrained_cfg(full_name)
    source = getattr(config, "hf_hub_id", None) or getattr(config, "url", None)
    with downloading(f"{source} (timm's {full_name})", "give the file as weights=FILE"):
        network = timm.create_model(full_name, pretrained=pretrained)
    return network, Preprocessing(network.pretrained_cfg["mean"], network.pretrained_cfg["std"])


def timm_tags(architecture: str) -> list[str]:
    """The tags under which timm publishes weights for an architecture. It needs timm."""
    return [full_name.partition(".")[2] for full_name in import_timm().list_pretrained(f"{architecture}.*")]


def published_weights(name: str) -> list[str]:
    """The published names that `weights=` takes for a backbone. None of them is a default that may change.

    torchvision's are "imagenet_v1" and "imagenet_v2". timm's are "timm/TAG", listed only where timm is installed.
    """
    names: list[str] = []
    # torchvision does not have every network.
    with suppress(ValueError):
        entries = get_model_weights(name).__members__
        names += [
            entry.replace("IMAGENET1K_", "imagenet_").lower() for entry in entries if entry != "DEFAULT"
        ]
    architecture = _timm_architecture(name)
    if architecture is not None and importlib.util.find_spec("timm") is not None:
        names += [f"timm/{tag}" for tag in timm_tags(architecture)]
    return sorted(names)


def is_published(weights: object) -> bool:
    """Whether `weights` is a published name, such as "imagenet_v1" or "timm/in1k", and not a file.

    timm's full name is one too, such as "timm/legacy_seresnet50.in1k".
    """
    published = r"imagenet_\w+|timm/((legacy_seresnet|resnetv2_)\w+\.)?\w+"
    return isinstance(weights, str) and re.fullmatch(published, weights) is not None


def _published(name: str, weights: str) -> tuple[dict[str, Tensor], Preprocessing]:
    """The state dict under the publisher's names, and the preprocessing."""
    from_timm = weights.startswith("timm/")
    if from_timm:
        import_timm()
        weights = weights.replace(f"{_timm_architecture(name)}.", "")
    names = published_weights(name)
    if weights not in names:
        accepted = ", ".join(names) or "none are published"
        raise ValueError(f"{name} has no weights {weights!r}; accepted: {accepted}, or a file")
    if not from_timm:
        return from_torchvision(name, weights, lambda entry: read_state_dict(cached_path(entry)))
    full_name = f"{_timm_architecture(name)}.{weights.removeprefix('timm/')}"
    network, preprocessing = timm_network(full_name, pretrained=True)
    return network.state_dict(), preprocessing


def load_weights(backbone: Backbone, weights: str | Path | None, published: NameTable) -> None:
    """Fill `backbone` from a published name or a file; None and "deferred" load nothing.

    published: the publisher's keys -> ours. Weights that do not exist or do not fit are a ValueError.
    """
    if weights is None or weights == DEFERRED:
        return
    if is_published(weights):
        state, backbone.preprocessing = _published(backbone.name, str(weights))
    else:
        state = read_network(weights)
        backbone.preprocessing = stored_preprocessing(weights) or backbone.preprocessing
    load_into(backbone, state, published, source=str(weights))


def load_into(backbone: Backbone, state: dict[str, Tensor], published: NameTable, source: str) -> None:
    """Load a state dict with our keys or the publisher's.

    A state dict of another architecture is a ValueError that names the first differences.
    """
    state = {key: value for key, value in state.items() if not key.startswith(_CLASSIFIERS)}
    if not any(key.startswith(("trunk.", "roi_head.")) for key in state):
        state = rename(state, published)
    wanted = backbone.state_dict()
    if differences := misfit(wanted, state):
        raise ValueError(f"{source} does not fit {backbone.name}; {differences}")
    backbone.load_state_dict({**wanted, **{k: v for k, v in state.items() if k in wanted}})
