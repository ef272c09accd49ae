"""A corpus of layouts: the same pictures give the same boxes from every format, with the quirks of real sets."""

import contextlib
import csv
import json
import random
import re
import unicodedata
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import yaml
from PIL import Image

from detector.data.file_index import FileIndex, is_picture
from detector.data.find import find_data, is_recipe
from detector.data.sources import DataConfig, build_dataset, build_datasets
from detector.data.yolo import parse_box, read_names

# picture: (width, height), boxes by class. Sizes differ, so that a box of the wrong picture is noticed.
PICTURES = {
    "one.jpg": ((40, 30), [("cat", (1, 2, 20, 22)), ("traffic light", (5, 4, 40, 30))]),
    "two words.JPG": ((50, 20), [("dog", (0, 6, 10, 16))]),
    "größe.png": ((24, 36), [("dog", (2, 3, 22, 33)), ("dog", (4, 4, 12, 20))]),
    "four.v2.jpeg": ((32, 32), [("cat", (8, 8, 24, 24))]),
    "nothing.jpg": ((28, 28), []),
}
CLASSES = ("cat", "dog", "traffic light")
IDS = {"cat": 3, "dog": 7, "traffic light": 20}
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def nfd(text):
    return unicodedata.normalize("NFD", text)


def paint(path, name=None):
    """Write the picture called `name`, or as the path is, to a path."""
    width, height = PICTURES[name or path.name][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    number = list(PICTURES).index(name or path.name)
    Image.new("RGB", (width, height), (number, 51, 255)).save(path, "PNG")
    return path


def paint_all(folder, rename=lambda name: name):
    for name in PICTURES:
        paint(folder / rename(name), name)


def put(path, text, encoding="utf-8", newline="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.replace("\n", newline).encode(encoding))


# VOC


def xml(name, shift=0, filename=None, size=True, form="{}"):
    """The XML of a picture; shift: 1 for VOC's own files, which count pixels from 1."""
    (width, height), boxes = PICTURES[name]
    lines = [f"<filename>{filename or name}</filename>"]
    lines += ["<source><database>The VOC2007 Database</database></source>"] * shift
    lines += [f"<size><width>{width}</width><height>{height}</height></size>"] if size else []
    for label, (xmin, ymin, xmax, ymax) in boxes:
        corners = zip(CORNERS, (xmin + shift, ymin + shift, xmax, ymax), strict=True)
        numbers = "".join(f"<{tag}>{form.format(value)}</{tag}>" for tag, value in corners)
        lines.append(f"<object><name> {label}\n</name><bndbox>{numbers}</bndbox></object>")
    return "<annotation>\n" + "\n".join(lines) + "\n</annotation>\n"


def voc_folder(root):
    """Pascal's own: lists of splits with 1 behind a name, pixels from 1, subset lists of a class."""
    paint_all(root / "JPEGImages")
    for name in PICTURES:
        put(root / "Annotations" / f"{Path(name).stem}.xml", xml(name, shift=1))
    stems = [Path(name).stem for name in PICTURES]
    put(root / "ImageSets/Main/train.txt", "".join(f"{stem}  1\n" for stem in stems[:3]), newline="\r\n")
    put(root / "ImageSets/Main/val.txt", "".join(f"{stem} -1\n" for stem in stems[3:]))
    put(root / "ImageSets/Main/trainval.txt", "\n".join(stems))
    put(root / "ImageSets/Main/cat_train.txt", "one 1\n")


def voc_devkit(root):
    """Two VOC folders in one, as 2007 and 2012 are, and CVAT's list `default`."""
    for part, names in (("VOC2007", list(PICTURES)[:2]), ("VOC2012", list(PICTURES)[2:])):
        for name in names:
            paint(root / "VOCdevkit" / part / "JPEGImages" / name)
            put(root / "VOCdevkit" / part / "Annotations" / f"{Path(name).stem}.xml", xml(name, form="{}.0"))
        lines = "\n".join(Path(name).stem for name in names)
        put(root / "VOCdevkit" / part / "ImageSets/Main/default.txt", "\ufeff" + lines)


def voc_without_lists(root):
    """Other folders, no sizes, file names that lie, floats, umlauts in the other form of Unicode."""
    paint_all(root / "pics/day 1")
    for name in PICTURES:
        put(
            root / "labels xml" / f"{nfd(Path(name).stem)}.XML",
            xml(name, filename="one.jpg", size=False, form="{}.00"),
        )


def labelimg(root):
    """An XML beside each picture, in folders of splits; Windows line ends, BOM, UTF-16, paths as file names."""
    for number, name in enumerate(PICTURES):
        folder = root / ("train", "valid", "test")[number % 3]
        paint(folder / name)
        text = '<?xml version="1.0"?>\n' + xml(name, filename=f"C:\\pictures\\{name}")
        encoding = ("utf-8-sig", "utf-16", "utf-8")[number % 3]
        put(folder / f"{Path(name).stem}.xml", text, encoding, "\r\n")


def labelimg_by_filename(root):
    """XML files that are numbered, in one folder with the pictures, which only <filename> names."""
    paint_all(root)
    for number, name in enumerate(PICTURES):
        put(root / f"{number:03}.xml", xml(name, filename=f".\\{name}"))


# COCO


def coco(file_name=lambda name: name, sizes=True, images=lambda name: True, number=IDS.get, **extra):
    """COCO's dict of the pictures that `images` accepts."""
    content = {"info": {}, "images": [], "annotations": []}
    content["categories"] = [{"id": number(name), "name": name} for name in reversed(CLASSES)]
    for id, (name, ((width, height), boxes)) in enumerate(PICTURES.items()):
        if images(name):
            size = {"width": width, "height": height} if sizes else {}
            content["images"].append({"id": id, "file_name": file_name(name)} | size)
            for label, (x1, y1, x2, y2) in boxes:
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1]} | extra
                content["annotations"].append({"image_id": id, "category_id": number(label)} | box)
    return content


def coco_folder(root):
    """COCO's own: pictures in sub-folders, ids with gaps, crowds as text, RLE, and files of captions and keypoints."""
    for name in PICTURES:
        paint(root / "images/set a" / name)
    run_lengths = {"counts": [0, 5, 20], "size": [5, 5]}
    content = coco(lambda name: f"set a/{name}", iscrowd="0", segmentation=run_lengths, area=7.5)
    put(root / "annotations/instances_train2017.json", json.dumps(content))
    put(root / "annotations/person_keypoints_train2017.json", json.dumps(content))
    put(root / "annotations/captions_train2017.json", json.dumps({**content, "categories": {}}))


def roboflow_coco(root):
    """_annotations.coco.json in the folder of each split, and a class that nothing has."""
    for split, part in (("train", slice(0, 3)), ("valid", slice(3, 4)), ("test", slice(4, 5))):
        names = list(PICTURES)[part]
        for name in names:
            paint(root / split / name)
        content = coco(images=names.__contains__)
        put(root / split / "_annotations.coco.json", json.dumps(content, indent=1), newline="\r\n")


def cvat_coco(root):
    """A leading folder in the file names that the pictures are not in, backslashes, BOM, umlauts in the other form."""
    paint_all(root / "images/default")
    content = coco(lambda name: f"task 7\\{nfd(name)}")
    put(root / "annotations/instances_default.json", json.dumps(content, ensure_ascii=False), "utf-8-sig")


