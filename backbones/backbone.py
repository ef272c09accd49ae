"""The contract between a classification network and a C4 detector, and the registry of names.

Letters: N images of H x W pixels, R regions, C4 and C5 channels of conv4_x and conv5_x.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

NUM_TRUNK_STAGES = 4
NUM_STAGES = 5
CROP = 14  # bins of a region along each axis, as the head takes it
# Regions whose activations are held at once where they are recomputed. Each part projects the map anew: 24 GMAC of the
# 1,600 of a ResNet-101's step on 512 regions.
CHECKPOINTED_REGIONS = 128


@dataclass(frozen=True)
class Preprocessing:
    """What a network's weights expect of an image: `(image * scale - mean) / std`, per channel.

    `image` is float RGB in [0, 1]; `mean` and `std` stand in `channel_order` and in the units of `image * scale`.
    The default is torchvision's ImageNet normalisation.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channel_order: str = "rgb"
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mean", "std"):  # lists, as JSON has them, are tuples here
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.channel_order not in ("rgb", "bgr"):
            raise ValueError(f"channel_order is {self.channel_order!r}; accepted: 'rgb', 'bgr'")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0 or self.scale <= 0:
            raise ValueError(f"mean and std are three numbers, std and scale positive; got {self}")


def _freeze(stage: nn.Module) -> None:
    stage.requires_grad_(False)
    stage.eval()


def keeps_activations(block: nn.Module, checkpointing: bool) -> bool:
    """Whether a block runs as usual: not asked to save memory, or with no gradient to save any for."""
    return not (
        checkpointing and torch.is_grad_enabled() and any(p.requires_grad for p in block.parameters())
    )


def run_blocks(blocks: nn.Module, features: Tensor, checkpointing: bool) -> Tensor:
    """blocks(features); with `checkpointing`, a block's activations are recomputed in the backward pass."""
    if not checkpointing:
        return blocks(features)
    for block in blocks if isinstance(blocks, nn.Sequential) else [blocks]:
        if isinstance(block, nn.Sequential):
            features = run_blocks(block, features, checkpointing)
        elif keeps_activations(block, checkpointing):
            features = block(features)
        else:
            features = recomputed(block, block, features)
    return features


