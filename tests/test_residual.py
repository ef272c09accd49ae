"""The residual family: torchvision's and timm's networks, the papers' figures and formulas, published weights."""

import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import randomize_norms
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from backbones import Backbone, backbone_options, create_backbone
from backbones.branch_ends import BRANCH_ENDS, Shrinkage, linear_rule, soft_threshold, squeeze_excitation
from backbones.layers import CaffePool
from backbones.recompute import run_blocks
from backbones.residual import ORDERS, BlockOptions, ResidualBlock, basic, bottleneck, residual_block
from backbones.resnet import TORCHVISION_NAMES
from backbones.shortcuts import GATED, SHORTCUTS
from backbones.weights import load_into, published_weights, rename

timm = pytest.importorskip("timm")

# millions of parameters with the classifier of 1000 classes, as torchvision's and timm's documentation prints them
PUBLISHED_MILLIONS = {
    "se_resnet18": 11.78,
    "se_resnet34": 21.96,
    "se_resnet50": 28.09,
    "se_resnet101": 49.33,
    "se_resnet152": 66.82,
    "resnext50_32x4d": 25.03,
    "resnext101_32x8d": 88.79,
    "resnext101_64x4d": 83.46,
    "wide_resnet50_2": 68.88,
    "wide_resnet101_2": 126.89,
}