def label_studio_coco(root):
    """A hash in front of each name, no sizes, ids from 0, polygons without boxes."""
    paint_all(root / "images", lambda name: name)
    content = coco(lambda name: f"/data/upload/1/0a1b2c3d-{name}", sizes=False, number=CLASSES.index)
    for entry in content["annotations"]:
        x, y, width, height = entry.pop("bbox")
        entry["segmentation"] = [[x + width / 2, y, x + width, y + height, x, y + height / 2]]
    put(root / "result.json", json.dumps(content))


def coco_same_names(root):
    """Pictures of the same names in the folders of both splits."""
    for name in PICTURES:
        paint(root / "train" / name)
        Image.new("RGB", (9, 9)).save(paint(root / "val" / name), "PNG")
    paint(root / "val/nothing.jpg")
    put(root / "annotations/train.json", json.dumps(coco(images=lambda name: name != "nothing.jpg")))
    put(root / "annotations/val.json", json.dumps(coco(images=lambda name: name == "nothing.jpg")))


# YOLO


def lines(name, number, polygon=False):
    """A YOLO text: `number` gives the class; polygon: corners in place of the box."""
    (width, height), boxes = PICTURES[name]
    found = []
    for label, (x1, y1, x2, y2) in boxes:
        values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        corners = (x1 / width, y1 / height, x2 / width, (y1 + y2) / 2 / height, x1 / width, y2 / height)
        found.append(" ".join([str(number(label)), *(f"{v:.9f}" for v in (corners if polygon else values))]))
    return "\n".join(found) + "\n" * bool(found)


def roboflow_yolo(root):
    """../train/images in data.yaml, a split that is not there, an empty text, names as a list, scores behind boxes."""
    for name in PICTURES:
        split = "valid" if name == "one.jpg" else "train"
        paint(root / split / "images" / name)
        text = lines(name, CLASSES.index).replace("\n", " 0.9\n")
        put(root / split / "labels" / f"{Path(name).stem}.txt", text, newline="\r\n")
    described = {
        f"{split}": f"../{folder}/images" for split, folder in (("train", "train"), ("val", "valid"))
    }
    put(
        root / "data.yaml",
        yaml.dump({**described, "test": "../test/images", "nc": 3, "names": list(CLASSES)}),
    )


def ultralytics(root):
    """images/train and labels/train, names as a table with gaps, polygons, class numbers as floats, a text missing."""
    for name in PICTURES:
        paint(root / "images/train" / name)
        if name != "nothing.jpg":
            text = lines(name, lambda label: f"{IDS[label]}.0", polygon=True)
            put(root / "labels/train" / f"{nfd(Path(name).stem)}.txt", text, "utf-8-sig")
    names = {id: name for name, id in IDS.items()}
    put(
        root / "coco8.yaml",
        yaml.dump(
            {"path": "../datasets/coco8", "train": "images/train", "val": "images/train", "names": names}
        ),
    )


