"""Foreign checkpoints: published names and shapes become ours and back, others are refused and nothing is written."""

import argparse
import dataclasses
import json
import os
import pickle
import sys
from importlib import import_module
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open

import backbones.weights
from backbones import Preprocessing, create_backbone
from detector.build import build_model
from detector.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from detector.config import ModelConfig, load_config
from detector.convert import convert_file
from detector.convert.class_names import COCO, VOC
from detector.convert.detectron2 import (
    BACKBONE_CONVENTIONS,
    CONVENTIONS,
    detectron2_to_ours,
    ours_to_detectron2,
)
from detector.convert.export import export_detectron2
from detector.convert.msra import EPS

ROOT = Path(__file__).resolve().parent.parent
CAFFE_RESNET = Preprocessing((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "bgr", 255.0)
DEPTHS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
WIDTH = 8


@pytest.fixture
def convert(monkeypatch, capsys):
    """convert(argument, ...) -> (exit status, standard output, standard error) of tools/convert_weights.py."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = import_module("convert_weights")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
        capsys.readouterr()
        return module.main(), *capsys.readouterr()

    return run


# State dicts under the names that their makers publish, drawn at random


def draw(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def norm_shapes(name, channels, kinds=("weight", "bias", "running_mean", "running_var")):
    return {f"{name}.{kind}": (channels,) for kind in kinds}


def blocks(depth, width=WIDTH):
    """(stage 2..5, index of the block, (channels in, inside, out)) of a bottleneck ResNet."""
    channels = width
    for stage, count in enumerate(DEPTHS[depth], start=2):
        inside = width * 2 ** (stage - 2)
        for index in range(count):
            yield stage, index, (channels, inside, 4 * inside)
            channels = 4 * inside


def detectron2_state(depth=50, num_classes=20, width=WIDTH, anchors=15):
    shapes = {"backbone.stem.conv1.weight": (width, 3, 7, 7)} | norm_shapes("backbone.stem.conv1.norm", width)
    for stage, index, (first, inside, last) in blocks(depth, width):
        block = f"roi_heads.res5.{index}" if stage == 5 else f"backbone.res{stage}.{index}"
        layers = {"conv1": (inside, first, 1), "conv2": (inside, inside, 3), "conv3": (last, inside, 1)}
        if index == 0:
            layers["shortcut"] = (last, first, 1)
        for layer, (out_channels, in_channels, kernel) in layers.items():
            shapes[f"{block}.{layer}.weight"] = (out_channels, in_channels, kernel, kernel)
            shapes |= norm_shapes(f"{block}.{layer}.norm", out_channels)
    c4, c5, rpn = 16 * width, 32 * width, "proposal_generator.rpn_head"
    for name, rows in (("objectness_logits", anchors), ("anchor_deltas", 4 * anchors)):
        shapes |= {f"{rpn}.{name}.weight": (rows, c4, 1, 1), f"{rpn}.{name}.bias": (rows,)}
    shapes |= {f"{rpn}.conv.weight": (c4, c4, 3, 3), f"{rpn}.conv.bias": (c4,)}
    for name, rows in (("cls_score", num_classes + 1), ("bbox_pred", 4 * num_classes)):
        shapes |= {f"roi_heads.box_predictor.{name}.weight": (rows, c5)}
        shapes |= {f"roi_heads.box_predictor.{name}.bias": (rows,)}
    return draw(shapes)


def mmdetection_state(num_classes=20, width=WIDTH):
    shapes = {"backbone.conv1.weight": (width, 3, 7, 7)} | norm_shapes("backbone.bn1", width)
    for stage, index, (first, inside, last) in blocks(50, width):
        layer = f"{'roi_head.shared_head' if stage == 5 else 'backbone'}.layer{stage - 1}.{index}"
        convs = {"1": (inside, first, 1), "2": (inside, inside, 3), "3": (last, inside, 1)}
        for number, (out_channels, in_channels, kernel) in convs.items():
            shapes[f"{layer}.conv{number}.weight"] = (out_channels, in_channels, kernel, kernel)
            shapes |= norm_shapes(f"{layer}.bn{number}", out_channels)
        if index == 0:
            shapes[f"{layer}.downsample.0.weight"] = (last, first, 1, 1)
            shapes |= norm_shapes(f"{layer}.downsample.1", last)
    c4, c5 = 16 * width, 32 * width
    for name, rows, kernel in (("rpn_conv", c4, 3), ("rpn_cls", 15, 1), ("rpn_reg", 60, 1)):
        shapes |= {f"rpn_head.{name}.weight": (rows, c4, kernel, kernel), f"rpn_head.{name}.bias": (rows,)}
    for name, rows in (("fc_cls", num_classes + 1), ("fc_reg", 4 * num_classes)):
        shapes |= {
            f"roi_head.bbox_head.{name}.weight": (rows, c5),
            f"roi_head.bbox_head.{name}.bias": (rows,),
        }
    counters = {n.replace("running_var", "num_batches_tracked"): () for n in shapes if "running_var" in n}
    return draw(shapes | counters)


def msra_blobs(width=WIDTH, stem_bias=True):
    def norm(name, channels):
        return {f"{name}_bn_s": (channels,), f"{name}_bn_b": (channels,)}

    shapes = {"conv1_w": (width, 3, 7, 7)} | norm("res_conv1", width)
    if stem_bias:
        shapes["conv1_b"] = (width,)
    for stage, index, (first, inside, last) in blocks(50, width):
        block = f"res{stage}_{index}"
        layers = {"2a": (inside, first, 1), "2b": (inside, inside, 3), "2c": (last, inside, 1)}
        if index == 0:
            layers["1"] = (last, first, 1)
        for layer, (out_channels, in_channels, kernel) in layers.items():
            name = f"{block}_branch{layer}"
            shapes |= {f"{name}_w": (out_channels, in_channels, kernel, kernel)} | norm(name, out_channels)
    shapes |= {"fc1000_w": (1000, 32 * width), "fc1000_b": (1000,)}
    return {name: value.numpy() for name, value in draw(shapes).items()}


def save_pickle(path, state, **rest):
    arrays = {name: value.numpy() for name, value in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone", **rest}, protocol=2))
    return path


def save_torch(path, state, key="model", **rest):
    torch.save({key: state, **rest}, path)
    return path


def one_line(error):
    return error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error


# Detectron2


def assert_has(model, settings):
    """The settings stand in a model's configuration; a name of conventions stands for its values."""
    wanted = ModelConfig(backbone="resnet18", **settings)
    assert {name: getattr(model, name) for name in settings} == {
        name: getattr(wanted, name) for name in settings
    }


def test_detectron2_names_become_ours_and_back_to_the_last_bit():
    state = detectron2_state()
    ours = detectron2_to_ours(state)
    back = ours_to_detectron2(ours)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    again = detectron2_to_ours(back)
    assert again.keys() == ours.keys() and all(torch.equal(again[name], v) for name, v in ours.items())


def test_background_moves_to_the_front_and_gets_four_rows_of_zeros():
    state = detectron2_state(num_classes=20)
    ours = detectron2_to_ours(state)
    for kind in ("weight", "bias"):
        theirs = {
            name: state[f"roi_heads.box_predictor.{name}.{kind}"] for name in ("cls_score", "bbox_pred")
        }
        scores, deltas = (ours[f"roi_heads.box_predictor.{name}.{kind}"] for name in theirs)
        assert torch.equal(scores[0], theirs["cls_score"][20]) and torch.equal(
            scores[1], theirs["cls_score"][0]
        )
        assert torch.equal(deltas[4:8], theirs["bbox_pred"][:4]) and deltas[:4].abs().sum() == 0


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_detectron2_file_becomes_a_checkpoint_that_builds(convert, tmp_path, depth, suffix):
    state = detectron2_state(depth)
    save = save_pickle if suffix == ".pkl" else save_torch
    path, output = save(tmp_path / f"model_final{suffix}", state), tmp_path / "out" / "converted.safetensors"
    status, out, error = convert(path, "--output", output)
    assert (status, error) == (0, "") and "detectron2 (by the names" in out and "20 classes: aeroplane" in out
    checkpoint = load_checkpoint(output)
    assert checkpoint.class_names == VOC and checkpoint.preprocessing == CAFFE_RESNET
    backbone = {"name": f"resnet{depth}", "width": WIDTH, **BACKBONE_CONVENTIONS}
    assert checkpoint.config.model.backbone == backbone
    assert_has(checkpoint.config.model, CONVENTIONS)
    model = checkpoint.build()
    assert torch.equal(
        model.state_dict()["backbone.stage4.0.shortcut.conv.weight"], state["backbone.res4.0.shortcut.weight"]
    )
    assert model.transform.preprocessing == CAFFE_RESNET


def test_what_files_hold_beside_the_weights_is_read_or_left_out(convert, tmp_path):
    state = detectron2_state(num_classes=3)
    sizes, ratios = torch.tensor([32, 64, 128, 256, 512.0]), torch.tensor([0.5, 1, 2])
    widths, heights = (sizes[:, None] * r.sqrt() for r in (1 / ratios, ratios))
    cells = torch.stack([-widths, -heights, widths, heights], -1).view(15, 4) / 2
    state |= {
        "pixel_mean": torch.tensor([102.9801, 115.9465, 122.7717]).view(3, 1, 1),
        "pixel_std": torch.ones(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": cells,
        "roi_heads.mask_head.deconv.weight": torch.zeros(8, 8, 2, 2),
    }
    (tmp_path / "names.txt").write_text("cat\ndog\n\nbird\n")
    path, output = save_torch(tmp_path / "model.pth", state, iteration=9), tmp_path / "o.safetensors"
    arguments = [path, "--class-names", tmp_path / "names.txt", "--output", output]
    status, out, _ = convert(*arguments, "model.min_size=600")
    assert status == 0 and "left out: roi_heads.mask_head.*" in out
    checkpoint = load_checkpoint(output)
    assert checkpoint.class_names == ("cat", "dog", "bird") and checkpoint.config.model.min_size == 600
    assert checkpoint.preprocessing == Preprocessing((102.9801, 115.9465, 122.7717), (1, 1, 1), "bgr", 255)
    output.unlink()
    status, _, error = convert(*arguments, "model.anchor_sizes=[16,32,64,128,256]")
    assert status == 1 and one_line(error) and "has other anchors than sizes" in error and not output.exists()


def test_the_published_numbers_follow_from_a_converted_file(convert, shared, tmp_path):
    """conv4_x of the reference image, computed by Detectron2, within the tolerance of folded norms."""
    reference = shared / "reference"
    sys.path.insert(0, str(reference))
    try:
        from seeded_weights import seeded_state_dict
    finally:
        sys.path.remove(str(reference))
    with np.load(reference / "r50_c4_calibrated.npz") as calibrated:
        arrays = seeded_state_dict(50, dict(calibrated))
    state = {name: torch.from_numpy(value) for name, value in arrays.items()}
    loaded = []
    for path in (save_pickle(tmp_path / "zoo.pkl", state), save_torch(tmp_path / "own.pth", state)):
        output = tmp_path / f"{path.stem}.safetensors"
        assert convert(path, "model.min_size=320", "--output", output)[0] == 0
        path.unlink()
        loaded.append(load_checkpoint(output))
    one, two = loaded
    assert one.class_names == COCO and one.config == two.config
    assert all(torch.equal(value, two.state_dict[name]) for name, value in one.state_dict.items())
    back = ours_to_detectron2(one.state_dict)
    assert back.keys() == state.keys() and all(torch.equal(back[name], v) for name, v in state.items())
    with np.load(reference / "r50_c4_reference.npz") as numbers:
        image, wanted = (torch.from_numpy(numbers[name]) for name in ("image_resized", "res4"))
    model = one.build()
    with torch.inference_mode():
        features = model.backbone(model.transform([image.flip(0) / 255])[0].tensors)
    torch.testing.assert_close(features, wanted, rtol=0, atol=2e-4)


def test_our_detector_goes_to_detectron2_and_comes_back(convert, tmp_path):
    path, output = save_pickle(tmp_path / "a.pkl", detectron2_state()), tmp_path / "a.safetensors"
    convert(path, "--output", output)
    for name in ("back.pkl", "back.pth"):
        status, out, _ = convert(output, "--to", "detectron2", "--output", tmp_path / name)
        assert status == 0 and "MODEL.RESNETS.STRIDE_IN_1X1 True" in out and "INPUT.FORMAT BGR" in out
        assert "MODEL.PIXEL_MEAN [103.53, 116.28, 123.675]" in out and "differ" not in out
        convert(tmp_path / name, "--output", tmp_path / "again.safetensors")
        one, two = load_checkpoint(output), load_checkpoint(tmp_path / "again.safetensors")
        assert one.config == two.config and one.class_names == two.class_names
        assert all(torch.equal(two.state_dict[key], value) for key, value in one.state_dict.items())
    with open(tmp_path / "back.pkl", "rb") as file:
        zoo = pickle.load(file, encoding="latin1")  # as Detectron2 reads it
    assert zoo["__author__"] and isinstance(zoo["model"]["backbone.stem.conv1.weight"], np.ndarray)


def test_anchors_of_a_stock_detector_are_reordered_for_detectron2(tiny_config):
    config = tiny_config("model.anchor_sizes=[16,32,64]", "model.aspect_ratios=[0.5,2]")
    model = build_model(config.model, 5)
    with torch.no_grad():
        model.rpn.head.cls_logits.bias.copy_(torch.arange(6))
        model.rpn.head.bbox_pred.bias.copy_(torch.arange(24))
    state = export_detectron2(Checkpoint(model.state_dict(), config, ("a", "b", "c", "d")))
    head = "proposal_generator.rpn_head"
    # for each ratio each size: 0 1 2 | 3 4 5 -> for each size each ratio: 0 3 | 1 4 | 2 5
    assert state[f"{head}.objectness_logits.bias"].tolist() == [0, 3, 1, 4, 2, 5]
    assert state[f"{head}.anchor_deltas.bias"][:8].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert not any("num_batches_tracked" in name for name in state)


RGB = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}


def test_a_detector_that_was_trained_with_rgb_in_detectron2_stays_one(convert, tmp_path):
    """The settings of MoCo and PyContrast: from the file's tensors, options, or a config file with its base."""
    state = detectron2_state()
    pixels = {f"pixel_{name}": torch.tensor(values).view(3, 1, 1) for name, values in RGB.items()}
    bare, whole = save_torch(tmp_path / "bare.pth", state), save_torch(tmp_path / "whole.pth", state | pixels)
    (tmp_path / "base.yaml").write_text(
        "MODEL: {RESNETS: {DEPTH: 50, STRIDE_IN_1X1: true}, PIXEL_MEAN: [1, 2, 3]}\n"
    )
    config = tmp_path / "moco.yaml"
    config.write_text(
        "_BASE_: base.yaml\nINPUT: {FORMAT: RGB, MIN_SIZE_TEST: 640}\nMODEL:\n  RESNETS: {STRIDE_IN_1X1: false}\n"
        "  PIXEL_MEAN: [123.675, 116.280, 103.530]\n  PIXEL_STD: [58.395, 57.120, 57.375]\n"
        "  ROI_BOX_HEAD: {POOLER_TYPE: ROIAlign, POOLER_SAMPLING_RATIO: 2}\n  RPN: {NMS_THRESH: 0.6}\n"
        "  ANCHOR_GENERATOR: {SIZES: [[16, 32, 64, 128, 256]]}\n"
    )
    order, numbers = ("--channel-order", "rgb"), ("--pixel-mean", *RGB["mean"], "--pixel-std", *RGB["std"])
    for arguments, assumed in (
        ((whole,), "INPUT.FORMAT RGB, MODEL.RESNETS.STRIDE_IN_1X1 True"),
        ((bare, *order, *numbers), "MODEL.RESNETS.STRIDE_IN_1X1 True"),
        ((bare, "--config-file", config), None),
    ):
        status, out, error = convert(*arguments, "--output", tmp_path / "o.safetensors")
        assert (status, error) == (0, "") and "CC BY-SA 3.0" in out
        assert (
            (f"assumed, since the file does not say it: {assumed};" in out)
            if assumed
            else "assumed" not in out
        )
        checkpoint = load_checkpoint(tmp_path / "o.safetensors")
        wanted = Preprocessing(RGB["mean"], RGB["std"], "rgb", 255.0)
        assert checkpoint.preprocessing == checkpoint.build().transform.preprocessing == wanted
    model = checkpoint.config.model
    assert (model.backbone["stride_in"], model.min_size, model.rpn_nms_thresh) == ("3x3", 640, 0.6)
    assert model.anchor_sizes == (16, 32, 64, 128, 256) and model.aspect_ratios == (0.5, 1, 2)
    chosen = model.conventions
    assert (chosen.roi_align_aligned, chosen.roi_align_sampling_ratio, chosen.resize) == (False, 2, "pil")
    out = convert(bare, "--output", tmp_path / "o.safetensors")[1]
    assert (
        "INPUT.FORMAT BGR, MODEL.PIXEL_MEAN (103.53, 116.28, 123.675), MODEL.PIXEL_STD (1.0, 1.0, 1.0)" in out
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "is no config of Detectron2"),
        ("MODEL: [", "is no config of Detectron2: line 1"),
        ("MODEL: !!python/object/apply:os.system ['touch x']", "!tags are not accepted"),
        ("_BASE_: gone.yaml", "gone.yaml: no such file"),
        ("MODEL: {PIXEL_STD: 3}", "model.preprocessing"),
        ("MODEL: {PIXEL_MEAN: 3}", "model.preprocessing"),
        ("MODEL: {ANCHOR_GENERATOR: {SIZES: 3}}", "model.anchor_sizes"),
        ("INPUT: {FORMAT: YUV-BT.601}", "channel_order is 'yuv-bt.601'"),
    ],
)
def test_a_config_file_that_is_none_is_refused_and_runs_nothing(convert, tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    path = save_torch(tmp_path / "it.pth", detectron2_state())
    status, _, error = convert(
        path, "--config-file", tmp_path / "c.yaml", "--output", tmp_path / "o.safetensors"
    )
    assert status == 1 and error.startswith("error: ") and message in error and "Traceback" not in error
    assert sorted(os.listdir(tmp_path)) == ["c.yaml", "it.pth"]


def exported(convert, folder, config, *to):
    """Export a detector with random weights of 4 classes."""
    path = folder / "best.safetensors"
    model = build_model(config.model, 5)
    names = ("a", "b", "c", "d")
    save_checkpoint(path, Checkpoint(model.state_dict(), config, names, model.transform.preprocessing))
    return convert(path, "--to", "detectron2", "--output", *to)


def test_our_own_rgb_detector_comes_back_from_detectron2_as_it_was(convert, tiny_config, tmp_path):
    thresholds = ("model.rpn_nms_thresh=0.6", "model.box_nms_thresh=0.3", "model.bbox_reg_weights=[1,1,1,1]")
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\n")
    for suffix in ("pkl", "pth"):
        path = tmp_path / f"best.{suffix}"
        config = tiny_config("model.conventions=detectron2", *thresholds)
        status, out, _ = exported(convert, tmp_path, config, path)
        assert status == 0 and "RPN.NMS_THRESH 0.6" in out and "BBOX_REG_WEIGHTS (1.0, 1.0, 1.0, 1.0)" in out
        assert "ROI_HEADS.NMS_THRESH_TEST 0.3" in out and "RESNETS.NORM BN" in out and "differ" not in out
        status, out, error = convert(path, "--class-names", names, "--output", tmp_path / "again.safetensors")
        assert (status, error) == (0, "") and "assumed" not in out
        one, two = (load_checkpoint(tmp_path / f"{name}.safetensors") for name in ("best", "again"))
        kept = (
            "rpn_nms_thresh",
            "box_nms_thresh",
            "bbox_reg_weights",
            "anchor_sizes",
            "min_size",
            "conventions",
        )
        assert [getattr(one.config.model, n) for n in kept] == [getattr(two.config.model, n) for n in kept]
        image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
        features = []
        for checkpoint in (one, two):
            model = checkpoint.build()
            with torch.inference_mode():
                features.append(model.backbone(model.transform([image])[0].tensors))
        torch.testing.assert_close(*features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("backbone", "said"),
    [
        ("{name: resnet50, width: 32, norm: group}", ["RESNETS.NORM GN", "RES2_OUT_CHANNELS 128"]),
        (
            "{name: resnext50_32x4d, width: 64}",
            ["NUM_GROUPS 32", "WIDTH_PER_GROUP 4", "RES2_OUT_CHANNELS 256"],
        ),
        ("{name: wide_resnet50_2, width: 8}", ["NUM_GROUPS 1", "WIDTH_PER_GROUP 16", "STEM_OUT_CHANNELS 8"]),
        (
            "{name: preact_resnet18, width: 8, order: original}",
            ["DEPTH 18", "ResNet.make_stage(BasicBlock, ...)"],
        ),
        ("{name: preact_resnet18, width: 8}", "preact_resnet18 with order='full_preactivation'"),
        ("{name: se_resnet18, width: 8}", "with branch_end='relu_se', stem_pool='ceil'"),
        ("{name: shrinkage_resnet18, width: 8}", "with branch_end='shrinkage_cw'"),
        ("{name: plain18, width: 8}", "plain18 with shortcut='none'"),
        (
            "{name: resnet18, width: 8, shortcut: A}",
            "with shortcut='A'; accepted: a ResNet with shortcut='B'",
        ),
        ("{name: resnet18, width: 8, shortcut: constant_scaling}", "with shortcut='constant_scaling'"),
        ("{name: resnet18, width: 8, order: relu_before_addition}", "with order='relu_before_addition'"),
        ("{name: resnet18, width: 8, stem_pool: ceil}", "with stem_pool='ceil'"),
        ("{name: densenet121}", "holds no ResNet"),
    ],
)
def test_detectron2_gets_the_settings_of_a_network_or_does_not_get_the_network(
    convert, tiny_config, tmp_path, backbone, said
):
    status, out, error = exported(
        convert, tmp_path, tiny_config(f"model.backbone={backbone}"), tmp_path / "o.pkl"
    )
    if isinstance(said, list):
        assert status == 0 and all(
            f"{text}\n" in out or text.startswith("ResNet.") and text in out for text in said
        )
    else:
        assert status == 1 and one_line(error) and said in error and not (tmp_path / "o.pkl").exists()


def test_what_a_config_of_detectron2_cannot_say_is_printed(convert, tiny_config, tmp_path):
    pooled = tiny_config("model.roi_pool=max", "model.class_agnostic_nms=true", "model.rpn_score_thresh=0.1")
    out = exported(convert, tmp_path, pooled, tmp_path / "o.pkl")[1]
    assert "POOLER_TYPE ROIPool\n" in out and "class_agnostic_nms True (Detectron2: 0)" in out
    assert "rpn_score_thresh 0.1 (Detectron2: 0)" in out


def test_a_stock_detectors_conventions_are_said_to_differ_in_detectron2(convert, tiny_config, tmp_path):
    config = tiny_config()
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, Checkpoint(build_model(config.model, 5).state_dict(), config, ("a", "b", "c", "d")))
    status, out, _ = convert(path, "--to", "detectron2", "--output", tmp_path / "best.pkl")
    assert status == 0 and "MODEL.RESNETS.DEPTH 18" in out and "RES2_OUT_CHANNELS 8" in out
    assert "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]" in out and "INPUT.FORMAT RGB" in out
    assert "numbers there will differ" in out and "resize 'torch' (Detectron2: 'pil')" in out
    assert "POOLER_TYPE ROIAlign\n" in out and "POOLER_SAMPLING_RATIO 2\n" in out
    status, _, error = convert(path, "--to", "detectron2", "--output", tmp_path / "best.onnx")
    assert status == 1 and one_line(error) and "Detectron2 reads .pkl and .pth" in error
    status, _, error = convert(path, "--output", tmp_path / "again.safetensors")
    assert status == 1 and one_line(error) and "a checkpoint of this program already" in error


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/detectron2_*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_say_what_the_converter_writes(path):
    model = load_config(path).model
    assert_has(model, CONVENTIONS)
    assert {name: model.backbone.get(name) for name in BACKBONE_CONVENTIONS} == BACKBONE_CONVENTIONS
    assert model.preprocessing is None or model.preprocessing == CAFFE_RESNET


