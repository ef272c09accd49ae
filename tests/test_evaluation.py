"""Metrics against published numbers, an independent implementation's numbers, and hand arithmetic."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from detector.evaluation.coco import COCO_METRICS, check_results, evaluate_coco, format_coco, load_results
from detector.evaluation.voc import evaluate_voc, format_voc

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car",
    "cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike",
    "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
DETECTOR = "yolov2_htt1084_000150"

needs_faster = pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None, reason="faster-coco-eval is not installed"
)
backends = pytest.mark.parametrize("backend", ["pycocotools", pytest.param("faster", marks=needs_faster)])


def make_ground_truth(*objects: dict, num_images: int = 1, class_names: tuple[str, ...] = ("cat",)) -> dict:
    """COCO-format ground truth; an object is a dict with `bbox`, by default of image 1 and category 1."""
    return {
        "images": [{"id": i, "width": 100, "height": 100} for i in range(1, num_images + 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(class_names, start=1)],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "iscrowd": 0, **fields}
            for i, fields in enumerate(objects, start=1)
        ],
    }


def detect(bbox: list[float], score: float = 0.9, image_id: int = 1, category_id: int = 1) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


def twelve(metrics: dict) -> list[float]:
    return [metrics[name] for name in COCO_METRICS]


def read_voc07(folder: Path) -> tuple[dict, list[dict]]:
    """Ground truth and detections of voc07_eval's text files, whose pixels are 1-based and inclusive."""
    difficult = {}
    for line in (folder / "voc07_test_difficult.txt").read_text().splitlines():
        name, *flags = line.split()
        difficult[name] = [int(flag) for flag in flags]
    images, annotations = [], []
    for line in (folder / "voc07_test.txt").read_text().splitlines():
        name, *numbers = line.split()
        image_id = int(Path(name).stem)
        images.append({"id": image_id})
        for index, flag in enumerate(difficult[name]):
            x1, y1, x2, y2, label = map(int, numbers[5 * index : 5 * index + 5])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1],
                    "area": (x2 - x1 + 1) * (y2 - y1 + 1),
                    "iscrowd": 0,
                    "difficult": flag,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(VOC_CLASSES, start=1)]
    results = []
    for category in categories:
        path = folder / DETECTOR / f"comp4_det_test_{category['name']}.txt"
        for line in path.read_text().splitlines():
            stem, *numbers = line.split()
            score, x1, y1, x2, y2 = map(float, numbers)
            bbox = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
            results.append(detect(bbox, score, int(stem), category["id"]))
    return {"images": images, "categories": categories, "annotations": annotations}, results


@pytest.fixture(scope="module")
def voc07(shared: Path) -> tuple[dict, list[dict], dict]:
    folder = shared / "data" / "voc07_eval"
    expected = json.loads((folder / "EXPECTED.json").read_text())["sets"][DETECTOR]
    return *read_voc07(folder), expected


@pytest.fixture(scope="module")
def val2014(shared: Path) -> tuple[dict, list[dict]]:
    folder = shared / "data" / "cocoeval_val2014_100"
    ground_truth = json.loads((folder / "instances_val2014_100.json").read_text())
    return ground_truth, load_results(folder / "instances_val2014_fakebbox100_results.json", ground_truth)


# --- published numbers


@backends
def test_coco_numbers_of_val2014_are_the_published_ones(val2014, shared, backend):
    text = (shared / "data" / "cocoeval_val2014_100" / "val2014_fake_eval_res.txt").read_text()
    section = text.split("type=bbox")[1].split("-----")[0]
    published = [float(line.split("=")[-1]) for line in section.splitlines() if "Average" in line]
    assert [round(value, 3) for value in twelve(evaluate_coco(*val2014, backend=backend))] == published


@needs_faster
def test_backends_give_the_same_numbers(val2014):
    slow, fast = (evaluate_coco(*val2014, backend=backend) for backend in ("pycocotools", "faster"))
    assert twelve(fast) == pytest.approx(twelve(slow), abs=1e-12)
    assert list(fast["per_class"]) == list(slow["per_class"])
    for name, row in slow["per_class"].items():
        assert fast["per_class"][name] == pytest.approx(row, abs=1e-12)


def test_mean_of_the_classes_is_the_whole(val2014):
    metrics = evaluate_coco(*val2014)
    for key in ("AP", "AP50"):
        values = [row[key] for row in metrics["per_class"].values() if row[key] is not None]
        assert sum(values) / len(values) == pytest.approx(metrics[key], abs=1e-12)