def darknet(root):
    """CVAT's obj.data and lists of pictures, whose paths are those of another machine."""
    paint_all(root / "obj_train_data")
    for name in PICTURES:
        put(root / "obj_train_data" / f"{Path(name).stem}.txt", lines(name, CLASSES.index))
    put(root / "obj.names", "cat\ndog\ntraffic light \n", newline="\r\n")
    put(root / "obj.data", "classes = 3\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    put(root / "train.txt", "".join(f"data/obj_train_data/{name}\n" for name in PICTURES), newline="\r\n")


def yolo_beside(root):
    """Texts beside the pictures, classes.txt in the same folder, other texts too."""
    paint_all(root)
    for name in PICTURES:
        put(root / f"{Path(name).stem}.txt", lines(name, CLASSES.index))
    put(root / "classes.txt", "cat\ndog\ntraffic light\n\n")
    put(root / "README.txt", "1 2 3 4 5")


# CSV


def rows(name, *columns):
    (width, height), boxes = PICTURES[name]
    for label, box in boxes:
        values = {"filename": name, "width": width, "height": height, "class": label}
        values |= dict(zip(CORNERS, box, strict=True))
        yield [values[column] for column in columns]


def tensorflow_csv(root):
    """A table a split, with a header, everything quoted, Windows line ends."""
    columns = ("filename", "width", "height", "class", *CORNERS)
    for split, part in (("train", slice(0, 3)), ("test", slice(3, 4))):
        names = list(PICTURES)[part]
        with open(root / f"{split}_labels.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, quoting=csv.QUOTE_ALL)
            table.writerow(columns)
            for name in names:
                paint(root / "images" / split / name)
                table.writerows(rows(name, *columns))


def retinanet_csv(root):
    """No header, paths of another machine, a row of commas for a picture without objects, a file of classes."""
    paint_all(root / "pictures")
    table = [[f"/home/me/pictures/{n}", *row] for n in PICTURES for row in rows(n, *CORNERS, "class")]
    text = "\n".join(
        ",".join(map(str, row)) for row in [*table, ["/home/me/pictures/nothing.jpg", *[""] * 5]]
    )
    put(root / "annotations.csv", text)
    put(root / "classes.csv", "".join(f"{name},{id}\n" for id, name in enumerate(CLASSES)))


def spreadsheet_csv(root):
    """A German spreadsheet: semicolons, decimal commas, UTF-16, other names and order of columns, blank lines."""
    paint_all(root / "Bilder")
    text = "Label; X_Min; Y_Min; X_Max; Y_Max; Image Name\n"
    for name in PICTURES:
        for label, *box, _ in rows(name, "class", *CORNERS, "filename"):
            text += ";".join([label, *(f"{value},0" for value in box), f"Bilder\\{name}"]) + "\n\n"
    put(root / "boxes.csv", text + ";;;;;Bilder\\nothing.jpg\n", "utf-16", "\r\n")


def fractions_csv(root):
    """Coordinates as fractions of the sides, tabs, and the encoding of Western Windows."""
    paint_all(root)
    text = "image_id\tlabel\tx1\ty1\tx2\ty2\n"
    for name, ((width, height), boxes) in PICTURES.items():
        for label, box in boxes:
            values = np.array(box) / (width, height, width, height)
            text += "\t".join([Path(name).stem, label, *(f"{value:.9f}" for value in values)]) + "\n"
    put(root / "boxes.csv", text, "cp1252")


def makesense_csv(root):
    """makesense.ai's table: no header, the class first, boxes as x, y, width and height, the picture behind them."""
    paint_all(root / "images")
    text = ""
    for name, ((width, height), boxes) in PICTURES.items():
        for label, (x1, y1, x2, y2) in boxes:
            text += f"{label},{x1},{y1},{x2 - x1},{y2 - y1},{name},{width},{height}\n"
    put(root / "annotations/labels.csv", text)


def gtsdb_text(root):
    """The table of the German traffic signs, gt.txt: semicolons, no header; another text beside it."""
    paint_all(root)
    put(
        root / "gt.txt",
        "\n".join(
            ";".join(map(str, row)) for n in PICTURES for row in rows(n, "filename", *CORNERS, "class")
        ),
    )
    put(root / "ReadMe.txt", "one.jpg and the others, drawn by hand;")


# labelme


def labelme(name, shape, **keys):
    (width, height), boxes = PICTURES[name]
    shapes = [{"label": label, **shape(*box)} for label, box in boxes]
    content = {"version": "5.0", "shapes": shapes, "imagePath": name, "imageData": "QUJD" * 50}
    return json.dumps(content | {"imageWidth": width, "imageHeight": height} | keys)


def swapped_rectangle(x1, y1, x2, y2):
    return {"shape_type": "rectangle", "points": [[x2, y1], [x1, y2]]}


def circle_or_polygon(x1, y1, x2, y2):
    x, y, radius = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2
    if x2 - x1 == y2 - y1:
        return {"shape_type": "circle", "points": [[x, y], [x + radius * 0.6, y - radius * 0.8]]}
    return {"points": [[x, y1], [x2, y], [x, y2], [x1, y]]}


def labelme_beside(root):
    """A JSON beside each picture, in folders of splits, rectangles drawn from any corner, blanks around labels."""
    for name in PICTURES:
        folder = root / ("val" if name == "one.jpg" else "train")
        paint(folder / name)
        text = labelme(name, swapped_rectangle).replace('"dog"', '" dog "')
        put(folder / f"{Path(name).stem}.json", text, "utf-8-sig", "\r\n")


def labelme_folder(root):
    """JSON files in a folder of their own, backslashes in imagePath, no sizes, circles and polygons, other names."""
    paint_all(root / "images")
    for number, name in enumerate(PICTURES):
        text = labelme(name, circle_or_polygon, imagePath=f"..\\images\\{nfd(name)}", imageWidth=None)
        put(root / "annotated" / f"{number}.json", text)


LAYOUTS = {
    voc_folder: "voc", voc_devkit: "voc", voc_without_lists: "voc", labelimg: "voc", labelimg_by_filename: "voc",
    coco_folder: "coco", roboflow_coco: "coco", cvat_coco: "coco", label_studio_coco: "coco", coco_same_names: "coco",
    roboflow_yolo: "yolo", ultralytics: "yolo", darknet: "yolo", yolo_beside: "yolo",
    tensorflow_csv: "csv", retinanet_csv: "csv", spreadsheet_csv: "csv", fractions_csv: "csv",
    makesense_csv: "csv", gtsdb_text: "csv",
    labelme_beside: "labelme", labelme_folder: "labelme",
}  # fmt: skip


def read(path, **options):
    """Every split that is found, by name."""
    found = find_data(path, **options)
    data = DataConfig(root=found.root, class_names=CLASSES, **found.splits)
    return found, {split: build_dataset(data, split) for split in found.splits}


def content(datasets):
    """picture: (size, sorted boxes by class) of all data sets."""
    read = {}
    for dataset in datasets:
        for row, path in enumerate(dataset.image_paths.tolist()):
            target = dataset.target(row)
            names = [dataset.class_names[label - 1] for label in target["labels"]]
            boxes = [tuple(round(float(value), 3) for value in box) for box in target["boxes"]]
            height, width = dataset.image_sizes[row].tolist()
            assert Path(path).is_file() and dataset.image(row).shape == (height, width, 3)
            read[unicodedata.normalize("NFC", Path(path).name)] = (
                (width, height),
                sorted(zip(names, boxes, strict=True)),
            )
    return read


EXPECTED = {name: (size, sorted(boxes)) for name, (size, boxes) in PICTURES.items()}


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_the_same_pictures_give_the_same_boxes_from_every_layout(tmp_path, write):
    write(tmp_path)
    found, datasets = read(tmp_path)
    assert found.format == LAYOUTS[write]
    # Tables of objects alone do not know of pictures without any.
    unknown = (
        {"nothing.jpg"} if write in (tensorflow_csv, fractions_csv, makesense_csv, gtsdb_text) else set()
    )
    assert content(datasets.values()) == {name: e for name, e in EXPECTED.items() if name not in unknown}
    assert all(dataset.problems == () for dataset in datasets.values())


def source_keys(found, key):
    return {split: [source.get(key) for source in sources] for split, sources in found.splits.items()}


def test_splits_are_those_of_lists_folders_files_and_data_yaml(tmp_path):
    for write in (voc_folder, labelimg, roboflow_coco, tensorflow_csv, roboflow_yolo, labelme_beside):
        write(tmp_path / write.__name__) if write is not tensorflow_csv else (
            (tmp_path / write.__name__).mkdir(),
            write(tmp_path / write.__name__),
        )
    assert source_keys(find_data(tmp_path / "voc_folder"), "split") == {"train": ["train"], "val": ["val"]}
    assert source_keys(find_data(tmp_path / "labelimg"), "annotations") == {
        "train": ["train"],
        "val": ["valid"],
        "test": ["test"],
    }
    assert source_keys(find_data(tmp_path / "roboflow_coco"), "images") == {
        "train": ["train"],
        "val": ["valid"],
        "test": ["test"],
    }
    assert source_keys(find_data(tmp_path / "tensorflow_csv"), "images") == {
        "train": ["images/train"],
        "test": ["images/test"],
    }
    found = find_data(tmp_path / "roboflow_yolo")
    assert source_keys(found, "images") == {"train": ["train/images"], "val": ["valid/images"]}
    assert source_keys(found, "names") == {"train": ["data.yaml"], "val": ["data.yaml"]}
    assert "data.yaml says test: ../test/images, which is not there" in found.remarks
    assert source_keys(find_data(tmp_path / "labelme_beside"), "images") == {
        "train": ["train"],
        "val": ["val"],
    }


def test_what_is_trained_on_is_not_validated_on(tmp_path):
    ultralytics(tmp_path)
    found = find_data(tmp_path)
    assert list(found.splits) == ["train"] and any("which is trained on" in each for each in found.remarks)


def test_of_formats_that_agree_the_one_that_says_more_is_taken(tmp_path):
    """149 XML files beside the two tables that were made of them: the tables have the split."""
    tensorflow_csv(tmp_path)
    for name in list(PICTURES)[:4]:
        put(tmp_path / "xml" / f"{Path(name).stem}.xml", xml(name))
    found, datasets = read(tmp_path)
    assert found.format == "csv" and list(found.splits) == ["train", "test"]
    assert any("voc agrees with csv, which says all that it says" in remark for remark in found.remarks)
    assert content(datasets.values()) == {n: e for n, e in EXPECTED.items() if n != "nothing.jpg"}
    paint(tmp_path / "nothing.jpg")
    put(tmp_path / "xml/nothing.xml", xml("nothing.jpg"))
    assert find_data(tmp_path).format == "voc"


def test_formats_that_agree_and_have_other_pictures_are_both_used(tmp_path):
    paint_all(tmp_path)
    for name in list(PICTURES)[:3]:
        put(tmp_path / f"{Path(name).stem}.xml", xml(name))
    put(tmp_path / "all.json", json.dumps(coco(images=lambda name: name in list(PICTURES)[2:])))
    found, datasets = read(tmp_path)
    assert any("both are used" in remark for remark in found.remarks)
    assert content(datasets.values()) == EXPECTED and len(datasets["train"]) == len(PICTURES)
    (tmp_path / "train").mkdir()
    (tmp_path / "all.json").rename(tmp_path / "train/all.json")
    for number, name in enumerate(list(PICTURES)[:3]):
        (tmp_path / ("val" if number else "train")).mkdir(exist_ok=True)
        (tmp_path / f"{Path(name).stem}.xml").rename(
            tmp_path / ("val" if number else "train") / f"{Path(name).stem}.xml"
        )
    with pytest.raises(
        ValueError, match="has pictures that .* lacks, such as .*; choose a format with --format"
    ):
        find_data(tmp_path)


def test_formats_that_contradict_each_other_are_refused_and_one_can_be_chosen(tmp_path):
    voc_folder(tmp_path)
    moved = coco()
    moved["annotations"][0]["bbox"][0] += 4
    put(tmp_path / "all.json", json.dumps(moved))
    message = r"contradict each other: .*one\.jpg has 2 objects in one and 2 in the other, and 2 are in one only; .*--format"
    with pytest.raises(ValueError, match=message):
        find_data(tmp_path)
    put(tmp_path / "all.json", json.dumps(coco()))
    for format in ("voc", "coco"):
        found, datasets = read(tmp_path, format=format)
        assert found.format == format and content(datasets.values()) == EXPECTED


def test_a_folder_without_annotations_is_said_to_hold_what_it_holds(tmp_path):
    paint_all(tmp_path)
    put(tmp_path / "notes.json", "{}")
    with pytest.raises(
        ValueError, match=r"no annotations found; looked for XML files, .*; found 3 .jpg, .*1 .json"
    ):
        find_data(tmp_path)
    with pytest.raises(ValueError, match="looked for XML files; found"):
        find_data(tmp_path, "voc")
    with pytest.raises(ValueError, match="format is 'vok'; accepted: voc, coco"):
        find_data(tmp_path, "vok")
    with pytest.raises(FileNotFoundError, match="gone: no such folder or file"):
        find_data(tmp_path / "gone")


def test_pictures_of_a_run_below_the_data_are_no_data(tmp_path):
    """YOLO takes every picture, those without a text as background."""
    yolo_beside(tmp_path)
    put(tmp_path / "run1/training_state.pt", "")
    put(tmp_path / "run1/train.txt", "one.jpg")
    for name in ("found.jpg", "first_batch.jpg", "curves.png"):
        paint(tmp_path / "run1" / name, "one.jpg")
    found, datasets = read(tmp_path)
    assert content(datasets.values()) == EXPECTED
    assert "1 folders of outputs are passed over" in found.remarks


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".jp2"])
def test_pictures_of_every_suffix_that_is_decoded_are_data(tmp_path, suffix):
    yolo_beside(tmp_path)
    Image.open(tmp_path / "one.jpg").save(
        tmp_path / f"one{suffix}", "JPEG2000" if suffix == ".jp2" else "JPEG"
    )
    (tmp_path / "one.jpg").unlink()
    _, datasets = read(tmp_path)
    found = content(datasets.values())
    assert len(found) == 5 and found[f"one{suffix}"] == EXPECTED["one.jpg"]


