"""COCO JSON into a data set: ids, crowds, errors, and what the data set itself does."""

import contextlib
import copy
import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from detector.data.coco import CocoSource, load_coco
from detector.data.dataset import DetectionDataset, concatenate
from detector.data.memory import available_memory

CONTENT = {
    "images": [
        {"id": 30, "file_name": "c.png", "width": 40, "height": 30},
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 12, "file_name": "sub/b.png", "width": 40, "height": 30},
    ],
    "categories": [{"id": 90, "name": "zebra"}, {"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}],
    "annotations": [
        {"id": 0, "image_id": 30, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 123.5, "iscrowd": 0},
        {"id": 1, "image_id": 7, "category_id": 17, "bbox": [0.5, 0.25, 4, 5]},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": [5, 5, 30, 20], "area": 99, "iscrowd": 1},
        {"id": 3, "image_id": 30, "category_id": 3, "bbox": [30, 20, 20, 20], "area": 400, "difficult": 1},
    ],
}


@pytest.fixture
def write(tmp_path):
    """Write a COCO set: pictures on disk, and the JSON that `change` leaves of CONTENT."""

    def write(change=lambda content: None):
        content = copy.deepcopy(CONTENT)
        for number, image in enumerate(content["images"]):
            path = tmp_path / "images" / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (image["width"], image["height"]), (number, 51, 255)).save(path)
        change(content)
        (tmp_path / "a.json").write_text(json.dumps(content))
        return tmp_path / "images", tmp_path / "a.json"

    return write


def test_images_come_in_ascending_id_and_labels_in_ascending_category_id(write):
    dataset = load_coco(*write())
    assert dataset.image_ids.tolist() == [7, 12, 30]
    assert dataset.class_names == ("cat", "dog", "zebra")
    assert dataset.category_ids.tolist() == [3, 17, 90]
    assert dataset.box_counts() == {"cat": 1, "dog": 1, "zebra": 1}
    assert dataset.target(2)["labels"].tolist() == [3, 1]
    assert dataset.target(2)["boxes"].tolist() == [[1, 2, 11, 22], [30, 20, 50, 40]]  # unclipped
    assert dataset.problems == ()


def test_an_item_is_torchvisions_pair(write):
    dataset = load_coco(*write())
    image, target = dataset[0]
    assert image.shape == (3, 30, 40) and image.dtype == torch.float32 and image.is_contiguous()
    assert image[:, 0, 0].tolist() == pytest.approx([1 / 255, 0.2, 1])
    assert target["boxes"].tolist() == [[0.5, 0.25, 4.5, 5.25]] and target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [2] and target["labels"].dtype == torch.int64
    assert target["image_id"] == 7 and type(target["image_id"]) is int
    assert dataset.aspect_ratios().tolist() == [0.75] * 3
    with pytest.raises(IndexError):
        dataset[3]


def test_an_image_without_annotations_is_kept_with_empty_arrays(write):
    target = load_coco(*write())[1][1]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,) and target["image_id"] == 12


def test_crowds_are_left_out_of_targets_and_kept_for_the_evaluator(write):
    dataset = load_coco(*write())
    assert dataset.target(0)["labels"].tolist() == [2]
    assert [entry["iscrowd"] for entry in dataset.to_coco()["annotations"]] == [0, 1, 0, 0]


def test_crowds_are_counted_and_can_be_trained_on(write):
    assert "1 of 4 boxes are crowds, and are not trained on" in load_coco(*write()).notes[-1]
    trained = load_coco(*write(), use_crowd=True)
    assert trained.target(0)["labels"].tolist() == [2, 1] and not trained.crowd.any()
    assert "1 of 4 boxes are crowds, and are trained on" in trained.notes[-1]


def test_difficult_objects_are_learned_only_on_request(write):
    dataset = load_coco(*write(), use_difficult=False)
    assert dataset.target(2)["labels"].tolist() == [3]
    assert dataset.box_counts()["cat"] == 0
    assert [entry["difficult"] for entry in dataset.to_coco()["annotations"]] == [0, 0, 0, 1]


