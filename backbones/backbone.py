"""The contract between a classification network and a C4 detector.

Letters: N images of H x W pixels, R regions, C4 and C5 channels of conv4_x and conv5_x.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import StochasticDepth

from .folding import use_folding
from .messages import check_choice
from .recompute import has_gradients, recomputed, run_blocks
from .regions import Regions

NUM_TRUNK_STAGES = 4
NUM_STAGES = 5
# The most channels of a stem: four times those of the published networks.
MAX_WIDTH = 256
# Bins along each axis of a region that enters the head.
CROP = 14
# The most regions whose activations are held at once when the head recomputes them, on a CPU and on a GPU. Each part
# projects its image's map again: 24 of the 1,600 GMAC of a ResNet-101's step on 512 regions. A GPU waits for small parts.
CHECKPOINTED_REGIONS = {"cpu": 128, "cuda": 512}


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing that a network's weights expect: `(image * scale - mean) / std`, per channel.

    `image` is float RGB in [0, 1]. `mean` and `std` are in `channel_order`, in the units of `image * scale`.
    Raises a ValueError for an unknown channel order, for a mean or std that is not three numbers, and for a std or scale
    that is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: str = "rgb"
    scale: float = 1.0

    def __post_init__(self) -> None:
        # JSON gives lists; they become tuples.
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_choice("channel_order", self.channel_order, ("rgb", "bgr"))
        numbers = (*self.mean, *self.std, self.scale)
        known = all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
        if not known or len(self.mean) != 3 or len(self.std) != 3 or min(*self.std, self.scale) <= 0:
            raise ValueError(f"mean and std are three numbers, std and scale positive; got {self}")


# torchvision's normalisation.
IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _freeze(stage: nn.Module) -> None:
    stage.requires_grad_(False)
    stage.eval()


class Trunk(nn.Module):
    """Stages 1-4, run once per image: (N, 3, H, W) -> (N, C4, ceil(H/16), ceil(W/16)).

    DenseNets round down where the other families round up.

    A frozen stage takes no gradient. Its batch norms stay in evaluation mode after `train()`: otherwise their running
    statistics would drift with the training images.
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
        use_folding(self)

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
        """(N, 3, H, W) -> (N, C4, ceil(H/16), ceil(W/16))"""
        features = images
        for stage in self.stages:
            features = run_blocks(stage, features, self.activation_checkpointing)
        return features


class RoIHead(nn.Module):
    """Stage 5 and average pooling, run once per region: (R, C4, 14, 14) -> (R, C5).

    When the head gets `Regions`, the 1x1 convolutions that open stage 5 run on the shared map. With
    `shared_projection = False` the head crops first, as the definition does.
    """

    def __init__(self, stage5: nn.Sequential, out_channels: int) -> None:
        super().__init__()
        self.stage5 = stage5
        self.out_channels = out_channels
        self.frozen = False
        self.shared_projection = True
        self.activation_checkpointing = False
        use_folding(self)

    def freeze(self) -> None:
        """Freeze stage 5."""
        self.frozen = True
        _freeze(self.stage5)

    def train(self, mode: bool = True) -> "RoIHead":
        super().train(mode)
        if self.frozen:
            self.stage5.eval()
        return self

    def forward(self, regions: Tensor) -> Tensor:
        """(R, C4, 14, 14), a tensor or `Regions` -> (R, C5)"""
        # Many networks refuse an empty batch. A synchronised norm must take it: the other processes wait for its share.
        if not (len(regions) or self._synchronises()):
            source = regions.features if isinstance(regions, Regions) else regions
            # Several processes wait for a gradient of each weight, here 0.
            unread = source.sum() + sum(p.sum() for p in self.stage5.parameters() if p.requires_grad)
            return unread + source.new_zeros(0, self.out_channels)
        if not isinstance(regions, Regions):
            return self._vectors(regions, self.activation_checkpointing)
        if not (self.training or torch.is_grad_enabled()):
            vectors = [self._vectors(part) for part in regions.parts()]
        elif self.activation_checkpointing and has_gradients(self.stage5) and not self._needs_all_regions():
            most = CHECKPOINTED_REGIONS["cpu" if regions.device.type == "cpu" else "cuda"]
            parts = [part for each in regions.by_image() if len(each) for part in each.parts(most)]
            vectors = [recomputed(self.stage5, self._vectors, part) for part in parts]
        else:
            # No parts: without recomputing, gradients keep the activations of every part anyway.
            vectors = [self._vectors(regions, self.activation_checkpointing)]
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors)

    def _needs_all_regions(self) -> bool:
        """Whether parts of the regions would give other numbers: by batch statistics, or by another order of draws."""
        active = [layer for layer in self.stage5.modules() if layer.training]
        return any(isinstance(a, (_BatchNorm, StochasticDepth)) or "Drop" in type(a).__name__ for a in active)

    def _synchronises(self) -> bool:
        """Whether a batch norm of stage 5 normalises with the statistics of all processes."""
        return any(isinstance(layer, nn.SyncBatchNorm) and layer.training for layer in self.stage5.modules())

    def _vectors(self, regions: Tensor, checkpointing: bool = False) -> Tensor:
        """(R, C4, 14, 14) -> (R, C5), all regions at once."""
        if isinstance(regions, Regions) and not self.shared_projection:
            regions = regions.crop()
        return self.pool(run_blocks(self.stage5, regions, checkpointing))

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
        self.preprocessing = preprocessing or IMAGENET

    def freeze(self, num_stages: int) -> "Backbone":
        """Freeze stages 1..num_stages of the five (1 is the stem, 2 is conv2_x). Others than 0..5 are a ValueError."""
        if not isinstance(num_stages, int) or not 0 <= num_stages <= NUM_STAGES:
            raise ValueError(f"frozen_stages is {num_stages!r}; accepted: 0 (none) to {NUM_STAGES} (all)")
        self.trunk.freeze(num_stages)
        if num_stages == NUM_STAGES:
            self.roi_head.freeze()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C5)"""
        return self.roi_head(self.trunk(images))
