"""`Detector.load(path)(image)`: one picture in any form gives the same detections, and other things are refused."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detector import Detections, Detector
from detector.build import build_model
from detector.checkpoint import Checkpoint, save_checkpoint
from detector.inference import choose_device

NAMES = ("circle", "cross", "triangle", "star")


@pytest.fixture(scope="module")
def weights(tiny_config, tmp_path_factory):
    """A checkpoint of random weights: with five classes, scores around 0.2."""
    config = tiny_config("model.box_detections_per_img=10")
    torch.manual_seed(0)
    model = build_model(config.model, 5)
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    save_checkpoint(path, Checkpoint(model.state_dict(), config, NAMES))
    return path


@pytest.fixture(scope="module")
def detector(weights):
    return Detector.load(weights, "cpu")


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    return cv2.resize(pixels, (80, 50))


@pytest.fixture(scope="module")
def wanted(detector, picture):
    return detector(picture)


def equal(one, two):
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("boxes", "labels", "scores"))


def tensor_of(picture):
    return torch.from_numpy(picture).permute(2, 0, 1)


def test_detections_are_of_the_picture_by_falling_score_with_class_names(wanted):
    assert 0 < len(wanted) <= 10
    assert (
        wanted.boxes.shape == (len(wanted), 4) and wanted.boxes.dtype == wanted.scores.dtype == torch.float32
    )
    assert wanted.labels.dtype == torch.int64 and wanted.features is None
    assert (wanted.boxes >= 0).all() and (wanted.boxes <= torch.tensor([80, 50, 80, 50])).all()
    assert (wanted.boxes[:, 2:] > wanted.boxes[:, :2]).all() and (wanted.scores.diff() <= 0).all()
    assert wanted.class_names == NAMES and wanted.names == [NAMES[label - 1] for label in wanted.labels]


@pytest.mark.parametrize("kind", ["path", "string", "pil", "bgr", "uint8", "float", "double", "bgr tensor"])
def test_every_form_of_a_picture_gives_the_same_detections(detector, picture, wanted, tmp_path, kind):
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    forms = {
        "path": (path, "rgb"),
        "string": (str(path), "bgr"),  # a file says itself what its channels are
        "pil": (Image.open(path), "rgb"),
        "bgr": (cv2.imread(str(path)), "bgr"),
        "uint8": (tensor_of(picture), "rgb"),
        "float": (tensor_of(picture) / 255, "rgb"),
        "double": (tensor_of(picture).float().div(255).double(), "rgb"),
        "bgr tensor": (tensor_of(picture).flip(0), "bgr"),
    }
    image, channel_order = forms[kind]
    assert equal(detector(image, channel_order=channel_order), wanted)


def test_the_channel_order_matters(detector, picture, wanted):
    assert not equal(detector(picture, channel_order="bgr"), wanted)


def test_grey_arrays_and_pictures_are_taken_as_three_equal_channels(detector, picture):
    grey = picture[:, :, 0]
    three = detector(np.repeat(grey[:, :, None], 3, axis=2))
    assert equal(detector(grey), three) and equal(detector(Image.fromarray(grey)), three)


def test_a_turned_pil_picture_is_seen_upright(detector, picture, wanted):
    turned = Image.fromarray(np.rot90(picture))
    turned.getexif()[0x0112] = 6  # a viewer turns it clockwise
    assert equal(detector(turned), wanted)


def test_the_picture_given_is_left_as_it_was(detector, picture):
    array, tensor = picture.copy(), tensor_of(picture) / 255
    before = tensor.clone()
    detector(array), detector(tensor)
    assert np.array_equal(array, picture) and torch.equal(tensor, before)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((8, 8, 4), np.uint8), ValueError, r"the array is \(8, 8, 4\) uint8; accepted: \(H, W, 3\)"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"the array is \(3, 8, 8\) uint8"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "not empty"),
        (np.zeros((8, 8, 3), np.float32), ValueError, r"the array is \(8, 8, 3\) float32"),
        (torch.zeros(8, 8, 3), ValueError, r"the tensor is \(8, 8, 3\); accepted: \(3, H, W\)"),
        (torch.zeros(1, 3, 8, 8), ValueError, r"the tensor is \(1, 3, 8, 8\)"),
        (torch.zeros(3, 0, 8), ValueError, "not empty"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, "the tensor is torch.int64; accepted: uint8"),
        (
            torch.full((3, 8, 8), -2.1),
            ValueError,
            r"values from -2.1 to -2.1; accepted: \[0, 1\], not normalised",
        ),
        (torch.full((3, 8, 8), 255.0), ValueError, "values from 255 to 255"),
        (torch.full((3, 8, 8), torch.nan), ValueError, "values from nan"),
        ([[1, 2], [3, 4]], TypeError, "an image is a path, PIL image, array or tensor; got list"),
        ("no/such/picture.jpg", FileNotFoundError, "no/such/picture.jpg: no such picture file"),
    ],
)
def test_what_is_no_picture_is_refused(detector, image, error, message):
    with pytest.raises(error, match=message):
        detector(image)


def test_settings_out_of_range_are_refused(detector, picture):
    with pytest.raises(ValueError, match="score_thresh is 50; accepted: 0 to 1"):
        detector(picture, score_thresh=50)
    with pytest.raises(ValueError, match="channel_order is 'RGB'; .*accepted: rgb, bgr"):
        detector(picture, channel_order="RGB")


def test_the_threshold_of_one_call_is_not_that_of_the_next(detector, picture, wanted):
    middle = float(wanted.scores[len(wanted) // 2])
    fewer = detector(picture, score_thresh=middle)
    assert 0 < len(fewer) < len(wanted) and (fewer.scores > middle).all()
    assert equal(fewer, wanted.above(middle))
    assert len(detector(picture, score_thresh=1.0)) == 0
    assert equal(detector(picture), wanted)


def test_a_call_changes_nothing_in_the_model(detector, picture):
    """Threads with other thresholds share the model."""
    before = dict(vars(detector.model.roi_heads))
    detector(picture, score_thresh=0.9, class_agnostic_nms=True)
    assert vars(detector.model.roi_heads) == before


def test_features_are_the_roi_heads_vectors_of_the_boxes(detector, picture, wanted):
    found = detector(picture, features=True)
    assert equal(found, wanted) and found.features.shape == (len(found), 64)  # C5 of a ResNet-18 of width 8
    image = tensor_of(picture) / 255
    alone = [detector.model.region_vectors([image], [box[None]])[0] for box in found.boxes]
    torch.testing.assert_close(found.features, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert detector(picture, features=True, score_thresh=1.0).features.shape == (0, 64)


def test_above_keeps_boxes_names_and_features_together():
    found = Detections(
        torch.arange(12.0).view(3, 4),
        torch.tensor([2, 1, 1]),
        torch.tensor([0.9, 0.5, 0.1]),
        ("a", "b"),
        torch.eye(3),
    )
    kept = found.above(0.4)
    assert kept.boxes.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and kept.names == ["b", "a"]
    assert kept.features.tolist() == torch.eye(3)[:2].tolist() and len(found) == 3
    assert len(found.above(0.5)) == 1  # a threshold is below what it keeps
    assert len(found.above(1.0)) == 0 and found.above(1.0).names == []


def test_dicts_are_plain_and_can_be_written_as_json():
    found = Detections(
        torch.tensor([[0.0, 1.5, 2.0, 3.0]]), torch.tensor([2]), torch.tensor([0.75]), ("a", "b")
    )
    assert json.loads(json.dumps(found.to_dicts())) == [
        {"box": [0, 1.5, 2, 3], "label": 2, "name": "b", "score": 0.75}
    ]


@pytest.mark.parametrize("name", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(weights, name):
    message = f"device '{name}' cannot be used; available here: cpu"
    with pytest.raises(ValueError, match=message):
        choose_device(name)
    with pytest.raises(ValueError, match=message):
        Detector.load(weights, name)


def test_the_device_is_chosen_where_none_is_named():
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == torch.device("cpu")


def test_a_picture_of_one_pixel_and_a_long_one_are_taken(detector):
    for size in ((1, 1), (4, 300)):
        found = detector(np.full((*size, 3), 128, np.uint8))
        assert (found.boxes <= torch.tensor([size[1], size[0]] * 2)).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits_score_as_float32_does_and_return_float32(weights, picture, wanted, dtype):
    found = Detector.load(weights, "cpu", dtype=dtype)(picture, features=True)
    assert float(found.scores[0]) == pytest.approx(float(wanted.scores[0]), abs=0.02)
    assert found.boxes.dtype == found.scores.dtype == found.features.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "int8"}, "dtype is 'int8'"), ({"dtype": "bf16", "optimize": False}, "optimize is False")],
)
def test_a_dtype_that_cannot_be_had_is_refused(weights, options, message):
    with pytest.raises(ValueError, match=message):
        Detector.load(weights, "cpu", **options)


# Many pictures


def test_a_list_gives_what_each_picture_gives_alone_whatever_its_size(detector, picture):
    tall = np.ascontiguousarray(picture.transpose(1, 0, 2))
    pictures = [picture, tall, picture[:, ::-1].copy(), cv2.resize(picture, (64, 64))]
    for one, alone in zip(detector(pictures), map(detector, pictures), strict=True):
        assert len(one) == len(alone) and torch.equal(one.labels, alone.labels)
        torch.testing.assert_close(one.boxes, alone.boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(one.scores, alone.scores, atol=1e-5, rtol=1e-4)


def test_pictures_of_one_padded_size_run_together(detector, picture, monkeypatch):
    sizes, detect = [], detector.model.detect
    monkeypatch.setattr(
        detector.model, "detect", lambda images, **o: sizes.append(len(images)) or detect(images, **o)
    )
    detector([picture, cv2.resize(picture, (80, 16)), picture])
    assert sizes == [2, 1]


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_a_stream_gives_the_pictures_in_order(detector, picture, tmp_path, batch_size):
    pictures = [np.roll(picture, 8 * i, axis=1) for i in range(5)]
    path = tmp_path / "last.png"
    Image.fromarray(pictures[-1]).save(path)
    streamed = list(detector.stream([*pictures[:-1], path], batch_size=batch_size, score_thresh=0.1))
    for one, alone in zip(streamed, (detector(each, score_thresh=0.1) for each in pictures), strict=True):
        torch.testing.assert_close(one.boxes, alone.boxes, atol=1e-3, rtol=1e-4)


def test_a_stream_reads_only_a_few_pictures_ahead(detector, picture):
    taken = []
    stream = detector.stream((taken.append(i) or picture for i in range(100)), num_threads=2)
    next(stream)
    assert len(taken) <= 6
    stream.close()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_a_picture_that_cannot_be_read_raises_in_its_turn(detector, picture, tmp_path, batch_size):
    stream = detector.stream([picture] * 4 + [tmp_path / "absent.png", picture], batch_size=batch_size)
    assert all(len(next(stream)) for _ in range(4))
    with pytest.raises(FileNotFoundError, match="absent.png"):
        next(stream)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_where_the_source_of_pictures_fails_those_before_come_first(detector, picture, batch_size):
    def film():
        yield from [picture] * 5
        raise OSError("the camera is gone")

    stream = detector.stream(film(), batch_size=batch_size)
    assert all(len(next(stream)) for _ in range(5))
    with pytest.raises(OSError, match="the camera is gone"):
        next(stream)