def test_areas_are_the_files_and_otherwise_the_boxs(write):
    assert load_coco(*write()).areas.tolist() == [20, 99, 123.5, 400]


def test_to_coco_gives_annotation_ids_from_1_and_the_sets_own_category_ids(write):
    content = load_coco(*write()).to_coco()
    assert [entry["id"] for entry in content["annotations"]] == [1, 2, 3, 4]
    assert [entry["category_id"] for entry in content["annotations"]] == [17, 3, 90, 3]
    assert content["annotations"][2]["bbox"] == [1, 2, 10, 20]
    assert content["images"][1].pop("file_name").endswith("images/sub/b.png")
    assert content["images"][1] == {"id": 12, "height": 30, "width": 40}
    json.dumps(content)  # plain numbers only


def test_to_coco_and_pycocotools_agree(write):
    coco = COCO()
    coco.dataset = load_coco(*write()).to_coco()
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    assert coco.getImgIds() == [7, 12, 30] and coco.getCatIds() == [3, 17, 90]
    assert coco.getAnnIds(imgIds=[7], iscrowd=False) == [1]
    assert coco.getAnnIds(catIds=[3]) == [2, 4]


def test_class_names_select_and_reorder(write):
    dataset = load_coco(*write(), class_names=["zebra", "cat"])
    assert dataset.category_ids.tolist() == [90, 3]
    assert dataset.labels.tolist() == [2, 1, 2]
    assert "1 dog" in dataset.notes[0]
    with pytest.raises(ValueError, match="has no category 'zebar'; did you mean 'zebra'"):
        load_coco(*write(), class_names=["zebar"])
    with pytest.raises(ValueError, match="'cat' twice"):
        load_coco(*write(), class_names=["cat", "cat"])


def test_limit_takes_the_lowest_ids_that_have_something_to_learn(write):
    assert load_coco(*write(), limit=2).image_ids.tolist() == [7, 30]
    assert load_coco(*write(), limit=1, class_names=["cat"]).image_ids.tolist() == [30]  # 7 has only a crowd
    with pytest.raises(ValueError, match="limit must be at least 1, or None for all images, got 0"):
        load_coco(*write(), limit=0)


BAD_BOXES = [
    ([1, 2, 0, 5], "has no area"),
    ([40, 2, 5, 5], "lies outside the image"),
    ([-6, 2, 5, 5], "lies outside the image"),
    ([1, float("nan"), 5, 5], "is not four finite numbers"),
    ([1, 2, float("inf"), 5], "is not four finite numbers"),
    ([1, 2, 3], "is not four finite numbers"),
    (["x", 2, 3, 4], "is not four finite numbers"),
    ([1, 2, 10**400, 5], "is not four finite numbers"),
    (None, "is not four finite numbers"),
]


@pytest.mark.parametrize(("bbox", "reason"), BAD_BOXES)
def test_a_box_that_cannot_be_used_is_reported_with_file_and_index_and_skipped(write, bbox, reason):
    paths = write(lambda content: content["annotations"][3].update(bbox=bbox))
    dataset = load_coco(*paths)
    assert len(dataset.boxes) == 3 and len(dataset) == 3
    assert len(dataset.problems) == 1
    assert (
        f"a.json: annotations[3] (c.png) has a box that {reason}, and is skipped: bbox" in dataset.problems[0]
    )
    with pytest.raises(ValueError, match=r"strict=True refuses any:\n.*annotations\[3\]"):
        load_coco(*paths, strict=True)


@pytest.mark.parametrize(("flag", "is_crowd"), [("0", 0), ("1", 1), (0, 0), (True, 1), (0.0, 0)])
def test_a_crowd_may_be_marked_by_text(write, flag, is_crowd):
    dataset = load_coco(*write(lambda content: content["annotations"][1].update(iscrowd=flag)))
    assert dataset.crowd.tolist()[0] == is_crowd


def test_an_area_beyond_all_numbers_is_not_an_error_of_python(write):
    paths = write(lambda content: content["annotations"][0].update(area=10**400))
    assert len(load_coco(*paths).boxes) == 4


