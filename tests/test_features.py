"""Vectors of regions: the detector's own, from one pass of the trunk, and on disk as people's programs read them."""

import base64
import csv
import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from backbones import IMAGENET
from detector import Detector, processes
from detector.build import build_model
from detector.checkpoint import Checkpoint, save_checkpoint
from detector.convert.converted import CAFFE_RESNET
from detector.feature_files import TSV_FIELDS
from detector.features import check_boxes, extract_regions, read_boxes
from detector.inference import to_tensor
from detector.names import file_names, image_ids

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("circle", "cross", "triangle", "star")
C5 = 64  # of a ResNet-18 of width 8


@pytest.fixture(scope="module")
def checkpoint(tiny_config):
    """Random weights: with five classes, scores around 0.2."""
    config = tiny_config("model.box_detections_per_img=10")
    torch.manual_seed(0)
    return Checkpoint(build_model(config.model, 5).state_dict(), config, NAMES)


@pytest.fixture(scope="module")
def detector(checkpoint):
    return Detector.load(checkpoint, "cpu")


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)


@pytest.fixture
def trunk_calls(detector):
    """A list that grows by the batch size whenever the trunk runs."""
    calls = []
    hook = detector.model.backbone.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    yield calls
    hook.remove()


def random_boxes(count, height=50, width=80):
    corners = np.sort(np.random.default_rng(1).uniform(0, (width, height), (count, 2, 2)), axis=1)
    corners[:, 1] += 1
    return torch.from_numpy(corners.reshape(count, 4)).float()


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# Detector


def test_a_thousand_boxes_take_one_run_of_the_trunk_and_equal_each_alone(detector, picture, trunk_calls):
    boxes = random_boxes(1000)
    vectors = detector.features(picture, boxes)
    assert trunk_calls == [1] and vectors.shape == (1000, C5) and vectors.dtype == torch.float32
    for index in (0, 500, 999):
        close(vectors[index], detector.features(picture, boxes[index : index + 1])[0])
    assert len({tuple(v) for v in vectors.tolist()}) > 900


def test_features_of_boxes_equal_those_that_come_with_the_detections(detector, picture, trunk_calls):
    found = detector(picture, features=True)
    assert len(found) and trunk_calls == [1]
    close(detector.features(picture, found.boxes), found.features)


def test_boxes_are_taken_as_lists_and_arrays_and_none_is_an_empty_result(detector, picture):
    boxes = random_boxes(3)
    wanted = detector.features(picture, boxes)
    assert torch.equal(detector.features(picture, boxes.tolist()), wanted)
    assert torch.equal(detector.features(picture, boxes.numpy()), wanted)
    bgr = np.ascontiguousarray(picture[:, :, ::-1])
    assert torch.equal(detector.features(bgr, boxes, channel_order="bgr"), wanted)
    assert detector.features(picture, []).shape == (0, C5)
    assert detector.features(picture, [[-5, -5, 200, 90]]).isfinite().all()  # partly outside


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0, 0, 5, 5], [3, 3, 3, 9]], r"box 1 is \[3.0, 3.0, 3.0, 9.0\]; accepted: \[x1, y1, x2, y2\]"),
        (torch.tensor([[0, 0, float("nan"), 5]]), r"box 0 is \[0.0, 0.0, nan, 5.0\]"),
        ([[0, 0, 5]], r"box 0 is \[0, 0, 5\]"),
        ([[0, 0, "5", 5]], r"box 0 is \[0, 0, '5', 5\]"),
        (torch.zeros(2, 5), r"boxes are \(2, 5\); accepted: \(M, 4\)"),
        (5, "boxes are '5'; accepted: a list of"),
    ],
)
def test_a_bad_box_is_named(boxes, message):
    with pytest.raises(ValueError, match=message):
        check_boxes(boxes)