FILES = [
    (roboflow_yolo, "data.yaml", {"train", "val"}),
    (darknet, "obj.data", {"train"}),
    (cvat_coco, "annotations/instances_default.json", {"train"}),
    (retinanet_csv, "annotations.csv", {"train"}),
    (roboflow_coco, "valid/_annotations.coco.json", {"train"}),
]


@pytest.mark.parametrize(("write", "file", "splits"), FILES)
def test_an_annotation_file_is_taken_in_place_of_a_folder(tmp_path, write, file, splits):
    write(tmp_path)
    put(tmp_path / "other.xml", xml("one.jpg"))
    found, datasets = read(tmp_path / file)
    assert set(found.splits) == splits
    assert content(datasets.values()).items() <= EXPECTED.items()


def test_yolos_data_yaml_is_told_from_a_recipe(tmp_path):
    ultralytics(tmp_path)
    put(tmp_path / "broken.yaml", "a: [")
    assert is_recipe("configs/shapes.yaml") and is_recipe(tmp_path / "broken.yaml")
    assert not is_recipe(tmp_path / "coco8.yaml") and not is_recipe(tmp_path) and not is_recipe("a.json")


def test_coco_files_of_the_same_pictures_are_joined_where_they_agree_and_refused_where_they_do_not(tmp_path):
    paint_all(tmp_path)
    for name in ("a.json", "b.json"):
        put(tmp_path / name, json.dumps(coco()))
    _, datasets = read(tmp_path)
    assert content(datasets.values()) == EXPECTED
    other = coco()
    del other["annotations"][0]
    put(tmp_path / "b.json", json.dumps(other))
    with pytest.raises(
        ValueError, match=r"a\.json and b\.json contradict each other: .*one\.jpg has 2 objects in one and 1"
    ):
        find_data(tmp_path)


# Lines of public data sets, and what they say: Kaggle's BCCD, wheat, cars, traffic signs (GTSRB), helmets (NFL) and
# chest X-rays (VinBigData), LISA's traffic lights, Udacity's streets, makesense.ai, SKU-110K, VoTT.
TABLES = [
    ("filename,cell_type,xmin,xmax,ymin,ymax\na.jpg,RBC,81,194,18,115", "RBC", (81, 18, 194, 115)),
    ('image_id,width,height,bbox,source\na,1024,1024,"[834.0, 222.0, 56.0, 36.0]",usask_1', "object", (834, 222, 890, 258)),
    ("image,xmin,ymin,xmax,ymax\na.jpg,281,187.5,327,223", "object", (281, 187.5, 327, 223)),
    ("Width,Height,Roi.X1,Roi.Y1,Roi.X2,Roi.Y2,ClassId,Path\n1024,1024,5,6,22,20,20,Train/20/a.png", "20", (5, 6, 22, 20)),
    ("Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\na.ppm;1024;1024;6;5;48;49;16", "16", (6, 5, 48, 49)),
    ("image,label,right,bbox\na.jpg,leaf,7,[834 222 56 36]", "leaf", (834, 222, 890, 258)),
    ("image,label,left,width,top,height\na.jpg,Helmet,900,16,456,15", "Helmet", (900, 456, 916, 471)),
    ("image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max\na,Cardiomegaly,3,R10,691,375,953,831", "Cardiomegaly", (691, 375, 953, 831)),
    ("Filename;Annotation tag;Upper left corner X;Upper left corner Y;Lower right corner X;Lower right corner Y;Occluded,On another road;Origin file\n"
     "night/a.png;go;670;393;675;398;0,0;b.mp4", "go", (670, 393, 675, 398)),
    ("frame,xmin,xmax,ymin,ymax,class_id\na.jpg,237,251,143,155,1", "1", (237, 143, 251, 155)),
    ("label_name,bbox_x,bbox_y,bbox_width,bbox_height,image_name,image_width,image_height\ncar,273,881,75,79,a.jpg,1024,1024", "car", (273, 881, 348, 960)),
    ("a.jpg,208,537,422,814,thing,1024,1024", "thing", (208, 537, 422, 814)),
    ('"image","xmin","ymin","xmax","ymax","label"\n"a.jpg",118.5,142,312,460,"card"', "card", (118.5, 142, 312, 460)),
]  # fmt: skip


@pytest.mark.parametrize(("table", "name", "box"), TABLES)
def test_tables_of_public_data_sets_are_read(tmp_path, table, name, box):
    Image.new("RGB", (1024, 1024)).save(tmp_path / "a.png")
    put(tmp_path / "boxes.csv", table)
    found = find_data(tmp_path)
    dataset = build_dataset(DataConfig(root=tmp_path, **found.splits), "train")
    assert dataset.class_names == (name,) and dataset.boxes.tolist() == [list(box)]
    told = " ".join(dataset.notes)
    assert ("no column has the class" in told) == (name == "object")
    assert ("left top corner, width and height" in told) == any(word in table for word in ("bbox", "left,"))


def test_a_row_without_coordinates_is_a_picture_without_objects(tmp_path):
    paint_all(tmp_path)
    put(
        tmp_path / "boxes.csv",
        "image,label,x,y,width,height\none.jpg,cat,1,2,19,20\nnothing.jpg,No finding,,,,\n",
    )
    _, datasets = read(tmp_path)
    assert content(datasets.values()) == {
        "one.jpg": ((40, 30), [("cat", (1, 2, 20, 22))]),
        "nothing.jpg": EXPECTED["nothing.jpg"],
    }