def test_json_nested_deep_and_files_above_max_bytes_are_refused(write):
    images_dir, path = write()
    source = CocoSource(format="coco", images="images", annotations="a.json", max_bytes=100)
    with pytest.raises(ValueError, match=r"a\.json: the file has \d+ bytes; max_bytes accepts 100"):
        source.read(path.parent)
    path.write_text('{"images": ' + "[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON \(recursion limit exceeded"):
        load_coco(images_dir, path)


def test_a_file_that_would_not_fit_into_memory_is_refused_before_it_is_parsed(write, monkeypatch):
    files = write()
    assert available_memory() > 2**20
    monkeypatch.setattr("detector.data.memory.available_memory", lambda: 1000)
    with pytest.raises(
        ValueError, match=r"a\.json: reading it takes about .* GiB of memory, and 0\.0 GiB are free"
    ):
        load_coco(*files)


def test_links_out_of_the_root_are_followed_and_paths_out_of_it_are_not(write, tmp_path):
    images_dir, path = write()
    aside = tmp_path.parent / f"{tmp_path.name}_aside"
    (images_dir / "sub").rename(aside)
    (images_dir / "sub").symlink_to(aside)
    (aside / "circle").symlink_to(images_dir)
    assert len(load_coco(images_dir, path)) == 3
    outside = write(lambda content: content["images"][0].update(file_name=f"../../{aside.name}/z.png"))
    with pytest.raises(ValueError, match="outside"):
        load_coco(*outside)


def test_a_size_and_a_box_that_are_absent_come_from_the_picture_and_the_polygons(write):
    def change(content):
        del content["images"][1]["width"]
        del content["annotations"][1]["bbox"]
        content["annotations"][1]["segmentation"] = [[5, 6, 15, 6, 15, 16], [2, 10, 4, 12, 3, 20]]
        del content["annotations"][0]["bbox"]
        content["annotations"][0]["segmentation"] = {"counts": [0, 5], "size": [30, 40]}

    dataset = load_coco(*write(change))
    assert dataset.image_sizes[0].tolist() == [30, 40]
    assert dataset.target(0)["boxes"].tolist() == [[2, 6, 15, 20]]
    assert "annotations[0] (c.png) has a box that is not four finite numbers" in dataset.problems[0]


def test_a_picture_that_is_elsewhere_is_noted(write):
    dataset = load_coco(*write(lambda content: content["images"][0].update(file_name="old/c.jpg")))
    assert dataset.image_paths[2].endswith("images/c.png")
    assert "1 pictures have other paths than the file says: 'old/c.jpg' is" in dataset.notes[0]


def test_blanks_around_class_names_are_dropped_with_a_note(write):
    dataset = load_coco(*write(lambda content: content["categories"][2].update(name="dog ")))
    assert dataset.class_names == ("cat", "dog", "zebra")
    assert dataset.notes[0].endswith("blanks around class names are dropped: 'dog '")


def spell(content, spelling):
    """Write the ids, sizes and boxes of a COCO dict in another spelling."""
    for section, keys in (("images", ("id", "width", "height")), ("categories", ("id",))):
        for entry in content[section]:
            entry |= {key: spelling(entry[key]) for key in keys}
    for entry in content["annotations"]:
        entry |= {key: spelling(entry[key]) for key in ("id", "image_id", "category_id")}
        entry["bbox"] = list(map(spelling, entry["bbox"]))


@pytest.mark.parametrize("spelling", [str, float, lambda number: str(float(number))])
def test_whole_numbers_are_read_in_any_spelling(write, spelling):
    expected = load_coco(*write())
    dataset = load_coco(*write(lambda content: spell(content, spelling)))
    assert dataset.to_coco() == expected.to_coco() and dataset.problems == ()


def test_a_number_may_be_the_name_of_a_class(write):
    dataset = load_coco(*write(lambda content: content["categories"][1].update(name=5)))
    assert dataset.class_names == ("5", "dog", "zebra")


