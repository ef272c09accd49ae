"""What tests make of networks before they compare them."""

import torch
from torch import Tensor, nn

from backbones.regions import Regions
from detector.model.conventions import Conventions


@torch.no_grad()
def randomize_norms(
    network: nn.Module,
    weight: tuple[float, float] = (0.3, 0.7),
    shift: tuple[float, float] = (-0.2, 0.2),
    variance: tuple[float, float] = (0.8, 1.5),
) -> nn.Module:
    """Factors, biases and means, and variances drawn from these ranges: none of them 0 or 1, as training leaves them."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.affine:
            layer.weight.uniform_(*weight)
            layer.bias.uniform_(*shift)
            layer.running_mean.uniform_(*shift)
            layer.running_var.uniform_(*variance)
    return network


def settings(**options) -> dict:
    """Arguments of `build_faster_rcnn`, the fields of `Conventions` among them gathered into one."""
    conventions = {name: options.pop(name) for name in list(options) if name in Conventions.model_fields}
    return {**options, "conventions": conventions}


def watch_projections(monkeypatch) -> list[Tensor]:
    """The weights of the 1x1 convolutions that are asked of `Regions` from now on, as they come."""
    weights, project = [], Regions._project
    monkeypatch.setattr(
        Regions,
        "_project",
        lambda self, weight, stride: weights.append(weight) or project(self, weight, stride),
    )
    return weights
