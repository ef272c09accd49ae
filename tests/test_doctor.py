"""The doctor: each fault that is put into a small data set is found, with its file, and a sound set has none."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.ops import box_iou

import detector.data.opened
from detector.config import load_config, parse_config
from detector.data.coco import load_coco
from detector.data.likeness import _close_pairs, perceptual_hashes
from detector.data.sources import build_dataset, build_datasets
from detector.doctor.box_format import guess_format
from detector.doctor.check import examine, quick_check
from detector.doctor.findings import Finding, exit_status_of, format_findings
from detector.model.anchor_fit import anchor_recall, best_anchor_ious, fit_anchors, grid_offsets
from detector.model.anchors import MapAnchors
from detector.model.conventions import Conventions

ROOT = Path(__file__).resolve().parent.parent
CATEGORIES = {1: "cat", 2: "dog"}
WIDTH, HEIGHT = 96, 64


class Data:
    """A COCO set of pictures of noise below `root`; tests damage its lists before `recipe` writes them."""

    def __init__(self, root, num_train=12, num_val=2):
        self.root, self.categories = root, dict(CATEGORIES)
        (root / "images").mkdir()
        self.splits = {"train": ([], []), "val": ([], [])}
        for split, count in (("train", num_train), ("val", num_val)):
            for number in range(count):
                name = f"{split}{number}.png"
                seed = (number, count)
                low = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
                Image.fromarray(low).resize((WIDTH, HEIGHT)).save(root / "images" / name)
                self.add(split, name)

    def add(self, split, name, size=(WIDTH, HEIGHT)):
        """List a picture with one object of each class, of the size of the anchors."""
        images, annotations = self.splits[split]
        images.append({"id": len(images) + 1, "file_name": name, "width": size[0], "height": size[1]})
        for category in list(CATEGORIES):
            self.box(split, len(images), [16 * category, 16, 32, 32], category)

    def box(self, split, image_id, bbox, category=1, **keys):
        self.splits[split][1].append({"image_id": image_id, "category_id": category, "bbox": bbox, **keys})
        return len(self.splits[split][1]) - 1

    def values(self):
        categories = [{"id": id, "name": name} for id, name in self.categories.items()]
        for split, (images, annotations) in self.splits.items():
            content = {"images": images, "annotations": annotations, "categories": categories}
            (self.root / f"{split}.json").write_text(json.dumps(content))
        source = {"format": "coco", "images": "images"}
        return {
            "model": {"backbone": "resnet18", "anchor_sizes": [32], "min_size": HEIGHT, "max_size": WIDTH},
            "data": {
                "root": str(self.root),
                **{split: {**source, "annotations": f"{split}.json"} for split in self.splits},
            },
        }

    def findings(self, pictures="decode"):
        return examine(parse_config(self.values()), pictures=pictures).findings

    def recipe(self):
        path = self.root / "recipe.yaml"
        path.write_text(json.dumps(self.values()))  # JSON is YAML
        return path


@pytest.fixture
def data(tmp_path):
    return Data(tmp_path)


def bbox_of(annotation):
    return annotation["bbox"]


def named(findings, kind):
    """(file name, index) of the findings of a kind."""
    return [(Path(f.file).name, f.index) for f in findings if f.kind == kind]


def test_a_sound_set_has_no_finding(data):
    assert data.findings() == []


@pytest.mark.parametrize(
    ("kind", "bbox"),
    [
        ("box outside the picture", [200, 10, 20, 20]),
        ("box without area", [60, 10, 0, 20]),
        ("box that is not four numbers", ["a", 10, 20, 20]),
        ("box past the edge", [80, 10, 30, 20]),
        ("box a pixel past the edge", [70, 10, 26.5, 20]),
        ("box of the whole picture", [0, 0, WIDTH, HEIGHT]),
        ("duplicate box", [16, 16, 32, 32]),
        ("one box, two classes", [32, 16, 32, 32]),
    ],
)
def test_a_faulty_box_is_found_with_its_picture_and_index(data, kind, bbox):
    index = data.box("train", 3, bbox)
    found = [f for f in data.findings("none") if f.kind != "remark"]
    assert named(found, kind) == [("train2.png", index)] and len(found) == 1
    assert f"annotations[{index}]" in found[0].what


def test_what_stops_a_training_is_an_error_and_what_it_mends_is_a_note(data):
    data.box("train", 3, [60, 10, -20, 20])
    assert [f.severity for f in data.findings("none")] == ["note"]
    assert "1 of 25 boxes were drawn" in build_dataset(parse_config(data.values()).data, "train").notes[0]
    indices = [data.box("train", 3, [60, 10, 0, 20]) for _ in range(3)]
    errors = [f.index for f in data.findings("none") if f.severity == "error"]
    assert errors == indices
    with pytest.raises(ValueError, match="3 of 28 objects cannot be used"):
        build_dataset(parse_config(data.values()).data, "train")


def test_a_crowd_is_no_faulty_box(data):
    data.box("train", 1, [0, 0, WIDTH, HEIGHT], iscrowd=1)
    assert [f.kind for f in data.findings("none")] == ["remark"]
    assert "1 of 25 boxes are crowds, and are not trained on" in data.findings("none")[0].what
    values = data.values()
    values["data"]["crowd"] = "train"
    assert "box of the whole picture" in [
        f.kind for f in examine(parse_config(values), pictures="none").findings
    ]


@pytest.fixture(scope="module")
def true_boxes():
    """(M, 4) xyxy boxes inside pictures of 640x480, and the pictures' (height, width)."""
    rng = np.random.default_rng(0)
    sides = rng.uniform(10, 200, (200, 2))
    corner = rng.uniform(0, 1, (200, 2)) * ((640, 480) - sides)
    return np.hstack([corner, corner + sides]), np.tile([480, 640], (200, 1))


