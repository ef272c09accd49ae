"""What the README shows is run here as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from backbones import backbone_options, list_backbones, registry
from backbones.fuse import fuse
from backbones.regions import RegionPool
from detector import build_faster_rcnn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def own_backbone(monkeypatch):
    """The README's example of a new backbone, run; its name is forgotten afterwards."""
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "register_backbone" in block
    )
    assert sum(bool(line.strip()) for line in code.splitlines()) < 15
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))
    names: dict = {}
    exec(code, names)
    return names["backbone"]


def test_a_new_backbone_takes_under_fifteen_lines(own_backbone):
    assert own_backbone.trunk(torch.zeros(1, 3, 70, 100)).shape == (1, 64, 5, 7)
    assert own_backbone.roi_head(torch.zeros(2, 64, 14, 14)).shape == (2, 128)
    assert "small_net" in list_backbones() and list(backbone_options("small_net")) == ["width"]


def test_a_new_backbone_trains_and_detects(own_backbone):
    model = build_faster_rcnn(own_backbone, num_classes=3, anchor_sizes=(16, 32), min_size=64, max_size=96)
    targets = [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}]
    losses = model(images := [torch.rand(3, 64, 96)], targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in own_backbone.parameters())
    assert set(model.eval()(images)[0]) == {"boxes", "labels", "scores"}


def test_a_new_backbone_projects_its_opening_convolution_on_the_map_and_folds_its_norms(own_backbone):
    head = own_backbone.eval().roi_head
    features, boxes = torch.rand(1, 64, 6, 8), [torch.tensor([[8.0, 8, 60, 70], [0.0, 0, 128, 96]])]
    regions = RegionPool()(features, boxes)
    with torch.no_grad():
        vectors = head(regions)
        torch.testing.assert_close(vectors, head(regions.of(features).crop()), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(vectors, fuse(head)(regions.of(features)), rtol=1e-4, atol=1e-6)
    opening = head.stage5[0][0].weight
    assert list(regions.projected) == [id(opening)] and 1 not in regions._crops
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fuse(own_backbone).modules())


def test_the_table_of_backbones_names_each_one():
    table = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\w+) \| \d+ \| \d+ \|", table, re.M) == list_backbones()
    assert f"There are {len(list_backbones())} names" in README