# MMDetection


@pytest.mark.parametrize(
    ("rest", "names"),
    [
        ({}, VOC),
        ({"meta": {"CLASSES": [f"v2_{i}" for i in range(20)]}}, tuple(f"v2_{i}" for i in range(20))),
        (
            {"meta": {"dataset_meta": {"classes": tuple(f"v3_{i}" for i in range(20))}}},
            tuple(f"v3_{i}" for i in range(20)),
        ),
    ],
)
def test_an_mmdetection_file_becomes_a_checkpoint_that_builds(convert, tmp_path, rest, names):
    state = mmdetection_state()
    path = save_torch(tmp_path / "epoch_12.pth", state, "state_dict", **rest)
    status, out, _ = convert(path, "--output", tmp_path / "o.safetensors")
    assert status == 0 and "mmdetection (by the names" in out
    checkpoint = load_checkpoint(tmp_path / "o.safetensors")
    settings = checkpoint.config.model
    assert checkpoint.class_names == names and checkpoint.preprocessing == CAFFE_RESNET
    assert settings.conventions.anchor_order == "ratio_major" and not settings.conventions.anchor_rounding
    assert settings.backbone["stride_in"] == "1x1" and settings.conventions.roi_align_aligned
    ours = checkpoint.build().state_dict()
    pairs = {
        "backbone.stage2.blocks.0.branch.conv2.weight": "backbone.layer1.0.conv2.weight",
        "roi_heads.box_head.stage5.0.shortcut.bn.running_var": "roi_head.shared_head.layer4.0.downsample.1.running_var",
        "rpn.head.conv.0.0.bias": "rpn_head.rpn_conv.bias",
        "rpn.head.cls_logits.weight": "rpn_head.rpn_cls.weight",
        "rpn.head.bbox_pred.bias": "rpn_head.rpn_reg.bias",
    }
    assert all(torch.equal(ours[a], state[b]) for a, b in pairs.items())
    assert torch.equal(
        ours["roi_heads.box_predictor.cls_score.bias"], state["roi_head.bbox_head.fc_cls.bias"].roll(1)
    )