def test_boxes_of_the_right_format_are_not_suspected(true_boxes):
    assert guess_format(*true_boxes) == []


@pytest.mark.parametrize(
    ("misread", "expected"),
    [
        (lambda a, b, c, d: (a, b, a + c, b + d), "corners (x1, y1, x2, y2), read as x, y, width, height"),
        (lambda a, b, c, d: (a, b, c - a, d - b), "x, y, width, height, read as corners"),
        (
            lambda a, b, c, d: ((a + c) / 2, (b + d) / 2, (a + c) / 2 + c - a, (b + d) / 2 + d - b),
            "centre, width, height, read as x, y, width, height",
        ),
        (
            lambda a, b, c, d: ((a + c) / 2, (b + d) / 2, c - a, d - b),
            "centre, width, height, read as corners",
        ),
        (lambda a, b, c, d: (b, a, d, c), "y before x"),
        (
            lambda a, b, c, d: (a / 640, b / 480, c / 640, d / 480),
            "shares of the picture's width and height (0 to 1), read as pixels",
        ),
    ],
)
def test_a_wrong_box_format_is_named(true_boxes, misread, expected):
    boxes, sizes = true_boxes
    assert guess_format(np.stack(misread(*boxes.T), axis=1), sizes) == [expected]


def test_a_wrong_format_is_one_finding_not_one_for_each_box(tmp_path):
    data = Data(tmp_path, num_train=12, num_val=4)
    for _, annotations in data.splits.values():
        for annotation in annotations:
            x, y, width, height = annotation["bbox"]
            annotation["bbox"] = [x + 32, y, x + 32 + width, y + height]
    errors = [f.kind for f in data.findings("none") if f.severity == "error"]
    assert errors == ["wrong box format"] * 2


