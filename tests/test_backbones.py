"""Backbones: equal to torchvision's networks, cut where the contract says, and careful with weights."""

import os
import pickle
from dataclasses import replace

import pytest
import torch
import torchvision
from networks import randomize_norms
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from backbones import (
    IMAGENET,
    Backbone,
    RoIHead,
    Trunk,
    backbone_options,
    create_backbone,
    list_backbones,
    register_backbone,
    registry,
)
from backbones.fuse import fuse
from backbones.resnet import resnet
from backbones.weights import published_weights, read_state_dict

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
CHANNELS = dict.fromkeys(RESNETS[:2], (256, 512)) | dict.fromkeys(RESNETS[2:], (1024, 2048))
# millions of parameters with the classifier of 1000 classes, as torchvision's documentation prints them
PUBLISHED_MILLIONS = {
    "resnet18": 11.690,
    "resnet34": 21.798,
    "resnet50": 25.557,
    "resnet101": 44.549,
    "resnet152": 60.193,
}


def small(name: str, **options) -> Backbone:
    """The named backbone as narrow as its family allows, with repeatable random weights."""
    if "width" in backbone_options(name):
        options = {"width": 8} | options
    torch.manual_seed(0)
    return create_backbone(name, **options)


def torchvision_network(name: str) -> nn.Module:
    torch.manual_seed(1)
    return randomize_norms(torchvision.models.get_model(name, weights=None)).eval()


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def resnet18_file(tmp_path_factory):
    """Random weights of torchvision's ResNet-18 in a file."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision_network("resnet18").state_dict(), path)
    return path


@pytest.fixture
def small_file(tmp_path):
    """Weights of `small("resnet18")`, with norms as training leaves them, under our own keys."""
    path = tmp_path / "small.pth"
    torch.save(randomize_norms(small("resnet18")).state_dict(), path)
    return path


# ---- the uncut network


@pytest.mark.parametrize("name", RESNETS)
def test_pooled_features_equal_torchvisions_to_the_last_bit(name, tmp_path):
    theirs = torchvision_network(name)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = create_backbone(name, weights=str(tmp_path / "weights.pth")).eval()
    theirs.fc = nn.Identity()
    images = torch.rand(2, 3, 75, 101)
    with torch.no_grad():
        pooled, expected = ours(images), theirs(images)
    assert expected.isfinite().all() and expected.std() > 1e-3
    assert torch.equal(pooled, expected)


def test_a_safetensors_file_gives_the_same_network_as_a_torch_file(resnet18_file, tmp_path):
    state = torch.load(resnet18_file, weights_only=True)
    save_file(state, tmp_path / "weights.safetensors")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "wrapped.pth")
    expected = create_backbone("resnet18", weights=str(resnet18_file)).state_dict()
    for other in ("weights.safetensors", "wrapped.pth"):
        found = create_backbone("resnet18", weights=str(tmp_path / other)).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", RESNETS)
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        backbone = create_backbone(name)
    classifier = (backbone.roi_head.out_channels + 1) * 1000
    assert round((count(backbone) + classifier) / 1e6, 3) == PUBLISHED_MILLIONS[name]
    exact = {"resnet50": 23_508_032, "resnet101": 42_500_160}
    assert count(backbone) == exact.get(name, count(backbone))


@pytest.mark.parametrize("name", RESNETS)
def test_channels_of_the_cut_are_the_papers(name):
    with torch.device("meta"):
        backbone = create_backbone(name)
    assert (backbone.trunk.out_channels, backbone.roi_head.out_channels) == CHANNELS[name]


# ---- freezing (what every backbone keeps is in test_backbone_contract.py)


def stages_of(backbone: Backbone) -> list[nn.Module]:
    return [*backbone.trunk.stages, backbone.roi_head.stage5]


def statistics(module: nn.Module) -> list[torch.Tensor]:
    return [b.clone() for n, b in module.named_buffers() if "running" in n]


def assert_frozen(backbone: Backbone, num_frozen: int) -> None:
    """One training step's forward and backward moves stages after `num_frozen`, and those only."""
    before = [statistics(stage) for stage in stages_of(backbone)]
    vectors = backbone.train()(torch.rand(2, 3, 48, 48))
    if vectors.requires_grad:
        vectors.square().sum().backward()
    for k, (stage, old) in enumerate(zip(stages_of(backbone), before, strict=True), start=1):
        new = statistics(stage)
        same = [torch.equal(a, b) for a, b in zip(old, new, strict=True)]
        has_gradient = [p.grad is not None for p in stage.parameters()]
        if k <= num_frozen:
            assert all(same) and not any(has_gradient)
            assert not any(p.requires_grad for p in stage.parameters())
            assert not any(m.training for m in stage.modules())
        else:
            assert not any(same) and all(has_gradient)


