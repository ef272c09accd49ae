"""The names "torchvision/NAME" and "timm/NAME": their table, weights, norms, frozen stages and errors."""

import copy
import importlib.util
import json
import sys
from dataclasses import asdict
from urllib.error import URLError

import pytest
import torch
from cut_networks import CUT, ROOT, TABLE, timm, uncut_and_cut
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import backbones.weights
from backbones import Preprocessing, backbone_options, create_backbone, list_backbones
from backbones.cut import libraries
from backbones.cut.split import layer_path
from backbones.fuse import fuse
from detector.config import parse_config


def table_script():
    spec = importlib.util.spec_from_file_location("cut_networks", ROOT / "benchmarks/cut_networks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [CUT[0], *(pytest.param(n, marks=pytest.mark.slow) for n in CUT[1:])])
def test_the_table_holds_what_is_computed(name):
    family = TABLE[name].split(" | ")[1]
    assert table_script().row(name, family) == TABLE[name]


def test_the_table_lists_thirty_networks_of_fifteen_families_and_three_refusals():
    assert len(CUT) >= 30 and len({TABLE[name].split(" | ")[1] for name in CUT}) >= 15
    assert len(TABLE) - len(CUT) >= 3
    script = table_script()
    assert [name for names in script.FAMILIES.values() for name in names] == CUT
    assert [*TABLE] == [*CUT, *script.REFUSED]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TABLE if name not in CUT])
def test_the_table_holds_the_sentence_of_each_refusal(name):
    assert TABLE[name] == f"| {name} | {table_script().refusal(name)} |"


# ---- freezing


def test_frozen_stages_keep_weights_and_statistics():
    backbone = create_backbone("torchvision/regnet_y_400mf", frozen_stages=3).train()
    before = copy.deepcopy(backbone.state_dict())
    backbone(torch.rand(2, 3, 64, 64)).square().sum().backward()
    moved = {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    with_gradient = {key for key, p in backbone.named_parameters() if p.grad is not None}
    for found in (moved, with_gradient):
        assert found and {key.split(".")[1] for key in found} == {"stage4", "stage5"}


def test_a_stage_that_a_network_does_not_have_cannot_be_the_last_frozen_one():
    with torch.device("meta"):
        with pytest.raises(
            ValueError, match=r"no map of stride 2 that would end stage 1; accepted: 0, 2, 3, 4, 5"
        ):
            create_backbone("timm/convnext_atto", frozen_stages=1)
        frozen = create_backbone("timm/convnext_atto", frozen_stages=2)
    trained = {layer_path(key).split(".")[1] for key, p in frozen.named_parameters() if p.requires_grad}
    assert trained == {"1", "2", "3"}  # of stages.N: stem and stages.0 are frozen


# ---- weights


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "timm/test_efficientnet"])
def test_files_in_our_layout_and_in_the_librarys_give_the_same_network(name, tmp_path):
    network, backbone = uncut_and_cut(name)
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    torch.save(backbone.state_dict(), tmp_path / "ours.pth")
    images = torch.rand(1, 3, 64, 96)
    deferred = create_backbone(name, weights="deferred")
    deferred.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        expected = backbone(images)
        assert torch.equal(deferred.eval()(images), expected)
        for file in ("theirs.pth", "ours.pth"):
            loaded = create_backbone(name, weights=str(tmp_path / file)).eval()
            assert torch.equal(loaded(images), expected)


def test_a_files_stored_preprocessing_comes_with_its_weights(tmp_path):
    _, backbone = uncut_and_cut("torchvision/resnet18")
    caffe = Preprocessing((102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0), "bgr", 255.0)
    file = tmp_path / "caffe.safetensors"
    save_file(backbone.state_dict(), file, {"preprocessing": json.dumps(asdict(caffe))})
    assert create_backbone("torchvision/resnet18", weights=str(file)).preprocessing == caffe


def test_the_keys_are_the_librarys_behind_the_stage_and_the_number_of_the_block():
    network, backbone = uncut_and_cut("torchvision/resnet18")
    keys = list(backbone.state_dict())
    assert (
        "trunk.stage4.1.layer3.1.bn2.running_var" in keys
        and "roi_head.stage5.0.layer4.0.conv1.weight" in keys
    )
    assert {layer_path(key) for key in keys} == {k for k in network.state_dict() if not k.startswith("fc.")}