@pytest.mark.parametrize("side", [None, 0, -3, "", "unknown", 2**31, float("inf")])
def test_a_size_that_is_unknown_is_read_from_the_picture(write, side):
    dataset = load_coco(*write(lambda content: content["images"][1].update(width=side)))
    assert dataset.image_sizes.tolist() == [[30, 40]] * 3 and dataset.problems == ()


def test_boxes_drawn_from_right_to_left_are_put_in_order_and_counted(write):
    def change(content):
        content["annotations"][0]["bbox"] = [11, 22, -10, -20]
        content["annotations"][1]["bbox"] = [0.5, 5.25, 4, -5]

    dataset, expected = load_coco(*write(change)), load_coco(*write())
    assert dataset.boxes.tolist() == expected.boxes.tolist() and dataset.problems == ()
    assert "2 of 4 boxes were drawn from right to left or upwards" in dataset.notes[0]
    with pytest.raises(
        ValueError, match=r"2 problem\(s\), and strict=True refuses any:\n.*ends before it starts"
    ):
        load_coco(*write(change), strict=True)
    assert (
        "the first: " in dataset.notes[0]
        and "annotations[1] (a.png) bbox [0.5, 5.25, 4, -5]" in dataset.notes[0]
    )


def fill(content, num_boxes, bbox_of):
    entries = [{"image_id": 7, "category_id": 3, "bbox": bbox_of(row)} for row in range(num_boxes)]
    content["annotations"] = entries


def test_numbers_that_may_be_widths_and_heights_are_not_put_in_order(write):
    """Read as x2 - x1 and y2 - y1, widths and heights of boxes in the lower right are negative."""

    def change(content):
        fill(content, 20, lambda row: [10 + row, 10, 8 - 10 - row, 9 - 10])

    with pytest.raises(ValueError, match=r"20 of 20 objects cannot be used, .*\n.*ends before it starts"):
        load_coco(*write(change))


def test_no_more_than_a_twentieth_of_the_objects_is_lost_without_stopping(write):
    def bad(count):
        return write(lambda content: fill(content, 100, lambda row: [1, 2, 3 * (row >= count), 4]))

    assert len(load_coco(*bad(5)).boxes) == 95
    message = r"6 of 100 objects cannot be used, and at most 5% may be left out:\n.*annotations\[0\]"
    with pytest.raises(ValueError, match=message):
        load_coco(*bad(6))


def test_objects_of_unknown_pictures_and_objects_with_bad_boxes_are_lost_alike(write):
    def change(content):
        fill(content, 100, lambda row: [1, 2, 3 * (row > 2), 4])
        for entry in content["annotations"][-3:]:
            entry["image_id"] = 99

    paths = write(change)
    with pytest.raises(ValueError, match="6 of 100 objects cannot be used"):
        load_coco(*paths)
    assert len(load_coco(*paths, pictures={str(paths[0] / "c.png")}).problems) == 3


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_an_annotation_of_nothing_known_is_reported_and_skipped(write, key):
    dataset = load_coco(*write(lambda content: content["annotations"][1].update({key: 55})))
    assert len(dataset.boxes) == 3
    assert len(dataset.problems) == 1
    assert "annotations[1]" in dataset.problems[0] and f"{key} 55" in dataset.problems[0]