def count(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def library_network(name: str) -> nn.Module:
    """torchvision's network, or timm's under our name of it, with random weights."""
    torch.manual_seed(1)
    if name.startswith("se_resnet"):
        return timm.create_model(f"legacy_{name.replace('_', '', 1)}")
    return torchvision.models.get_model(name, weights=None)


# ---- the libraries' networks


@pytest.mark.parametrize(
    "name",
    [
        "se_resnet18",
        "se_resnet50",
        "resnext50_32x4d",
        pytest.param("wide_resnet50_2", marks=pytest.mark.slow),
        pytest.param("se_resnet152", marks=pytest.mark.slow),
        pytest.param("resnext101_64x4d", marks=pytest.mark.slow),
    ],
)
def test_pooled_features_equal_the_librarys_in_float64(name):
    theirs = randomize_norms(library_network(name), weight=(-0.3, 0.7)).double().eval()
    ours = create_backbone(name).double().eval()
    load_into(ours, theirs.state_dict(), TORCHVISION_NAMES, source="the library's network")
    setattr(theirs, "last_linear" if name.startswith("se") else "fc", nn.Identity())
    # Behind the stem an SE-ResNet's map is even (see CaffePool); the later maps are odd.
    images = torch.rand(2, 3, *((76, 100) if name.startswith("se") else (75, 101)), dtype=torch.float64)
    with torch.no_grad():
        pooled, expected = ours(images), theirs(images)
    assert expected.std() > 1e-3
    assert (pooled - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_names_shapes_and_parameters_are_the_librarys(name):
    with torch.device("meta"):
        ours, theirs = create_backbone(name), library_network(name)
    renamed = rename(theirs.state_dict(), TORCHVISION_NAMES)
    mine = {key: value.shape for key, value in ours.state_dict().items()}
    assert mine == {k: v.shape for k, v in renamed.items() if k.startswith(("trunk.", "roi_head."))}
    classifier = (ours.roi_head.out_channels + 1) * 1000
    assert count(ours) + classifier == count(theirs)
    assert round((count(ours) + classifier) / 1e6, 2) == PUBLISHED_MILLIONS[name]


@pytest.mark.parametrize("size", [(38, 50), (2, 4)])
def test_the_ceil_pool_is_caffes_on_even_maps(size):
    maps = torch.rand(1, 3, *size)
    assert torch.equal(CaffePool()(maps), F.max_pool2d(maps, 3, 2, ceil_mode=True))


@pytest.mark.parametrize("size", [(37, 51), (1, 2), (3, 1)])
def test_the_ceil_pool_keeps_the_last_row_and_column_of_odd_maps(size):
    maps = torch.rand(1, 3, *size)
    pooled = CaffePool()(maps)
    assert pooled.shape[-2:] == (-(-size[0] // 2), -(-size[1] // 2))
    # the last window begins two positions before an even end, or at the last position of an odd one
    rows, columns = (slice(n - 2 if n % 2 == 0 else n - 1, None) for n in size)
    assert torch.equal(pooled[..., -1, -1], maps[..., rows, columns].amax((2, 3)))


def test_a_variants_signature_shows_its_own_defaults():
    assert backbone_options("se_resnet50")["stride_in"].default == "1x1"
    assert backbone_options("resnext50_32x4d")["groups"].default == 32
    assert backbone_options("resnet50")["groups"].default == 1


def test_a_plain_network_has_the_residual_networks_parameters_less_its_projections():
    for depth in (18, 34):
        with torch.device("meta"):
            plain, residual = create_backbone(f"plain{depth}"), create_backbone(f"resnet{depth}")
        projections = [m.shortcut for m in residual.modules() if isinstance(m, ResidualBlock)]
        assert count(plain) == count(residual) - sum(count(p) for p in projections) < count(residual)
        assert {k: v.shape for k, v in residual.state_dict().items() if ".shortcut." not in k} == {
            k: v.shape for k, v in plain.state_dict().items()
        }


# ---- Figure 4 and section 3 of He et al. 2016, by hand

FIGURE_4 = {
    "original": lambda x, w1, n1, w2, n2: F.relu(x + n2(w2(F.relu(n1(w1(x)))))),
    "bn_after_addition": lambda x, w1, n1, w2, n2: F.relu(n2(x + w2(F.relu(n1(w1(x)))))),
    "relu_before_addition": lambda x, w1, n1, w2, n2: x + F.relu(n2(w2(F.relu(n1(w1(x)))))),
    "relu_only_preactivation": lambda x, w1, n1, w2, n2: x + n2(w2(F.relu(n1(w1(F.relu(x)))))),
    "full_preactivation": lambda x, w1, n1, w2, n2: x + w2(F.relu(n2(w1(F.relu(n1(x)))))),
}


def make_block(
    in_channels: int = 8, width: int = 8, stride: int = 1, convs=basic, **options
) -> ResidualBlock:
    torch.manual_seed(0)
    drop = options.pop("drop", 0.0)
    return randomize_norms(
        residual_block(BlockOptions(convs, **options), in_channels, width, stride, drop), weight=(-0.3, 0.7)
    ).double()


def values_and_gradients(function, block: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    return [
        y,
        *torch.autograd.grad(
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), (x, *block.parameters())
        ),
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_a_block_is_figure_4s_in_values_and_gradients(order, training):
    block = make_block(order=order).train(training)
    n2 = block.closing.bn if order == "bn_after_addition" else block.branch.bn2
    parts = block.branch.conv1, block.branch.bn1, block.branch.conv2, n2
    x = torch.randn(3, 8, 5, 4, dtype=torch.float64)
    got = values_and_gradients(block, block, x)
    expected = values_and_gradients(lambda x: FIGURE_4[order](x, *parts), block, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("convs", [basic, bottleneck])
@pytest.mark.parametrize("order", ["relu_only_preactivation", "full_preactivation"])
def test_a_blocks_opening_may_stand_before_it_for_both_paths(order, convs):
    torch.manual_seed(0)
    options = BlockOptions(convs, order=order)
    block = randomize_norms(residual_block(options, 8, 8, 2, opened=True), weight=(-0.3, 0.7)).double().eval()
    whole = randomize_norms(residual_block(options, 8, 8, 2), weight=(-0.3, 0.7)).double().eval()
    block.load_state_dict({k: v for k, v in whole.state_dict().items() if k in block.state_dict()})
    norm = whole.branch.bn1 if order == "full_preactivation" else nn.Identity()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    opened = F.relu(norm(x))
    with torch.no_grad():
        torch.testing.assert_close(
            block(opened), whole.branch(x) + whole.shortcut(opened), rtol=1e-9, atol=1e-12
        )


def expected_sum(kind: str, block: ResidualBlock, x: Tensor) -> Tensor:
    """Section 3 of the paper from the block's own projection p (or identity), branch f and gate g."""
    layers = block.branch
    f = layers.bn2(layers.conv2(F.relu(layers.bn1(layers.conv1(x)))))
    if kind == "A":
        sampled = x[:, :, ::2, ::2]
        return f + torch.cat((sampled, torch.zeros_like(sampled)), dim=1)
    p = block.shortcut.bn(block.shortcut.conv(x))
    if kind in GATED:
        weight = block.gate.conv.weight
        g = torch.sigmoid(F.conv2d(x, weight, block.gate.bias.bias, stride=2))
        return (1 - g) * p + (g * f if kind == "exclusive_gating" else f)
    return {"constant_scaling": 0.5 * p + 0.5 * f}.get(kind, p + f)


@pytest.mark.parametrize("kind", [k for k in SHORTCUTS if k != "none"])
def test_a_block_that_changes_size_is_the_papers_formula(kind):
    block = make_block(8, 16, 2, shortcut=kind, gate_bias=-0.5).eval()
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), F.relu(expected_sum(kind, block, x)), rtol=1e-9, atol=1e-12)


def test_shortcuts_that_keep_the_size_are_identities_but_for_option_c():
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    for kind in ("A", "B", "dropout"):
        assert torch.equal(make_block(shortcut=kind).eval().shortcut(x), x)
    assert torch.equal(make_block(shortcut="constant_scaling").shortcut(x), 0.5 * x)
    for kind in ("C", "conv1x1"):
        assert make_block(shortcut=kind).shortcut.conv.weight.shape == (8, 8, 1, 1)
    assert make_block(shortcut="none").shortcut is None


@pytest.mark.parametrize("kind", GATED)
def test_a_gates_bias_opens_and_shuts_the_shortcut(kind):
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    outputs = {}
    for bias in (-60.0, 60.0):
        block = make_block(shortcut=kind, gate_bias=bias).eval()
        with torch.no_grad():
            branch, outputs[bias] = block.branch(x), block(x)
    branch_when_open = branch if kind == "shortcut_only_gating" else torch.zeros_like(branch)
    torch.testing.assert_close(outputs[-60.0], F.relu(x + branch_when_open))
    torch.testing.assert_close(outputs[60.0], F.relu(branch))


def test_a_gates_bias_begins_where_the_option_says_and_is_trained():
    backbone = create_backbone("resnet18", width=8, shortcut="exclusive_gating", gate_bias=-7)
    biases = [p for n, p in backbone.named_parameters() if n.endswith("gate.bias.bias")]
    assert len(biases) == 8 and all((p == -7).all() and p.requires_grad for p in biases)


def test_dropout_halves_the_shortcuts_values_in_training_only():
    block = make_block(shortcut="dropout").train()
    x = torch.ones(64, 8, 4, 4, dtype=torch.float64)
    kept = block.shortcut(x)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert abs(kept.mean() - 1) < 5 / x.numel() ** 0.5  # standard deviation 1 / sqrt(n)
    assert torch.equal(block.eval().shortcut(x), x)


# ---- every option trains


def small(name: str = "resnet18", **options) -> Backbone:
    torch.manual_seed(0)
    return create_backbone(name, **{"width": 8, **options})


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", SHORTCUTS)
def test_every_shortcut_in_every_order_trains_every_parameter(kind, order):
    backbone = small(shortcut=kind, order=order).train()
    features = backbone.trunk(torch.rand(2, 3, 50, 47))
    assert features.shape == (2, 32, 4, 3)
    backbone.roi_head(features).square().sum().backward()
    without = [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == [] and all(p.grad.isfinite().all() for p in backbone.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"branch_end": "se"},
        {"branch_end": "relu_se"},
        {"branch_end": "shrinkage_cs"},
        {"branch_end": "shrinkage_cw", "norm": "group"},
        {"order": "relu_only_preactivation", "shortcut": "C"},
        {"order": "bn_after_addition", "branch_end": "se", "shortcut": "constant_scaling"},
        {"groups": 4, "width_per_group": 16, "stem_pool": "ceil"},
    ],
    ids=lambda o: ",".join(map(str, o.values())),
)
def test_bottlenecks_with_other_options_train_every_parameter(options):
    backbone = small("resnet50", **options).train()
    backbone(torch.rand(2, 3, 33, 47)).square().sum().backward()
    without = [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == [] and all(p.grad.isfinite().all() for p in backbone.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shortcut": "D"}, "shortcut is 'D'; .*accepted: A, B, C, conv1x1, none, constant_scaling"),
        ({"order": "full_preactivaton"}, "did you mean 'full_preactivation'.*accepted: original, bn_after"),
        (
            {"branch_end": "shrinkage"},
            "branch_end is 'shrinkage'; .*accepted: None, se, relu_se, shrinkage_cs",
        ),
        ({"stem_pool": "floor"}, "stem_pool is 'floor'; .*accepted: padded, ceil"),
        ({"stochastic_depth": 1.0}, r"stochastic_depth is 1\.0; accepted: 0 \(none\) to below 1"),
        ({"stochastic_depth": -0.1}, r"stochastic_depth is -0\.1; accepted"),
        ({"groups": 0}, "groups is 0; accepted: a positive whole number"),
        ({"width_per_group": 4.0}, r"width_per_group is 4\.0; accepted: a positive whole number"),
    ],
)
def test_a_wrong_option_is_refused_with_what_is_accepted(options, message):
    with pytest.raises(ValueError, match=message):
        create_backbone("resnet50", **options)


def test_basic_blocks_have_no_groups():
    with pytest.raises(ValueError, match="groups=32 and width_per_group=4 are options of bottlenecks"):
        create_backbone("resnet18", groups=32, width_per_group=4)


# ---- branch ends


def test_squeeze_excitation_squeezes_by_16():
    assert squeeze_excitation(256).fc1.weight.shape == (16, 256, 1, 1)
    assert squeeze_excitation(16).fc1.weight.shape == (4, 16, 1, 1)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_soft_thresholding_is_torchs_softshrink(threshold):
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(soft_threshold(x, torch.tensor(threshold)), F.softshrink(x, threshold))


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("channel_shared", [True, False])
def test_shrinkage_is_soft_thresholding_by_a_share_of_the_mean(channel_shared, norm):
    torch.manual_seed(0)
    x = 5 * torch.randn(6, 16, 5, 5) * torch.rand(6, 16, 1, 1)
    layer = randomize_norms(Shrinkage(16, norm, channel_shared), weight=(-0.3, 0.7))
    means = x.abs().mean((1, 2, 3)) if channel_shared else x.abs().mean((2, 3))
    thresholds = layer.thresholds(x).flatten(1)
    assert thresholds.shape == ((6, 1) if channel_shared else (6, 16))
    assert (thresholds >= 0).all() and (thresholds <= means.view_as(thresholds)).all()
    assert thresholds.std() > 0 and (thresholds / means.view_as(thresholds)).std() > 0
    for i, sample in enumerate(layer(x)):
        for channel, (got, values) in enumerate(zip(sample, x[i], strict=True)):
            t = thresholds[i, 0 if channel_shared else channel].item()
            torch.testing.assert_close(got, F.softshrink(values, t))


def test_the_thresholds_are_the_published_formula():
    layer = randomize_norms(Shrinkage(8, "batch", channel_shared=False), weight=(-0.3, 0.7)).eval()
    fc1, norm, fc2 = layer.share.fc1, layer.share.bn, layer.share.fc2
    x = torch.randn(3, 8, 4, 6)
    mean = x.abs().mean((2, 3))
    hidden = mean @ fc1.weight.flatten(1).T
    hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    share = 1 / (1 + torch.exp(-(hidden.clamp(min=0) @ fc2.weight.flatten(1).T + fc2.bias)))
    torch.testing.assert_close(layer.thresholds(x).flatten(1), mean * share)


@pytest.mark.parametrize("num_regions", [0, 1])
def test_a_lone_vector_in_training_takes_the_running_statistics_and_leaves_them(num_regions):
    layer = randomize_norms(Shrinkage(8, "batch", channel_shared=False), weight=(-0.3, 0.7))
    before = layer.share.bn.running_mean.clone()
    x = torch.randn(num_regions, 8, 7, 7)
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert torch.equal(layer.share.bn.running_mean, before)
    layer.train()(torch.randn(2, 8, 7, 7))
    assert not torch.equal(layer.share.bn.running_mean, before)


def test_shrinkage_has_no_batch_norm_where_the_network_has_none():
    group = small("shrinkage_resnet18", norm="group")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in group.modules())
    frozen = small("shrinkage_resnet18", norm="frozen", weights="deferred")
    frozen.load_state_dict(
        {k: v for k, v in small("shrinkage_resnet18").state_dict().items() if "num_b" not in k}
    )
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())


def test_stochastic_depth_drops_by_the_linear_rule():
    backbone = small("resnet18", stochastic_depth=0.5)
    drops = [m.p for m in backbone.modules() if isinstance(m, StochasticDepth)]
    assert drops == [0.5 * block / 8 for block in range(1, 9)]
    assert linear_rule(0.5, (1, 3)) == [[0.125], [0.25, 0.375, 0.5]]


@pytest.mark.parametrize("end", BRANCH_ENDS)
def test_stochastic_depth_keeps_the_blocks_expectation(end):
    block = make_block(order="full_preactivation", norm="group", branch_end=end, drop=0.3).train()
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        whole = block.eval()(x) - x
        branches = block.train()(x.repeat(2000, 1, 1, 1)) - x
    kept = branches.flatten(1).abs().amax(1) > 0
    torch.testing.assert_close(branches[kept], (whole / 0.7).expand(int(kept.sum()), -1, -1, -1))
    assert abs(kept.double().mean() - 0.7) < 5 * (0.7 * 0.3 / 2000) ** 0.5


def test_stochastic_depth_of_0_is_the_plain_network_and_evaluation_never_drops():
    without, zero, some = small(), small(stochastic_depth=0.0), small(stochastic_depth=0.5)
    assert not any(isinstance(m, StochasticDepth) for m in zero.modules())
    images = torch.rand(2, 3, 40, 40)
    with torch.no_grad():
        expected = without.train()(images)
        assert torch.equal(zero.train()(images), expected) and not torch.equal(some.train()(images), expected)
        some.load_state_dict(without.state_dict())
        assert torch.equal(some.eval()(images), without.eval()(images))


def test_recomputed_activations_drop_the_same_branches():
    gradients = []
    for checkpointing in (False, True):
        stage = small(stochastic_depth=0.5, norm="group").trunk.stage3.double()
        torch.manual_seed(3)
        x = torch.rand(4, 8, 8, 8, dtype=torch.float64)
        run_blocks(stage.train(), x, checkpointing).square().sum().backward()
        gradients.append([p.grad for p in stage.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, rtol=1e-9, atol=1e-12)


# ---- published weights


def test_published_names_are_the_publishers():
    assert published_weights("se_resnet50") == ["timm/in1k"]
    assert published_weights("preact_resnet50") == ["timm/a1h_in1k"]
    assert published_weights("resnext101_64x4d") == ["imagenet_v1"]
    assert published_weights("wide_resnet50_2") == ["imagenet_v1", "imagenet_v2"]
    assert published_weights("plain18") == published_weights("preact_resnet152") == []


@pytest.fixture
def timm_calls(monkeypatch):
    """What timm was asked for; random weights come back."""
    calls, create = [], timm.create_model

    def create_model(name, pretrained=False):
        calls.append((name, pretrained))
        torch.manual_seed(0)
        return create(name, pretrained=False)

    monkeypatch.setattr(timm, "create_model", create_model)
    return calls


@pytest.mark.parametrize(
    ("name", "weights", "asked", "mean"),
    [
        ("se_resnet18", "timm/in1k", "legacy_seresnet18.in1k", (0.485, 0.456, 0.406)),
        ("preact_resnet18", "timm/ra4_e3600_r224_in1k", "resnetv2_18.ra4_e3600_r224_in1k", (0.5, 0.5, 0.5)),
    ],
)
def test_timms_weights_are_asked_for_by_tag_and_bring_their_preprocessing(
    timm_calls, name, weights, asked, mean
):
    backbone = create_backbone(name, weights=weights)
    assert timm_calls == [(asked, True)]
    assert backbone.preprocessing.mean == mean
    stem = next(p for n, p in timm.create_model(asked).named_parameters() if n.endswith("weight"))
    assert torch.equal(backbone.trunk.stage1.conv1.weight, stem)


def test_a_tag_that_was_never_published_is_refused_with_those_that_were(timm_calls):
    with pytest.raises(
        ValueError, match="se_resnet50 has no weights 'timm/in22k'; accepted: timm/in1k, or a file"
    ):
        create_backbone("se_resnet50", weights="timm/in22k")
    with pytest.raises(
        ValueError, match="plain18 has no weights 'imagenet_v1'; accepted: none are published"
    ):
        create_backbone("plain18", weights="imagenet_v1")
    assert timm_calls == []


def test_without_timm_its_weights_say_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="need timm; run: pip install timm"):
        create_backbone("se_resnet50", weights="timm/in1k")
    assert published_weights("se_resnet50") == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet50", {"stride_in": "1x1"}, "were trained with stride_in='3x3'; got stride_in='1x1'"),
        ("resnet50", {"order": "full_preactivation"}, "were trained with order='original'; got order='full"),
        (
            "resnet18",
            {"width": 32, "shortcut": "A"},
            "with width=64, shortcut='B'; got width=32, shortcut='A'",
        ),
        ("resnext50_32x4d", {"groups": 1}, "were trained with groups=32; got groups=1"),
    ],
)
def test_published_weights_refuse_another_function(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(name, weights="imagenet_v1", **options)


def test_a_file_of_timms_layout_loads_and_one_of_another_family_is_refused(tmp_path):
    theirs = library_network("se_resnet18")
    torch.save(theirs.state_dict(), tmp_path / "se.pth")
    ours = create_backbone("se_resnet18", weights=str(tmp_path / "se.pth"), norm="frozen")
    assert torch.equal(ours.roi_head.stage5[1].branch.se.fc2.bias, theirs.layer4[1].se_module.fc2.bias)
    with pytest.raises(ValueError, match=r"does not fit resnet18; unknown: .*branch\.se\.fc1\.weight"):
        create_backbone("resnet18", weights=str(tmp_path / "se.pth"))