def test_a_file_of_another_architecture_is_refused_by_its_first_keys(tmp_path):
    torch.save(uncut_and_cut("torchvision/resnet18")[0].state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(
        ValueError, match="does not fit torchvision/mobilenet_v3_small; missing: trunk.*unknown: "
    ):
        create_backbone("torchvision/mobilenet_v3_small", weights=str(tmp_path / "resnet18.pth"))


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "timm/test_efficientnet"])
def test_frozen_norm_keeps_the_statistics_of_its_weights(name, tmp_path):
    network, backbone = uncut_and_cut(name)
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    frozen = create_backbone(name, weights=str(tmp_path / "theirs.pth"), norm="frozen").train()
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in frozen.modules())
    norms = {key for key, layer in backbone.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert norms and not norms & {key.rpartition(".")[0] for key, _ in frozen.named_parameters()}
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(frozen.eval()(images), backbone(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fuse(frozen)(images), backbone(images), rtol=1e-4, atol=1e-5)
    assert any(isinstance(layer, FrozenBatchNorm2d) for layer in frozen.modules())
    exact = frozen.trunk.train()(images)
    with torch.autocast("cpu", torch.bfloat16):
        half = frozen.trunk(images.requires_grad_())
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() / exact.norm() < 0.03


def test_published_weights_come_from_the_library_by_their_name_with_their_preprocessing(monkeypatch):
    asked = []
    monkeypatch.setattr(backbones.weights, "fetch", lambda entry: None)
    create, get = timm.create_model, libraries.get_model
    monkeypatch.setattr(
        timm, "create_model", lambda n, pretrained: asked.append((n, pretrained)) or create(n)
    )
    monkeypatch.setattr(
        libraries,
        "get_model",
        lambda n, weights: asked.append((n, weights.name)) or get(n, weights=None),
    )
    with torch.device("meta"):
        theirs = create_backbone("timm/tf_efficientnet_lite0", weights="in1k")
        create_backbone("torchvision/resnet18", weights="imagenet_v1", norm="frozen")
    assert asked == [("tf_efficientnet_lite0.in1k", True), ("resnet18", "IMAGENET1K_V1")]
    assert theirs.preprocessing.mean == theirs.preprocessing.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torchvision/resnet18", {"weights": "imagenet_v2"}, "has no weights 'imagenet_v2'; did you mean 'imagenet_v1'"),
        ("timm/resnet18", {"weights": "a9_in1k"}, "timm/resnet18 has no weights 'a9_in1k'; .*accepted: .*tv_in1k.*or a file"),
        ("timm/resnet18", {"norm": "frozen"}, "norm='frozen' needs trained weights"),
        ("timm/resnet18", {"norm": "group"}, "norm is 'group'; .*accepted: batch, frozen"),
        ("timm/convnext_atto", {"norm": "frozen", "weights": "deferred"}, "has no batch norm to freeze"),
        ("timm/resnet18", {"frozen_stages": 7}, "frozen_stages is 7; accepted: 0"),
        ("timm/resnett18", {}, "timm has no network 'resnett18'; did you mean 'resnet18'"),
        ("timm/qqqqqq", {}, r"timm has no network 'qqqqqq'; all: list_backbones\('timm/\*'\)"),
        ("torchvision/fasterrcnn_resnet50_fpn", {}, "torchvision has no network 'fasterrcnn_resnet50_fpn'"),
    ],
)  # fmt: skip
def test_wrong_names_and_options_are_errors_that_say_what_is_accepted(name, options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_backbone(name, **options)


@pytest.mark.parametrize(
    ("name", "weights", "wanted"),
    [
        ("timm/resnet18.a1_in1k", None, "resnet18.a1_in1k"),
        ("timm/resnet18", "timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("timm/resnet18", "resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("timm/resnet18", "timm/a1_in1k", "resnet18.a1_in1k"),
        ("timm/resnet18.a1_in1k", "a2_in1k", "resnet18.a2_in1k"),
        ("se_resnet18", "timm/legacy_seresnet18.in1k", "legacy_seresnet18.in1k"),
    ],
)
def test_timms_own_names_are_accepted_with_the_tag(monkeypatch, name, weights, wanted):
    asked, create = [], timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda n, pretrained: asked.append((n, pretrained)) or create(n)
    )
    create_backbone(name, **({"weights": weights} if weights else {}))
    assert asked == [(wanted, True)]


def test_a_wrong_tag_in_timms_own_name_is_refused():
    with pytest.raises(ValueError, match="timm/resnet18 has no weights 'a9_in1k'; .*accepted: .*a1_in1k"):
        create_backbone("timm/resnet18.a9_in1k")
    with pytest.raises(
        ValueError, match="has no weights 'timm/legacy_seresnet34.in1k'; accepted: timm/in1k, or a file"
    ):
        create_backbone("se_resnet18", weights="timm/legacy_seresnet34.in1k")


def test_without_timm_its_names_say_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="need timm; run: pip install timm"):
        create_backbone("timm/resnet18")


def test_libraries_are_listed_only_where_the_pattern_names_them():
    assert not [name for name in list_backbones() if "/" in name]
    assert "torchvision/regnet_y_400mf" in list_backbones("torchvision/regnet*")
    assert "timm/dla34" in list_backbones("timm/*")
    assert list(backbone_options("timm/dla34")) == ["weights", "norm", "frozen_stages"]


def test_a_recipe_takes_a_cut_network_and_checks_its_options():
    recipe = {"model": {"backbone": {"name": "torchvision/regnet_y_400mf", "frozen_stages": 2}}}
    assert parse_config(recipe).model.backbone["frozen_stages"] == 2
    for wrong, message in (
        ({"width": 8}, "unknown key width"),
        ({"frozen_stages": "two"}, "valid integer"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_config({"model": {"backbone": {"name": "torchvision/regnet_y_400mf", **wrong}}})


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18"])
def test_weights_that_cannot_be_downloaded_say_which_file_to_put_where(name, monkeypatch, tmp_path):
    def refuse(*args, **options):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(
        OSError,
        match=r"Name or service.*Fetch http\S*resnet18-\w+\.pth by hand and put it into .*checkpoints",
    ):
        create_backbone(name, weights="imagenet_v1")