def test_a_table_whose_columns_are_unknown_is_named_with_its_first_line(tmp_path):
    paint_all(tmp_path)
    put(tmp_path / "train_labels.csv", "patient,x,y,width,height,Target\none,1,2,3,4,1\n")
    message = (
        r"found .*1 .csv \(train_labels.csv\); save the annotations in one of these formats; "
        r".*train_labels.csv: its first line is 'patient,x,y,width,height,Target'; accepted are a header"
    )
    with pytest.raises(ValueError, match=message):
        find_data(tmp_path)


OTHERS = {
    "_annotations.createml.json": '[{"image": "one.jpg", "annotations": [{"label": "a", "coordinates": {"x": 2, "y": 2, "width": 2, "height": 2}}]}]',
    "via_region_data.json": '{"one.jpg430": {"filename": "one.jpg", "regions": {"0": {"shape_attributes": {"name": "rect", "x": 1, "y": 6}}}}}',
    "via_region_data.csv": 'filename,file_size,region_shape_attributes,region_attributes\none.jpg,162,"{""name"":""rect"",""x"":1}","{}"',
    "project-1.csv": 'image,id,label,annotator\n/data/upload/1/one.jpg,1,"[{""x"": 19.5, ""rectanglelabels"": [""Car""]}]",1',
    "project-1.json": '[{"id": 1, "annotations": [{"result": [{"value": {"rectanglelabels": ["Car"]}}]}], "data": {"image": "one.jpg"}}]',
    "annotations.xml": '<?xml version="1.0"?>\n<annotations><version>1.1</version><image id="0" name="one.jpg"/></annotations>',
    "_annotations.txt": "one.jpg 3,2,8,5,1 19,18,32,21,1",
    "label_2/one.txt": "Truck 0.00 0 -1.57 599.41 156.40 629.75 189.25 2.85 2.63 12.34 0.47 1.49 69.44 -1.56",
    "annotations/one.txt": "684,8,273,116,0,0,0,0\n406,119,265,70,0,0,0,0",
    "labelTxt/one.txt": "imagesource:GoogleEarth\ngsd:0.146343590398\n2753 2408 2861 2385 2888 2468 2805 2502 plane 0",
    "wider_face_train_bbx_gt.txt": "0--Parade/one.jpg\n1\n4 3 12 14 0 0 0 0 0 0",
    "gt/gt.txt": "1,1,912,484,97,109,0,7,1",
    "ann/one.jpg.json": '{"size": {"height": 30, "width": 40}, "objects": [{"classTitle": "lemon", "points": {"exterior": [[1, 2]]}}]}',
    "det_val.json": '[{"name": "one.jpg", "labels": [{"category": "car", "box2d": {"x1": 1, "x2": 4, "y1": 2, "y2": 9}}]}]',
}  # fmt: skip


@pytest.mark.parametrize("file", OTHERS)
def test_formats_that_are_not_read_are_named_by_their_file_with_those_that_are(tmp_path, file):
    paint(tmp_path / "one.jpg")
    put(tmp_path / file, OTHERS[file])
    with pytest.raises(
        ValueError, match=rf"no annotations found; looked for XML files, .*\({re.escape(file)}\).*; save"
    ):
        find_data(tmp_path)


def test_classes_without_names_are_called_by_their_numbers(tmp_path):
    yolo_beside(tmp_path)
    (tmp_path / "classes.txt").unlink()
    found = find_data(tmp_path)
    dataset = build_dataset(DataConfig(root=found.root, **found.splits), "train")
    assert dataset.class_names == ("class_0", "class_1", "class_2")
    assert any("no list of class names" in note for note in dataset.notes)


def boxes_by_class(dataset):
    """picture's path from its folder: sorted class names of its boxes"""
    found = {}
    for row, path in enumerate(dataset.image_paths.tolist()):
        labels = dataset.target(row)["labels"]
        found["/".join(Path(path).parts[-2:])] = sorted(dataset.class_names[label - 1] for label in labels)
    return found


def two_sittings(root):
    """labelImg's texts of two people, each with a list of classes in the order of that sitting, and its own list."""
    for person, classes in (("anna", ["cat", "dog"]), ("ben", ["dog", "cat"])):
        for name in ("one.jpg", "two words.JPG"):
            paint(root / person / name)
            put(
                root / person / f"{Path(name).stem}.txt",
                f"{classes.index(PICTURES[name][1][0][0])} 0.5 0.5 0.5 0.5\n",
            )
        put(root / person / "classes.txt", "\n".join(classes))
    put(root / "data/predefined_classes.txt", "person\nbicycle\n")


def test_each_text_goes_by_the_nearest_list_of_classes_and_lists_are_joined_by_name(tmp_path):
    two_sittings(tmp_path)
    found = find_data(tmp_path)
    data = DataConfig(root=tmp_path, **found.splits)
    dataset = build_dataset(data, "train")
    assert dataset.class_names == ("cat", "dog")
    assert boxes_by_class(dataset) == {
        f"{person}/{name}": [label]
        for person in ("anna", "ben")
        for name, label in (("one.jpg", "cat"), ("two words.JPG", "dog"))
    }
    (tmp_path / "ben/classes.txt").rename(tmp_path / "data/classes.txt")
    with pytest.raises(
        ValueError, match=r"ben/one.txt: the lists anna/classes.txt and data/classes.txt differ"
    ):
        build_dataset(data, "train")
    put(tmp_path / "data/classes.txt", "cat\ndog\n")
    assert set(sum(boxes_by_class(build_dataset(data, "train")).values(), [])) == {"cat", "dog"}


def helmets_and_vests(root, write):
    for folder, classes in (("helmets", ["cat", "dog"]), ("vests", ["dog", "traffic light"])):
        write(root / folder, classes)


def yolo_export(root, classes):
    for name in ("one.jpg", "two words.JPG"):
        paint(root / "train/images" / name)
        put(root / "train/labels" / f"{Path(name).stem}.txt", "1 0.5 0.5 0.5 0.5\n")
    put(root / "data.yaml", yaml.dump({"train": "../train/images", "names": classes}))


def darknet_export(root, classes):
    for name in ("one.jpg", "two words.JPG"):
        paint(root / "obj_train_data" / name)
        put(root / "obj_train_data" / f"{Path(name).stem}.txt", "1 0.5 0.5 0.5 0.5\n")
    put(root / "obj.names", "\n".join(classes))
    put(root / "obj.data", "train = data/train.txt\nnames = data/obj.names\n")
    put(root / "train.txt", "data/obj_train_data/one.jpg\ndata/obj_train_data/two words.JPG\n")


def coco_export(root, classes):
    images = [{"id": id, "file_name": name} for id, name in enumerate(("one.jpg", "two words.JPG"))]
    objects = [{"image_id": id, "category_id": 2, "bbox": [1, 2, 3, 4]} for id in range(2)]
    categories = [{"id": id, "name": name} for id, name in enumerate(classes, start=1)]
    for image in images:
        paint(root / "images/default" / image["file_name"])
    put(
        root / "annotations/instances_default.json",
        json.dumps({"images": images, "annotations": objects, "categories": categories}),
    )


def voc_export(root, classes):
    for name in ("one.jpg", "two words.JPG"):
        paint(root / "JPEGImages" / name)
        box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(CORNERS, (2, 3, 8, 9), strict=True))
        text = f"<annotation><object><name>{classes[1]}</name><bndbox>{box}</bndbox></object></annotation>"
        put(root / "Annotations" / f"{Path(name).stem}.xml", text)
    put(root / "ImageSets/Main/default.txt", "one\ntwo words\n")


