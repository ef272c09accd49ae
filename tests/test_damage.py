"""Forty kinds of damage: each is a sentence with the file's name, or an object that is left out and told."""

import io
import json
import pickle
import struct

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from backbones import create_backbone
from backbones.weights import read_state_dict
from detector.checkpoint import load_checkpoint
from detector.data.coco import load_coco
from detector.data.voc import load_voc

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def torch_bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class Code:
    def __reduce__(self):
        return print, ("code ran",)


WEIGHTS = {
    "empty": (b"", "it begins with b''"),
    "text": (b"hello world", "it begins with b'hello world'"),
    "a web page": (b"<!DOCTYPE html><html>", "it begins with b'<!DOCTYPE ht"),
    "zeros": (bytes(100), "it begins with"),
    "a Git LFS pointer": (
        LFS_POINTER,
        "a Git LFS pointer; get the file that it points to with: git lfs pull",
    ),
    "half a file": (torch_bytes({"w": torch.zeros(99)})[:700], "is damaged, cut short"),
    "a zip of nothing": (b"PK\x03\x04" + bytes(100), "is damaged, cut short"),
    "code": (pickle.dumps(Code()), "it may hold code, which is never run"),
    "code in a torch file": (torch_bytes({"w": Code()}), "asks for print|builtins.print|is never run"),
    "a list": (torch_bytes([torch.zeros(1)]), "holds list, not a state dict of tensors"),
    "a tensor": (torch_bytes(torch.zeros(1)), "holds Tensor, not a state dict of tensors"),
    "a whole module": (torch_bytes(torch.nn.ReLU()), "asks for torch.nn.modules.activation.ReLU"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_damaged_weights_are_refused_by_name_and_without_torchs_advice(tmp_path, kind, capsys, recwarn):
    content, message = WEIGHTS[kind]
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"weights\.pth .*({message})") as caught:
        read_state_dict(path)
    assert "weights_only" not in str(caught.value) and len(str(caught.value)) < 500
    assert "code ran" not in capsys.readouterr().out and not recwarn.list


METADATA = {
    "format": "fasterrcnn-c4",
    "version": "2",
    "config": '{"model": {"backbone": "resnet18"}}',
    "class_names": '["cat"]',
    "preprocessing": '{"mean": [0, 0, 0], "std": [1, 1, 1], "channel_order": "rgb", "scale": 1.0}',
    "metrics": "{}",
}
CHECKPOINTS = {
    "no version": ({"version": None}, "version is missing"),
    "a version in words": ({"version": "two"}, "version is 'two'"),
    "a later version": ({"version": "99"}, "is of version 99; this program reads up to 2"),
    "no class names": ({"class_names": None}, "class_names is missing"),
    "a number for class names": ({"class_names": "3"}, "class_names is 3"),
    "half the config": ({"config": '{"model": '}, "config is .*Invalid JSON"),
    "nested config": ({"config": "[" * 100_000}, "config is .*recursion limit"),
    "a config without a model": ({"config": "{}"}, "model is missing"),
    "an old config without a model": ({"version": "1", "config": "{}"}, "has no section model"),
    "an unknown backbone": ({"config": '{"model": {"backbone": "x"}}'}, "there is no backbone 'x'"),
    "a preprocessing without mean": ({"preprocessing": "{}"}, r"preprocessing\.mean is missing"),
    "a preprocessing of nan": (
        {"preprocessing": '{"mean": [NaN, 0, 0], "std": [1, 1, 1]}'},
        "mean and std are three numbers",
    ),
    "no metrics": ({"metrics": "[]"}, "metrics is"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_damaged_metadata_are_refused_by_name(tmp_path, kind):
    changes, message = CHECKPOINTS[kind]
    metadata = {key: value for key, value in {**METADATA, **changes}.items() if value is not None}
    path = tmp_path / "best.safetensors"
    path.write_bytes(save({"w": torch.zeros(1)}, metadata))
    with pytest.raises(ValueError, match=rf"(?s)best\.safetensors.*{message}") as caught:
        load_checkpoint(path)
    assert len(str(caught.value)) < 1500


def test_the_undamaged_metadata_are_read(tmp_path):
    (tmp_path / "best.safetensors").write_bytes(save({"w": torch.zeros(1)}, METADATA))
    assert load_checkpoint(tmp_path / "best.safetensors").class_names == ("cat",)


@pytest.mark.parametrize(
    "content", [struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 10) + b"{", LFS_POINTER, b"PK\x03\x04"]
)
def test_a_damaged_header_is_refused_by_name(tmp_path, content):
    (tmp_path / "best.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"best\.safetensors is damaged, cut short, or no file of tensors"):
        load_checkpoint(tmp_path / "best.safetensors")


def test_a_preprocessing_that_a_stranger_wrote_is_refused_by_name(tmp_path):
    path = tmp_path / "backbone.safetensors"
    path.write_bytes(save({"w": torch.zeros(1)}, {"preprocessing": '{"mean": "abc"}'}))
    with pytest.raises(ValueError, match=r"backbone\.safetensors is damaged"):
        create_backbone("resnet18", weights=str(path))


def xml(size="<width>20</width><height>10</height>", name="cat", box="1 2 9 8", tail=""):
    corners = "".join(
        f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=False)
    )
    thing = f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
    return f"<annotation><filename>a.jpg</filename><size>{size}</size>{thing}{tail}</annotation>".encode()


XML = {
    "empty": b"",
    "text": b"hello",
    "cut short": xml()[:-20],
    "another encoding": xml(name="gr\u00fc\u00df").decode().encode("latin1"),
    "an unknown entity": xml(name="&cat;"),
    "a file as an entity": b'<!DOCTYPE a [<!ENTITY c SYSTEM "file:///etc/hostname">]>' + xml(name="&c;"),
    "a box of words": xml(box="one two three four"),
    "a box of three": xml(box="1 2 3"),
    "an infinite box": xml(box="1 2 inf 8"),
    "a box outside": xml(box="100 100 200 200"),
    "no class": xml(name=""),
    "two roots": xml() + xml(),
}


@pytest.mark.parametrize("kind", XML)
def test_damaged_xml_is_refused_or_told_by_name_and_its_neighbour_is_kept(tmp_path, kind):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb\n")
    for stem, content in (("a", XML[kind]), ("b", xml())):
        (tmp_path / f"Annotations/{stem}.xml").write_bytes(content)
        Image.new("RGB", (20, 10)).save(tmp_path / f"JPEGImages/{stem}.jpg")
    try:
        dataset = load_voc(tmp_path, "train")
    except ValueError as error:
        assert "a.xml" in str(error) and len(str(error)) < 500
    else:
        assert "a.xml" in dataset.problems[0] and sum(dataset.box_counts().values()) == 1


def coco(**changes):
    thing = {"id": 2, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], **changes}
    sound = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 20, "height": 10}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [sound, thing],
    }


