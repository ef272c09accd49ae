"""torchvision's and timm's classifiers as backbones, cut by tracing: "torchvision/NAME" and "timm/NAME"."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model, list_models

from ..backbone import IMAGENET, NUM_TRUNK_STAGES, Backbone, Preprocessing
from ..layers import FrozenBatchNorm, norm_layer
from ..messages import check_choice, nearest
from ..registry import register_library
from ..weights import (
    DEFERRED,
    from_torchvision,
    import_timm,
    load_into,
    published_weights,
    read_network,
    stored_preprocessing,
    timm_network,
    timm_tags,
)
from .split import cut_network, layer_path

CUT_NORMS = ("batch", "frozen")


def torchvision_names() -> list[str]:
    """The names of torchvision's classifiers."""
    import torchvision.models

    return list_models(module=torchvision.models)


def timm_names() -> list[str]:
    """The names of timm's networks. It needs timm."""
    return import_timm().list_models()


@register_library("torchvision", names=torchvision_names)
def torchvision_backbone(
    name: str, *, weights: str | None = None, norm: str = "batch", frozen_stages: int = 0
) -> Backbone:
    """A torchvision classifier, cut by `cut_classifier`. The weights "imagenet_v1" are torchvision's IMAGENET1K_V1."""

    def build(tag: str | None) -> tuple[nn.Module, Preprocessing]:
        if tag is None:
            return get_model(name, weights=None), IMAGENET
        return from_torchvision(name, tag, lambda entry: get_model(name, weights=entry))

    published = published_weights(name)
    return cut_classifier(f"torchvision/{name}", build, published, weights, norm, frozen_stages)


@register_library("timm", names=timm_names)
def timm_backbone(
    name: str, *, weights: str | None = None, norm: str = "batch", frozen_stages: int = 0
) -> Backbone:
    """A timm classifier, cut by `cut_classifier`. `weights` is one of timm's tags, such as "a1_in1k", or timm's full
    name with the tag, such as "timm/resnet18.a1_in1k".

    Without a tag, mean and std are those of timm's default weights.
    """

    def build(tag: str | None) -> tuple[nn.Module, Preprocessing]:
        return timm_network(name if tag is None else f"{name}.{tag}", pretrained=tag is not None)

    tags = timm_tags(name)
    tag = str(weights).removeprefix("timm/").removeprefix(f"{name}.")
    return cut_classifier(f"timm/{name}", build, tags, tag if tag in tags else weights, norm, frozen_stages)


def cut_classifier(
    name: str,
    build: Callable[[str | None], tuple[nn.Module, Preprocessing]],
    published: list[str],
    weights: str | None,
    norm: str,
    frozen_stages: int,
) -> Backbone:
    """A backbone cut from the network that `build` makes. A value that is not accepted is a ValueError.

    build: (tag) -> the network and its preprocessing, with the weights published under `tag`; None: random weights.
    published: the tags of the published weights.
    weights: None; a published tag; a file in the library's layout or ours; or "deferred", which promises a later
        `load_state_dict`.
    norm: "batch" leaves the network's norms as they are, "frozen" freezes its batch norms (with weights only).
    frozen_stages: stages 1..frozen_stages take no gradient and keep their statistics.
    """
    check_choice("norm", norm, CUT_NORMS)
    # Refuse frozen norms with random weights.
    norm_layer(norm, weights)
    tag = _tag(name, weights, published)
    try:
        network, preprocessing = build(tag)
    except NotImplementedError:
        # torchvision's RegNets compute their widths with tensors, which the meta device does not support.
        device = torch.get_default_device()
        with torch.device("cpu"):
            network, preprocessing = build(tag)
        network.to(device)
    if norm == "frozen":
        freeze_norms(network, name)
    uncut = set(network.state_dict())
    backbone = cut_network(network, name, preprocessing)
    if tag is None and weights not in (None, DEFERRED):
        _load_file(backbone, weights, uncut)
    return _freeze(backbone, frozen_stages)


def _tag(name: str, weights: str | None, published: list[str]) -> str | None:
    """`weights` if it is a published tag, None if it is None, "deferred" or a file; anything else is a ValueError."""
    if weights in published:
        return weights
    if weights in (None, DEFERRED) or Path(weights).suffix:
        return None
    accepted = nearest(weights, published) if published else "none are published, accepted: None"
    raise ValueError(f"{name} has no weights {weights!r}; {accepted}, or a file (.safetensors, .pth)")


def _load_file(backbone: Backbone, path: str, uncut: set[str]) -> None:
    """Load a file in our layout or in the layout of the uncut network, whose keys are `uncut`."""
    state = read_network(path)
    ours = {layer_path(key): key for key in backbone.state_dict()}
    dropped = uncut - set(ours)
    state = {ours.get(key, key): value for key, value in state.items() if key not in dropped}
    load_into(backbone, state, (), source=str(path))
    backbone.preprocessing = stored_preprocessing(path) or backbone.preprocessing


def _freeze(backbone: Backbone, num_stages: int) -> Backbone:
    """Freeze stages 1..num_stages; a ValueError where the network has no such stage."""
    backbone.freeze(num_stages)
    known = [k for k, stage in enumerate(backbone.trunk.stages, start=1) if len(stage)]
    if 0 < num_stages <= NUM_TRUNK_STAGES and num_stages not in known:
        raise ValueError(
            f"frozen_stages is {num_stages}, but {backbone.name} has no map of stride {2**num_stages} that would end "
            f"stage {num_stages}; accepted: {', '.join(map(str, [0, *known, NUM_TRUNK_STAGES + 1]))}"
        )
    return backbone


def freeze_norms(network: nn.Module, name: str) -> None:
    """Replace each batch norm by a frozen one with the same statistics. A network without any is a ValueError."""
    norms = [path for path, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    if not norms:
        raise ValueError(f"norm is 'frozen', but {name} has no batch norm to freeze; accepted: 'batch'")
    for path in norms:
        network.set_submodule(path, frozen_norm(network.get_submodule(path)))


class FrozenBatchNormAct(FrozenBatchNorm):
    """A frozen form of timm's batch norm, with its dropping and its activation inside. timm's own widens 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)"""
        return self.act(self.drop(super().forward(x)))


@torch.no_grad()
def frozen_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """A frozen batch norm with the factors and statistics of `norm`; timm's norms keep their activation."""
    kind = FrozenBatchNormAct if hasattr(norm, "act") else FrozenBatchNorm
    frozen = kind(norm.num_features, norm.eps).to(norm.running_mean)
    frozen.load_state_dict(
        {k: v for k, v in norm.state_dict().items() if k in frozen.state_dict()}, strict=False
    )
    if kind is FrozenBatchNormAct:
        frozen.drop, frozen.act = norm.drop, norm.act
    return frozen
