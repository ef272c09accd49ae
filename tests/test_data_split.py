"""The split of a data set: by content and seed, equal pictures together, every class on both sides."""

import shutil

import numpy as np
import pytest
from PIL import Image

from detector.data.dataset import DetectionDataset
from detector.data.sources import DataConfig, build_dataset
from detector.data.split import split_dataset, write_split


@pytest.fixture
def make(tmp_path):
    """Make a data set whose picture i has the classes `labels[i]`; pictures of equal `contents` are equal."""

    def make(labels, contents=None, order=None, name="{}.png"):
        contents = range(len(labels)) if contents is None else contents
        paths = []
        for number, content in enumerate(contents):
            path = tmp_path / name.format(number)
            noise = np.random.default_rng(content).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
            paths.append(str(path))
        order = range(len(labels)) if order is None else order
        flat = [label for row in order for label in labels[row]]
        return DetectionDataset(
            class_names=tuple("abcdefgh"),
            category_ids=range(8),
            image_paths=[paths[row] for row in order],
            image_ids=range(len(labels)),
            image_sizes=[(8, 8)] * len(labels),
            offsets=np.concatenate([[0], np.cumsum([len(labels[row]) for row in order])]),
            boxes=[(0, 0, 4, 4)] * len(flat),
            labels=flat,
            areas=[16] * len(flat),
            crowd=[False] * len(flat),
            difficult=[False] * len(flat),
        )

    return make


def paths(dataset, parts):
    return {part: sorted(dataset.image_paths[rows].tolist()) for part, rows in parts.items()}


def random_labels(number, seed=0):
    draw = np.random.default_rng(seed)
    odds = np.array([0.6, 0.3, 0.1, 0.05, 0.03, 0.02, 0.01, 0.0])
    return [list(np.flatnonzero(draw.random(8) < odds) + 1) for _ in range(number)]


def test_every_picture_is_in_one_part_and_a_fifth_of_each_class_is_validated_on(make):
    labels = random_labels(400)
    parts = split_dataset(make(labels), seed=0)
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(400))
    assert len(parts["val"]) == pytest.approx(80, abs=4)
    present = np.array([[label in each for label in range(1, 9)] for each in labels])
    for counts, validated in zip(present.sum(0), present[parts["val"]].sum(0), strict=True):
        assert validated == pytest.approx(counts / 5, abs=1.5)
        assert counts < 2 or 0 < validated < counts


@pytest.mark.parametrize("seed", range(5))
def test_a_class_of_two_pictures_has_one_in_each_part_and_that_of_one_is_trained_on(make, seed):
    labels = [[1]] * 20 + [[1, 2], [2], [3], [1, 4], [4, 5], [5, 1]]
    parts = split_dataset(make(labels), seed)
    for label in (1, 2, 4, 5):
        assert all(any(label in labels[row] for row in rows) for rows in parts.values())
    assert 22 in parts["train"]