# ImageNet


def test_msra_norms_stay_scale_and_bias_and_the_stems_bias_becomes_a_mean(convert, tmp_path):
    blobs = msra_blobs()
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(blobs, protocol=2))
    output = tmp_path / "r50.safetensors"
    status, out, _ = convert(tmp_path / "R-50.pkl", "--output", output)
    assert status == 0 and "msra (by the names" in out and "stride_in: 1x1" in out and "BGR in 0..255" in out
    for norm in ("batch", "frozen"):
        options = {"width": WIDTH, "stride_in": "1x1", "norm": norm}
        backbone = create_backbone("resnet50", weights=str(output), **options).eval()
        assert backbone.preprocessing == CAFFE_RESNET
        stem, images = backbone.trunk.stage1, torch.randn(2, 3, 32, 32)
        scale, bias = (torch.from_numpy(blobs[f"res_conv1_bn_{k}"])[:, None, None] for k in "sb")
        weight, conv_bias = (torch.from_numpy(blobs[f"conv1_{k}"]) for k in "wb")
        wanted = torch.nn.functional.conv2d(images, weight, conv_bias, 2, 3) * scale + bias
        torch.testing.assert_close(stem.bn1(stem.conv1(images)), wanted, rtol=1e-5, atol=1e-5)
        inside = backbone.roi_head.stage5[2].branch
        x = torch.randn(2, 32 * WIDTH, 3, 3)
        scale, bias = (torch.from_numpy(blobs[f"res5_2_branch2c_bn_{k}"])[:, None, None] for k in "sb")
        torch.testing.assert_close(inside.bn3(x), x * scale + bias, rtol=1e-5, atol=1e-5)


