"""Fine-tuning: what fits of a detector is kept, classes by their names, and what is new is said."""

import re

import pytest
import torch

import detector.run
import detector.training_run
from detector.build import build_model
from detector.checkpoint import Checkpoint, load_checkpoint, load_training_state, save_checkpoint
from detector.convert.converted import CAFFE_RESNET
from detector.run import Run
from detector.transfer import start_from

THEIRS = ("person", "star", "car", "circle", "dog")
OURS = ("circle", "cross", "triangle", "star")
PREDICTOR = "roi_heads.box_predictor"


@pytest.fixture(scope="module")
def trained(tiny_config):
    """A detector of other classes, with Caffe's preprocessing."""
    config = tiny_config()
    torch.manual_seed(1)
    return Checkpoint(build_model(config.model, 6).state_dict(), config, THEIRS, CAFFE_RESNET)


def test_classes_of_the_same_name_keep_their_rows_and_the_others_are_new(trained, tiny_config):
    config = tiny_config()
    torch.manual_seed(2)
    model = build_model(config.model, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = start_from(model, config.model, OURS, trained)
    after, given = model.state_dict(), trained.state_dict
    assert start.kept_classes == ("circle", "star") and start.new_classes == ("cross", "triangle")
    for layer, rows in (("cls_score", 1), ("bbox_pred", 4)):
        for kind in ("weight", "bias"):
            new, theirs, old = (
                state[f"{PREDICTOR}.{layer}.{kind}"].unflatten(0, (-1, rows))
                for state in (after, given, before)
            )
            # ours: background circle cross triangle star; theirs: background person star car circle dog
            assert torch.equal(new[[0, 1, 4]], theirs[[0, 4, 2]]) and torch.equal(new[2:4], old[2:4])
    others = [name for name in after if not name.startswith(PREDICTOR)]
    assert all(torch.equal(after[name], given[name]) for name in others)
    assert model.transform.preprocessing == CAFFE_RESNET and not start.new and not start.other_settings
    said = start.describe()
    assert "classes kept by name: circle, star" in said and "new classes: cross, triangle" in said
    assert f"kept: {len(after)} tensors: trunk " in said


@pytest.mark.parametrize(
    ("override", "new"),
    [
        ("model.anchor_sizes=[16,32,48]", 4),
        ("model.conventions={anchor_order: size_major}", 4),
        ("model.anchor_sizes=[20,40]", 0),
    ],
)
def test_the_rpns_outputs_are_new_where_its_anchors_are_others(trained, tiny_config, override, new):
    config = tiny_config(override)
    model = build_model(config.model, 5)
    before = model.rpn.head.cls_logits.weight.clone()
    start = start_from(model, config.model, OURS, trained)
    assert len(start.new) == new and all(name.startswith("rpn.head.") for name in start.new)
    assert torch.equal(model.rpn.head.cls_logits.weight, before) == bool(new)
    assert re.search(r"anchor_\w+", override)[0] in start.describe()


def test_settings_with_which_the_weights_were_not_trained_are_said(trained, tiny_config):
    config = tiny_config("model.conventions={roi_align_aligned: true}", "model.rpn_pre_nms_top_n_test=20")
    start = start_from(build_model(config.model, 5), config.model, OURS, trained)
    assert start.other_settings == ("roi_align_aligned is True, was False",)


def test_weights_of_frozen_norms_start_a_network_whose_norms_learn(trained, tiny_config):
    frozen = tiny_config("model.backbone={name: resnet18, width: 8, norm: frozen, weights: deferred}")
    state = {k: v for k, v in trained.state_dict.items() if not k.endswith("num_batches_tracked")}
    checkpoint = Checkpoint(state, frozen, THEIRS)
    config = tiny_config()
    model = build_model(config.model, 5)
    assert not start_from(model, config.model, OURS, checkpoint).new
    assert torch.equal(model.backbone.stage1.bn1.running_var, state["backbone.stage1.bn1.running_var"])


def test_another_network_is_refused(trained, tiny_config):
    config = tiny_config("model.backbone={name: resnet34, width: 8}")
    with pytest.raises(ValueError, match="are of resnet18, the recipe's backbone is resnet34; missing: "):
        start_from(build_model(config.model, 5), config.model, OURS, trained)


def test_a_run_starts_from_a_checkpoint_and_keeps_its_preprocessing_when_resumed(
    trained, tiny_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(detector.training_run, "plot_curves", lambda log_path, png_path: None)
    save_checkpoint(tmp_path / "theirs.safetensors", trained)
    config = tiny_config("train.epochs=1", "train.lr=1.0e-9", "data.val=null")
    cpu, output = torch.device("cpu"), tmp_path / "run"
    Run(config, output, cpu, start_from_path=tmp_path / "theirs.safetensors").train()
    said = capsys.readouterr().out
    assert f"start from {tmp_path / 'theirs.safetensors'}" in said and "new classes: cross, triangle" in said
    last = load_checkpoint(output / "last.safetensors")
    assert last.preprocessing == CAFFE_RESNET and last.class_names == OURS
    name = "backbone.stage4.0.branch.conv1.weight"
    torch.testing.assert_close(last.state_dict[name], trained.state_dict[name], rtol=0, atol=1e-6)
    assert load_training_state(output / "training_state.pt")["preprocessing"]["channel_order"] == "bgr"
    (output / "last.safetensors").unlink()
    arguments = {"resume": True, "start_from_path": tmp_path / "theirs.safetensors"}
    longer = config.model_copy(update={"train": config.train})
    (output / "last.safetensors").touch()
    Run(longer, output, cpu, **arguments).train()
    assert "start from" not in capsys.readouterr().out