def test_voc_numbers_of_voc07_are_those_of_voc_eval(voc07):
    ground_truth, results, expected = voc07
    metrics = evaluate_voc(ground_truth, results)
    assert metrics["mAP_11point"] == pytest.approx(expected["voc_eval_11point_mAP"], abs=1e-5)
    assert metrics["mAP_allpoint"] == pytest.approx(expected["voc_eval_allpoint_mAP"], abs=1e-5)
    for name, row in expected["per_class"].items():
        assert metrics["per_class"][name] == pytest.approx(row, abs=1e-5), name


@backends
@pytest.mark.parametrize("treatment", ["difficult_as_iscrowd", "difficult_counted"])
def test_coco_numbers_of_voc07(voc07, backend, treatment):
    if backend == "pycocotools" and importlib.util.find_spec("faster_coco_eval"):
        pytest.skip("slow; the faster backend gives these, and the two are compared on val2014")
    ground_truth, results, expected = voc07
    if treatment == "difficult_as_iscrowd":
        crowded = [{**a, "iscrowd": a["difficult"]} for a in ground_truth["annotations"]]
        ground_truth = {**ground_truth, "annotations": crowded}
    metrics = evaluate_coco(ground_truth, results, backend=backend)
    assert twelve(metrics) == pytest.approx(expected[f"pycocotools_{treatment}"], abs=1e-9)


# --- COCO by hand


@backends
def test_coco_of_a_perfect_detector_is_one(backend):
    ground_truth = make_ground_truth({"bbox": [10, 10, 20, 20]}, {"bbox": [50, 50, 40, 40]})
    metrics = evaluate_coco(
        ground_truth, [detect([10, 10, 20, 20]), detect([50, 50, 40, 40])], backend=backend
    )
    for name in ("AP", "AP50", "AP75", "APs", "APm", "AR10", "AR100", "ARs", "ARm"):
        assert metrics[name] == pytest.approx(1), name
    assert metrics["APl"] is None  # no large object
    assert metrics["AR1"] == pytest.approx(0.5)  # one detection can find one of two


@backends
def test_coco_counts_images_without_detections(backend):
    ground_truth = make_ground_truth(
        {"bbox": [10, 10, 20, 20]}, {"bbox": [10, 10, 20, 20], "image_id": 2}, num_images=2
    )
    metrics = evaluate_coco(ground_truth, [detect([10, 10, 20, 20])], backend=backend)
    assert metrics["AP50"] == pytest.approx(51 / 101)  # recall 1/2: 51 of the 101 recall points
    assert metrics["AR100"] == pytest.approx(0.5)


@backends
def test_coco_takes_annotation_ids_from_zero(backend):
    ground_truth = make_ground_truth({"bbox": [10, 10, 20, 20], "id": 0})
    assert evaluate_coco(ground_truth, [detect([10, 10, 20, 20])], backend=backend)["AP"] == pytest.approx(1)


@backends
def test_coco_ignores_detections_of_a_crowd(backend):
    ground_truth = make_ground_truth({"bbox": [10, 10, 20, 20]}, {"bbox": [50, 50, 40, 40], "iscrowd": 1})
    results = [detect([55, 55, 10, 10], 0.9), detect([10, 10, 20, 20], 0.8)]
    assert evaluate_coco(ground_truth, results, backend=backend)["AP"] == pytest.approx(1)


@backends
def test_coco_of_no_detection_is_zero(backend):
    ground_truth = make_ground_truth(
        {"bbox": [10, 10, 20, 20]}, {"bbox": [9, 9, 50, 50]}, {"bbox": [0, 0, 97, 97]}
    )
    metrics = evaluate_coco(ground_truth, [], backend=backend)
    assert twelve(metrics) == [0] * 12
    assert metrics["per_class"] == {"cat": {"AP": 0, "AP50": 0}}


@backends
def test_coco_of_no_object_is_none(backend):
    metrics = evaluate_coco(make_ground_truth(), [detect([1, 1, 5, 5])], backend=backend)
    assert twelve(metrics) == [None] * 12


@backends
def test_coco_class_without_objects_is_none_and_left_out_of_the_mean(backend):
    ground_truth = make_ground_truth({"bbox": [10, 10, 20, 20]}, class_names=("cat", "dog"))
    results = [detect([10, 10, 20, 20]), detect([10, 10, 20, 20], category_id=2)]
    metrics = evaluate_coco(ground_truth, results, backend=backend)
    assert metrics["per_class"]["dog"] == {"AP": None, "AP50": None}
    assert metrics["AP"] == pytest.approx(1)
    json.dumps(metrics, allow_nan=False)
    assert re.search("^dog +- +-$", format_coco(metrics), re.MULTILINE)