@pytest.mark.parametrize("write", [yolo_export, darknet_export, coco_export, voc_export])
def test_exports_side_by_side_are_all_read_and_their_classes_are_joined_by_name(tmp_path, write):
    helmets_and_vests(tmp_path, write)
    found = find_data(tmp_path)
    dataset = build_dataset(DataConfig(root=tmp_path, **found.splits), "train")
    by_folder = {}
    for row, path in enumerate(dataset.image_paths.tolist()):
        names = [dataset.class_names[label - 1] for label in dataset.target(row)["labels"]]
        by_folder.setdefault(Path(path).relative_to(tmp_path).parts[0], []).extend(names)
    assert by_folder == {"helmets": ["dog", "dog"], "vests": ["traffic light", "traffic light"]}
    assert (
        set(dataset.class_names) - {"cat"} == {"dog", "traffic light"}
        and len(dataset.image_sizes.tolist()) == 4
    )


def test_names_with_percent_signs_are_those_that_they_stand_for(tmp_path):
    """Label Studio writes %C3%A9cran.txt for écran.jpg."""
    for name in ("one.jpg", "größe.png"):
        paint(tmp_path / "images" / name)
    put(tmp_path / "labels/one.txt", lines("one.jpg", CLASSES.index))
    put(tmp_path / "labels/gr%C3%B6%C3%9Fe.txt", lines("größe.png", CLASSES.index))
    put(tmp_path / "classes.txt", "\n".join(CLASSES))
    _, datasets = read(tmp_path)
    assert content(datasets.values()) == {name: EXPECTED[name] for name in ("one.jpg", "größe.png")}
    assert not datasets["train"].warnings


@pytest.mark.parametrize("place", ["", "images\\", "..\\images\\", "/data/"])
def test_cocos_names_with_percent_signs_are_found_behind_any_folder(tmp_path, place):
    paint_all(tmp_path / "images")
    put(tmp_path / "a.json", json.dumps(coco(lambda name: place + quote(nfd(name)))))
    _, datasets = read(tmp_path)
    assert content(datasets.values()) == EXPECTED


def test_texts_without_picture_and_pictures_without_text_are_counted_with_examples(tmp_path):
    yolo_beside(tmp_path)
    put(tmp_path / "README.txt", "how these were drawn")
    (tmp_path / "one.jpg").unlink()
    (tmp_path / "two words.txt").unlink()
    found = find_data(tmp_path)
    warnings = build_dataset(DataConfig(root=tmp_path, **found.splits), "train").warnings
    assert any(
        "1 texts belong to no picture, so their objects are lost, such as one.txt. Is that" in w
        for w in warnings
    )
    assert any(
        "1 pictures have no text file, so no objects, such as two words.JPG. Is that" in w for w in warnings
    )


def test_few_pictures_without_text_are_a_note(tmp_path):
    for number in range(40):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{number}.png")
        put(tmp_path / f"{number}.txt", "0 0.5 0.5 0.5 0.5") if number else None
    dataset = build_dataset(DataConfig(root=tmp_path, **find_data(tmp_path).splits), "train")
    assert dataset.warnings == () and any("1 pictures have no text file" in note for note in dataset.notes)


def test_a_text_that_would_be_that_of_two_pictures_is_refused_with_their_names(tmp_path):
    for camera in ("cam1", "cam2"):
        paint(tmp_path / "images" / camera / "one.jpg")
    put(tmp_path / "labels/one.txt", lines("one.jpg", CLASSES.index))
    source = {"format": "yolo", "images": "images", "labels": "labels"}
    with pytest.raises(
        ValueError, match=r"labels/one.txt would be .* both .*cam1/one.jpg and .*cam2/one.jpg"
    ):
        build_dataset(DataConfig(root=tmp_path, train=source), "train")


def lists_of_classes(root, **lists):
    """COCO files of one picture each, with an object of each class in the given order."""
    for file, classes in lists.items():
        paint(root / file / "one.jpg")
        categories = [{"id": id, "name": name} for id, name in enumerate(classes, start=1)]
        objects = [{"image_id": 1, "category_id": c["id"], "bbox": [c["id"], 2, 9, 9]} for c in categories]
        content = {
            "images": [{"id": 1, "file_name": "one.jpg"}],
            "annotations": objects,
            "categories": categories,
        }
        put(root / file / f"{file}.json", json.dumps(content))


def test_coco_files_with_other_lists_of_classes_have_their_union_in_the_order_of_the_first(tmp_path):
    lists_of_classes(tmp_path, a=["disc", "block"], b=["block", "disc"], c=["rod"])
    found = find_data(tmp_path)
    data = DataConfig(root=tmp_path, **found.splits)
    dataset = build_dataset(data, "train")
    assert dataset.class_names == ("disc", "block", "rod") and dataset.category_ids.tolist() == [1, 2, 3]
    assert [dataset.target(row)["labels"].tolist() for row in range(3)] == [[1, 2], [2, 1], [3]]
    chosen = build_dataset(data.model_copy(update={"class_names": ("rod", "disc")}), "train")
    assert [chosen.target(row)["labels"].tolist() for row in range(3)] == [[2], [2], [1]]
    with pytest.raises(ValueError, match=r"a/a\.json, .*has no category 'disk'; did you mean 'disc'"):
        build_dataset(data.model_copy(update={"class_names": ("disk",)}), "train")


def test_a_class_that_val_lacks_is_a_note_and_one_that_train_lacks_is_a_warning(tmp_path):
    lists_of_classes(tmp_path, train=["disc", "block"], val=["block", "rod"])
    train_set, val_set = build_datasets(DataConfig(root=tmp_path, **find_data(tmp_path).splits))
    assert val_set.class_names == train_set.class_names == ("disc", "block")
    assert val_set.target(0)["labels"].tolist() == [2] and val_set.category_ids.tolist()[1] == 1
    assert any("has no object of disc" in note for note in val_set.notes)
    assert val_set.warnings == ("data.val has 1 objects of 'rod', a class that training lacks",)


@pytest.mark.parametrize("write", ["one file", "two files"])
def test_a_picture_with_several_entries_has_the_objects_of_all_and_common_ones_once(tmp_path, write):
    paint(tmp_path / "one.jpg")
    whole = coco(images=lambda name: name == "one.jpg")
    first, second = whole["annotations"]
    entries = ({"annotations": [first]}, {"annotations": [first, second]})
    if write == "one file":
        again = [{**each, "image_id": 9} for each in (first, second)]
        images = [whole["images"][0], {**whole["images"][0], "id": 9}]
        entries = ({"images": images, "annotations": [first, *again]},)
    sources = []
    for number, entry in enumerate(entries):
        put(tmp_path / f"{number}.json", json.dumps(whole | entry))
        sources.append({"format": "coco", "annotations": f"{number}.json", "images": "."})
    dataset = build_dataset(DataConfig(root=tmp_path, train=sources), "train")
    assert content([dataset]) == {"one.jpg": EXPECTED["one.jpg"]} and len(dataset) == 1
    assert any("1 pictures have several entries" in note and "1 objects" in note for note in dataset.notes)


def only_train(root, write, **options):
    write(root)
    found = find_data(root, write and LAYOUTS[write])
    source = found.splits["train"][0] | options
    return DataConfig(root=root, class_names=CLASSES, train=[source])