def test_class_scores_are_the_posterior_that_each_score_is_of(detector, picture):
    found = detector(picture, class_scores=True)
    assert found.class_scores.shape == (len(found), 5) and detector(picture).class_scores is None
    close(found.class_scores.sum(1), torch.ones(len(found)))
    close(found.class_scores.gather(1, found.labels[:, None])[:, 0], found.scores)
    middle = float(found.scores[len(found) // 2])
    assert torch.equal(found.above(middle).class_scores, found.class_scores[found.scores > middle])


def test_class_agnostic_nms_leaves_no_two_boxes_on_each_other_for_one_call(checkpoint, picture):
    detector = Detector.load(checkpoint.with_overrides(["model.box_detections_per_img=100"]), "cpu")

    def overlaps(found):
        return (box_iou(found.boxes, found.boxes).fill_diagonal_(0) > 0.5).any()

    usual = detector(picture)
    assert overlaps(usual)
    assert not overlaps(detector(picture, class_agnostic_nms=True))
    assert torch.equal(detector(picture).boxes, usual.boxes)


# Regions


def test_regions_carry_boxes_vectors_scores_and_posteriors(detector, picture, trunk_calls):
    tensor = to_tensor(picture)
    own, proposals = (extract_regions(detector.model, [tensor], r)[0] for r in ("detections", "proposals"))
    boxes = random_boxes(7)
    given = extract_regions(detector.model, [tensor], boxes=[boxes])[0]
    assert trunk_calls == [1, 1, 1]
    found = detector(picture, features=True, class_scores=True)
    for name in ("boxes", "features", "scores", "labels", "class_scores"):
        close(getattr(own, name), getattr(found, name))
    assert len(proposals.boxes) == 16  # rpn_post_nms_top_n_test
    assert (proposals.boxes >= 0).all() and (proposals.boxes <= torch.tensor([80, 50, 80, 50])).all()
    assert torch.equal(given.boxes, boxes)
    for regions in (proposals, given):
        close(regions.features, detector.features(picture, regions.boxes))
        best = regions.class_scores[:, 1:].max(1)
        assert torch.equal(regions.scores, best.values) and torch.equal(regions.labels, best.indices + 1)
        assert regions.image_size == (50, 80)


def test_several_images_of_one_size_are_as_each_alone(detector, picture):
    tensors = [to_tensor(picture), to_tensor(picture[:, ::-1])]
    together = extract_regions(detector.model, tensors, "proposals")
    for tensor, regions in zip(tensors, together, strict=True):
        alone = extract_regions(detector.model, [tensor], "proposals")[0]
        close(regions.boxes, alone.boxes)
        close(regions.features, alone.features)


@pytest.mark.parametrize("regions", ["detections", "proposals", "boxes"])
def test_vectors_of_an_image_do_not_depend_on_the_sizes_of_its_neighbours(detector, picture, regions):
    tensors = [to_tensor(p) for p in (picture, picture[:25], picture.transpose(1, 0, 2), picture[:, ::-1])]
    boxes = [random_boxes(5, *tensor.shape[1:]) for tensor in tensors] if regions == "boxes" else None
    arguments = [] if boxes else [regions]
    together = extract_regions(detector.model, tensors, *arguments, boxes=boxes)
    for row, tensor in enumerate(tensors):
        given = boxes and boxes[row : row + 1]
        (alone,) = extract_regions(detector.model, [tensor], *arguments, boxes=given)
        assert len(alone.boxes) and together[row].image_size == tuple(tensor.shape[1:])
        for name in ("features", "class_scores"):
            close(getattr(together[row], name), getattr(alone, name))
        torch.testing.assert_close(together[row].boxes, alone.boxes, rtol=1e-4, atol=1e-3)


def test_an_image_without_regions_gives_none(detector, picture):
    regions = extract_regions(detector.model, [to_tensor(picture)], boxes=[torch.zeros(0, 4)])[0]
    assert regions.features.shape == (0, C5) and regions.class_scores.shape == (0, 5)
    with pytest.raises(ValueError, match="regions is 'anchors'; accepted: detections, proposals"):
        extract_regions(detector.model, [to_tensor(picture)], "anchors")


# Files of boxes, names and ids


def test_boxes_come_from_a_mapping_or_from_infers_json(tmp_path):
    images = [tmp_path / "a.jpg", tmp_path / "more" / "b.jpg"]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"a.jpg": [[0, 0, 5, 5.5]], str(images[1]): [], "other.jpg": []}))
    boxes = read_boxes(path, images)
    assert boxes[images[0]].tolist() == [[0, 0, 5, 5.5]] and boxes[images[1]].shape == (0, 4)
    path.write_text(json.dumps([{"image_id": 2, "category_id": 1, "bbox": [1, 2, 2, 2], "score": 0.5}]))
    entries = [{"id": number, "file_name": str(image)} for number, image in enumerate(images, start=1)]
    (tmp_path / "images.json").write_text(json.dumps({"images": entries, "categories": []}))
    boxes = read_boxes(path, images)
    assert boxes[images[0]].shape == (0, 4) and boxes[images[1]].tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "boxes.json: not a JSON file"),
        ("[]", "boxes.json: accepted are .* with its images.json beside it"),
        ('{"b.jpg": []}', "boxes.json has no boxes of a.jpg"),
        ('{"a.jpg": [[0, 0, 5, 5], [5, 0, 0, 5]]}', r"boxes.json: a.jpg: box 1 is \[5.0, 0.0, 0.0, 5.0\]"),
        ('{"a.jpg": [[0, 0, 5]]}', r"boxes.json: a.jpg: box 0 is \[0, 0, 5\]; accepted"),
        ('{"a.jpg": [[0, 0, 5, NaN]]}', r"boxes.json: a.jpg: box 0 is \[0.0, 0.0, 5.0, nan\]"),
        ('{"a.jpg": {"x": 1}}', "boxes.json: a.jpg: box: boxes are"),
        ("3", "boxes.json: accepted are"),
    ],
)
def test_a_bad_file_of_boxes_is_one_sentence_with_file_and_index(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("boxes.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_boxes("boxes.json", [Path("a.jpg")])
    assert "\n" not in str(caught.value)


def test_files_are_named_after_their_pictures_and_each_apart():
    images = [Path(p) for p in ("/a/x.jpg", "/b/x.jpg", "/b/x.png", "/b/y.png")]
    assert list(file_names(images).values()) == ["a_x", "b_x", "b_x_2", "y"]


def test_ids_are_the_numbers_that_end_the_names_where_all_have_one():
    images = [Path("COCO_val2014_000000391895.jpg"), Path("000000000042.jpg")]
    assert list(image_ids(images).values()) == ["391895", "42"]
    assert list(image_ids([Path("42.jpg"), Path("street.jpg")]).values()) == ["42", "street"]
    assert list(image_ids([Path("a_1.jpg"), Path("b_1.jpg")]).values()) == ["a_1", "b_1"]


def test_a_long_name_is_cut_and_stays_apart_from_its_neighbours():
    images = [Path(f"{'ü' * 124}{end}.jpg") for end in ("a", "b")]
    assert [len(name.encode()) for name in file_names(images).values()] == [200, 202]
    assert len(set(file_names(images).values())) == 2


def test_an_id_is_one_field_of_one_line():
    images = [Path("a\tb\nc\rd.jpg"), Path("caf\udce9.jpg")]
    assert list(image_ids(images).values()) == [r"a\tb\nc\rd", r"caf\udce9"]


# tools/extract_features.py


@pytest.fixture(scope="module")
def weights(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    save_checkpoint(path, checkpoint)
    return path


@pytest.fixture
def pictures(tmp_path, picture):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(np.roll(picture, 9 * number, axis=1)[: 50 - number]).save(
            folder / f"img_{number}.png"
        )
    return folder


@pytest.fixture
def extract(monkeypatch, capsys, weights):
    """extract(argument, ...) -> (exit status, standard output, standard error) of tools/extract_features.py."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = import_module("extract_features")

    def run(*arguments):
        line = ["extract_features.py", "--weights", str(weights), "--device", "cpu", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", line)
        capsys.readouterr()
        return module.main(), *capsys.readouterr()

    return run


def read_tsv(path):
    """As the programs around bottom-up attention read it."""
    csv.field_size_limit(sys.maxsize)
    with open(path, newline="") as file:
        for item in csv.DictReader(file, delimiter="\t", fieldnames=TSV_FIELDS):
            count = int(item["num_boxes"])
            for field in ("boxes", "features"):
                raw = base64.decodebytes(item[field].encode())
                item[field] = np.frombuffer(raw, dtype=np.float32).reshape(count, -1)
            yield item


def test_an_npz_of_each_picture_holds_what_the_detector_gives(extract, detector, pictures, tmp_path):
    status, out, error = extract(pictures, "--output", tmp_path / "out")
    assert (status, error) == (0, "") and "4 pictures' features are in" in out
    for path in sorted(pictures.iterdir()):
        found = detector(path, features=True, class_scores=True)
        with np.load(tmp_path / "out" / f"{path.stem}.npz") as stored:
            for name in ("boxes", "features", "scores", "labels", "class_scores"):
                close(torch.from_numpy(stored[name]), getattr(found, name))
            assert stored["image_size"].tolist() == [50 - int(path.stem[-1]), 80]
            assert str(stored["path"]) == str(path) and stored["features"].dtype == np.float32
    settings = json.loads((tmp_path / "out" / "extraction.json").read_text())
    assert settings["class_names"] == ["background", *NAMES] and settings["regions"] == "detections"


def test_the_tsv_is_read_as_bottom_up_attention_reads_it(extract, detector, pictures, tmp_path):
    boxes = {path.name: random_boxes(5).tolist() for path in pictures.iterdir()}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    output = tmp_path / "features.tsv"
    status, _, _ = extract(pictures, "--boxes", tmp_path / "boxes.json", "--output", output, "--batch", 3)
    rows = list(read_tsv(output))
    assert status == 0 and [row["image_id"] for row in rows] == ["0", "1", "2", "3"]
    assert [(row["image_w"], row["image_h"]) for row in rows] == [("80", str(50 - i)) for i in range(4)]
    assert np.array_equal(rows[2]["boxes"], random_boxes(5).numpy())
    assert rows[2]["features"].shape == (5, C5)
    wanted = detector.features(pictures / "img_3.png", random_boxes(5))  # alone in its batch
    close(torch.from_numpy(rows[3]["features"].copy()), wanted)


def test_a_fixed_number_of_boxes_is_a_setting_of_the_recipe(extract, pictures, tmp_path):
    settings = ["model.box_score_thresh=0", "model.box_detections_per_img=3", "model.class_agnostic_nms=true"]
    assert extract(pictures, *settings, "--output", tmp_path / "out.tsv")[0] == 0
    assert [row["num_boxes"] for row in read_tsv(tmp_path / "out.tsv")] == ["3"] * 4


def test_a_stopped_extraction_continues_where_it_was(extract, pictures, tmp_path, monkeypatch):
    # A measurement chooses the convolutions' form, and a busy machine may choose another one next time.
    monkeypatch.setattr("backbones.kernels.winograd._time", lambda *args: 1.0)
    for output in (tmp_path / "npz", tmp_path / "all.tsv"):
        assert extract(pictures, "--output", output)[0] == 0
    whole = (tmp_path / "all.tsv").read_bytes()
    first = whole.index(b"\n") + 1
    (tmp_path / "all.tsv").write_bytes(whole[: first + 1000])  # the second line is torn
    status, out, _ = extract(pictures, "--output", tmp_path / "all.tsv")
    assert status == 0 and "1 of 4 pictures are done already" in out
    assert (tmp_path / "all.tsv").read_bytes() == whole
    kept, lost = tmp_path / "npz" / "img_0.npz", tmp_path / "npz" / "img_2.npz"
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    status, out, _ = extract(pictures, "--output", tmp_path / "npz")
    assert status == 0 and "3 of 4 pictures are done already" in out and "1 pictures' features" in out
    assert lost.exists() and kept.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("name", ["npz", "all.tsv"])
def test_processes_share_the_pictures_and_together_do_each_once(
    extract, pictures, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        assert extract(pictures, "--output", tmp_path / name)[0] == 0
        if name == "npz":
            assert len(list((tmp_path / name).glob("*.npz"))) == (2, 3, 4)[rank]
        else:
            ids = [row["image_id"] for row in read_tsv(tmp_path / f"all.{rank}of3.tsv")]
            assert ids == [["0", "3"], ["1"], ["2"]][rank]


def test_features_of_other_settings_are_not_mixed(extract, pictures, tmp_path):
    assert extract(pictures, "--output", tmp_path / "out")[0] == 0
    status, _, error = extract(pictures, "--output", tmp_path / "out", "--regions", "proposals")
    assert status == 1 and "an extraction with other settings (regions)" in error and error.count("\n") == 1
    other = tmp_path / "other"
    other.mkdir()
    (pictures / "img_1.png").rename(other / "img_0.png")
    status, _, error = extract(other, "--output", tmp_path / "out")
    assert status == 1 and "img_0.npz is of" in error and error.count("\n") == 1


def test_an_unreadable_picture_is_named_and_the_others_are_done(extract, pictures, tmp_path):
    (pictures / "img_1.png").write_text("not a picture")
    status, out, error = extract(pictures, "--output", tmp_path / "out", "--batch", 2)
    assert status == 1 and "3 pictures' features" in out
    assert error.startswith("skipped: ") and "img_1.png" in error and error.count("\n") == 1
    assert len(list((tmp_path / "out").glob("*.npz"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "out", "--batch", "0"], "--batch is 0"),
        (["--output", "out", "--boxes", "gone.json"], "gone.json: cannot be read"),
        (["--output", "PICTURES", "--format", "tsv"], "a file is needed"),
        (["--output", "FILE", "--format", "npz"], "a folder is needed"),
        (["--output", "out", "model.box_nms_tresh=0.4"], "did you mean 'box_nms_thresh'?"),
    ],
)
def test_wrong_arguments_are_refused(extract, pictures, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    arguments = [pictures if a == "PICTURES" else a for a in arguments]
    status, _, error = extract(pictures, *arguments)
    assert status == 1 and message in error and "Traceback" not in error


def test_the_weights_own_preprocessing_is_used(checkpoint, picture):
    caffe = Detector.load(Checkpoint(checkpoint.state_dict, checkpoint.config, NAMES, CAFFE_RESNET), "cpu")
    boxes = random_boxes(2)
    usual = Detector.load(Checkpoint(checkpoint.state_dict, checkpoint.config, NAMES, IMAGENET), "cpu")
    assert not torch.allclose(caffe.features(picture, boxes), usual.features(picture, boxes))