@backends
def test_coco_prints_nothing_and_leaves_its_input_alone(val2014, backend, capfd):
    ground_truth = make_ground_truth({"bbox": [10, 10, 20, 20]})
    results = [detect([10, 10, 20, 20])]
    before = json.dumps([ground_truth, results])
    evaluate_coco(ground_truth, results, backend=backend)
    assert json.dumps([ground_truth, results]) == before
    assert capfd.readouterr() == ("", "")


def crowded(count):
    """An image of `count` small objects in a grid, and the detections that find them all."""
    boxes = [[12 * (i % 20), 12 * (i // 20), 10, 10] for i in range(count)]
    return make_ground_truth(*({"bbox": box} for box in boxes)), [
        detect(box, 0.9 - 0.001 * i) for i, box in enumerate(boxes)
    ]


@backends
def test_coco_counts_as_many_detections_as_the_detector_gives(backend):
    metrics = evaluate_coco(*crowded(256), backend=backend, detections_per_img=300)
    assert metrics["AP"] == metrics["AP50"] == metrics["APs"] == metrics["ARs"] == pytest.approx(1)
    assert metrics["per_class"]["cat"] == pytest.approx({"AP": 1, "AP50": 1})
    # Those keep their meaning.
    recalls = {name: metrics[name] for name in ("AR1", "AR10", "AR100")}
    assert recalls == pytest.approx({"AR1": 1 / 256, "AR10": 10 / 256, "AR100": 100 / 256})
    assert metrics["max_detections"] == 300
    assert "over the best 300 detections of a class and image" in format_coco(metrics)


@backends
@pytest.mark.parametrize("detections_per_img", [{}, {"detections_per_img": 36}])
def test_coco_counts_100_by_default_and_says_where_that_is_too_few(backend, detections_per_img):
    # 100 of 256 found: recall 0.39, and 40 of the 101 recalls from 0 to 1 are no higher.
    with pytest.warns(
        UserWarning, match="image 1 has 256 .* category 1, and COCO's numbers count the best 100"
    ) as warned:
        metrics = evaluate_coco(*crowded(256), backend=backend, **detections_per_img)
    assert [str(each.message).split()[4] for each in warned] == ["objects", "detections"]
    assert metrics["AP"] == pytest.approx(40 / 101) and metrics["max_detections"] == 100
    assert "over the best 100 detections of a class and image" in format_coco(metrics)


@backends
def test_coco_of_a_hundred_objects_is_no_warning(backend, recwarn):
    assert evaluate_coco(*crowded(100), backend=backend)["AP"] == pytest.approx(1)
    assert not recwarn.list


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'slow'; accepted are \"auto\""):
        evaluate_coco(make_ground_truth(), [], backend="slow")


def test_categories_of_one_name_are_refused():
    with pytest.raises(ValueError, match="must be unique"):
        evaluate_coco(make_ground_truth(class_names=("cat", "cat")), [])


# --- VOC by hand


def test_voc_ap_of_three_detections():
    # Sorted by score: right, wrong, right, of 2 objects. Recall 1/2, 1/2, 1; precision 1, 1/2, 2/3.
    # All points: 1/2 * 1 + 1/2 * 2/3 = 5/6. Eleven points: 0..0.5 see 1 (six), 0.6..1 see 2/3 (five).
    ground_truth = make_ground_truth({"bbox": [0, 0, 10, 10]}, {"bbox": [50, 50, 10, 10]})
    results = [detect([50, 50, 10, 10], 0.7), detect([0, 0, 10, 10], 0.9), detect([80, 80, 10, 10], 0.8)]
    metrics = evaluate_voc(ground_truth, results)
    assert metrics["mAP_allpoint"] == pytest.approx(5 / 6)
    assert metrics["mAP_11point"] == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_voc_second_detection_of_an_object_is_wrong():
    # right, wrong (the same object again), right: as above.
    ground_truth = make_ground_truth({"bbox": [0, 0, 10, 10]}, {"bbox": [50, 50, 10, 10]})
    results = [detect([0, 0, 10, 10], 0.9), detect([0, 0, 10, 9], 0.8), detect([50, 50, 10, 10], 0.7)]
    assert evaluate_voc(ground_truth, results)["mAP_allpoint"] == pytest.approx(5 / 6)


def test_voc_claims_only_the_object_overlapped_most():
    # The second detection overlaps the claimed object more (9/11) than the free one (8/12): wrong.
    ground_truth = make_ground_truth({"bbox": [0, 0, 10, 10]}, {"bbox": [3, 0, 10, 10]})
    results = [detect([0, 0, 10, 10], 0.9), detect([1, 0, 10, 10], 0.8)]
    assert evaluate_voc(ground_truth, results)["mAP_allpoint"] == pytest.approx(0.5)


@pytest.mark.parametrize("flag", ["difficult", "iscrowd"])
def test_voc_difficult_objects_are_neither_counted_nor_penalised(flag):
    ground_truth = make_ground_truth({"bbox": [0, 0, 10, 10], flag: 1}, {"bbox": [50, 50, 10, 10]})
    twice = [detect([0, 0, 10, 10], 0.9), detect([0, 0, 10, 10], 0.8), detect([50, 50, 10, 10], 0.7)]
    assert evaluate_voc(ground_truth, twice)["mAP_allpoint"] == 1


@pytest.mark.parametrize(("width", "right"), [(5.0, 0), (5.01, 1)])
def test_voc_match_is_strictly_above_the_threshold(width, right):
    # The detection lies inside the object: IoU = width / 10.
    ground_truth = make_ground_truth({"bbox": [0, 0, 10, 10]})
    assert evaluate_voc(ground_truth, [detect([0, 0, width, 10])])["mAP_allpoint"] == right


def test_voc_matches_only_within_image_and_class():
    ground_truth = make_ground_truth({"bbox": [0, 0, 10, 10]}, num_images=2, class_names=("cat", "dog"))
    results = [detect([0, 0, 10, 10], image_id=2), detect([0, 0, 10, 10], category_id=2)]
    assert evaluate_voc(ground_truth, results)["per_class"]["cat"] == {"ap11": 0, "ap_all": 0}


def test_voc_class_without_objects_to_find_is_none_and_left_out_of_the_mean():
    ground_truth = make_ground_truth(
        {"bbox": [0, 0, 10, 10]},
        {"bbox": [0, 0, 10, 10], "category_id": 2, "difficult": 1},
        class_names=("cat", "dog", "cow"),
    )
    metrics = evaluate_voc(ground_truth, [detect([0, 0, 10, 10]), detect([0, 0, 9, 9], category_id=3)])
    assert metrics["mAP_11point"] == metrics["mAP_allpoint"] == pytest.approx(1)
    assert metrics["per_class"]["dog"] == metrics["per_class"]["cow"] == {"ap11": None, "ap_all": None}
    assert re.search("^dog +- +-$", format_voc(metrics), re.MULTILINE)


def test_voc_of_no_detection_is_zero_and_of_no_object_none():
    empty = evaluate_voc(make_ground_truth({"bbox": [0, 0, 10, 10]}), [])
    assert empty["mAP_11point"] == empty["mAP_allpoint"] == 0
    assert evaluate_voc(make_ground_truth(), [detect([0, 0, 5, 5])])["mAP_allpoint"] is None
    assert evaluate_voc(make_ground_truth(), [])["mAP_11point"] is None


def test_voc_boxes_without_area_are_no_match():
    ground_truth = make_ground_truth({"bbox": [5, 5, 0, 0]})
    assert evaluate_voc(ground_truth, [detect([5, 5, 0, 0])])["mAP_allpoint"] == 0


# --- what is refused


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"annotations": []}, "results are a dict; accepted is a list of dicts"),
        (["cat"], r"results\[0\]: is a str; accepted is a dict"),
        (
            [{"image_id": 1, "bbox": [1, 1, 2, 2]}],
            r"results\[0\]: has no category_id, score; it has image_id",
        ),
        ([detect([1, 1, 2, 2], image_id=7)], r"unknown image_id 7; the ground truth has 1: 1$"),
        ([detect([1, 1, 2, 2], image_id=[1])], r"unknown image_id \[1\]"),
        ([detect([1, 1, 2, 2], category_id=0)], r"results\[0\]: unknown category_id 0; .* has 1: 1 \(cat\)$"),
        ([detect([1, 1, 2, 2]), detect([1, 1, 2, 2], math.nan)], r"results\[1\]: score is nan; accepted is"),
        ([detect([1, 1, 2, 2], "high")], r"score is 'high'; accepted is a finite number"),
        ([detect([1, 1, 2])], r"bbox is \[1, 1, 2\]; accepted are four finite numbers"),
        ([detect([1, 1, 2, None])], r"accepted are four finite numbers \[x, y, width, height\]"),
    ],
)
def test_bad_results_are_refused_with_their_index(results, message):
    ground_truth = make_ground_truth({"bbox": [10, 10, 20, 20]})
    for refuse in (evaluate_coco, evaluate_voc):
        with pytest.raises(ValueError, match=message):
            refuse(ground_truth, results)
    with pytest.raises(ValueError, match=message):
        check_results(results, ground_truth)


