"""VOC folders into a data set: pixel conventions, splits, classes, and the two real sets."""

import pickle
import re
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from detector.data.voc import load_voc

CAT = ("cat", (1, 1, 40, 30))
DOG = ("dog", (11, 6, 20, 25))


def object_xml(name, corners, extra=""):
    box = "".join(
        f"<{tag}>{value}</{tag}>"
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>{name}</name>{extra}<bndbox>{box}</bndbox></object>"


SIZE = "<size><width>40</width><height>30</height><depth /></size>"


@pytest.fixture
def write(tmp_path):
    """Write a VOC folder with the split train: {stem: objects (name, corners[, extra]) or a body}."""

    def write(files, suffix="jpg"):
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for stem, objects in files.items():
            body = (
                objects if isinstance(objects, str) else SIZE + "".join(object_xml(*each) for each in objects)
            )
            (tmp_path / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{body}</annotation>")
            Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / f"{stem}.{suffix}")
        (tmp_path / "ImageSets/Main/train.txt").write_text("".join(f"{stem}  1\n" for stem in files))
        return tmp_path

    return write


def test_one_based_boxes_count_both_ends_and_others_are_as_filed(write):
    root = write({"a": [CAT, DOG]})
    assert load_voc(root, "train").boxes.tolist() == [[0, 0, 40, 30], [10, 5, 20, 25]]
    dataset = load_voc(root, "train", one_based=False)
    assert dataset.boxes.tolist() == [[1, 1, 40, 30], [11, 6, 20, 25]]
    assert dataset.areas.tolist() == [39 * 29, 9 * 19]


def test_classes_are_the_sorted_names_of_the_split(write):
    dataset = load_voc(write({"a": [DOG], "b": [CAT, DOG], "c": []}), "train")
    assert dataset.class_names == ("cat", "dog") and dataset.category_ids.tolist() == [1, 2]
    assert dataset.labels.tolist() == [2, 1, 2] and dataset.offsets.tolist() == [0, 1, 3, 3]
    assert dataset.box_counts() == {"cat": 1, "dog": 2}
    assert dataset.target(2)["boxes"].shape == (0, 4)


def test_objects_of_other_classes_than_the_given_are_counted_in_a_note(write):
    dataset = load_voc(write({"a": [DOG, CAT], "b": [DOG]}), "train", class_names=["cow", "cat"])
    assert dataset.class_names == ("cow", "cat") and dataset.labels.tolist() == [2]
    assert "2 dog" in dataset.notes[0] and "no object of cow" in dataset.notes[1]
    assert dataset.problems == ()


def test_image_ids_are_the_file_names_where_all_are_numbers(write, tmp_path):
    assert load_voc(write({"000012": [CAT], "000007": []}), "train").image_ids.tolist() == [12, 7]


def test_image_ids_are_counted_where_a_name_is_no_number_or_two_are_equal(write):
    assert load_voc(write({"2007_1": [CAT], "7": []}), "train").image_ids.tolist() == [1, 2]
    assert load_voc(write({"07": [CAT], "7": []}), "train").image_ids.tolist() == [1, 2]


def test_difficult_objects_are_marked_and_learned_only_on_request(write):
    root = write({"a": [(*CAT, "<difficult>1</difficult>"), (*DOG, "<difficult>0</difficult>"), DOG]})
    assert load_voc(root, "train").target(0)["labels"].tolist() == [1, 2, 2]
    dataset = load_voc(root, "train", use_difficult=False)
    assert dataset.target(0)["labels"].tolist() == [2, 2]
    assert [entry["difficult"] for entry in dataset.to_coco()["annotations"]] == [1, 0, 0]
    assert not dataset.crowd.any()


def test_boxes_of_parts_are_not_taken_for_objects(write):
    part = "<part><name>head</name><bndbox><xmin>2</xmin></bndbox></part>"
    assert load_voc(write({"a": [(*CAT, part)]}), "train").boxes.tolist() == [[0, 0, 40, 30]]


def test_limit_takes_the_first_images_with_an_object(write):
    dataset = load_voc(write({"a": [], "b": [CAT], "c": [DOG], "d": [DOG]}), "train", limit=2)
    assert dataset.image_ids.tolist() == [2, 3]


BAD_OBJECTS = [
    (("cat", (5, 6, 5, 20)), "has no area"),
    (("cat", (41, 6, 50, 20)), "lies outside the image"),
    (("cat", (1, "", 5, 20)), "is not four finite numbers"),
    (("cat", (1, "nan", 5, 20)), "is not four finite numbers"),
    (("", (1, 2, 5, 20)), "has no class name"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_OBJECTS)
def test_an_object_that_cannot_be_used_is_reported_with_file_and_index_and_skipped(write, bad, reason):
    root = write({"a": [CAT], "b": [DOG, bad]})
    dataset = load_voc(root, "train")
    assert len(dataset) == 2 and dataset.labels.tolist() == [1, 2]
    assert len(dataset.problems) == 1
    assert "b.xml: object[1]" in dataset.problems[0] and reason in dataset.problems[0]
    assert "skipped" in dataset.problems[0]
    with pytest.raises(ValueError, match=r"strict=True refuses any:\n.*b\.xml: object\[1\]"):
        load_voc(root, "train", strict=True)


def test_a_box_drawn_from_right_to_left_counts_both_ends_too(write):
    dataset = load_voc(write({"a": [DOG, ("cat", (9, 20, 5, 6))]}), "train")
    assert dataset.boxes.tolist() == [[10, 5, 20, 25], [4, 5, 9, 20]] and dataset.problems == ()
    assert "1 of 2 boxes were drawn from right to left or upwards" in dataset.notes[0]


LISTS = {
    "pictures": "a.jpg\nb v2.x.JPG\n",
    "paths of pictures": "JPEGImages/a.jpg\n/home/me/VOC/JPEGImages/b v2.x.jpg\n",
    "paths of XML files": "Annotations/a.xml\nAnnotations/b v2.x.XML\n",
    "pairs": "JPEGImages/a.jpg Annotations/a.xml\nJPEGImages/b v2.x.jpg\tAnnotations/b v2.x.xml\n",
    "backslashes": "JPEGImages\\a.jpg\r\nJPEGImages\\b v2.x.jpg\r\n",
    "flags": "a -1\nb v2.x  1\n",
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_may_name_stems_pictures_xml_files_or_pairs(write, kind):
    root = write({"a": [CAT], "b v2.x": [DOG], "c": [DOG]})
    (root / "ImageSets/Main/train.txt").write_text(LISTS[kind])
    dataset = load_voc(root, "train")
    assert [path.rpartition("/")[2] for path in dataset.image_paths] == ["a.jpg", "b v2.x.jpg"]
    assert dataset.labels.tolist() == [1, 2]


def test_a_box_past_the_edge_is_reported_and_kept(write):
    dataset = load_voc(write({"a": [("cat", (30, 5, 44, 20))]}), "train")
    assert dataset.boxes.tolist() == [[29, 4, 44, 20]]
    assert "a.xml: object[0] (cat) reaches past its image of 40x30 pixels, and is kept" in dataset.problems[0]


def test_a_coordinate_below_1_contradicts_one_based(write):
    root = write({"a": [CAT], "b": [DOG, ("dog", (3, 0.5, 9, 9)), ("cat", (0, 1, 9, 9))]})
    message = r"b\.xml: object\[1\] \(dog\) has ymin 0\.5, below 1, as have 1 other .*one_based: false"
    with pytest.raises(ValueError, match=message):
        load_voc(root, "train")
    assert load_voc(root, "train", one_based=False).notes == ()


PASCAL = "<source><database>The VOC2007 Database</database></source>"


def test_files_of_voc_that_are_taken_as_counted_from_0_are_noted(write):
    body = PASCAL + SIZE + object_xml(*CAT)
    dataset = load_voc(write({"a": body}), "train", one_based=False)
    assert "the files name 'The VOC2007 Database', which counts pixels from 1" in dataset.notes[0]
    other = PASCAL + SIZE + object_xml("cat", (0, 1, 40, 30))
    assert load_voc(write({"a": other}), "train", one_based=False).notes == ()


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_a_missing_size_is_read_from_the_picture(write, size):
    dataset = load_voc(write({"a": size + object_xml(*CAT)}), "train")
    assert dataset.image_sizes.tolist() == [[30, 40]]


def test_pictures_are_found_by_the_stem_of_the_xml_and_otherwise_by_filename(write):
    root = write({"a": f"<filename>other.png</filename>{SIZE}{object_xml(*CAT)}", "b": [CAT]}, suffix="PNG")
    Image.new("RGB", (40, 30)).save(root / "JPEGImages/other.png")
    assert load_voc(root, "train").image_paths[0].endswith("a.PNG")
    (root / "JPEGImages/a.PNG").unlink()
    assert load_voc(root, "train").image_paths[0].endswith("other.png")
    assert load_voc(root, "train")[0][0].shape == (3, 30, 40)


def test_missing_things_are_named(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="should be a VOC folder"):
        load_voc(tmp_path / "nowhere", "train")
    root = write({"a": [CAT], "b": [DOG]})
    (root / "ImageSets/Main/cat_train.txt").touch()
    with pytest.raises(ValueError, match="has no split 'tran'; there are train, cat_train"):
        load_voc(root, "tran")
    with pytest.raises(ValueError, match="the split is empty"):
        load_voc(root, "cat_train")
    (root / "Annotations/b.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the split's 2 annotations are missing: b +1$"):
        load_voc(root, "train")
    (root / "ImageSets/Main/train.txt").write_text("a\na\n")
    with pytest.raises(ValueError, match=r"lists 1 image\(s\) more than once: a"):
        load_voc(root, "train")


def test_annotations_alone_need_no_pictures(write, tmp_path):
    root = write({"a": [CAT], "b": [DOG]})
    whole = load_voc(root, "train")
    shutil.rmtree(root / "JPEGImages")
    alone = load_voc(root, "train", check_pictures=False)
    assert alone.to_coco() == whole.to_coco()
    (root / "Annotations/b.xml").write_text(f"<annotation>{object_xml(*DOG)}</annotation>")
    assert load_voc(root, "train", check_pictures=False).image_sizes.tolist() == [[30, 40], [0, 0]]
    with pytest.raises(FileNotFoundError, match="JPEGImages: no such folder"):
        load_voc(root, "train")


def test_malformed_xml_and_a_split_without_objects_are_errors(write):
    root = write({"a": []})
    with pytest.raises(ValueError, match="split 'train': has no object, so no class names"):
        load_voc(root, "train")
    assert len(load_voc(root, "train", class_names=["cat"])) == 1
    (root / "Annotations/a.xml").write_text("<annotation><object>")
    with pytest.raises(ValueError, match=r"a\.xml: not valid XML"):
        load_voc(root, "train")


XML_DAMAGE = {
    "undefined entity": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><annotation>&x;</annotation>',
    "amplification": "<!DOCTYPE a [<!ENTITY a0 'aaaaaaaaaa'>"
    + "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 10))
    + "]><annotation>&a9;</annotation>",
    "unknown encoding": '<?xml version="1.0" encoding="foo"?><annotation/>',
    "multi-byte encodings": '<?xml version="1.0" encoding="gb2312"?><annotation/>',
    "no element found": "",
    r"outside .*; accepted are files below": "<annotation><filename>../../x.jpg</filename></annotation>",
}


@pytest.mark.parametrize(("message", "text"), XML_DAMAGE.items(), ids=map(str, XML_DAMAGE))
def test_a_damaged_xml_is_left_out_with_its_name_and_its_neighbours_stay(write, message, text):
    root = write({"a": [CAT], "b": [DOG]})
    (root / "Annotations/b.xml").write_text(text)
    (root / "JPEGImages/b.jpg").unlink()
    dataset = load_voc(root, "train")
    assert [len(dataset), dataset.class_names] == [1, ("cat",)]
    assert re.search(rf"b\.xml: .*{message}.*; the file is left out$", dataset.problems[0], re.S)
    with pytest.raises(ValueError, match="strict=True refuses any"):
        load_voc(root, "train", strict=True)


@pytest.mark.parametrize("number", ["inf", "1e400", "-1e400", "nan", "99999999999999999999"])
def test_a_size_that_is_none_is_read_from_the_picture_and_a_box_of_such_numbers_is_skipped(write, number):
    size = f"<size><width>{number}</width><height>30</height></size>"
    root = write({"a": size + object_xml(*CAT) + object_xml("dog", (1, 1, number, 5))})
    dataset = load_voc(root, "train", class_names=["cat"])
    assert dataset.image_sizes.tolist() == [[30, 40]] and len(dataset.boxes) == 1


@pytest.mark.parametrize(
    ("source", "corners", "box", "said"),
    [
        (PASCAL, (1, 1, 40, 30), [0, 0, 40, 30], "counted from 1, as the files name 'The VOC2007 Database' and no"),
        # VOC2012 has a few boxes with fractions.
        (PASCAL, (1.5, 1, 39.5, 30), [0.5, 0, 39.5, 30], "counted from 1, as the files name"),
        # The head of VOC's files is copied by tools that count from 0.
        (PASCAL, (0, 1, 40, 30), [0, 1, 40, 30], "counted from 0, as 1 objects have a coordinate below 1"),
        ("", (0.5, 1, 40, 30), [0.5, 1, 40, 30], "counted from 0, as 1 objects have a coordinate below 1"),
        ("", (1, 1, 40, 30), [1, 1, 40, 30], "taken as counted from 0, as the files do not name VOC. If they"),
    ],
)  # fmt: skip
def test_one_based_auto_is_decided_by_the_data_and_said(write, source, corners, box, said):
    root = write({"a": source + SIZE + object_xml("cat", corners)})
    dataset = load_voc(root, "train", one_based="auto")
    assert dataset.boxes.tolist() == [box] and said in dataset.notes[0]


@pytest.mark.parametrize("name", ["bccd", "foda"])
def test_labelimgs_and_cvats_files_are_counted_from_0(shared, name):
    root = shared / "data" / name
    found, filed = (load_voc(root, "train", one_based=counting) for counting in ("auto", False))
    assert (found.boxes == filed.boxes).all()


def test_vocs_own_numbers_are_counted_from_1(shared, write):
    lines = (shared / "data/voc07_eval/voc07_test.txt").read_text().splitlines()[:200]
    files = {}
    for line in lines:
        name, *numbers = line.split()
        boxes = [numbers[start : start + 4] for start in range(0, len(numbers), 5)]
        size = "<size><width>500</width><height>500</height></size>"
        files[name] = PASCAL + size + "".join(object_xml("thing", box) for box in boxes)
    dataset = load_voc(write(files), "train", one_based="auto")
    assert dataset.problems == () and dataset.boxes.min() == 0 and dataset.boxes.max() == 500


def test_a_file_that_names_the_picture_of_another_file_is_left_out(write):
    root = write({"a": [CAT], "b": f"<filename>a.jpg</filename>{SIZE}{object_xml(*DOG)}"})
    (root / "JPEGImages/b.jpg").unlink()
    dataset = load_voc(root, "train")
    assert len(dataset) == 1 and "b.xml: is left out, because" in dataset.problems[0]


def test_bccds_two_boxes_without_area_are_reported_and_strict_refuses_them(shared):
    root = shared / "data/bccd"
    dataset = load_voc(root, "trainval")
    assert len(dataset) == 292 and dataset.class_names == ("Platelets", "RBC", "WBC")
    assert len(dataset.problems) == 2
    assert "BloodImage_00338.xml: object[12] (RBC) has a box that has no area" in dataset.problems[0]
    assert "BloodImage_00343.xml: object[3] (RBC) has a box that has no area" in dataset.problems[1]
    with pytest.raises(ValueError, match=r"2 problem\(s\).*\n.*BloodImage_00338.*\n.*BloodImage_00343"):
        load_voc(root, "trainval", strict=True)


def test_bccds_splits_hold_the_published_numbers_of_images_and_boxes(shared):
    sets = [load_voc(shared / "data/bccd", split) for split in ("train", "val", "test")]
    assert [len(dataset) for dataset in sets] == [205, 87, 72]
    assert sum(len(dataset.boxes) + len(dataset.problems) for dataset in sets) == 4888
    assert sets[0].boxes.min() == 0 and sets[0].boxes.max() == 640


def test_bccd_taken_as_filed_has_no_note(shared):
    assert load_voc(shared / "data/bccd", "train", one_based=False).notes == ()


def test_foda_loads_with_fractional_coordinates_and_is_refused_as_one_based(shared):
    root = shared / "data/foda"
    dataset = load_voc(root, "train", one_based=False)
    assert len(dataset) == 1240 and len(dataset.class_names) == 31
    assert len(dataset.boxes) + len(load_voc(root, "val", one_based=False).boxes) == 1590
    assert dataset.problems == () and dataset.notes == ()
    assert (dataset.boxes % 1).any() and dataset.boxes.min() == 0
    assert dataset.image_ids[0] == 10
    with pytest.raises(ValueError, match=r"has xmin 0, below 1, .*set one_based: false"):
        load_voc(root, "train", one_based=True)


def test_foda_is_read_within_two_seconds_and_held_within_half_a_megabyte(shared):
    start = time.perf_counter()
    dataset = load_voc(shared / "data/foda", "train", one_based=False)
    assert time.perf_counter() - start < 2
    assert len(pickle.dumps(dataset)) < 500_000
    assert all(value.dtype != object for value in vars(dataset).values() if isinstance(value, np.ndarray))