@pytest.mark.parametrize("num_frozen", range(6))
def test_frozen_stages_keep_weights_and_statistics_under_train(num_frozen):
    backbone = small("resnet18", frozen_stages=num_frozen)
    assert_frozen(backbone, num_frozen)


def test_freezing_survives_where_trunk_and_head_are_taken_apart():
    backbone = small("resnet18", frozen_stages=5)
    parts = nn.ModuleList([backbone.trunk, backbone.roi_head]).eval().train()
    norms = [m for m in parts.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)


@pytest.mark.parametrize("frozen_stages", [-1, 6, "2", 1.0])
def test_frozen_stages_out_of_range_is_refused(frozen_stages):
    with pytest.raises(ValueError, match=r"frozen_stages is .*; accepted: 0 \(none\) to 5 \(all\)"):
        small("resnet18", frozen_stages=frozen_stages)


# ---- options


def test_sync_norm_has_batch_norm_s_weights_and_numbers_and_trains_on_a_gpu_only():
    torch.manual_seed(0)
    batch = create_backbone("resnet18", width=8).eval()
    sync = create_backbone("resnet18", width=8, norm="sync").eval()
    sync.load_state_dict(batch.state_dict())
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(sync(image), batch(image))
    torch.testing.assert_close(fuse(sync)(image), batch(image), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="norm='sync' trains on a GPU only; accepted on a CPU: 'batch'"):
        sync.train()(image)


def test_frozen_norm_with_random_weights_is_refused():
    with pytest.raises(ValueError, match="norm='frozen' needs trained weights.*norm='batch' or norm='group'"):
        create_backbone("resnet18", norm="frozen")


@pytest.mark.parametrize("layout", ["ours", "torchvision"])
def test_frozen_norm_equals_batch_norm_in_evaluation_and_takes_no_gradient(layout, small_file, resnet18_file):
    options = (
        {"width": 8, "weights": str(small_file)} if layout == "ours" else {"weights": str(resnet18_file)}
    )
    frozen = create_backbone("resnet18", norm="frozen", **options).train()
    batch = create_backbone("resnet18", norm="batch", **options).eval()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in frozen.modules()) == 20
    assert not [n for n, _ in frozen.named_parameters() if ".bn" in n]
    images = torch.rand(2, 3, 45, 45)
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), batch(images), rtol=1e-4, atol=1e-5)


def test_deferred_weights_are_a_later_state_dict(small_file):
    deferred = create_backbone("resnet18", width=8, norm="frozen", weights="deferred")
    loaded = create_backbone("resnet18", width=8, norm="frozen", weights=str(small_file))
    deferred.load_state_dict(loaded.state_dict())
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(deferred(images), loaded(images))


def test_stride_in_1x1_halves_the_map_in_the_first_convolution_of_a_stage():
    for place, strides in (("1x1", [2, 1, 1]), ("3x3", [1, 2, 1])):
        backbone = small("resnet50", stride_in=place)
        for stage in (backbone.trunk.stage3, backbone.trunk.stage4, backbone.roi_head.stage5):
            branch = stage[0].branch
            assert [c.stride[0] for c in (branch.conv1, branch.conv2, branch.conv3)] == strides
            assert all(c.stride == (1, 1) for c in stage[1].branch if isinstance(c, nn.Conv2d))
        first = backbone.trunk.stage2.blocks[0].branch
        assert all(c.stride == (1, 1) for c in first if isinstance(c, nn.Conv2d))


