"""Checkpoints: what was saved comes back, whole or not at all, and nothing in a file is run."""

import dataclasses
import pickle

import pytest
import torch
from safetensors.torch import save_file

import backbones.weights
from backbones import Preprocessing
from detector.build import build_model
from detector.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_training_state,
    parse_stored_config,
    save_checkpoint,
    save_training_state,
)
from detector.files import write_atomically, write_json

NAMES = ("circle", "cross", "triangle", "star")
CAFFE_RESNET = Preprocessing((102.98, 115.95, 122.77), (1.0, 1.0, 1.0), "bgr", 255.0)


@pytest.fixture(scope="module")
def checkpoint(tiny_config):
    config = tiny_config()
    torch.manual_seed(0)
    model = build_model(config.model, 5)
    return Checkpoint(model.state_dict(), config, NAMES, CAFFE_RESNET, {"AP": 0.25, "APl": None})


def test_all_that_was_saved_comes_back(checkpoint, tmp_path):
    save_checkpoint(tmp_path / "best.safetensors", checkpoint)
    loaded = load_checkpoint(tmp_path / "best.safetensors")
    assert loaded.config == checkpoint.config
    assert loaded.class_names == NAMES and loaded.metrics == {"AP": 0.25, "APl": None}
    assert loaded.preprocessing == CAFFE_RESNET
    assert loaded.state_dict.keys() == checkpoint.state_dict.keys()
    assert all(torch.equal(loaded.state_dict[k], v) for k, v in checkpoint.state_dict.items())


def test_the_built_model_is_the_saved_one_with_its_preprocessing(checkpoint, tmp_path):
    save_checkpoint(tmp_path / "best.safetensors", checkpoint)
    model = load_checkpoint(tmp_path / "best.safetensors").build()
    assert not model.training and model.transform.preprocessing == CAFFE_RESNET
    image = torch.rand(3, 64, 64)
    reference = checkpoint.build()
    for wanted, got in zip(reference([image])[0].values(), model([image])[0].values(), strict=True):
        assert torch.equal(wanted, got)


def test_an_override_of_the_preprocessing_is_heard(checkpoint):
    override = "model.preprocessing={mean: [1, 2, 3], std: [4, 5, 6], channel_order: bgr, scale: 255}"
    model = checkpoint.with_overrides([override]).build()
    assert model.transform.preprocessing == Preprocessing((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), "bgr", 255.0)


@pytest.mark.parametrize("before", [b"the old file", None])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, before):
    path = tmp_path / "file.bin"
    if before is not None:
        path.write_bytes(before)

    def fail(temporary):
        temporary.write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["file.bin"])
    assert before is None or path.read_bytes() == before


def test_a_failing_checkpoint_leaves_the_old_one(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, checkpoint)
    old = path.read_bytes()

    def fail(tensors, temporary, metadata):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("detector.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, checkpoint)
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_has_the_mode_of_other_files(checkpoint, tmp_path):
    (tmp_path / "other").touch()
    save_checkpoint(tmp_path / "saved.safetensors", checkpoint)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_json_is_written_whole_into_new_folders_and_refuses_nan(tmp_path):
    write_json(tmp_path / "new" / "folder" / "a.json", {"name": "Größe"})
    assert (tmp_path / "new" / "folder" / "a.json").read_text(encoding="utf-8") == '{"name": "Größe"}\n'
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "b.json", {"AP": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone.safetensors"):
        load_checkpoint(tmp_path / "gone.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"nothing to resume from: .*training_state.pt does not exist"
    ):
        load_training_state(tmp_path / "training_state.pt")


def test_a_folder_is_refused_with_the_checkpoint_inside_it(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="is a folder; give a file$"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "best.safetensors", checkpoint)
    with pytest.raises(ValueError, match="is a folder; give a file, such as .*best.safetensors"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"some text\n", b"PK\x03\x04" + bytes(100)])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="a.safetensors is damaged, cut short, or no file of tensors"):
        load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [100, -1])
def test_a_truncated_checkpoint_is_refused(checkpoint, tmp_path, length):
    save_checkpoint(tmp_path / "a.safetensors", checkpoint)
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:length])
    with pytest.raises(ValueError, match="is damaged, cut short, or no file of tensors"):
        load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_tensors_are_refused(tmp_path, metadata):
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="holds tensors but no detector"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_a_checkpoint_of_a_later_version_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("detector.checkpoint.VERSION", 99)
    save_checkpoint(tmp_path / "a.safetensors", checkpoint)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is of version 99; this program reads up to 2"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_a_config_of_version_1_is_read_into_its_new_places(tiny_config):
    now = tiny_config("model.conventions=detectron2", "speed.fold_norms=false", "model.box_nms_thresh=0.4")
    then = now.model_dump(mode="json")
    model = then["model"]
    model |= model.pop("conventions") | then.pop("speed") | {"rpn_nms_thresh": None, "bbox_reg_weights": None}
    assert parse_stored_config(then, 1, "a file") == now
    assert parse_stored_config(now.model_dump(mode="json"), 2, "a file") == now


class Code:
    def __reduce__(self):
        return (print, ("code ran",))


def test_code_in_a_training_state_is_never_run(tmp_path, capsys):
    path = tmp_path / "training_state.pt"
    torch.save({"model": Code()}, path)
    with pytest.raises(
        ValueError, match="training_state.pt (asks for|is damaged, cut short, or no file of tensors)"
    ):
        load_training_state(path)
    path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match="it may hold code, which is never run"):
        load_training_state(path)
    assert "code ran" not in capsys.readouterr().out


def test_a_truncated_training_state_is_refused(tmp_path):
    path = tmp_path / "training_state.pt"
    save_training_state(path, {"step": 3, "weights": torch.zeros(1000)})
    assert load_training_state(path)["step"] == 3
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(
        ValueError, match="training_state.pt (asks for|is damaged, cut short, or no file of tensors)"
    ):
        load_training_state(path)


@pytest.mark.parametrize("change", ["shape", "missing", "added", "classes"])
def test_weights_that_do_not_fit_the_config_are_refused(checkpoint, tiny_config, change):
    state = dict(checkpoint.state_dict)
    names = NAMES[:2] if change == "classes" else NAMES
    config = tiny_config("model.backbone.width=16") if change == "shape" else checkpoint.config
    if change == "missing":
        state.pop("rpn.head.cls_logits.weight")
    if change == "added":
        state["more"] = torch.zeros(1)
    with pytest.raises(
        ValueError,
        match=r"the weights do not fit the config beside them; (missing|unknown|of another shape): ",
    ):
        Checkpoint(state, config, names).build()


def test_a_frozen_norm_checkpoint_is_built_without_the_published_weights(tiny_config, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the published weights were asked for")

    monkeypatch.setattr(backbones.weights, "_published", refuse)
    config = tiny_config("model.backbone={name: resnet18, norm: frozen, weights: imagenet_v1}")
    model = build_model(config.model, 5, load_weights=False)
    saved = Checkpoint(model.state_dict(), config, NAMES)
    save_checkpoint(tmp_path / "best.safetensors", saved)
    loaded = load_checkpoint(tmp_path / "best.safetensors")
    assert loaded.build().state_dict().keys() == saved.state_dict.keys()
    with pytest.raises(AssertionError, match="published weights were asked for"):
        build_model(config.model, 5)


def test_a_checkpoint_is_frozen(checkpoint):
    with pytest.raises(dataclasses.FrozenInstanceError):
        checkpoint.class_names = ()
