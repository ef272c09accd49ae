"""Networks of torchvision and timm for the tests: uncut, cut, and what the cut must equal."""

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
import torchvision
from networks import randomize_norms
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from backbones import Backbone, cut_network

timm = pytest.importorskip("timm")

ROOT = Path(__file__).resolve().parent.parent
TABLE = {
    line.split(" | ")[0].removeprefix("| "): line
    for line in (ROOT / "docs/cut_networks.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| (timm|torchvision)/", line)
}
CUT = [name for name, line in TABLE.items() if line.count(" | ") > 5]
FEW = (
    *("torchvision/resnet18", "torchvision/regnet_y_400mf", "torchvision/mobilenet_v3_small"),
    *("timm/test_efficientnet", "timm/resnest14d", "timm/repvgg_a0", "timm/convnext_atto"),
)
ALL = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in CUT]
BOXES = [
    torch.tensor([[10.0, 10, 60, 70], [-20, -20, 5, 5], [100, 40, 165, 95]]),
    torch.tensor([[50.0, 60, 127, 92]]),
]


@functools.lru_cache(maxsize=len(FEW))
def uncut_and_cut(name: str) -> tuple[nn.Module, Backbone]:
    """A library's network with random weights, and what is made of it; both share parameters: do not change them."""
    library, _, network_name = name.partition("/")
    torch.manual_seed(0)
    create = timm.create_model if library == "timm" else torchvision.models.get_model
    network = randomize_norms(create(network_name), weight=(0.5, 1.0)).eval()
    return network, cut_network(network, name)


def backbone_of(name: str) -> Backbone:
    return copy.deepcopy(uncut_and_cut(name)[1])


class LastMap(TorchFunctionMode):
    """Keeps the last tensor of a spatial size that any call of torch gives, whatever module makes it."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size, self.map = size, None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        value = function(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            if isinstance(value, Tensor) and value.ndim == 4 and tuple(value.shape[2:]) == self.size:
                self.map = value.clone()
        return value


def pooled_features(network: nn.Module, images: Tensor) -> Tensor:
    """The average of the last map of stride 32 that the uncut network makes."""
    with LastMap((images.shape[2] // 32, images.shape[3] // 32)) as last:
        network(images)
    return F.adaptive_avg_pool2d(last.map, 1).flatten(1)