def test_stride_in_changes_the_function_but_neither_shapes_nor_parameters():
    paper, theirs = small("resnet50", stride_in="1x1").eval(), small("resnet50").eval()
    assert count(paper) == count(theirs)
    paper.load_state_dict(theirs.state_dict())
    images = torch.rand(1, 3, 75, 53)
    with torch.no_grad():
        a, b = paper.trunk(images), theirs.trunk(images)
    assert a.shape == b.shape and not torch.allclose(a, b)


def test_group_norm_has_no_statistics_of_the_batch():
    backbone = small("resnet18", norm="group")
    assert not statistics(backbone) and not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
    images = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(backbone.train()(images), backbone.eval()(images))


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize("width", [8, 24])
def test_every_width_is_a_multiple_of_the_stems(name, width):
    with torch.device("meta"):
        narrow, full = create_backbone(name, width=width), create_backbone(name)
    for a, b in zip(narrow.modules(), full.modules(), strict=True):
        if isinstance(a, nn.Conv2d):
            assert a.out_channels * 64 == b.out_channels * width
    assert narrow.trunk.out_channels * 64 == CHANNELS[name][0] * width
    assert narrow.roi_head.out_channels * 64 == CHANNELS[name][1] * width


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"widht": 8},
            "resnet50 has no option 'widht'; did you mean 'width'.*accepted: width, stride_in, norm",
        ),
        ({"num_classes": 10}, "resnet50 has no option 'num_classes'; .*accepted: width"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(options, message):
    with pytest.raises(TypeError, match=message):
        create_backbone("resnet50", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "btach"}, "norm is 'btach'; did you mean 'batch'.*batch, frozen, group"),
        ({"stride_in": "3x1"}, "stride_in is '3x1'; did you mean .*accepted: 3x3, 1x1"),
        ({"width": 1_000_000}, "width is 1000000; accepted: a positive whole number up to 256"),
        ({"width": 0}, "width is 0; accepted: a positive whole number"),
        ({"width": 8.0}, r"width is 8\.0; accepted: a positive whole number"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_accepted(options, message):
    with pytest.raises(ValueError, match=message):
        create_backbone("resnet50", **options)


# ---- weights


def test_weights_of_another_depth_are_refused_with_the_first_differing_keys(resnet18_file):
    message = r"resnet18\.pth does not fit resnet34; missing: trunk\.stage2\.blocks\.2\.branch\.conv1\.weight.* and \d+ more"
    with pytest.raises(ValueError, match=message):
        create_backbone("resnet34", weights=str(resnet18_file))
    with pytest.raises(ValueError, match=r"does not fit resnet50; missing: .*of another shape: "):
        create_backbone("resnet50", weights=str(resnet18_file))


def test_weights_of_another_width_are_refused_with_both_shapes(small_file):
    message = r"of another shape: trunk\.stage1\.conv1\.weight \(8, 3, 7, 7\) for \(16, 3, 7, 7\)"
    with pytest.raises(ValueError, match=message):
        create_backbone("resnet18", width=16, weights=str(small_file))


def test_weights_of_another_family_are_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match=r"missing: .*; unknown: features\.0\.weight"):
        create_backbone("resnet18", weights=str(tmp_path / "vgg.pth"))