def test_load_results_names_the_file(tmp_path):
    path = tmp_path / "detections.json"
    with pytest.raises(FileNotFoundError, match="detections.json: cannot be read: No such file"):
        load_results(path)
    path.write_text("[{")
    with pytest.raises(ValueError, match="detections.json: not a JSON file"):
        load_results(path)
    path.write_text(json.dumps([detect([1, 1, 2, 2], image_id=7)]))
    with pytest.raises(ValueError, match=r"detections.json: results\[0\]: unknown image_id 7"):
        load_results(path, make_ground_truth())
    assert load_results(path) == [detect([1, 1, 2, 2], image_id=7)]


FILES = ("day/0001.jpg", "night/0001.jpg", "day/0002.jpg", "day/café.png")


def truth_of_files():
    """A ground truth of four pictures with the ids 10..13, and the classes cat (1) and dog (2)."""
    return {
        "images": [{"id": n, "file_name": f"/data/{name}"} for n, name in enumerate(FILES, start=10)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [],
    }


@pytest.mark.parametrize(
    ("image", "category", "others", "wanted"),
    [
        (12, 2, {}, (12, 2)),
        ("0002", 2, {}, (12, 2)),
        (2, 1, {}, (12, 1)),
        ("café", "dog", {}, (13, 2)),
        ("café.png", "cat", {}, (13, 1)),
        ("night/0001.jpg", 1, {}, (11, 1)),
        ("/elsewhere/night/0001.jpg", 1, {}, (11, 1)),
        (12, 1, {"file_name": "café.png"}, (13, 1)),
    ],
)
def test_a_result_may_name_its_picture_and_its_class(tmp_path, image, category, others, wanted):
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps([detect([1, 1, 2, 2], image_id=image, category_id=category) | others]))
    result = load_results(path, truth_of_files())[0]
    assert (result["image_id"], result["category_id"]) == wanted