MALFORMED = [
    (lambda c: c.pop("annotations"), "it has no 'annotations'"),
    (lambda c: c["images"][1].pop("file_name"), r"images\[1\] has no 'file_name'"),
    (lambda c: c["annotations"][2].pop("image_id"), r"annotations\[2\] has no 'image_id'"),
    (lambda c: c["images"][1].update(id=-5), r"images\[1\] has id -5: .*greater than or equal to 0"),
    (lambda c: c["images"][1].update(id=2**70), r"images\[1\] has id 1180591620717411303424: .*less than"),
    (lambda c: c["categories"][1].update(id=2**70), r"categories\[1\] has id 1180591620717411303424: .*less"),
    (lambda c: c["annotations"][1].update(iscrowd="no"), r"annotations\[1\] has iscrowd 'no': .*integer"),
    (lambda c: c["images"][0].update(file_name="../../../etc/hostname"), r"images with id 30: .*outside"),
    (lambda c: c["images"][0].update(file_name="/etc/hostname"), r"images with id 30: .*outside"),
    (lambda c: c["images"][0].update(file_name="x" * 9000), r"images with id 30: .*no path of a file"),
    (lambda c: c["images"][0].update(file_name="a\0b"), r"images with id 30: .*no path of a file"),
    (lambda c: c["images"][1].update(id="a7"), r"images\[1\] has id 'a7': .*integer"),
    (lambda c: c["images"][1].update(id=7.5), r"images\[1\] has id 7.5: .*integer"),
    (lambda c: c["images"][1].update(id=30), r"images\[0\] and images\[1\] share id 30"),
    (lambda c: c["categories"].clear(), "no class to detect"),
    (lambda c: c["annotations"].append(3), r"annotations\[4\] is 3: .*object"),
]


@pytest.mark.parametrize(("change", "message"), MALFORMED)
def test_a_malformed_file_is_an_error_that_names_the_entry(write, change, message):
    with pytest.raises(ValueError, match=rf"a\.json: .*{message}|a\.json: {message}"):
        load_coco(*write(change))


def test_categories_of_one_name_are_one_class_with_a_note(write):
    """Roboflow lists the group of the classes as a category, often under the name of one of them."""
    whole, merged = load_coco(*write()), load_coco(*write(lambda c: c["categories"][1].update(name="dog")))
    assert len(merged.class_names) == len(whole.class_names) - 1 and len(merged.boxes) == len(whole.boxes)
    assert any("2 categories are called 'dog', and are taken as one class" in note for note in merged.notes)
    assert not any("are called" in note for note in whole.notes)


def test_files_that_are_missing_or_no_json_are_named(write, tmp_path):
    images_dir, path = write()
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_coco(images_dir, tmp_path / "gone.json")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder of images"):
        load_coco(tmp_path / "nowhere", path)
    path.write_text('{"images": [')
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        load_coco(images_dir, path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="got a list"):
        load_coco(images_dir, path)


def test_a_picture_of_another_size_is_an_error_and_swapped_sides_point_to_exif(write):
    dataset = load_coco(*write(lambda content: content["images"][1].update(width=30, height=40)))
    with pytest.raises(ValueError, match=r"a\.png: the picture is 40x30 .* say 30x40; .*EXIF"):
        dataset.image(0)
    dataset = load_coco(*write(lambda content: content["images"][1].update(width=41)))
    with pytest.raises(ValueError, match=r"the picture is 40x30 .* say 41x30$"):
        dataset[0]


def test_a_set_without_any_annotation_loads(write):
    dataset = load_coco(*write(lambda content: content["annotations"].clear()))
    assert len(dataset) == 3 and dataset.boxes.shape == (0, 4)
    assert dataset.to_coco()["annotations"] == []
    assert len(dataset.subset([2, 0])) == 2


def test_a_subset_keeps_boxes_with_their_images(write):
    dataset = load_coco(*write())
    for indices in ([2, 0], np.array([2, 0]), slice(None, None, -2)):
        part = dataset.subset(indices)
        assert part.image_ids.tolist() == [30, 7]
        assert part.offsets.tolist() == [0, 2, 4]
        for row, index in enumerate((2, 0)):
            for key, value in dataset.target(index).items():
                assert np.array_equal(part.target(row)[key], value)
    assert len(dataset.subset([])) == 0
    assert dataset.subset(np.array([False, True, False])).image_ids.tolist() == [12]
    with pytest.raises(IndexError):
        dataset.subset([3])


def test_concatenation_keeps_ids_where_they_differ_and_renumbers_them_otherwise(write):
    dataset = load_coco(*write())
    whole = concatenate([dataset.subset([1, 2]), dataset.subset([0])])
    assert whole.image_ids.tolist() == [12, 30, 7] and not any("renumbered" in note for note in whole.notes)
    assert whole.target(2)["labels"].tolist() == [2]
    twice = concatenate([dataset, replace(dataset, image_paths=[f"copy/{p}" for p in dataset.image_paths])])
    assert twice.image_ids.tolist() == [1, 2, 3, 4, 5, 6] and "renumbered 1..6" in twice.notes[-1]
    assert twice.box_counts() == {"cat": 2, "dog": 2, "zebra": 2}