def test_near_equal_names_and_background_are_found(data):
    data.categories |= {3: "Dog ", 4: "background"}
    for number in range(12):
        data.box("train", number + 1, [60, 20, 20, 30], 3)
        data.box("train", number + 1, [4, 20, 20, 30], 4)
    what = {f.kind: f.what for f in data.findings("none")}
    assert "'dog' (14), 'Dog ' (12)" in what["near-equal class names"]
    assert "'background'" in what["background as a class"]


def test_classes_with_no_and_with_few_examples_are_found(data):
    data.categories |= {3: "bird", 4: "cow"}
    data.box("train", 1, [60, 20, 20, 30], 3)
    data.box("val", 1, [60, 20, 20, 30], 4)
    what = {f.kind: f.what for f in data.findings("none")}
    assert "'bird' has 1 training object" in what["class with few examples"]
    assert "'cow' has no training objects" in what["class without examples"]
    assert "'cow' has 1 objects in val" in what["class that training lacks"]


@pytest.mark.parametrize(("shift", "said"), [(1, "one too high"), (-1, "one too low")])
def test_labels_off_by_one_are_found(data, shift, said):
    for annotation in data.splits["train"][1]:
        annotation["category_id"] += shift
    found = [f for f in data.findings("none") if f.kind == "labels off by one"]
    assert len(found) == 1 and said in found[0].what


def test_yolos_class_numbers_off_by_one_are_found(tmp_path):
    for number in range(2):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{number}.jpg")
        (tmp_path / f"{number}.txt").write_text(f"{number + 1} 0.5 0.5 0.5 0.5")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    source = {"format": "yolo", "images": ".", "names": "names.txt"}
    recipe = {"model": {"backbone": "resnet18"}, "data": {"root": str(tmp_path), "train": source}}
    what = {f.kind: f.what for f in examine(parse_config(recipe), pictures="none").findings}
    assert "1.txt: line 1 () has the class '2', which names lack" in what["object that cannot be used"]
    assert "class id 2 is used but not listed, and 'cat' has no object" in what["labels off by one"]


def test_ids_that_annotations_share_are_a_note_and_both_are_used(data):
    for annotation, id in zip(data.splits["train"][1], [5, 6, 5, 6], strict=False):
        annotation["id"] = id
    (found,) = data.findings("none")
    assert "annotations[0] and annotations[2] share id 5, and 2 of 4 repeat one in all" in found.what
    assert found.severity == "note"


def test_an_annotation_file_that_cannot_be_read_is_a_finding_with_the_readers_sentence(data):
    data.splits["train"][0][1]["id"] = 1
    (found,) = [f for f in data.findings() if f.kind == "annotations that cannot be read"]
    assert "images[0] and images[1] share id 1" in found.what and found.severity == "error"


def test_absent_pictures_and_pictures_of_no_split_are_found(data):
    (data.root / "images/train0.png").rename(data.root / "images/old0.png")
    found = data.findings()
    assert named(found, "picture that is absent") == [("train0.png", None)]
    assert named(found, "picture that no split names") == [("old0.png", None)]


def test_a_picture_cut_short_is_found_only_by_decoding(data):
    path = data.root / "images/train1.png"
    path.write_bytes(path.read_bytes()[:-200])
    assert named(data.findings(), "picture that cannot be read") == [("train1.png", None)]
    assert data.findings("headers") == []


@pytest.mark.parametrize(
    ("filed", "kind", "severity"),
    [
        ((WIDTH, HEIGHT + 1), "picture of nearly the annotated size", "warning"),
        ((2 * WIDTH, 2 * HEIGHT), "picture of nearly the annotated size", "warning"),
        ((HEIGHT, WIDTH), "picture of another size", "error"),
        ((300, 70), "picture of another size", "error"),
    ],
)
def test_a_size_that_disagrees_is_found(data, filed, kind, severity):
    data.splits["train"][0][0] |= {"width": filed[0], "height": filed[1]}
    found = [f for f in data.findings("headers") if f.kind.startswith("picture of")]
    assert [(f.kind, f.severity) for f in found] == [(kind, severity)]