def test_the_variance_of_a_folded_norm_is_one_behind_eps():
    assert torch.tensor(1 - EPS) + EPS == 1  # in float32


@pytest.mark.parametrize("source", ["torchvision", "timm", "timm legacy_seresnet18"])
def test_a_classifier_keeps_its_features(convert, tmp_path, source):
    torch.manual_seed(0)
    arguments = []
    if source == "torchvision":
        network = torchvision.models.resnet18()
        features = torch.nn.Sequential(*list(network.children())[:-1], torch.nn.Flatten())
    else:
        timm = pytest.importorskip("timm")
        network = timm.create_model(source.split()[-1] if " " in source else "resnet18", num_classes=10)
        if " " in source:
            arguments = ["--backbone", "se_resnet18"]

        def features(x):
            return network.forward_head(network.forward_features(x), pre_logits=True)

    network.eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    output = tmp_path / "weights.safetensors"
    status, out, error = convert(tmp_path / "weights.pth", "--output", output, *arguments)
    assert (status, error) == (0, ""), error
    name = "se_resnet18" if arguments else "resnet18"
    assert f"name: {name}" in out
    backbone = create_backbone(name, weights=str(output)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images), features(images), rtol=1e-5, atol=1e-5)


def classifier_state(width=WIDTH):
    """ResNet-18 under torchvision's names."""
    shapes = {"conv1.weight": (width, 3, 7, 7), "fc.weight": (10, 8 * width)} | norm_shapes("bn1", width)
    channels = width
    for stage, out_channels in enumerate((width, 2 * width, 4 * width, 8 * width), start=1):
        for index in (0, 1):
            block = f"layer{stage}.{index}"
            for number in (1, 2):
                inputs = channels if number == 1 else out_channels
                shapes[f"{block}.conv{number}.weight"] = (out_channels, inputs, 3, 3)
                shapes |= norm_shapes(f"{block}.bn{number}", out_channels)
            if channels != out_channels:
                shapes[f"{block}.downsample.0.weight"] = (out_channels, channels, 1, 1)
                shapes |= norm_shapes(f"{block}.downsample.1", out_channels)
            channels = out_channels
    return draw(shapes)