def recomputed(block: nn.Module, function: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """function(features), whose activations are computed again for the gradient; statistics move only once."""
    norms = [layer for layer in block.modules() if isinstance(layer, nn.BatchNorm2d)]

    @contextmanager
    def still() -> Iterator[None]:
        momenta, counts = [n.momentum for n in norms], [n.num_batches_tracked.clone() for n in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum, count in zip(norms, momenta, counts, strict=True):
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(count)

    return checkpoint(function, features, use_reentrant=False, context_fn=lambda: (nullcontext(), still()))


class Trunk(nn.Module):
    """Stages 1-4, run once per image: (N, 3, H, W) -> (N, C4, ceil(H/16), ceil(W/16)).

    A frozen stage takes no gradient, and its batch norms stay in evaluation mode whatever `train()` is told:
    without that, running statistics of frozen layers drift with the training images.
    """

    def __init__(self, stages: list[nn.Module], out_channels: int) -> None:
        super().__init__()
        if len(stages) != NUM_TRUNK_STAGES:
            raise ValueError(f"a trunk has {NUM_TRUNK_STAGES} stages, got {len(stages)}")
        for k, stage in enumerate(stages, start=1):
            self.add_module(f"stage{k}", stage)
        self.out_channels = out_channels
        self.frozen_stages = 0
        self.activation_checkpointing = False

    @property
    def stages(self) -> list[nn.Module]:
        return [getattr(self, f"stage{k}") for k in range(1, NUM_TRUNK_STAGES + 1)]

    def freeze(self, num_stages: int) -> None:
        """Freeze stages 1..num_stages."""
        self.frozen_stages = min(num_stages, NUM_TRUNK_STAGES)
        for stage in self.stages[: self.frozen_stages]:
            _freeze(stage)

    def train(self, mode: bool = True) -> "Trunk":
        super().train(mode)
        for stage in self.stages[: self.frozen_stages]:
            stage.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        features = images
        for stage in self.stages:
            features = run_blocks(stage, features, self.activation_checkpointing)
        return features


class Regions(Protocol):
    """Regions of a shared map that are cropped when, and only as far as, the head asks for it.

    RoIAlign is linear, and so is a 1x1 convolution at each position: the two commute, and a head that begins with
    1x1 convolutions runs them once on the map in place of once a region (`conv1x1`).
    """

    def crop(self, stride: int = 1) -> Tensor:
        """The bins ::stride of the regions, (R, C4, 14/stride, 14/stride)."""

    def conv1x1(self, weight: Tensor, stride: int) -> Tensor:
        """conv2d(self.crop(), weight, stride=stride), whichever way round is less work; weight (C, C4, 1, 1)."""

    features: Tensor

    def of(self, features: Tensor) -> "Regions":
        """The same regions of another map, or of this one with nothing computed yet."""

    def split(self, max_regions: int | None = None) -> "Iterable[Regions]":
        """Parts of at most so many regions (None: as a bound of memory asks for); they share what was computed."""


class RoIHead(nn.Module):
    """Stage 5 and average pooling, run once per region: (R, C4, 14, 14) or `Regions` -> (R, C5).

    With `Regions`, the 1x1 convolutions that open the first block's branch and shortcut run on the shared map
    (`shared_projection = False` crops first, as the definition does).
    """

    def __init__(self, stage5: nn.Sequential, out_channels: int) -> None:
        super().__init__()
        self.stage5 = stage5
        self.out_channels = out_channels
        self.frozen = False
        self.shared_projection = True
        self.activation_checkpointing = False

    def freeze(self) -> None:
        self.frozen = True
        _freeze(self.stage5)

    def train(self, mode: bool = True) -> "RoIHead":
        super().train(mode)
        if self.frozen:
            self.stage5.eval()
        return self

    def forward(self, regions: "Tensor | Regions") -> Tensor:
        if isinstance(regions, Tensor):
            return self.pool(run_blocks(self.stage5, regions, self.activation_checkpointing))
        if not (self.training or torch.is_grad_enabled()):
            vectors = [self.pool(self._run(part, False)) for part in regions.split()]
        elif not (keeps_activations(self.stage5, self.activation_checkpointing) or self._draws_statistics()):
            vectors = [self._recomputed(part) for part in regions.split(CHECKPOINTED_REGIONS)]
        else:  # batch statistics are of all regions, and a gradient keeps every part's activations: no parts
            vectors = [self.pool(self._run(regions, self.activation_checkpointing))]
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors)

    def _draws_statistics(self) -> bool:
        return any(isinstance(layer, _BatchNorm) and layer.training for layer in self.stage5.modules())

    def _recomputed(self, regions: "Regions") -> Tensor:
        """The vectors of a part of the regions, of which nothing else is kept for the backward pass."""

        def vectors(features: Tensor) -> Tensor:
            return self.pool(self._run(regions.of(features), False))

        return recomputed(self.stage5, vectors, regions.features)

    def _run(self, regions: "Regions", checkpointing: bool) -> Tensor:
        first, others = self.stage5[0], self.stage5[1:]
        if not (self.shared_projection and hasattr(first, "enter")):
            return run_blocks(self.stage5, regions.crop(), checkpointing)
        if keeps_activations(first, checkpointing):
            entered = first.enter(regions)
        else:
            entered = recomputed(first, lambda features: first.enter(regions.of(features)), regions.features)
        return run_blocks(others, entered, checkpointing)

    @staticmethod
    def pool(features: Tensor) -> Tensor:
        """(R, C5, h, w) -> (R, C5)"""
        return nn.functional.adaptive_avg_pool2d(features, 1).flatten(1)


class Backbone(nn.Module):
    """A classification network in five stages, cut at conv4_x.

    trunk:    (N, 3, H, W)    -> (N, C4, ceil(H/16), ceil(W/16))   .out_channels = C4
    roi_head: (R, C4, 14, 14) -> (R, C5)                           .out_channels = C5
    forward:  (N, 3, H, W)    -> (N, C5), the pooled features of the uncut classifier
    """

    def __init__(
        self, name: str, trunk: Trunk, roi_head: RoIHead, preprocessing: Preprocessing | None = None
    ) -> None:
        super().__init__()
        self.name = name
        self.trunk = trunk
        self.roi_head = roi_head
        self.preprocessing = preprocessing or Preprocessing()

    def freeze(self, num_stages: int) -> "Backbone":
        """Freeze stages 1..num_stages of the five (1 is the stem, 2 is conv2_x)."""
        if not isinstance(num_stages, int) or not 0 <= num_stages <= NUM_STAGES:
            raise ValueError(f"frozen_stages is {num_stages!r}; accepted: 0 (none) to {NUM_STAGES} (all)")
        self.trunk.freeze(num_stages)
        if num_stages == NUM_STAGES:
            self.roi_head.freeze()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.roi_head(self.trunk(images))


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_BUILDERS: dict[str, Callable[..., Backbone]] = {}
_LIBRARIES: dict[str, tuple[Callable[[], list[str]], Callable[..., Backbone]]] = {}


def register_backbone(*, options_of: Callable[..., Backbone] | None = None) -> Callable:
    """Decorator: the function's name becomes a name for `create_backbone`.

    The keyword-only parameters of `options_of`, a family's builder, are the options that the name takes, and become
    the decorated function's signature; None: the function's own.
    """

    def register(builder: Callable[..., Backbone]) -> Callable[..., Backbone]:
        parameters = inspect.signature(options_of or builder).parameters.values()
        options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        name = builder.__name__
        if name in _BUILDERS:
            raise ValueError(f"a backbone named {name!r} is registered already")
        builder.__signature__ = inspect.Signature(options, return_annotation=Backbone)
        _BUILDERS[name] = builder
        return builder

    return register


def register_library(library: str, *, names: Callable[[], list[str]]) -> Callable:
    """Decorator: "library/NAME" becomes a name for `create_backbone`, built by the decorated function of NAME.

    `names` lists every NAME; it is called only when a name of the library is asked for.
    """

    def register(builder: Callable[..., Backbone]) -> Callable[..., Backbone]:
        if library in _LIBRARIES:
            raise ValueError(f"a library named {library!r} is registered already")
        _LIBRARIES[library] = names, builder
        return builder

    return register


def list_backbones(pattern: str = "*") -> list[str]:
    """Names that `create_backbone` takes, sorted, as far as they match the shell-style pattern.

    Networks of a library are listed where the pattern names it, as "timm/resnet*" does; not each can be cut.
    """
    library, slash, _ = pattern.partition("/")
    if slash and library in _LIBRARIES:
        return sorted(
            f for f in (f"{library}/{name}" for name in _LIBRARIES[library][0]()) if fnmatch(f, pattern)
        )
    return sorted(name for name in _BUILDERS if fnmatch(name, pattern))


def nearest(name: str, accepted: list[str] | tuple[str, ...]) -> str:
    """The end of an error message: the nearest accepted name, and all of them."""
    close = difflib.get_close_matches(str(name), [str(a) for a in accepted], n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}accepted: {', '.join(str(a) for a in accepted)}"


def _builder(name: str) -> Callable[..., Backbone]:
    library, slash, network = str(name).partition("/")
    if slash and library in _LIBRARIES:
        names, builder = _LIBRARIES[library]
        accepted = names()
        if network not in accepted:
            close = difflib.get_close_matches(network, accepted, n=3, cutoff=0.5)
            hint = f"the nearest names are {', '.join(close)}" if close else "no name is near"
            raise ValueError(
                f"{library} has no network {network!r}; {hint} (all: list_backbones('{library}/*'))"
            )
        return partial(builder, network)
    if name not in _BUILDERS:
        raise ValueError(f"there is no backbone {name!r}; {nearest(name, list_backbones())}")
    return _BUILDERS[name]


def backbone_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a named backbone with their annotations and defaults."""
    return dict(inspect.signature(_builder(name)).parameters)


def create_backbone(name: str, **options: object) -> Backbone:
    """Build a backbone by name, for example `create_backbone("resnet50", weights="imagenet_v2", frozen_stages=2)`."""
    accepted = backbone_options(name)
    for option in options:
        if option not in accepted:
            raise TypeError(f"{name} has no option {option!r}; {nearest(option, list(accepted))}")
    return _builder(name)(**options)


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """He initialisation of every convolution (fan out, ReLU), as torchvision's ResNets draw theirs."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