def test_exif_orientations_grey_and_empty_pictures_are_found(data):
    path = data.root / "images/train4.png"
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(path).convert("L").save(path, exif=exif)
    data.splits["train"][1][:] = [a for a in data.splits["train"][1] if a["image_id"] != 5]
    found = data.findings()
    for kind in ("picture with an EXIF orientation", "grey picture", "picture without objects"):
        assert named(found, kind) == [("train4.png", None)]


def test_an_exif_orientation_is_only_a_note_where_the_size_shows_that_it_was_seen(data):
    path = data.root / "images/train4.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).resize((HEIGHT, WIDTH)).save(path, exif=exif)
    found = [f.severity for f in data.findings("headers") if "EXIF" in f.kind]
    assert found == ["note"]


def test_only_the_pictures_and_classes_that_a_recipe_uses_are_checked(data):
    kept = data.box("train", 1, [60, 10, 0, 20])
    data.box("train", 12, [60, 10, 0, 20])
    data.box("train", 1, [60, 10, 0, 20], 2)
    values = data.values()
    values["data"]["train"]["limit"] = 3
    values["data"]["class_names"] = ["cat"]
    part = examine(parse_config(values), pictures="none")
    assert len(part.parts[0].paths) == 3
    assert [f.index for f in part.findings if f.kind == "box without area"] == [kept]


def test_a_fault_that_only_the_reader_knows_is_a_finding(tmp_path):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    corners = "<xmin>5</xmin><ymin>5</ymin><xmax>{}</xmax><ymax>9</ymax>"
    objects = "".join(
        f"<object><name>cat</name><bndbox>{corners.format(x)}</bndbox></object>" for x in (9, 5)
    )
    size = "<size><width>20</width><height>20</height></size>"
    (tmp_path / "Annotations/a.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    data = {"root": str(tmp_path), "train": {"format": "voc", "split": "train"}}
    found = examine(parse_config({"model": {"backbone": "resnet18"}, "data": data}), pictures="none")
    (fault,) = [f for f in found.findings if f.severity == "error"]
    assert fault.index == 1 and "object[1] (cat) has a box that has no area" in fault.what
    assert len(found.anchors.sizes) == 1


def test_the_same_picture_in_two_splits_is_found_by_its_bytes_and_by_its_pixels(data):
    source = data.root / "images/train0.png"
    (data.root / "images/copy.png").write_bytes(source.read_bytes())
    Image.open(source).save(data.root / "images/copy.bmp")
    data.add("val", "copy.png")
    data.add("val", "copy.bmp")
    found = named(data.findings(), "picture the same, in two splits")
    assert found == [("copy.png", None), ("copy.bmp", None)]
    assert named(data.findings("headers"), "picture the same, in two splits") == [("copy.png", None)]


def test_nearly_the_same_pictures_are_found_within_and_across_splits(data):
    image = Image.open(data.root / "images/train0.png")
    image.point(lambda value: value * 0.98).save(data.root / "images/dark.jpg", quality=80)
    for split in ("train", "val"):
        data.add(split, "dark.jpg")
    found = data.findings()
    assert named(found, "picture in two splits") == [("dark.jpg", None)]
    (near,) = [f for f in found if f.kind.startswith("picture nearly the same")]
    assert Path(near.file).name == "dark.jpg" and Path(near.other).name == "train0.png"


def test_close_hashes_are_those_of_a_comparison_of_all_pairs():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 60, dtype=np.uint64)
    flips = np.array(
        [sum(1 << int(b) for b in rng.choice(64, k, replace=False)) for k in range(1, 8)], np.uint64
    )
    hashes = np.concatenate([hashes, hashes[:7] ^ flips])
    expected = [
        [a, b]
        for a in range(len(hashes))
        for b in range(a + 1, len(hashes))
        if int(hashes[a] ^ hashes[b]).bit_count() <= 4
    ]
    assert _close_pairs(hashes).tolist() == expected and len(expected) == 4


