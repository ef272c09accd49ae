"""Whatever a stranger's file holds, a reader gives a sentence with the file's name, and no other exception."""

import io
import json
import pickle
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save
from short_runs import CPU, stop_after

from backbones.weights import read_state_dict, stored_preprocessing
from detector.checkpoint import load_checkpoint, newest_training_state
from detector.config import load_config
from detector.convert.class_names import read_class_names
from detector.convert.read import read_foreign
from detector.data.coco import load_coco
from detector.data.csv import CsvSource
from detector.data.find import find_data
from detector.data.labelme import LabelmeSource
from detector.data.sources import DataConfig, build_dataset
from detector.data.voc import load_voc
from detector.data.yolo import YoloSource, read_names
from detector.evaluation.coco import load_results
from detector.features import read_boxes
from detector.run import Run
from detector.stop import Interrupted

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


@pytest.fixture(autouse=True)
def denormal_numbers():
    """A run in the same process may have turned them off, and hypothesis refuses to go without."""
    torch.set_flush_denormal(False)


COCO = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "width": 20, "height": 10} for i in (1, 2)],
    "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3.5, 4], "area": 14, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 1, "bbox": [0, 0, 20, 10]},
    ],
}
RESULTS = [{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3.5, 4], "score": 0.5}]
BOXES = {"1.jpg": [[1, 2, 3, 4]], "images": [{"path": "1.jpg", "detections": [{"box": [1, 2, 3, 4]}]}]}
RECIPE = {
    "model": {
        "backbone": {"name": "resnet18", "width": 8, "weights": "file.pth"},
        "anchor_sizes": [16, 32],
        "conventions": {"name": "detectron2", "resize": "torch"},
        "preprocessing": {"mean": [1, 2, 3], "std": [1, 2, 3]},
    },
    "data": {
        "root": "pictures",
        "class_names": ["cat"],
        "train": [{"format": "shapes", "split": "train"}, {"format": "voc", "split": "train"}],
        "val": {"format": "coco", "images": "a", "annotations": "b"},
    },
    "augment": {"scale": [0.5, 2]},
    "train": {"lr": 0.01, "milestones": [1, 2]},
}
XML = """<annotation><filename>a.jpg</filename><size><width>20</width><height>10</height></size>
<object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax>
</bndbox></object></annotation>"""

ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    # A run on a CPU flushes denormal numbers to 0, for the whole process.
    | st.floats(allow_subnormal=False)
    | st.text(max_size=5)
    | st.sampled_from(
        ["", "0", "1e999", "\x1b[2J", "../..", "a\nb", "x" * 10_000, 2**31, 2**63, 2**70, -1, 1e300]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
TOKENS = [
    b"NaN",
    b"1e999",
    b"-1",
    b"null",
    b"true",
    b"[" * 3000,
    b"{",
    b'"',
    b"9" * 5000,
    b"\xff",
    b"\0",
    b"&a ",
    b"*a",
    b"!!",
    b"<a>",
    b"&b;",
]


@st.composite
def altered(draw, value, odd=ODD):
    """The value with one part, at any depth, replaced or taken away."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 5)) == 0:
        return draw(odd)
    key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    changed = value.copy()
    if draw(st.integers(0, 4)) == 0:
        del changed[key]
    else:
        changed[key] = draw(altered(value[key], odd))
    return changed


@st.composite
def damaged(draw, content):
    """The bytes with one to four places overwritten, cut out or filled in."""
    for _ in range(draw(st.integers(1, 4))):
        start, length = (
            draw(st.integers(0, len(content))),
            draw(st.sampled_from([0, 1, 1, 4, 50, len(content)])),
        )
        new = draw(st.binary(max_size=4) | st.sampled_from(TOKENS))
        content = content[:start] + new + content[start + length :]
    return content


def as_json(value):
    return json.dumps(value).encode()


def as_yaml(value):
    return yaml.dump(value).encode()


def torch_bytes(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def checkpoint_bytes(metadata):
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    return save({"weight": torch.zeros(2)}, texts)


METADATA = {
    "format": "fasterrcnn-c4",
    "version": "2",
    "config": {"model": {"backbone": {"name": "resnet18", "width": 8}}},
    "class_names": ["cat"],
    "preprocessing": {"mean": [1, 2, 3], "std": [1, 2, 3], "channel_order": "rgb", "scale": 1.0},
    "metrics": {},
}


@st.composite
def altered_metadata(draw):
    changed = draw(altered(METADATA))
    return checkpoint_bytes(changed if isinstance(changed, dict) else {"format": str(changed)})


@st.composite
def altered_xml(draw):
    """The XML with one text replaced."""
    texts = re.findall(">([^<]+)<", XML)
    return XML.replace(f">{draw(st.sampled_from(texts))}<", f">{draw(ODD | st.just('inf'))}<").encode(
        "utf-8", "replace"
    )


LABELME = {
    "imagePath": "a.jpg",
    "imageHeight": 10,
    "imageWidth": 20,
    "shapes": [
        {"label": "cat", "points": [[1, 2], [3, 4], [2, 9]], "shape_type": "polygon"},
        {"label": "dog", "points": [[5, 5], [7, 5]], "shape_type": "circle"},
    ],
}
YOLO_YAML = {
    "path": ".",
    "train": "JPEGImages",
    "val": ["JPEGImages"],
    "nc": 2,
    "names": {0: "cat", 1: "dog"},
}
YOLO = b"0 0.5 0.5 0.2 0.4\n1 0.1 0.1 0.4 0.2 0.3 0.9\n"
CSV = b"filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,20,10,cat,1,2,3,4\na.jpg,20,10,dog,2,2,9,9\n"
BBOX_CSV = b'image_id,width,height,bbox,source\na,20,10,"[1.0, 2.0, 3.0, 4.0]",farm_1\n'
RETINANET = b"a.jpg,1,2,3,4,cat\nb.jpg,,,,,\n"


def loader(source, **options):
    """Load the folder of a file, or the folder above it, which holds the pictures."""
    made = source(format=source.model_fields["format"].annotation.__args__[0], **options)
    return lambda path: made.select(made.read(path.parent.parent), path.parent.parent)


def read_found(path):
    """Find the data in the folder above, and read them."""
    found = find_data(path.parent.parent)
    config = DataConfig(root=found.root, **found.splits)
    return [build_dataset(config, split) for split in found.splits]


def read_coco(path):
    return load_coco(path.parent, path, check_pictures=False)


def read_voc(path):
    return load_voc(path.parent.parent, "train", one_based=False, check_pictures=False)


STATE = {
    **dict.fromkeys(("model", "optimizer", "schedule", "scaler", "config"), {"a": torch.zeros(2)}),
    **dict.fromkeys(("epoch", "batch", "step", "evaluations_since_best"), 1),
    "best": 0.5,
    "class_names": ["cat"],
}
WEIGHTS = {"a.weight": torch.zeros(3), "b": {"c": [1, "x"]}}
CASES = {
    "config": ("recipe.yaml", load_config, altered(RECIPE).map(as_yaml)),
    "config's bytes": ("recipe.yaml", load_config, damaged(as_yaml(RECIPE))),
    "checkpoint": ("best.safetensors", load_checkpoint, altered_metadata()),
    "checkpoint's bytes": ("best.safetensors", load_checkpoint, damaged(checkpoint_bytes(METADATA))),
    "preprocessing": ("w.safetensors", stored_preprocessing, altered_metadata()),
    "training state's bytes": ("training_state.pt", newest_training_state, damaged(torch_bytes(STATE))),
    "torch file": ("w.pth", read_state_dict, damaged(torch_bytes(WEIGHTS))),
    "old torch file": (
        "w.pth",
        read_state_dict,
        damaged(torch_bytes(WEIGHTS, _use_new_zipfile_serialization=False)),
    ),
    "foreign torch file": ("w.pth", read_foreign, damaged(torch_bytes(WEIGHTS))),
    "foreign pickle": (
        "w.pkl",
        read_foreign,
        damaged(pickle.dumps({"model": {"w": np.zeros(3)}})),
    ),
    "coco": ("a.json", read_coco, altered(COCO).map(as_json)),
    "coco's bytes": ("a.json", read_coco, damaged(as_json(COCO))),
    "results": ("r.json", lambda path: load_results(path, COCO), altered(RESULTS).map(as_json)),
    "boxes": (
        "b.json",
        lambda path: read_boxes(path, [path.with_name("1.jpg")]),
        altered(BOXES).map(as_json),
    ),
    "class names": ("names.txt", read_class_names, damaged(b'["cat", "dog"]')),
    "voc": ("Annotations/a.xml", read_voc, altered_xml()),
    "voc's bytes": ("Annotations/a.xml", read_voc, damaged(XML.encode())),
    "yolo's bytes": (
        "labels/a.txt",
        loader(YoloSource, images="JPEGImages", labels="labels"),
        damaged(YOLO),
    ),
    "yolo's names": ("data.yaml", lambda path: read_names(path, 10**6), altered(YOLO_YAML).map(as_yaml)),
    "csv's bytes": ("tables/a.csv", loader(CsvSource, annotations="tables/a.csv"), damaged(CSV)),
    "csv's bytes with bbox": (
        "tables/a.csv",
        loader(CsvSource, annotations="tables/a.csv"),
        damaged(BBOX_CSV),
    ),
    "csv's bytes without header": (
        "tables/a.csv",
        loader(CsvSource, annotations="tables/a.csv"),
        damaged(RETINANET),
    ),
    "labelme": ("labels/a.json", loader(LabelmeSource), altered(LABELME).map(as_json)),
    "labelme's bytes": ("labels/a.json", loader(LabelmeSource), damaged(as_json(LABELME))),
    "found coco": ("labels/a.json", read_found, altered(COCO).map(as_json)),
    "found coco's bytes": ("labels/a.json", read_found, damaged(as_json(COCO))),
    "found labelme": ("labels/a.json", read_found, altered(LABELME).map(as_json)),
    "found yolo": ("labels/data.yaml", read_found, altered(YOLO_YAML).map(as_yaml)),
    "found yolo's bytes": ("labels/data.yaml", read_found, damaged(as_yaml(YOLO_YAML))),
    "found texts": ("labels/a.txt", read_found, damaged(YOLO)),
    "found csv": ("tables/a.csv", read_found, damaged(CSV)),
    "found voc": ("labels/a.xml", read_found, damaged(XML.encode())),
}


@pytest.mark.parametrize("examples", [40, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_a_damaged_file_is_read_or_refused_by_name(case, examples, tmp_path):
    name, reader, contents = CASES[case]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a")
    (tmp_path / "JPEGImages").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "JPEGImages" / "a.jpg")

    @hypothesis.settings(max_examples=examples, deadline=None, database=None, derandomize=examples < 1000)
    @hypothesis.given(contents)
    def check(content):
        path.write_bytes(content)
        try:
            reader(path)
        except (ValueError, FileNotFoundError) as error:
            assert path.name in str(error) or str(tmp_path) in str(error)
            assert len(str(error)) < 5000 and "weights_only" not in str(error)

    check()


ODD_PARTS = ODD | st.sampled_from([torch.zeros(()), torch.zeros(3, 5), torch.ones(2, dtype=torch.int64)])


@pytest.mark.parametrize("examples", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_an_altered_training_state_resumes_or_is_refused_by_name(varied, examples, tmp_path, monkeypatch):
    stop_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        Run(varied, tmp_path, CPU).train()
    path = tmp_path / "training_state.pt"
    (tmp_path / "training_state.previous.pt").unlink()
    whole = torch.load(path)

    @hypothesis.settings(max_examples=examples, deadline=None, database=None, derandomize=examples < 1000)
    @hypothesis.given(altered(whole, ODD_PARTS))
    def check(state):
        torch.save(state, path)
        try:
            training = Run(varied, tmp_path, CPU, resume=True).training
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path) in str(error) or "--resume continues" in str(error)
            return
        for parameter in training.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        training.optimizer.step()
        training.schedule.step()
        training.ema.update_parameters(training.model)

    check()