def test_equal_pictures_come_into_one_part(make):
    contents = [number // 3 for number in range(30)]
    parts = split_dataset(make([[1]] * 30, contents), seed=1)
    assert not {contents[row] for row in parts["train"]} & {contents[row] for row in parts["val"]}
    assert len(parts["val"]) == 6


def test_frames_of_one_film_come_into_one_part_and_a_single_film_is_cut(make):
    """Twelve frames of each of five films; a frame differs from the one before it by a level."""
    dataset = make([[1]] * 60)
    for row, path in enumerate(dataset.image_paths):
        scene = np.random.default_rng(row // 12).integers(0, 230, (8, 8, 3))
        Image.fromarray((scene + row % 12).astype(np.uint8)).save(path)
    parts = split_dataset(dataset, seed=0)
    assert not {row // 12 for row in parts["train"]} & {row // 12 for row in parts["val"]}
    assert len(parts["val"]) == 12
    one_film = split_dataset(dataset.subset(range(12)), seed=0)
    assert len(one_film["val"]) == pytest.approx(12 / 5, abs=1)


def test_the_split_depends_on_the_seed_and_the_contents_and_not_on_names_or_order(make):
    labels = random_labels(40)
    dataset = make(labels)
    split = split_dataset(dataset, seed=3)
    order = np.random.default_rng(0).permutation(40)
    shuffled = make(labels, order=order)
    assert paths(shuffled, split_dataset(shuffled, 3)) == paths(dataset, split)
    renamed = make(labels, name="x{:03}.png")
    assert all(np.array_equal(rows, split[part]) for part, rows in split_dataset(renamed, 3).items())
    assert paths(dataset, split_dataset(dataset, 4)) != paths(dataset, split)


def test_two_pictures_are_split_and_one_cannot_be(make):
    parts = split_dataset(make([[1], [2]]), seed=0)
    assert [len(rows) for rows in parts.values()] == [1, 1]
    with pytest.raises(ValueError, match=r"1 different picture\(s\) cannot be split"):
        split_dataset(make([[1], [2]], contents=[5, 5]), seed=0)
    with pytest.raises(ValueError, match="val is 1.0; accepted: a share between 0 and 1"):
        split_dataset(make([[1], [2]]), 0, val=1.0)


def test_a_picture_that_is_missing_is_split_by_its_name(make, tmp_path):
    dataset = make([[1]] * 10)
    (tmp_path / "3.png").unlink()
    assert sum(map(len, split_dataset(dataset, 0).values())) == 10


def test_a_written_split_is_read_back_by_a_recipe(tiny_shapes, tmp_path):
    source = {"format": "coco", "images": "train", "annotations": "annotations/train.json"}
    dataset = build_dataset(DataConfig(root=tiny_shapes, train=[source]), "train")
    parts = split_dataset(dataset, seed=0, val=0.25)
    files = write_split(tmp_path / "run", dataset, parts, tiny_shapes)
    assert files == {part: str(tmp_path / f"run/{part}.txt") for part in ("train", "val")}
    sources = {part: [source | {"pictures": path}] for part, path in files.items()}
    data = DataConfig(root=tiny_shapes, **sources)
    for part, rows in parts.items():
        again = build_dataset(data, part)
        assert again.to_coco() == dataset.subset(rows).to_coco()


@pytest.mark.parametrize("place", ["data/run", "run"])
def test_a_written_split_fits_data_that_have_moved(tiny_shapes, tmp_path, place):
    shutil.copytree(tiny_shapes, tmp_path / "data")
    source = {"format": "coco", "images": "train", "annotations": "annotations/train.json"}
    dataset = build_dataset(DataConfig(root=tmp_path / "data", train=[source]), "train")
    files = write_split(tmp_path / place, dataset, {"train": np.arange(3)}, tmp_path / "data")
    (tmp_path / "data").rename(tmp_path / "moved")
    data = DataConfig(root=tmp_path / "moved", train=[source | {"pictures": files["train"]}])
    again = build_dataset(data, "train")
    assert again.to_coco()["annotations"] == dataset.subset(np.arange(3)).to_coco()["annotations"]
    assert again.image_paths[0].startswith(str(tmp_path / "moved"))


def test_a_name_with_a_line_break_is_refused_by_a_list(make, tmp_path):
    dataset = make([[1], [2]], name="a\n{}.png")
    with pytest.raises(ValueError, match="has a line break in its name"):
        write_split(tmp_path, dataset, {"train": np.array([0, 1])}, tmp_path)
    assert not (tmp_path / "train.txt").exists()


def test_bccds_and_fodas_training_pictures_are_split_with_every_class_in_both_parts(shared):
    for name, one_based in (("bccd", True), ("foda", False)):
        source = {"format": "voc", "split": "train", "one_based": one_based}
        dataset = build_dataset(DataConfig(root=shared / "data" / name, train=[source]), "train")
        parts = {part: dataset.subset(rows) for part, rows in split_dataset(dataset, seed=0).items()}
        assert len(parts["val"]) == pytest.approx(len(dataset) / 5, rel=0.1)
        assert all(count for part in parts.values() for count in part.box_counts().values())