def test_a_perceptual_hash_ignores_brightness():
    pixels = np.random.default_rng(0).integers(0, 200, (1, 16, 16, 3), dtype=np.uint8)
    assert perceptual_hashes(pixels) == perceptual_hashes(pixels + 40)


def test_the_best_iou_of_anchors_is_that_of_torchvision_over_the_whole_map():
    rng = np.random.default_rng(0)
    sides = rng.uniform(5, 150, (50, 2))
    corners = rng.uniform(150, 200, (50, 2))
    boxes = np.hstack([corners, corners + sides])
    sizes, ratios = (24.0, 64.0), (0.5, 1.0, 2.0)
    anchors = MapAnchors(sizes, ratios, Conventions(anchor_rounding=False))
    (grid,) = anchors(
        SimpleNamespace(image_sizes=[(512, 512)], tensors=torch.zeros(1, 3, 512, 512)),
        [torch.zeros(1, 1, 32, 32)],
    )
    expected = box_iou(torch.from_numpy(boxes), grid.double()).max(dim=1).values
    got = best_anchor_ious(sides, sizes, ratios, grid_offsets(boxes))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_without_places_an_object_lies_four_pixels_beside_an_anchor():
    # 16x16, shifted by 4 and 4: 12 * 12 = 144 of 2 * 256 - 144 = 368
    assert best_anchor_ious(np.array([[16, 16]]), (16,), (1,)) == pytest.approx([144 / 368])
    assert anchor_recall(np.array([[16, 16], [64, 64]]), (16, 64), (1,)) == 0.5


def test_fitted_anchors_find_the_objects_shapes_whatever_their_order():
    shapes = np.repeat([[80.0, 40.0], [200.0, 400.0]], 300, axis=0)
    sizes, ratios = fit_anchors(shapes, num_sizes=2, num_ratios=2)
    assert anchor_recall(shapes, sizes, ratios, 0.7) == 1
    assert sizes == pytest.approx((56, 283), rel=0.1) and ratios == pytest.approx((0.5, 2), rel=0.3)
    shuffled = shapes[np.random.default_rng(0).permutation(len(shapes))]
    assert fit_anchors(shuffled, num_sizes=2, num_ratios=2) == (sizes, ratios)


def test_fitting_anchors_to_nothing_is_refused():
    with pytest.raises(ValueError, match="no object with an area"):
        fit_anchors(np.zeros((3, 2)))


def test_anchors_that_miss_the_objects_are_a_finding_with_better_ones(data):
    values = data.values()
    values["model"]["anchor_sizes"] = [90]
    found = examine(parse_config(values), pictures="none").findings
    (anchors,) = [f for f in found if f.kind == "anchors"]
    assert "reach 0%" in anchors.what and "Try model.anchor_sizes=[3" in anchors.advice


def test_objects_below_half_a_cell_are_a_finding(data):
    for number in range(12):
        data.box("train", number + 1, [60, 50, 5, 5])
    assert [f.kind for f in data.findings("none") if f.kind == "small objects"]


def test_the_short_form_finds_what_annotations_show_and_opens_no_picture(data, monkeypatch):
    data.categories[3] = "bird"
    data.box("train", 1, [60, 40, 300, 20])
    config = parse_config(data.values())
    datasets = [
        load_coco(data.root / "images", data.root / f"{split}.json", check_pictures=False)
        for split in ("train", "val")
    ]
    for name in ("load_or_reason", "load_header"):
        monkeypatch.setattr(detector.data.opened, name, None)
    kinds = [f.kind for f in quick_check(*datasets, config)]
    assert kinds == ["class without examples", "box past the edge"]