JSON = {
    "empty": b"",
    "text": b"hello",
    "cut short": json.dumps(coco()).encode()[:-10],
    "another encoding": json.dumps(coco()).replace("cat", "gr\u00fc\u00df").encode("latin1"),
    "a list": b"[]",
    "nested": b"[" * 100_000,
    "a huge number": json.dumps(coco(image_id=0))
    .replace('"image_id": 0', '"image_id": ' + "9" * 5000)
    .encode(),
    "an unknown image": json.dumps(coco(image_id=9)).encode(),
    "an unknown category": json.dumps(coco(category_id=9)).encode(),
    "a category in words": json.dumps(coco(category_id="cat")).encode(),
    "a box of words": json.dumps(coco(bbox=["a", 1, 2, 3])).encode(),
    "a box of three": json.dumps(coco(bbox=[1, 2, 3])).encode(),
    "a box of nan": json.dumps(coco(bbox=[1, 2, float("nan"), 3])).encode(),
    "a box without area": json.dumps(coco(bbox=[1, 2, 0, 3])).encode(),
    "a box outside": json.dumps(coco(bbox=[100, 2, 3, 3])).encode(),
    "an id twice": json.dumps({**coco(), "images": coco()["images"] * 2}).encode(),
}


@pytest.mark.parametrize("kind", JSON)
def test_damaged_json_is_refused_or_told_by_name_and_its_neighbour_is_kept(tmp_path, kind):
    path = tmp_path / "train.json"
    path.write_bytes(JSON[kind])
    try:
        dataset = load_coco(tmp_path, path, check_pictures=False)
    except ValueError as error:
        assert "train.json" in str(error) and len(str(error)) < 500
    else:
        assert "train.json" in dataset.problems[0] and sum(dataset.box_counts().values()) == 1