@pytest.mark.parametrize("write", [voc_without_lists, cvat_coco, yolo_beside, retinanet_csv, labelme_folder])
def test_every_format_takes_a_list_of_pictures_and_a_limit_on_bytes(tmp_path, write):
    data = only_train(tmp_path, write, pictures="lists/mine.txt")
    everything = build_dataset(only_train(tmp_path, write), "train")
    chosen = everything.image_paths[[1, 3]].tolist()
    put(
        tmp_path / "lists/mine.txt",
        f"{chosen[0]}\n{Path(chosen[1]).relative_to(tmp_path)}\nother.jpg\n",
        newline="\r\n",
    )
    dataset = build_dataset(data, "train")
    assert dataset.image_paths.tolist() == chosen and dataset.class_names == CLASSES
    put(tmp_path / "lists/mine.txt", "other.jpg\n")
    with pytest.raises(ValueError, match="data.train has no picture"):
        build_dataset(data, "train")
    put(tmp_path / "lists/mine.txt", "\n")
    with pytest.raises(ValueError, match=r"mine\.txt: the list of pictures is empty"):
        build_dataset(data, "train")
    with pytest.raises(ValueError, match=r"the file has \d+ bytes; max_bytes accepts 3"):
        build_dataset(only_train(tmp_path, write, max_bytes=3), "train")


DAMAGE = [
    (voc_without_lists, "labels xml/one.XML", "<annotation><object><name>cat</name><polygon/></object></annotation>", r"one.XML: object.0. \(cat\) has no bndbox"),
    (yolo_beside, "one.txt", "0 0.5 0.5\n0 0.5 0.5 1 1\n", "one.txt: line 1 .* has 2 numbers behind the class"),
    (yolo_beside, "one.txt", "9 0.5 0.5 1 1\n", "one.txt: line 1 .*has the class '9', which names lack"),
    (yolo_beside, "one.txt", "0 a b c d\n", "one.txt: line 1 .* is not four finite numbers"),
    (yolo_beside, "one.txt", "1e400 0.5 0.5 1 1\n", "one.txt: line 1 .*has the class '1e400'"),
    (yolo_beside, "one.txt", "0 9 9 1 1\n", "one.txt: line 1 .* lies outside the image"),
    (yolo_beside, "one.txt", b"\xff\xfe\x00", "one.txt: not a text in UTF-8, .*; the file is left out"),
    (labelme_folder, "annotated/0.json", "{", "0.json: the file is not labelme's: Invalid JSON.*left out"),
    (labelme_folder, "annotated/0.json", "[" * 9000, "0.json: the file is not labelme's: .*recursion limit"),
    (labelme_folder, "annotated/0.json", labelme("one.jpg", lambda *b: {"points": []}), "not four finite"),
    (labelme_folder, "annotated/0.json", labelme("one.jpg", lambda *b: {"points": [[1]]}), "at least 2 items"),
    (labelme_folder, "annotated/0.json", labelme("one.jpg", lambda *b: {"shape_type": "line", "points": [[1, 2]]}), "0.json: shapes.0. .*is a line, which has no box"),
    (labelme_folder, "annotated/0.json", labelme("one.jpg", swapped_rectangle, imagePath="../../x"), "0.json: the file '../../x' is outside"),
    (retinanet_csv, "annotations.csv", "pictures/two words.JPG,1,2,3,4,dog\npictures/one.jpg,1,2,x,4,cat", "line 2 .*is not four finite"),
    (retinanet_csv, "annotations.csv", "pictures/one.jpg,1,2,3,4,\npictures/two words.JPG,1,2,3,4,dog", "line 1 .*has no class name"),
    (retinanet_csv, "annotations.csv", "../../x.jpg,1,2,3,4,cat\npictures/two words.JPG,1,2,3,4,dog", "line 1: the file '../../x.jpg' is outside"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "file", "text", "message"), DAMAGE)
def test_what_is_damaged_is_left_out_with_a_sentence_and_its_neighbours_stay(
    tmp_path, write, file, text, message
):
    data = only_train(tmp_path, write)
    put(tmp_path / file, text) if isinstance(text, str) else (tmp_path / file).write_bytes(text)
    dataset = build_dataset(data, "train")
    assert re.search(message, dataset.problems[0], re.S), dataset.problems
    names = [Path(path).name for path in dataset.image_paths]
    assert "two words.JPG" in names and len(dataset.target(names.index("two words.JPG"))["boxes"]) == 1
    with pytest.raises(ValueError, match="strict=True refuses any"):
        build_dataset(data.model_copy(update={"strict": True}), "train")


REFUSED = [
    (
        retinanet_csv,
        "annotations.csv",
        "a,b\n1,2\n",
        "its first line is 'a,b'; accepted are a header with filename",
    ),
    (retinanet_csv, "annotations.csv", "", "the file is empty"),
    (retinanet_csv, "annotations.csv", "a.jpg,1,2,3,4,cat\n" + "x" * 200_000, "line 2: not CSV"),
    (yolo_beside, "classes.txt", "cat\ncat", "two classes have the same name"),
    (yolo_beside, "classes.txt", "", "names are no list of texts"),
    (ultralytics, "coco8.yaml", "names: " + "[" * 20_000, "coco8.yaml: not YAML"),
    (ultralytics, "coco8.yaml", "names: {a: cat}", "names are no list of texts, and no table of numbers"),
    (ultralytics, "coco8.yaml", "- names", "expected a table of train, val and names"),
    (labelme_folder, "annotated", None, "no such folder, or no JSON file in it"),
    (yolo_beside, "images", None, "no picture in it"),
]