def test_findings_are_counted_and_printed_worst_first_without_control_characters():
    findings = [
        Finding("note", "b", "f", None, "\x1b[2J said", "do"),
        *[Finding("error", "a", "f", i, f"object {i}", "mend") for i in range(5)],
    ]
    text = format_findings(findings)
    assert text.splitlines()[0] == "5 errors, 0 warnings, 1 notes"
    assert text.index("error: a (5)") < text.index("note: b (1)") and "and 2 more" in text
    assert "\x1b" not in text and r"\x1b[2J said" in text


@pytest.mark.parametrize(
    ("severities", "status"), [([], 0), (["note"], 0), (["warning", "note"], 1), (["error"], 2)]
)
def test_the_exit_status_is_that_of_the_worst_finding(severities, status):
    assert exit_status_of([Finding(s, "k", "f", None, "w", "a") for s in severities]) == status


@pytest.fixture
def check_data(monkeypatch, capsys):
    """check_data(argument, ...) -> (exit status, standard output, standard error)."""

    def run(*arguments):
        spec = importlib.util.spec_from_file_location("tool_check_data", ROOT / "tools/check_data.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", ["check_data.py", *map(str, arguments)])
        capsys.readouterr()
        status = module.main()
        return status, *capsys.readouterr()

    return run


def test_the_tool_prints_a_table_and_writes_json_and_the_worst_pictures(data, check_data):
    index = data.box("train", 3, [60, 10, 0, 20])
    status, out, _ = check_data(data.recipe(), "--output", data.root / "found")
    assert (
        status == 2 and "error: box without area (1)" in out and "a training step: 2 images of 64x96" in out
    )
    (found,) = json.loads((data.root / "found/findings.json").read_text())
    assert found["index"] == index and found["file"].endswith("train2.png") and found["advice"]
    assert Image.open(data.root / "found/worst.jpg").width > 400


def test_the_tool_says_what_a_recipe_lacks_with_status_2(data, check_data):
    status, _, err = check_data(data.root / "absent.yaml")
    assert status == 2 and "there is no config" in err


def test_a_recipe_without_data_is_refused():
    with pytest.raises(ValueError, match="names no data; accepted: data.train, data.val, data.test"):
        examine(parse_config({"model": {"backbone": "resnet18"}}))


def test_a_training_step_is_tried_where_that_is_asked_for(data, check_data):
    overrides = ("model.backbone.width=8", "model.rpn_post_nms_top_n_train=10")
    status, out, _ = check_data(data.recipe(), "--no-pictures", "--time", "--device", "cpu", *overrides)
    assert status == 0 and "MB on cpu: 12 epochs take about" in out


def test_the_tool_takes_a_folder_whose_format_is_found_out(data, check_data):
    data.recipe()
    status, out, _ = check_data(data.root, "--no-pictures", "model.anchor_sizes=[400]")
    assert "format coco" in out and status == 0


def test_clean_annotations_leave_out_every_fault_and_say_so(data, check_data):
    data.box("train", 1, [60, 10, 0, 20])
    data.box("train", 1, [80, 10, 30, 20])
    (data.root / "images/train1.png").unlink()
    (data.root / "images/train2.png").write_bytes(b"text")
    Image.open(data.root / "images/train3.png").resize((2 * WIDTH, 2 * HEIGHT)).save(
        data.root / "images/train3.png"
    )
    (data.root / "images/train4.png").write_bytes((data.root / "images/val0.png").read_bytes())
    status, out, _ = check_data(data.recipe(), "--fix", data.root / "clean")
    assert status == 2
    for said in (
        "left out 1 pictures that are absent",
        "left out 1 pictures that cannot be read",
        "left out 1 pictures of train that val or test holds too",
        "left out 1 boxes that are faulty or repeated",
        "train: 9 pictures, 19 boxes",
    ):
        assert said in out
    clean = yaml.safe_load((data.root / "clean/data.yaml").read_text())
    found = examine(parse_config({**data.values(), **clean}))
    assert {f.kind for f in found.findings} <= {"picture that no split names", "class with few examples"}
    dataset = load_coco(data.root, data.root / "clean/train.json")
    scaled = dataset.image_paths.tolist().index(str(data.root / "images/train3.png"))
    assert dataset.image_sizes[scaled].tolist() == [2 * HEIGHT, 2 * WIDTH]
    np.testing.assert_allclose(dataset.target(scaled)["boxes"], [[32, 32, 96, 96], [64, 32, 128, 96]])
    assert [80, 10, 96, 30] in dataset.target(0)["boxes"].tolist()