class _Code:
    """Unpickling this would make a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_code_in_a_weights_file_is_refused_and_never_runs(save, tmp_path):
    folder = tmp_path / "made_by_the_pickle"
    save({"weight": _Code(str(folder))}, tmp_path / "evil.pth")
    with pytest.raises(
        ValueError, match=r"evil\.pth (asks for posix\.mkdir|is .*it may hold code), which is never run"
    ):
        create_backbone("resnet18", weights=str(tmp_path / "evil.pth"))
    assert not folder.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_text_file_under_the_name_of_weights_is_refused(suffix, tmp_path):
    path = tmp_path / f"page{suffix}"
    path.write_text("<html>404: not found</html>\n" * 20)
    with pytest.raises(ValueError, match=rf"page\{suffix} is damaged, cut short, or no file of tensors"):
        create_backbone("resnet18", weights=str(path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(suffix, tmp_path):
    path = tmp_path / f"half{suffix}"
    state = small("resnet18").state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"half\{suffix} is damaged, cut short, or no file of tensors"):
        create_backbone("resnet18", width=8, weights=str(path))


def test_a_file_of_something_else_than_tensors_is_refused(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds list, not a state dict of tensors"):
        read_state_dict(tmp_path / "list.pth")


def test_a_missing_weights_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.pth"):
        create_backbone("resnet18", weights=str(tmp_path / "nowhere.pth"))


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Addresses that would have been fetched; a ResNet-18 comes back from each."""
    fetched = []

    def fetch(url, path, *_):
        fetched.append(url)
        torch.save(torchvision_network("resnet18").state_dict(), path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    return fetched


def test_a_published_name_is_torchvisions_entry_of_that_name(downloads):
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    backbone = create_backbone("resnet18", weights="imagenet_v1", frozen_stages=1)
    assert downloads == [entry.url]
    assert list(backbone.preprocessing.mean) == entry.transforms().mean
    assert list(backbone.preprocessing.std) == entry.transforms().std
    stem = torchvision_network("resnet18").conv1.weight
    assert torch.equal(backbone.trunk.stage1.conv1.weight, stem)


def test_a_name_that_was_never_published_is_refused_with_those_that_were(downloads):
    with pytest.raises(
        ValueError, match="resnet18 has no weights 'imagenet_v2'; accepted: imagenet_v1, or a file"
    ):
        create_backbone("resnet18", weights="imagenet_v2")
    assert downloads == []


def test_published_weights_are_torchvisions_versions():
    assert published_weights("resnet18") == published_weights("resnet34") == ["imagenet_v1"]
    for name in RESNETS[2:]:
        assert published_weights(name) == ["imagenet_v1", "imagenet_v2"]
    assert published_weights("no_such_network") == []


# ---- the registry


def test_names_are_listed_by_pattern():
    assert set(RESNETS) <= set(list_backbones())
    assert list_backbones() == sorted(list_backbones())
    assert set(list_backbones("resnet1*")) >= {"resnet18", "resnet101", "resnet152"}
    assert list_backbones("resnet?4") == ["resnet34"]
    assert list_backbones("nothing*") == []


@pytest.mark.parametrize(
    ("wrong", "right"), [("resnet_50", "resnet50"), ("ResNet101", "resnet101"), ("resnt18", "resnet18")]
)
def test_an_unknown_backbone_is_refused_with_the_nearest(wrong, right):
    with pytest.raises(
        ValueError, match=f"there is no backbone '{wrong}'; did you mean '{right}'.*accepted: .*resnet34"
    ):
        create_backbone(wrong)


def test_a_name_is_registered_once():
    def resnet18(**options):
        raise AssertionError("never called")

    with pytest.raises(ValueError, match="a backbone named 'resnet18' is registered already"):
        register_backbone(options_of=resnet)(resnet18)
    assert small("resnet18").trunk.out_channels == 32


def test_a_backbone_is_added_by_one_decorated_function(monkeypatch):
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    def plain(*, width: int = 4) -> Backbone:
        stages = [nn.Conv2d(a, width, 3, 2, 1) for a in (3, width, width, width, width)]
        return Backbone(
            "five_convolutions", Trunk(stages[:4], width), RoIHead(nn.Sequential(stages[4]), width)
        )

    @register_backbone(options_of=plain)
    def five_convolutions(**options) -> Backbone:
        return plain(**options)

    assert "five_convolutions" in list_backbones() and list_backbones("five*") == ["five_convolutions"]
    assert list(backbone_options("five_convolutions")) == ["width"]
    backbone = create_backbone("five_convolutions", width=6)
    assert tuple(backbone(torch.rand(2, 3, 40, 40)).shape) == (2, 6)
    with pytest.raises(TypeError, match="five_convolutions has no option 'norm'; accepted: width"):
        create_backbone("five_convolutions", norm="batch")


def test_a_trunk_has_four_stages():
    with pytest.raises(ValueError, match="a trunk has 4 stages, got 3"):
        Trunk([nn.Identity()] * 3, out_channels=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channel_order": "gbr"}, "channel_order is 'gbr'; .*accepted: rgb, bgr"),
        ({"mean": (0.5,)}, "mean and std are three numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std and scale positive"),
        ({"scale": 0}, "std and scale positive"),
    ],
)
def test_impossible_preprocessing_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        replace(IMAGENET, **values)