def below(prefix, state, **others):
    return {prefix + name: value for name, value in state.items()} | others


ARGS = argparse.Namespace(data=Path("data"), lr=np.float64(0.1), layers=[1, 2])
QUEUE = {"module.queue": torch.ones(2, 4), "module.queue_ptr": torch.ones(1)}
HEAD = torch.ones(2, 2)
# The content of a file for a network's state, and what is stripped from its names.
SCRIPTS = {
    "bare": (lambda s: s, ""),
    "PyTorch's ImageNet example": (
        lambda s: {
            "epoch": 3,
            "arch": "resnet18",
            "state_dict": below("module.", s),
            "best_acc1": torch.tensor(7.0),
            "optimizer": {"state": {0: {"momentum_buffer": HEAD}}, "param_groups": [{"lr": 0.1}]},
        },
        "module.",
    ),
    "torchvision's references": (lambda s: {"model": s, "epoch": 3, "args": ARGS}, ""),
    "their averaged model": (lambda s: {"model": below("module.", s, n_averaged=torch.tensor(3))}, "module."),
    "timm": (
        lambda s: {"epoch": 3, "state_dict": s, "args": ARGS, "metric": np.float64(71.2), "version": 2},
        "",
    ),
    "Lightning": (
        lambda s: {
            "state_dict": below("model.", s),
            "hyper_parameters": {"path": Path("x"), "args": ARGS},
            "callbacks": {
                "ModelCheckpoint": {"best_model_path": "a.ckpt", "best_model_score": torch.tensor(0.5)}
            },
        },
        "model.",
    ),
    "Lightning with a loss of its own": (
        lambda s: {"state_dict": below("model.", s, **{"criterion.weight": HEAD})},
        "model., 1 other tensors left out",
    ),
    "torch.compile": (lambda s: below("_orig_mod.", s), "_orig_mod."),
    "torch.compile in DataParallel": (
        lambda s: {"model": below("module._orig_mod.", s)},
        "module._orig_mod.",
    ),
    "state of numpy's generator": (lambda s: {"net": s, "rng": np.random.RandomState(0).get_state()}, ""),
    "model_state_dict": (
        lambda s: {"model_state_dict": s, "loss": np.float32(0.1), "path": PurePosixPath("x")},
        "",
    ),
    "MoCo": (
        lambda s: {"state_dict": below("module.encoder_q.", s) | below("module.encoder_k.", s) | QUEUE},
        "module.encoder_q., 103 other tensors left out",
    ),
    "MoCo v3": (
        lambda s: {
            "state_dict": below("module.momentum_encoder.", s)
            | below("module.base_encoder.", s, **{"module.predictor.0.weight": HEAD})
        },
        "module.base_encoder., 102 other",
    ),
    "SimSiam": (
        lambda s: {"state_dict": below("module.encoder.", s, **{"module.predictor.0.weight": HEAD})},
        "module.encoder.",
    ),
    "PixPro": (lambda s: {"opt": ARGS, "model": below("module.encoder.", s)}, "module.encoder."),
    "SwAV": (lambda s: below("module.", s, **{"module.projection_head.0.weight": HEAD}), "module."),
    "DenseCL": (lambda s: {"state_dict": below("backbone.", s, **{"neck.0.weight": HEAD})}, "backbone."),
    "solo-learn": (lambda s: {"state_dict": below("encoder.", s, **{"classifier.weight": HEAD})}, "encoder."),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_checkpoints_of_usual_training_scripts_are_read_and_what_was_stripped_is_said(
    convert, tmp_path, capsys, name
):
    make, stripped = SCRIPTS[name]
    state, path = classifier_state(), tmp_path / "it.pth"
    torch.save(make(state), path)
    status, out, error = convert(path, "--output", tmp_path / "o.safetensors")
    assert (status, error) == (0, "")
    backbone = create_backbone("resnet18", width=WIDTH, weights=str(path))
    for said in (out, capsys.readouterr().out):
        assert (
            said.count(f"{path}: stripped from the names: {stripped}") == 1
            if stripped
            else "stripped" not in said
        )
    for network in (
        create_backbone("resnet18", width=WIDTH, weights=str(tmp_path / "o.safetensors")),
        backbone,
    ):
        assert torch.equal(network.trunk.stage1.conv1.weight, state["conv1.weight"])
        assert torch.equal(network.roi_head.stage5[1].branch.conv2.weight, state["layer4.1.conv2.weight"])


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_a_detector_that_a_script_wrapped_is_read_and_what_was_stripped_is_said(convert, tmp_path, suffix):
    state, path = below("module.", detectron2_state()), tmp_path / f"it.{suffix}"
    if suffix == "pth":
        save_torch(path, state, args=ARGS)
    else:
        save_pickle(path, state, args=ARGS)
    status, out, _ = convert(path, "--output", tmp_path / "o.safetensors")
    assert status == 0 and "stripped from the names: module.\n" in out
    stem = load_checkpoint(tmp_path / "o.safetensors").state_dict["backbone.stage1.conv1.weight"]
    assert torch.equal(stem, state["module.backbone.stem.conv1.weight"])


def test_objects_beside_the_weights_are_neither_made_nor_kept(tmp_path):
    from backbones.reading import Nothing, read

    torch.save({"args": ARGS, "path": Path("x"), "metric": np.float64(1)}, tmp_path / "it.pth")
    assert {type(value) for value in read(tmp_path / "it.pth").values()} == {Nothing}
    assert all(not vars(value) for value in read(tmp_path / "it.pth").values())


def test_a_backbones_file_says_what_it_is(convert, tmp_path):
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": msra_blobs(stem_bias=False)}))
    convert(tmp_path / "R-50.pkl", "--output", tmp_path / "o.safetensors")
    with safe_open(tmp_path / "o.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert file.get_tensor("trunk.stage1.bn1.running_mean").abs().sum() == 0
        assert not any("fc1000" in key for key in file.keys())  # noqa: SIM118
    assert json.loads(metadata["backbone"]) == {"name": "resnet50", "width": WIDTH, "stride_in": "1x1"}
    assert json.loads(metadata["preprocessing"]) == json.loads(json.dumps(dataclasses.asdict(CAFFE_RESNET)))
    weights = backbones.weights.read_state_dict(tmp_path / "o.safetensors")
    wanted = create_backbone("resnet50", width=WIDTH, norm="frozen", weights="deferred").state_dict()
    assert weights.keys() == wanted.keys()


# What is refused


def without(state, *parts):
    return {name: value for name, value in state.items() if not any(part in name for part in parts)}


def renamed(state, old, new):
    return {name.replace(old, new): value for name, value in state.items()}


STEM = {"conv1.weight": (8, 3, 7, 7), "bn1.weight": (8,)}
REFUSED = {
    "FPN of Detectron2": (
        lambda: renamed(detectron2_state(), "backbone.", "backbone.bottom_up."),
        "its backbone is a feature pyramid",
    ),
    "fully connected head": (
        lambda: detectron2_state() | draw({"roi_heads.box_head.fc1.weight": (8, 8)}),
        "its region head is fully connected",
    ),
    "DC5": (
        lambda: renamed(detectron2_state(), "roi_heads.res5", "backbone.res5"),
        "its res5 belongs to the trunk",
    ),
    "MoCo's last norm": (
        lambda: detectron2_state() | draw({"roi_heads.res5.norm.weight": (8,)}),
        "its res5 ends with one more norm (MoCo's Res5ROIHeadsExtraNorm)",
    ),
    "no predictor": (
        lambda: without(detectron2_state(), "box_predictor"),
        "it has no box head roi_heads.box_predictor",
    ),
    "class-agnostic boxes": (
        lambda: {
            name: value[:4] if "bbox_pred" in name else value for name, value in detectron2_state().items()
        },
        "20 classes and background need 80 rows of box deltas, four a class; it has 4",
    ),
    "a missing layer": (
        lambda: without(detectron2_state(), "res4.5.conv3.weight"),
        "is another architecture: missing: backbone.stage4.5.branch.conv3.weight",
    ),
    "an unknown layer": (
        lambda: detectron2_state() | draw({"roi_heads.box_predictor.attr_score.weight": (8, 8)}),
        "is another architecture: unknown: roi_heads.box_predictor.attr_score.weight",
    ),
    "other anchors": (
        lambda: detectron2_state(anchors=12),
        "has other anchors than sizes (32, 64, 128, 256, 512) and ratios (0.5, 1.0, 2.0): set model.anchor_sizes=[...]",
    ),
    "another depth": (
        lambda: without(detectron2_state(), "res4.5."),
        "no ResNet of a known depth: stages of 3, 4, 5, 3 blocks of three convolutions",
    ),
    "unnamed classes": (
        lambda: detectron2_state(num_classes=7),
        "the detector has 7 classes, whose names its file does not hold: give them with --class-names FILE",
    ),
    "FPN of MMDetection": (
        lambda: mmdetection_state() | draw({"neck.lateral_convs.0.conv.weight": (8, 8, 1, 1)}),
        "it has a neck (a feature pyramid)",
    ),
    "MMDetection 1": (
        lambda: renamed(mmdetection_state(), "roi_head.", ""),
        "or is of MMDetection 1, whose boxes are one pixel wider",
    ),
    "MMDetection without a shared head": (
        lambda: without(mmdetection_state(), "shared_head"),
        "it has no roi_head.shared_head.layer4",
    ),
    "jwyang": (
        lambda: draw({"RCNN_base.0.weight": (8, 3, 7, 7), "RCNN_rpn.RPN_Conv.weight": (512, 8, 3, 3)}),
        "a detector of jwyang/faster-rcnn.pytorch is not converted: its widths count one pixel more",
    ),
    "torchvision's detector": (
        lambda: draw(
            {"backbone.body.conv1.weight": (8, 3, 7, 7), "backbone.fpn.inner_blocks.0.0.bias": (8,)}
        ),
        "it is a torchvision detector with a feature pyramid",
    ),
    "Detectron 1": (
        lambda: {k: torch.from_numpy(v) for k, v in msra_blobs().items()} | draw({"conv_rpn_w": (8, 8)}),
        "is a detector of the first Detectron",
    ),
    "something else": (
        lambda: draw({"decoder.0.weight": (8, 8)}),
        "its tensors (decoder.0.weight, ...) are of no program that is known; accepted: --from detectron2, msra",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_architecture_is_refused_in_one_line_and_nothing_is_written(convert, tmp_path, name):
    make, message = REFUSED[name]
    path = save_torch(tmp_path / "it.pth", make())
    status, out, error = convert(path, "--output", tmp_path / "out" / "o.safetensors")
    assert status == 1 and out == "" and one_line(error) and message in error
    assert os.listdir(tmp_path) == ["it.pth"]


class Trap:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("case", ["trap.pkl", "trap.pth", "short.pkl", "short.pth", "text.pth", "gone.pth"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line_and_nothing_is_written(convert, tmp_path, case):
    kind, suffix = case.split(".")
    path, canary = tmp_path / case, tmp_path / "canary"
    if kind in ("trap", "short"):
        (save_pickle if suffix == "pkl" else save_torch)(path, draw(STEM), trap=Trap(canary))
    if kind == "short":
        path.write_bytes(path.read_bytes()[:-200])
    if kind == "text":
        path.write_text("the weights are elsewhere\n")
    before = os.listdir(tmp_path)
    status, out, error = convert(path, "--output", tmp_path / "o.safetensors")
    expected = {
        "trap": "asks for posix.system, which is never run",
        "short": "is damaged, cut short, or no file of tensors",
        "text": "neither a torch file nor a pickle",
        "gone": "there is no file",
    }
    assert status == 1 and out == "" and one_line(error) and expected[kind] in error
    assert os.listdir(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "OUT.pth"], "a name that ends in .safetensors is needed"),
        (["--output", "OUT.safetensors", "--backbone", "resnet50"], "it takes no backbone"),
        (["--output", "OUT.safetensors", "model.min_sise=3"], "unknown key model.min_sise"),
        (["--output", "OUT.safetensors", "--class-names", "NAMES"], "has 20 classes; 2 names were given"),
        (["--output", "OUT.safetensors", "--class-names", "gone.txt"], "no file of class names gone.txt"),
        (["--output", "OUT.safetensors", "--from", "jwyang"], "jwyang/faster-rcnn.pytorch is not converted"),
        (["--output", "OUT.safetensors", "--from", "msra"], "holds no ResNet"),
        (["--output", "OUT.safetensors", "--from", "mmdetection"], "no roi_head.shared_head.layer4"),
        (["--output", "OUT.pkl", "--to", "detectron2"], "is not a checkpoint of this project"),
        (["--output", "OUT.pkl", "--to", "detectron2", "--channel-order", "rgb"], "and --output alone"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(convert, tmp_path, arguments, message):
    path = save_pickle(tmp_path / "it.pkl", detectron2_state())
    (tmp_path / "names.json").write_text('["cat", "dog"]')
    places = {"NAMES": tmp_path / "names.json"}
    arguments = [places.get(a, tmp_path / a if a.startswith("OUT") else a) for a in arguments]
    status, _, error = convert(path, *arguments)
    assert status == 1 and message in error and "Traceback" not in error
    assert sorted(os.listdir(tmp_path)) == ["it.pkl", "names.json"]


def test_a_file_of_class_names_is_checked(tmp_path):
    path = save_pickle(tmp_path / "it.pkl", detectron2_state(num_classes=2))
    with pytest.raises(ValueError, match="accepted: detectron2, msra"):
        convert_file(path, "caffe")
    from detector.convert.class_names import read_class_names

    (tmp_path / "a.txt").write_text("cat\n dog \n")
    assert read_class_names(tmp_path / "a.txt") == ("cat", "dog")
    for text, message in (
        ("", "no class names"),
        ('["a", 1]', "no class names"),
        ("a\na\n", "names 'a' twice"),
    ):
        (tmp_path / "a.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_class_names(tmp_path / "a.txt")


def test_the_published_lists_of_classes_have_80_and_20_names():
    assert len(set(COCO)) == 80 and len(set(VOC)) == 20
    assert (COCO[0], COCO[79], VOC[0], VOC[19]) == ("person", "toothbrush", "aeroplane", "tvmonitor")
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    theirs = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert [name for name in theirs if name not in ("__background__", "N/A")] == list(COCO)