def test_concatenation_names_the_classes_that_differ(write):
    dataset = load_coco(*write())
    with pytest.raises(ValueError, match=r"it lacks \['dog'\] and adds \[\]"):
        concatenate([dataset, load_coco(*write(), class_names=["cat", "zebra"])])
    with pytest.raises(ValueError, match="it has them in another order"):
        concatenate([dataset, load_coco(*write(), class_names=["dog", "cat", "zebra"])])
    with pytest.raises(ValueError, match="differ in use_difficult"):
        concatenate([dataset, load_coco(*write(), use_difficult=False)])


def test_columns_that_do_not_fit_together_are_refused(write):
    columns = vars(load_coco(*write()))
    with pytest.raises(ValueError, match="labels has 1 rows, 4 expected"):
        DetectionDataset(**columns | {"labels": [1]})
    with pytest.raises(ValueError, match=r"labels must be in 1\.\.3, got 0\.\.1"):
        DetectionDataset(**columns | {"labels": [0, 1, 1, 1]})
    with pytest.raises(ValueError, match="offsets must rise from 0 to the number of boxes, 4"):
        DetectionDataset(**columns | {"offsets": [0, 1, 2, 3]})


def test_annotations_live_in_plain_arrays_that_workers_share(write):
    dataset = load_coco(*write())
    for name, value in vars(dataset).items():
        if name not in ("class_names", "problems", "notes", "warnings", "left_out", "use_difficult"):
            assert isinstance(value, np.ndarray) and value.dtype.kind in "iufbU", name
    assert repr(pickle.loads(pickle.dumps(dataset)).to_coco()) == repr(dataset.to_coco())


def test_workers_give_what_the_main_process_gives(write):
    dataset = load_coco(*write())
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    for (image, target), (own_image, own_target) in zip(
        loader, map(dataset.__getitem__, range(3)), strict=True
    ):
        assert torch.equal(image, own_image) and torch.equal(target["boxes"], own_target["boxes"])


def test_coco128_has_its_published_counts_and_no_problem(shared):
    folder = shared / "data/coco128"
    dataset = load_coco(folder / "images", folder / "annotations/instances.json")
    assert len(dataset) == 128 and len(dataset.boxes) == 939 and dataset.crowd.sum() == 10
    assert len(dataset.class_names) == 80 and dataset.category_ids[-1] == 90
    assert sum(dataset.box_counts().values()) == 929
    assert sum(count > 0 for count in dataset.box_counts().values()) == 71
    assert dataset.problems == ()
    assert (np.diff(dataset.offsets) == 0).any()
    per_image = len(pickle.dumps(dataset)) / len(dataset)
    assert per_image < 2000  # bytes, paths included; as lists of dicts over 10,000


def test_coco128_reads_back_from_to_coco_as_it_was(shared):
    folder = shared / "data/coco128"
    path = folder / "annotations/instances.json"
    ours = {entry["id"]: entry for entry in load_coco(folder / "images", path).to_coco()["annotations"]}
    filed = sorted(json.loads(path.read_text())["annotations"], key=lambda entry: entry["image_id"])
    assert len(ours) == len(filed)
    for entry, expected in zip(ours.values(), filed, strict=True):
        assert entry["bbox"] == pytest.approx(expected["bbox"], abs=1e-9)
        for key in ("image_id", "category_id", "area", "iscrowd"):
            assert entry[key] == expected[key]


def test_every_picture_of_coco128_has_the_size_that_its_annotations_say(shared):
    folder = shared / "data/coco128"
    dataset = load_coco(folder / "images", folder / "annotations/instances.json", limit=20)
    for index in range(len(dataset)):
        assert dataset.image(index).shape[:2] == tuple(dataset.image_sizes[index])
