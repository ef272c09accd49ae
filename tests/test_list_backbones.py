"""Parameters and cost of every backbone against the published ones, and the table that prints them."""

import json
import re
from pathlib import Path

import pytest
import torch
import torchvision

from backbones import IMAGENET, create_backbone, list_backbones
from backbones.summary import Summary, count_parameters, multiply_accumulates, summarize

ROOT = Path(__file__).resolve().parent.parent
# name -> parameters and GMAC (convolutions and linear layers) at 224x224, both with a classifier of 1000 classes
REFERENCE = json.loads((ROOT / "tests" / "data" / "backbones.json").read_text(encoding="utf-8"))


DEEP = re.compile(r"101|152|161|169|201|wide")


@pytest.mark.parametrize("name", list_backbones())
def test_parameters_are_the_published_ones(name):
    assert name in REFERENCE, (
        f"tests/data/backbones.json says nothing of {name}: add its numbers and their source"
    )
    with torch.device("meta"):
        backbone = create_backbone(name)
    classifier = (backbone.roi_head.out_channels + 1) * 1000
    assert count_parameters(backbone) + classifier == REFERENCE[name]["parameters"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if DEEP.search(n) else n for n in list_backbones()],
)
def test_the_cost_is_the_published_one(name):
    with torch.device("meta"):
        backbone = create_backbone(name)
        macs = multiply_accumulates(backbone, torch.zeros(1, 3, 224, 224))
    assert round((macs + backbone.roi_head.out_channels * 1000) / 1e9, 3) == REFERENCE[name]["gmac"]


def test_the_reference_says_where_each_number_is_from_and_of_nothing_else():
    assert sorted(REFERENCE) == list(REFERENCE) and set(REFERENCE) <= set(list_backbones())
    assert all(set(row) == {"parameters", "gmac", "source"} and row["source"] for row in REFERENCE.values())


def test_the_references_numbers_of_torchvision_are_torchvisions():
    for name, row in REFERENCE.items():
        if row["source"].startswith("torchvision"):
            meta = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].meta
            assert (row["parameters"], row["gmac"]) == (meta["num_params"], meta["_ops"])


@pytest.mark.slow
def test_the_references_numbers_of_timm_are_timms():
    timm = pytest.importorskip("timm")
    for ours, theirs in (("se_resnet", "legacy_seresnet"), ("preact_resnet", "resnetv2_")):
        for depth in (18, 34, 50, 101, 152):
            with torch.device("meta"):
                network = timm.create_model(f"{theirs}{depth}").eval()
                macs = multiply_accumulates(network, torch.zeros(1, 3, 224, 224))
            row = REFERENCE[f"{ours}{depth}"]
            assert row["parameters"] == count_parameters(network)
            assert row["gmac"] == round(macs / 1e9, 3)


@pytest.mark.parametrize(("depth", "millions"), [(50, 25.549), (101, 44.542), (152, 60.185)])
def test_preactivation_networks_have_pytorchcvs_parameters_less_the_norm_behind_its_stem(depth, millions):
    assert round((REFERENCE[f"preact_resnet{depth}"]["parameters"] + 128) / 1e6, 3) == millions


# ---- the table


def test_a_summary_is_what_a_detector_pays():
    # ResNet-18 and -101 at 800x1216: trunk 27.2 and 135.5 GMAC, 411 and 809 M a region of 14x14
    facts = [summarize("resnet18"), summarize("resnet101")]
    assert [round(f.trunk_macs / 1e9, 1) for f in facts] == [27.2, 135.5]
    assert [f.head_macs // 10**6 for f in facts] == [411, 809]
    assert facts[1] == Summary(
        name="resnet101",
        c4=1024,
        c5=2048,
        parameters=42_500_160,
        trunk_macs=facts[1].trunk_macs,
        head_macs=facts[1].head_macs,
        weights=("imagenet_v1", "imagenet_v2"),
        norms=("batch", "frozen", "group", "sync"),
        preprocessing=IMAGENET,
    )


def test_a_summary_follows_the_size_of_the_image():
    small, large = (summarize("resnet18", size) for size in ((224, 224), (448, 448)))
    assert large.trunk_macs == 4 * small.trunk_macs and large.head_macs == small.head_macs


def test_the_table_has_a_row_a_backbone(run_tool):
    status, out, err = run_tool("list_backbones", "resnet18", "densenet121", "plain*")
    assert (status, err) == (0, "")
    header, rule, *rows = out.splitlines()[:6]
    assert header.split()[:3] == ["name", "C4", "C5"]
    assert [row.split()[:3] for row in rows] == [
        ["resnet18", "256", "512"],
        ["densenet121", "512", "1024"],
        ["plain18", "256", "512"],
        ["plain34", "256", "512"],
    ]
    assert "imagenet_v1" in rows[0] and "batch, frozen, group" in rows[0]
    assert "800x1216" in out


def test_the_table_for_a_readme_is_markdown(run_tool):
    status, out, _ = run_tool("list_backbones", "bn_inception", "--markdown", "--size", "224", "224")
    header, rule, row = out.splitlines()[:3]
    assert status == 0 and {line.count("|") for line in (header, rule, row)} == {10}
    assert row.startswith("| bn_inception | 608 | 1024 | 10.27 | ")


def test_exact_numbers_come_as_json(run_tool):
    status, out, _ = run_tool("list_backbones", "resnet50", "--json")
    (facts,) = json.loads(out)
    assert status == 0 and facts["parameters"] == 23_508_032
    assert facts["preprocessing"]["mean"] == [0.485, 0.456, 0.406]


def test_networks_of_a_library_are_listed_with_their_own_weights_and_norms(run_tool):
    pytest.importorskip("timm")
    status, out, err = run_tool(
        "list_backbones", "torchvision/resnet18", "timm/legacy_seresnet18", "torchvision/vit_b_16", "--json"
    )
    theirs, timms = json.loads(out)
    assert status == 0 and err.startswith("torchvision/vit_b_16: ") and err.count("\n") == 1
    assert theirs["parameters"] == summarize("resnet18").parameters
    assert (theirs["weights"], theirs["norms"]) == (["imagenet_v1"], ["batch", "frozen"])
    assert (timms["c4"], timms["c5"], timms["weights"]) == (256, 512, ["in1k"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnt18"], "no backbone is named 'resnt18'; did you mean 'resnet18'"),
        (["resnet18", "--size", "8", "800"], "--size is 8 800; accepted: 32 pixels or more each"),
    ],
)
def test_errors_are_one_line(run_tool, arguments, message):
    status, out, err = run_tool("list_backbones", *arguments)
    assert status == 1 and out == "" and message in err and err.count("\n") == 1