@pytest.mark.parametrize(
    ("misread", "said"),
    [
        (lambda x, y, w, h: [x, y, x + w, y + h], ["corners (x1, y1, x2, y2), read as x, y, width, height"]),
        (
            lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT],
            ["shares of the picture's width"],
        ),
        (
            lambda x, y, w, h: [x / WIDTH, y / HEIGHT, (x + w) / WIDTH, (y + h) / HEIGHT],
            ["shares of the picture's width", "corners (x1, y1, x2, y2), read as x, y, width, height"],
        ),
    ],
)
def test_boxes_of_one_wrong_format_are_converted_by_fix(tmp_path, check_data, misread, said):
    data = Data(tmp_path, num_train=12, num_val=4)
    # Boxes at the right and at the bottom, where one format alone fits.
    moved = {
        split: [[x + 32, y + 16, w, h] for x, y, w, h in map(bbox_of, rows)]
        for split, (_, rows) in data.splits.items()
    }
    for split, (_, annotations) in data.splits.items():
        for annotation, bbox in zip(annotations, moved[split], strict=True):
            annotation |= {"bbox": misread(*bbox), "area": 7}
    status, out, _ = check_data(data.recipe(), "--fix", data.root / "clean")
    assert status == 2 and all(
        f"train: boxes are converted, as they looked like {words}" in out for words in said
    )
    clean = json.loads((data.root / "clean/train.json").read_text())["annotations"]
    np.testing.assert_allclose([entry["bbox"] for entry in clean], moved["train"])
    assert {round(entry["area"]) for entry in clean} == {32 * 32}


def test_boxes_that_fit_no_single_format_are_not_converted(data, check_data):
    rng = np.random.default_rng(0)
    for _, annotations in data.splits.values():
        for annotation in annotations:
            annotation["bbox"] = (rng.uniform(0, 2, 4) - 1).tolist()
    status, _, err = check_data(data.recipe(), "--fix", data.root / "clean")
    assert status == 2 and "give the right format first" in err and not (data.root / "clean").exists()


def test_clean_annotations_are_refused_where_a_split_would_be_empty(data, check_data):
    data.splits["val"] = data.splits["train"]
    status, _, err = check_data(data.recipe(), "--fix", data.root / "clean")
    assert (
        status == 2 and "train: no picture would be left; left out are 12 pictures of train that val" in err
    )


def test_the_known_faults_of_bccd_are_found(shared):
    config = load_config(ROOT / "configs/bccd_resnet18.yaml", [f"data.root={shared / 'data/bccd'}"])
    found = examine(config, pictures="none").findings
    errors = [(Path(f.file).name, f.kind) for f in found if f.severity == "error"]
    assert sorted(errors) == [
        ("BloodImage_00338.jpg", "box without area"),
        ("BloodImage_00343.jpg", "box without area"),
    ]


# What check_data says and what a training says