@pytest.mark.parametrize(
    ("image", "category", "message"),
    [
        ("0001", 1, r"unknown image_id '0001'; the ground truth has 4: 10 \(/data/day/0001.jpg\), 11 "),
        ("0009", 1, "unknown image_id '0009'"),
        (12, "cow", r"unknown category_id 'cow'; the ground truth has 2: 1 \(cat\), 2 \(dog\)$"),
        (12, 3, r"unknown category_id 3; the ground truth has 2: 1 \(cat\)"),
    ],
)
def test_a_name_of_no_or_of_several_pictures_is_refused(tmp_path, image, category, message):
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps([detect([1, 1, 2, 2], image_id=image, category_id=category)]))
    with pytest.raises(ValueError, match=message):
        load_results(path, truth_of_files())


def test_images_json_says_what_the_ids_beside_it_stand_for(tmp_path):
    """infer's ids count its pictures, here in another order than the ground truth's, and its classes."""
    path, beside = tmp_path / "detections.json", tmp_path / "images.json"
    images = [{"id": n, "file_name": f"/moved/{name}"} for n, name in enumerate(reversed(FILES), start=1)]
    beside.write_text(json.dumps({"images": images, "categories": [{"id": 1, "name": "dog"}]}))
    path.write_text(json.dumps([detect([1, 1, 2, 2], image_id=n) for n in (1, 2, 3, 4)]))
    results = load_results(path, truth_of_files())
    assert [result["image_id"] for result in results] == [13, 12, 11, 10]
    assert {result["category_id"] for result in results} == {2}
    beside.write_text("[3]")
    with pytest.raises(ValueError, match="images.json: accepted are COCO's images with file_name"):
        load_results(path, truth_of_files())


def test_ground_truth_that_is_not_coco_is_refused():
    with pytest.raises(ValueError, match="the ground truth has no categories, annotations"):
        evaluate_voc({"images": []}, [])


@backends
def test_a_detection_of_negative_size_is_scored_as_the_official_evaluator_does_and_counted(backend):
    ground_truth = make_ground_truth({"bbox": [10, 10, 20, 20]}, {"bbox": [50, 50, 40, 40]})
    good = detect([10, 10, 20, 20], 0.8)
    with pytest.warns(UserWarning, match="1 of 2 detections have a negative width or height"):
        metrics = evaluate_coco(ground_truth, [good, detect([60, 60, -20, -20], 0.9)], backend=backend)
    # A false positive above the one hit: precision 1/2 up to recall 1/2, so 51 of the 101 points have 0.5.
    assert metrics["AP50"] == pytest.approx(0.5 * 51 / 101)
