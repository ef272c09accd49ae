"""The fast training path's gradients against float64's, and against the plain path's distance from them."""

import copy

import pytest
import torch

from backbones import regions
from benchmarks import Settings
from benchmarks.models import ForcedProposals, build_form, make_images, random_weights, set_case
from benchmarks.training import make_targets
from detector.model.speed import Speed, apply_speed

SIZE, REGIONS = (96, 128), 24


def gradients(model: torch.nn.Module, settings: Settings, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The gradient of each trained parameter after one step's losses, in float64."""
    model = copy.deepcopy(model).to(dtype)
    images = [image.to(dtype) for image in make_images(settings, SIZE)]
    targets = [
        {k: v.to(dtype) if k == "boxes" else v for k, v in t.items()} for t in make_targets(settings, SIZE)
    ]
    sum(model(images, targets).values()).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def trained_model(settings: Settings, **options) -> torch.nn.Module:
    """The detector with SiLU for ReLU: on which side of zero a sum of rounding's size falls is luck in every path.

    With ReLU, the plain path in two memory layouts differs by up to 1e-3 for that reason alone.
    """
    weights = random_weights(settings.backbone)
    model = build_form("ours", settings, weights, training=True, box_batch_size_per_image=REGIONS, **options)
    for module in list(model.modules()):
        for child, layer in module.named_children():
            if isinstance(layer, torch.nn.ReLU):
                setattr(module, child, torch.nn.SiLU())
    ForcedProposals(model.rpn)
    set_case(model, SIZE, 4 * REGIONS)
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_gradient_is_as_near_to_float64s_as_the_plain_paths(name, monkeypatch):
    settings = Settings(backbone=name, num_classes=5)
    fast = gradients(trained_model(settings), settings, torch.float32)
    monkeypatch.setattr(regions, "_prefers_sparse", lambda features: False)
    plain_model = apply_speed(trained_model(settings), Speed(shared_projection=False, fold_norms=False)).to(
        memory_format=torch.contiguous_format
    )
    plain = gradients(plain_model, settings, torch.float32)
    exact = gradients(plain_model, settings, torch.float64)
    assert set(fast) == set(plain) == set(exact) and len(exact) > 20
    for key, truth in exact.items():
        scale = truth.norm()
        fast_error, plain_error = ((g[key] - truth).norm() / scale for g in (fast, plain))
        assert fast_error <= 1e-3, f"{key}: {fast_error:.1e}"
        # The predictor's own gradients are near rounding in both paths: 6e-6 and 2e-6 with AVX-512.
        assert fast_error <= 2 * plain_error + 1e-5, f"{key}: {fast_error:.1e}, plain {plain_error:.1e}"