def write_yolo(root, texts, pictures=None, **files):
    """Pictures 0.png, 1.png... with texts of the same names, and any other files."""
    for name in pictures or [f"{number}.png" for number in range(len(texts))]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(root / name)
    for name, text in {**{f"{number}.txt": text for number, text in enumerate(texts)}, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return {"train": {"format": "yolo", "images": "."}}


def write_coco(root, **splits):
    """A COCO file of one picture a split: lists of image ids, class names and (image id, class) of objects."""
    data = {}
    for split, (ids, names, objects) in splits.items():
        Image.new("RGB", (20, 20), split).save(root / f"{split}.png")
        content = {
            "images": [{"id": id, "file_name": f"{split}.png"} for id in ids],
            "categories": [{"id": names.index(name) + 1, "name": name} for name in names],
            "annotations": [
                {
                    "image_id": id,
                    "category_id": names.index(name) + 1,
                    "bbox": [2 + names.index(name), 2, 9, 9],
                }
                for id, name in objects
            ],
        }
        (root / f"{split}.json").write_text(json.dumps(content))
        data[{"red": "train", "blue": "val"}[split]] = {
            "format": "coco",
            "images": ".",
            "annotations": f"{split}.json",
        }
    return data


BOX = "0 0.5 0.5 0.5 0.5"
FAULTY_SETS = {
    "two lists of classes": (
        lambda root: write_yolo(root, [BOX], **{"a/classes.txt": "cat\ndog", "b/classes.txt": "dog\ncat"}),
        "error", "the lists a/classes.txt and b/classes.txt differ",
    ),
    "one text of two pictures": (
        lambda root: write_yolo(root, [BOX], ["0.png", "0.jpg"]),
        "error", "0.txt would be the text file of both",
    ),
    "a class number that the list lacks": (
        lambda root: write_yolo(root, [BOX, BOX.replace("0 ", "7 ", 1)], **{"classes.txt": "cat\ndog"}),
        "error", "1.txt: line 1 .*has the class '7'",
    ),
    "a text without picture": (
        lambda root: write_yolo(root, [BOX, BOX], ["0.png"]),
        "warning", "1 texts belong to no picture.*such as 1.txt",
    ),
    "a picture without text": (
        lambda root: write_yolo(root, [BOX], ["0.png", "1.png"]),
        "warning", "1 pictures have no text file.*such as 1.png",
    ),
    "no list of classes": (lambda root: write_yolo(root, [BOX]), "note", "no list of class names was found"),
    "a picture listed twice": (
        lambda root: write_coco(root, red=([1, 2], ["cat", "dog"], [(1, "cat"), (2, "dog")])),
        "note", "1 pictures have several entries, such as .*red.png",
    ),
    "a class in val that train lacks": (
        lambda root: write_coco(root, red=([1], ["cat"], [(1, "cat")]), blue=([1], ["cat", "dog"], [(1, "cat"), (1, "dog")])),
        "warning", "'dog'.*train",
    ),
    "a class without objects": (
        lambda root: write_coco(root, red=([1], ["cat", "dog"], [(1, "cat")])),
        "note", "has no object of dog",
    ),
    "one picture in both splits": (
        lambda root: (d := write_coco(root, red=([1], ["cat"], [(1, "cat")]))) | {"val": d["train"]},
        "error", "red.png is in train and val",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTY_SETS)
def test_check_data_and_a_training_say_the_same_of_a_faulty_set(tmp_path, name):
    write, severity, what = FAULTY_SETS[name]
    data = {"root": str(tmp_path), **write(tmp_path)}
    config = parse_config({"model": {"backbone": "resnet18", "anchor_sizes": [10]}, "data": data})
    found = [f for f in examine(config).findings if re.search(what, f.what, re.S)]
    assert severity in {f.severity for f in found}, found
    try:
        sets = build_datasets(config.data)
    except ValueError as error:
        said = [("error", str(error))]
    else:
        said = [(f.severity, f.what) for f in quick_check(*sets, config)]
        for dataset in filter(None, sets):
            said += [("error", each) for each in dataset.problems]
            said += [("warning", each) for each in dataset.warnings]
            said += [("note", each) for each in dataset.notes]
    assert severity in {kind for kind, sentence in said if re.search(what, sentence, re.S)}, said