@pytest.mark.parametrize(("write", "file", "text", "message"), REFUSED)
def test_what_cannot_be_read_at_all_is_refused_with_a_sentence(tmp_path, write, file, text, message):
    # Another library in this process may have raised it.
    csv.field_size_limit(131072)
    options = {} if text is not None else {"annotations" if write is labelme_folder else "images": "gone"}
    data = only_train(tmp_path, write, **options)
    if text is not None:
        put(tmp_path / file, text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_dataset(data, "train")


def test_yaml_words_for_true_and_false_may_be_class_names(tmp_path):
    put(tmp_path / "data.yaml", "names: [no, on, 1, 2024-01-01]")
    assert read_names(tmp_path / "data.yaml", 1000) == {0: "no", 1: "on", 2: "1", 3: "2024-01-01"}


def test_keypoints_behind_a_box_are_not_taken_for_a_polygon(tmp_path):
    paint(tmp_path / "images/one.jpg")
    put(tmp_path / "labels/one.txt", "0 0.5 0.5 0.5 0.5 0.1 0.1 0.9 0.9")
    put(tmp_path / "data.yaml", "train: images\nkpt_shape: [2, 2]\nnames: [cat]")
    found = find_data(tmp_path)
    dataset = build_dataset(DataConfig(root=tmp_path, **found.splits), "train")
    assert dataset.boxes.tolist() == [[10, 7.5, 30, 22.5]]
    assert parse_box([0.1, 0.1, 0.9, 0.9, 0.5, 0.5]) == (0.1, 0.1, 0.9, 0.9)


def pose(root, *lines, names="[cat]", **options):
    """The data set of one picture with these lines behind class 0, whose data.yaml has no kpt_shape."""
    paint(root / "images/one.jpg")
    put(root / "labels/one.txt", "".join(f"0 {line}\n" for line in lines))
    put(root / "data.yaml", f"train: images\nnames: {names}")
    source = find_data(root).splits["train"][0] | options
    return build_dataset(DataConfig(root=root, train=[source]), "train")


POSES = {
    "x and y": ("0.5 0.5 0.5 0.5 0.3 0.4 0.7 0.6", "0.8 0.4 0.2 0.4 0.8 0.5 0.75 0.3"),
    "an unmarked point": ("0.5 0.5 0.5 0.5 0.3 0.4 0 0", "0.8 0.4 0.2 0.4 0 0 0.75 0.3"),
    "visibility, an odd count": ("0.5 0.5 0.5 0.5 0.3 0.4 2", "0.8 0.4 0.2 0.4 0.1 0.9 1"),
    "visibility, an even count": ("0.5 0.5 0.5 0.5 0.3 0.4 2 0 0 0", "0.8 0.4 0.2 0.4 0.8 0.5 1 0.75 0.3 2"),
}


@pytest.mark.parametrize("kind", POSES)
def test_points_that_all_lie_in_the_box_in_front_of_them_are_keypoints(tmp_path, kind):
    dataset = pose(tmp_path, *POSES[kind], "0.5 0.5 1 1")
    np.testing.assert_allclose(
        dataset.boxes, [[10, 7.5, 30, 22.5], [28, 6, 36, 18], [0, 0, 40, 30]], atol=1e-6
    )
    assert any("2 lines hold keypoints behind their box" in note for note in dataset.notes)
    assert dataset.problems == ()


@pytest.mark.parametrize("other", ["0.1 0.1 0.6 0.2 0.5 0.9 0.1 0.8", "0.1 0.1 0.6 0.2 0.5 0.9"])
def test_lines_that_disagree_on_keypoints_are_refused_and_an_option_settles_it(tmp_path, other):
    lines = ("0.5 0.5 0.5 0.5 0.3 0.4 0.7 0.6", other, "0.5 0.4 0.5 0.5 0.3 0.4 0.7 0.6")
    message = r"one.txt: line 1 looks like a box with keypoints, and .*: line 2 does not; set keypoints: true"
    with pytest.raises(ValueError, match=message):
        pose(tmp_path, *lines)
    assert pose(tmp_path, *lines, keypoints=True).boxes[0].tolist() == [10, 7.5, 30, 22.5]
    np.testing.assert_allclose(pose(tmp_path, *lines, keypoints=False).boxes[1][:3], [4, 3, 24])


POLYGONS = {
    "rectangles": ("0.30 0.30 0.40 0.30 0.40 0.40 0.30 0.40", "0.2 0.3 0.3 0.2 0.4 0.3 0.3 0.4"),
    "counts that differ": ("0.3 0.3 0.4 0.3 0.4 0.4", "0.3 0.3 0.4 0.3 0.4 0.4 0.3 0.4"),
    "towards the lower right": ("0.8 0.8 0.9 0.8 0.9 0.9", "0.7 0.7 0.9 0.7 0.9 0.9"),
}


@pytest.mark.parametrize("kind", POLYGONS)
def test_polygons_are_not_taken_for_keypoints(tmp_path, kind):
    dataset = pose(tmp_path, *POLYGONS[kind])
    for line, box in zip(POLYGONS[kind], dataset.boxes, strict=True):
        x, y = (np.array(line.split()[start::2], float) for start in (0, 1))
        corners = x.min() * 40, y.min() * 30, x.max() * 40, y.max() * 30
        np.testing.assert_allclose(box, corners, atol=1e-6)
    assert dataset.notes == ()


def test_a_group_of_open_images_is_a_crowd(tmp_path):
    paint(tmp_path / "one.jpg")
    header = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction"
    )
    lines = ("one,x,cat,1,0.25,0.5,0.1,0.2,0,0,0,0", "one,x,cat,1,0.25,0.75,0.5,0.9,0,0,1,0")
    put(tmp_path / "boxes.csv", "\n".join((header, *lines)))
    _, datasets = read(tmp_path)
    assert datasets["train"].crowd.tolist() == [False, True]
    assert datasets["train"].target(0)["boxes"].tolist() == [[10, 3, 20, 6]]


@pytest.mark.parametrize("write", [labelimg, retinanet_csv, yolo_beside, labelme_folder, cvat_coco])
def test_corners_in_any_order_are_the_same_box_in_every_format(tmp_path, write, monkeypatch):
    """The quirk is put in where the corpus is written: every second box is drawn from its lower right corner."""
    number = iter(range(1000))
    turned = {
        name: (size, [(label, box if next(number) % 2 else (*box[2:], *box[:2])) for label, box in boxes])
        for name, (size, boxes) in PICTURES.items()
    }
    monkeypatch.setattr("test_formats.PICTURES", turned)
    write(tmp_path)
    _, datasets = read(tmp_path)
    assert content(datasets.values()) == EXPECTED
    notes = " ".join(note for dataset in datasets.values() for note in dataset.notes)
    assert ("drawn from right to left" in notes) == (write is not labelme_folder)


def test_no_more_than_a_twentieth_of_the_files_is_left_out_without_stopping(tmp_path):
    def files(bad):
        for number in range(60):
            paint(tmp_path / f"{number}.jpg", "one.jpg")
            put(tmp_path / f"{number}.xml", "<annotation" if number < bad else xml("one.jpg"))
        found = find_data(tmp_path, "voc")
        return build_dataset(DataConfig(root=tmp_path, **found.splits), "train")

    (tmp_path / "0.xml").touch()
    assert len(files(bad=3).problems) == 3
    with pytest.raises(ValueError, match=r"4 of 60 files cannot be used, .*\n.*0\.xml: not valid XML"):
        files(bad=4)


def test_a_picture_that_cannot_be_read_is_counted_by_the_rule_on_pictures(tmp_path):
    data = only_train(tmp_path, yolo_beside)
    put(tmp_path / "one.jpg", "no picture")
    with pytest.raises(ValueError, match=r"1 of 5 pictures cannot be used, .*\n.*one\.jpg: not a picture"):
        build_dataset(data, "train")
    assert len(build_dataset(data, "train", check_pictures=False)) == 5


def test_a_name_that_fits_two_pictures_is_not_guessed(tmp_path):
    for folder in ("a", "b"):
        paint(tmp_path / folder / "one.jpg")
    index = FileIndex(tmp_path)
    assert index.find("one.jpg") is None and index.find("x/b/one") == "b/one.jpg"
    assert index.path_of("one.jpg") == str(tmp_path / "one.jpg")


TOKENS = [b"1e400", b"-1", b"inf", b"null", b"\0", b"\xff\xfe", b"[", b"{", b"]", b"}", b"9" * 400, b"/etc/passwd", b"../..",
          b'"', b",", b";", b"<", b">", b"\n", b"true", b"", b"\\ud800", b"&a;", b"- ", b": ", b"[" * 2000, b" " * 50, b"0.5"]  # fmt: skip


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_random_damage_gives_data_or_a_sentence(tmp_path, write):
    for seed in range(8):
        draw, root = random.Random(seed), tmp_path / str(seed)
        root.mkdir()
        write(root)
        path = draw.choice(sorted(p for p in root.rglob("*") if p.is_file() and not is_picture(p.name)))
        data = bytearray(path.read_bytes())
        for _ in range(draw.choice([1, 2, 5])):
            start = draw.randint(0, len(data))
            data[start : start + draw.choice([0, 1, 3, 60])] = draw.choice(TOKENS)
        path.write_bytes(data)
        with contextlib.suppress(ValueError, FileNotFoundError):
            found = find_data(root, LAYOUTS[write])
            for split in found.splits:
                build_dataset(DataConfig(root=root, **found.splits), split)
