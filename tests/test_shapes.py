"""The generated data set: the same for a seed, tight boxes, and careful with what is on disk."""

import json

import numpy as np
import pytest

from detector.data.coco import load_coco
from detector.data.shapes import CLASS_NAMES, draw_picture, generate_shapes

SMALL = {"num_train": 6, "num_val": 3, "image_size": 96}


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_it_reads_as_coco_without_problems(tmp_path):
    generate_shapes(tmp_path, num_train=40, num_val=20)
    for split, num_images in (("train", 40), ("val", 20)):
        dataset = load_coco(tmp_path / split, tmp_path / f"annotations/{split}.json", strict=True)
        assert len(dataset) == num_images and dataset.class_names == CLASS_NAMES
        assert min(dataset.box_counts().values()) > 0
        assert np.diff(dataset.offsets).max() <= 5
        assert dataset.boxes.min() >= 0 and dataset.boxes.max() <= 160
        assert dataset[0][0].shape == (3, 160, 160)


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        generate_shapes(tmp_path / name, seed=seed, **SMALL)
    first, same, other = (contents(tmp_path / name) for name in "abc")
    assert first == same
    pictures = [path for path in first if path.suffix == ".jpg"]
    assert len(pictures) == 9 and len({first[path] for path in pictures}) == 9
    assert all(first[path] != other[path] for path in pictures)


def test_a_picture_does_not_depend_on_how_many_are_made(tmp_path):
    generate_shapes(tmp_path / "few", **SMALL)
    generate_shapes(tmp_path / "more", **SMALL | {"num_train": 8})
    few, more = contents(tmp_path / "few"), contents(tmp_path / "more")
    assert all(more[path] == data for path, data in few.items() if path.suffix == ".jpg")


def test_boxes_are_tight_around_what_is_drawn():
    checked = 0
    for seed in range(200):
        image, objects = draw_picture(np.random.default_rng(seed), 160)
        if len(objects) != 1:
            continue
        _, (x1, y1, x2, y2), area = objects[0]
        inside = image[(y1 + y2) // 2 - 2 : (y1 + y2) // 2 + 3, (x1 + x2) // 2 - 2 : (x1 + x2) // 2 + 3]
        color = np.median(inside.reshape(-1, 3).astype(float), axis=0)
        hue = color / np.linalg.norm(color)
        pixels = image.astype(float)
        alike = (pixels @ hue) / np.maximum(np.linalg.norm(pixels, axis=2), 1) > 0.995
        alike &= np.abs(np.linalg.norm(pixels, axis=2) / np.linalg.norm(color) - 1) < 0.35
        window = np.zeros_like(alike)
        window[max(y1 - 6, 0) : y2 + 6, max(x1 - 6, 0) : x2 + 6] = True
        rows, columns = np.nonzero(alike & window)
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        background = image[~window].astype(float)
        similar = ((background @ hue) / np.maximum(np.linalg.norm(background, axis=1), 1) > 0.99).any()
        if similar:
            continue  # the ground has the shape's hue: its edges cannot be found by colour
        assert np.abs(found - (x1, y1, x2, y2)).max() <= 2, seed
        assert 0.3 * (x2 - x1) * (y2 - y1) < area <= (x2 - x1) * (y2 - y1)
        checked += 1
    assert checked >= 10


def test_objects_overlap_little_some_are_cut_and_some_pictures_are_empty():
    counts, num_cut = [], 0
    for seed in range(150):
        _, objects = draw_picture(np.random.default_rng((1, seed)), 160)
        boxes = np.array([box for _, box, _ in objects], float).reshape(-1, 4)
        counts.append(len(boxes))
        num_cut += int(((boxes[:, :2] == 0).any(axis=1) | (boxes[:, 2:] == 160).any(axis=1)).sum())
        for i in range(len(boxes)):
            for j in range(i):
                sides = np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2])
                smaller = min(np.prod(boxes[k, 2:] - boxes[k, :2]) for k in (i, j))
                assert np.prod(np.clip(sides, 0, None)) < 0.1 * smaller
    assert set(counts) == {0, 1, 2, 3, 4, 5}
    assert num_cut > 0


def test_a_second_call_writes_nothing_and_other_settings_write_anew(tmp_path):
    generate_shapes(tmp_path, **SMALL)
    marker = tmp_path / "train/000001.jpg"
    marker.write_bytes(b"touched")
    generate_shapes(tmp_path, **SMALL)
    assert marker.read_bytes() == b"touched"
    generate_shapes(tmp_path, **SMALL | {"num_train": 4})
    assert marker.read_bytes() != b"touched"
    assert len(list((tmp_path / "train").iterdir())) == 4
    assert json.loads((tmp_path / "shapes.json").read_text())["num_train"] == 4


def test_a_half_written_folder_is_written_anew(tmp_path):
    generate_shapes(tmp_path / "whole", **SMALL)
    generate_shapes(tmp_path / "half", **SMALL)
    (tmp_path / "half/shapes.json").rename(tmp_path / "half/shapes.json.partial")
    (tmp_path / "half/annotations/val.json").unlink()
    generate_shapes(tmp_path / "half", **SMALL)
    assert contents(tmp_path / "half") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["notes.txt", "train/a.jpg"])
def test_a_folder_that_it_did_not_make_is_left_alone(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="holds files that are not of a generated data set"):
        generate_shapes(tmp_path, **SMALL)
    assert contents(tmp_path) == {(tmp_path / name).relative_to(tmp_path): b"mine"}


def test_a_file_added_to_a_generated_folder_is_not_deleted(tmp_path):
    generate_shapes(tmp_path, **SMALL)
    (tmp_path / "model.pt").write_text("mine")
    with pytest.raises(ValueError, match=r"model\.pt"):
        generate_shapes(tmp_path, **SMALL | {"seed": 1})
    assert (tmp_path / "shapes.json").exists()


@pytest.mark.parametrize(("name", "value"), [("num_val", 0), ("image_size", 20), ("seed", -1), ("seed", 0.5)])
def test_settings_out_of_range_are_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}: Input should be"):
        generate_shapes(tmp_path / "a", **{name: value})
    assert not (tmp_path / "a").exists()
