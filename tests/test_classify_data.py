"""A classifier's pictures: folders, CIFAR's files, objects of detection data, generated shapes."""

import time

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from detector.classify.cifar import load_cifar
from detector.classify.folder import load_folder
from detector.classify.objects import cut_objects, cut_square
from detector.classify.pictures import Pictures, measure_preprocessing
from detector.classify.shapes import CLASS_NAMES, draw_labelled, generate_labelled
from detector.classify.sources import PicturesSource
from detector.data.dataset import DetectionDataset


def source(**values):
    return TypeAdapter(PicturesSource).validate_python(values)


def picture(path, size=(20, 30), value=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


# ---- a folder of class folders


@pytest.fixture
def class_folders(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            for k in range(count):
                picture(tmp_path / split / name / f"{k}.png", value=40 * k + (10 if name == "dog" else 0))
    return tmp_path


def test_class_folders_give_pictures_of_any_size_with_the_folders_as_classes(class_folders):
    picture(class_folders / "train/dog/deep/9.jpg", (8, 9))
    found = load_folder(class_folders, "train")
    assert found.class_names == ("cat", "dog") and len(found) == 9
    image = found.image(0)
    assert image.dtype == np.uint8 and image.shape == (20, 30, 3)
    assert found.labels.tolist() == [0] * 4 + [1] * 5
    assert {found.image(k).shape for k in range(9)} == {(8, 9, 3), (20, 30, 3)}


def test_a_run_beside_class_folders_is_no_class(class_folders):
    picture(class_folders / "train/run/found.jpg")
    (class_folders / "train/run/training_state.pt").touch()
    assert "run" not in load_folder(class_folders, "train").class_names


def test_a_class_folder_that_is_a_link_to_nothing_is_told(class_folders):
    (class_folders / "train/cow").symlink_to(class_folders / "gone")
    assert load_folder(class_folders, "train").notes == (f"{class_folders / 'train/cow'}: a link to nothing",)


def test_a_folder_without_splits_gives_a_fifth_of_each_class_for_validation(tmp_path):
    for name, count in (("a", 10), ("b", 5)):
        for k in range(count):
            picture(tmp_path / name / f"{k}.png")
    parts = {split: load_folder(tmp_path, split) for split in ("train", "val")}
    assert np.bincount(parts["val"].labels).tolist() == [2, 1]
    assert np.bincount(parts["train"].labels).tolist() == [8, 4]
    assert not set(parts["val"].images) & set(parts["train"].images)


def test_a_small_class_without_splits_has_one_picture_for_validation(tmp_path):
    for name, count in (("a", 1), ("b", 2), ("c", 4)):
        for k in range(count):
            picture(tmp_path / name / f"{k}.png")
    assert np.bincount(load_folder(tmp_path, "val").labels).tolist() == [0, 1, 1]
    assert np.bincount(load_folder(tmp_path, "train").labels).tolist() == [1, 1, 3]


def test_a_class_without_a_readable_picture_is_refused(class_folders):
    for k in range(30):
        picture(class_folders / f"train/dog/more{k}.png")
    picture(class_folders / "train/emu/0.png")
    (class_folders / "train/emu/0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="train/emu: no picture can be read"):
        load_folder(class_folders, "train")


def test_validation_pictures_have_the_training_classes(class_folders):
    picture(class_folders / "train/ant/0.png")
    train = source(format="folder", root=class_folders).load("train")
    val = source(format="folder", root=class_folders).load("val", train.class_names)
    assert val.class_names == ("ant", "cat", "dog") and set(val.labels) == {1, 2}


def test_an_unreadable_picture_is_left_out_and_told(class_folders):
    for k in range(40):
        picture(class_folders / f"train/cat/more{k}.png")
    (class_folders / "train/cat/bad.png").write_bytes(b"nothing")
    found = load_folder(class_folders, "train")
    assert len(found) == 48 and "bad.png: not a picture" in found.left_out[0]
    with pytest.raises(ValueError, match="bad.png: not a picture.*strict refuses any; 1 cannot"):
        load_folder(class_folders, "train", strict=True)


def test_folders_that_are_no_classes_are_one_sentence(class_folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent/x: no such folder|absent: no such folder"):
        load_folder(tmp_path / "absent", "train")
    with pytest.raises(FileNotFoundError, match="test: no such folder; accepted: .* a folder for each class"):
        load_folder(class_folders, "test")
    picture(tmp_path / "one/cat/0.png")
    with pytest.raises(ValueError, match="one has one class, 'cat'; a classifier needs two or more"):
        load_folder(tmp_path / "one", "train")
    picture(tmp_path / "none/0.png")
    with pytest.raises(ValueError, match="none has no class; a classifier needs two or more"):
        load_folder(tmp_path / "none", "train")
    (class_folders / "train/empty").mkdir()
    with pytest.raises(ValueError, match="empty: no picture found"):
        load_folder(class_folders, "train")
    picture(class_folders / "val/emu/0.png")
    with pytest.raises(ValueError, match="emu: is no class of the training pictures: cat, dog"):
        load_folder(class_folders, "val", ("cat", "dog"))


@pytest.mark.parametrize("name", ["Train", "training"])
def test_a_split_by_another_name_is_no_class(class_folders, name):
    (class_folders / "train").rename(class_folders / name)
    with pytest.raises(ValueError, match="the name of a split; accepted: .* with train/ and val/"):
        load_folder(class_folders, "train")


def test_many_unreadable_pictures_are_refused(class_folders):
    for k in range(3):
        (class_folders / f"train/cat/{k}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="3 of 8 pictures cannot be used"):
        load_folder(class_folders, "train")


# ---- CIFAR


def records(rng, count, num_labels, num_classes):
    made = rng.integers(0, 256, (count, num_labels + 3072), dtype=np.uint8)
    made[:, :num_labels] = rng.integers(0, num_classes, (count, num_labels))
    return made


@pytest.fixture
def cifar10(tmp_path):
    rng = np.random.default_rng(0)
    made = {name: records(rng, 5, 1, 10) for name in ("data_batch_1", "data_batch_2", "test_batch")}
    for name, content in made.items():
        content.tofile(tmp_path / f"{name}.bin")
    names = [f"class{k}" for k in range(10)]
    (tmp_path / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    return tmp_path, made


def test_cifar10_is_read_from_its_binary_files(cifar10):
    root, made = cifar10
    found = load_cifar(root, "train")
    assert len(found) == 10 and found.class_names == tuple(f"class{k}" for k in range(10))
    image, row = found.images[7], made["data_batch_2"][2]
    assert found.labels[7] == row[0] and image.shape == (3, 32, 32)
    # The red plane comes first, row by row.
    assert image[0, 1, 4] == row[1 + 32 + 4] and image[2, 31, 31] == row[-1]
    assert "10 pictures; CIFAR has 50000" in found.notes[0]
    assert len(load_cifar(root, "test")) == len(load_cifar(root, "val")) == 5


def test_cifar100_has_fine_and_coarse_labels(tmp_path):
    made = records(np.random.default_rng(0), 4, 2, 20)
    made.tofile(tmp_path / "train.bin")
    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"fine{k}" for k in range(100)))
    (tmp_path / "coarse_label_names.txt").write_text("\n".join(f"coarse{k}" for k in range(20)))
    fine, coarse = (
        source(format="cifar", root=tmp_path, labels=kind).load("train") for kind in ("fine", "coarse")
    )
    assert fine.labels.tolist() == made[:, 1].tolist() and len(fine.class_names) == 100
    assert coarse.labels.tolist() == made[:, 0].tolist() and len(coarse.class_names) == 20
    assert np.array_equal(fine.images.reshape(4, -1), made[:, 2:])


def test_damaged_cifar_files_are_one_sentence(cifar10, tmp_path):
    root, made = cifar10
    content = made["data_batch_2"].tobytes()
    (root / "data_batch_2.bin").write_bytes(content[:-1])
    with pytest.raises(
        ValueError, match="data_batch_2.bin: the file is cut short: 15364 bytes are 4 records"
    ):
        load_cifar(root, "train")
    (root / "data_batch_2.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="data_batch_2.bin: the file is cut short: 0 bytes"):
        load_cifar(root, "train")
    (root / "data_batch_2.bin").write_bytes(content[: 3073 * 3] + b"\x0a" + content[3073 * 3 + 1 :])
    with pytest.raises(ValueError, match="data_batch_2.bin: record 3 has label 10; accepted: 0 to 9"):
        load_cifar(root, "train")
    with pytest.raises(FileNotFoundError, match="has no data_batch_.*bin of CIFAR-10 and no train.bin"):
        load_cifar(tmp_path / "absent", "train")
    with pytest.raises(ValueError, match="the classes are not those of the training pictures"):
        load_cifar(root, "test", class_names=("a", "b"))


# ---- objects


def detection_data(tmp_path, boxes, labels, crowd=None, difficult=None, names=("cat", "dog"), num_images=1):
    """Pictures of 60x80 pixels that are black, with the first boxes painted in 50 x label; all boxes on the first."""
    for k in range(num_images):
        image = np.zeros((60, 80, 3), np.uint8)
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            image[y1:y2, x1:x2] = 50 * label
        Image.fromarray(image).save(tmp_path / f"{k}.png")
    count = len(boxes)
    return DetectionDataset(
        class_names=names,
        category_ids=np.arange(1, len(names) + 1),
        image_paths=[str(tmp_path / f"{k}.png") for k in range(num_images)],
        image_ids=np.arange(num_images) + 5,
        image_sizes=[(60, 80)] * num_images,
        offsets=[0, *[count * (k + 1) for k in range(num_images)]],
        boxes=np.array(boxes * num_images, float).reshape(-1, 4),
        labels=labels * num_images,
        areas=np.ones(count * num_images),
        crowd=(crowd or [False] * count) * num_images,
        difficult=(difficult or [False] * count) * num_images,
    )


def test_objects_are_squares_around_their_boxes_with_context(tmp_path):
    data = detection_data(tmp_path, [(20, 20, 30, 30), (40, 10, 60, 20)], [1, 2])
    found = cut_objects(data, size=40, context=2.0)
    assert found.images.shape == (2, 3, 40, 40) and found.class_names == ("cat", "dog")
    assert found.labels.tolist() == [0, 1]
    # The first box is half of its square's side, in the middle.
    assert (found.images[0][:, 12:28, 12:28] == 50).all() and (found.images[0][:, :8] == 0).all()
    # The second is 20x10 in a square of 40: a half wide and a quarter high, with its top at the picture's border.
    assert (found.images[1][:, 16:24, 12:28] == 100).all() and (found.images[1][:, 27:] == 0).all()


def test_past_the_border_the_pictures_edge_is_repeated(tmp_path):
    image = np.full((20, 20, 3), 70, np.uint8)
    assert (cut_square(image, np.array([0.0, 0, 6, 6]), 4.0, 32) == 70).all()
    assert cut_square(image, np.array([-50.0, -50, 2, 2]), 1.0, 8).shape == (8, 8, 3)
    assert cut_square(image, np.array([19.7, 19.7, 19.9, 19.9]), 1.0, 8).shape == (8, 8, 3)


def test_crowds_and_difficult_objects_are_left_out(tmp_path):
    boxes = [(0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)]
    data = detection_data(tmp_path, boxes, [1, 2, 2], [False, True, False], [False, False, True])
    assert cut_objects(data, size=8).labels.tolist() == [0]


def test_background_is_a_class_of_its_own_away_from_all_objects(tmp_path):
    boxes = [(0, 0, 40, 60), (60, 40, 70, 50)]
    data = detection_data(tmp_path, boxes, [1, 2], [True, False], num_images=6)
    found = cut_objects(data, size=16, context=1.0, background=3, max_iou=0.0)
    assert found.class_names == ("cat", "dog", "background")
    background = found.images[found.labels == 2]
    assert len(background) == 18 and (background == 0).all()


def test_background_depends_on_the_seed_and_not_on_the_order_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    data = detection_data(tmp_path, [(5, 5, 15, 15), (30, 30, 40, 50)], [1, 2], num_images=3)
    for path in data.image_paths:
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)

    def background(dataset, seed):
        found = cut_objects(dataset, size=8, background=2, seed=seed)
        return found.images[found.labels == 2]

    assert np.array_equal(background(data, 1), background(data, 1))
    assert not np.array_equal(background(data, 1), background(data, 2))
    assert np.array_equal(background(data.subset([2, 0, 1]), 1)[:2], background(data, 1)[4:])


def test_objects_come_from_any_recipes_data(tmp_path):
    split = {"format": "shapes", "num_train": 12, "num_val": 6, "image_size": 64}
    detection = {"root": tmp_path, "train": {**split, "split": "train"}, "val": {**split, "split": "val"}}
    chosen = source(format="objects", detection=detection, size=32, background=1)
    train = chosen.load("train")
    val = chosen.load("val", train.class_names)
    assert train.class_names == val.class_names == ("circle", "cross", "triangle", "star", "background")
    assert train.images.shape[1:] == (3, 32, 32) and len(train) > len(val) > 6


def test_detection_data_without_objects_or_classes_are_one_sentence(tmp_path):
    empty = detection_data(tmp_path, [], [], num_images=2)
    with pytest.raises(ValueError, match="have no object to cut out: 2 pictures, 0 boxes"):
        cut_objects(empty)
    single = detection_data(tmp_path, [(0, 0, 9, 9)], [1], names=("cat",))
    with pytest.raises(ValueError, match="without background has one class, 'cat'"):
        cut_objects(single)
    assert set(cut_objects(single, size=8, background=2).labels) == {0, 1}


def test_an_undecodable_picture_of_objects_is_left_out_unless_strict(tmp_path):
    data = detection_data(tmp_path, [(0, 0, 9, 9), (20, 20, 30, 30)], [1, 2], num_images=30)
    (tmp_path / "7.png").write_bytes(b"nothing")
    found = cut_objects(data, size=8)
    assert len(found) == 58 and "7.png" in found.left_out[0]
    with pytest.raises(ValueError, match="7.png"):
        cut_objects(data, True, size=8)


# ---- generated shapes


def test_generated_shapes_are_cifars_files_and_the_same_for_a_seed(tmp_path):
    few, more, other = (
        source(format="shapes", root=tmp_path / name, num_train=count, num_test=6, seed=seed)
        for name, count, seed in (("few", 12, 0), ("more", 20, 0), ("other", 12, 1))
    )
    train = few.load("train")
    assert train.class_names == CLASS_NAMES and train.images.shape == (12, 3, 32, 32)
    assert np.array_equal(train.images, more.load("train").images[:12])
    assert not (train.images == other.load("train").images).all(axis=(1, 2, 3)).any()
    assert len(few.load("test")) == 6
    assert not (train.images[:6] == few.load("test").images).all(axis=(1, 2, 3)).any()


def test_generated_shapes_are_written_once_and_anew_for_other_settings(tmp_path):
    generate_labelled(tmp_path, num_train=4, num_test=2)
    written = (tmp_path / "data_batch_1.bin").stat().st_mtime_ns
    generate_labelled(tmp_path, num_train=4, num_test=2)
    assert (tmp_path / "data_batch_1.bin").stat().st_mtime_ns == written
    generate_labelled(tmp_path, num_train=6, num_test=2)
    assert len(load_cifar(tmp_path, "train")) == 6


def test_generated_shapes_never_overwrite_cifar(cifar10):
    root, _ = cifar10
    with pytest.raises(ValueError, match="holds files that are not generated shapes"):
        generate_labelled(root, num_train=4, num_test=2)


def test_generated_shapes_are_not_written_among_other_files(tmp_path):
    generate_labelled(tmp_path, num_train=4, num_test=2)
    (tmp_path / ".test_batch.bin.123.tmp.bin").touch()
    generate_labelled(tmp_path, num_train=6, num_test=2)
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"holds files that are not generated shapes \(mine.txt\)"):
        generate_labelled(tmp_path, num_train=5, num_test=2)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: a file, where the folder"):
        generate_labelled(tmp_path / "file", num_train=5, num_test=2)


def test_cifars_names_may_have_spaces_and_come_once(cifar10):
    root, _ = cifar10
    names = [f"sea animal {k}" for k in range(10)]
    (root / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    assert load_cifar(root, "train").class_names == tuple(names)
    (root / "batches.meta.txt").write_text("\n".join([*names[:9], names[0]]))
    with pytest.raises(ValueError, match="has the class 'sea animal 0' twice"):
        load_cifar(root, "train")


def test_every_class_is_drawn_and_colour_says_nothing_of_it():
    pictures, labels = zip(*(draw_labelled(np.random.default_rng((0, k))) for k in range(400)), strict=True)
    assert set(labels) == set(range(10))
    means = np.stack(pictures).mean(axis=(1, 2))
    labels = np.array(labels)
    centers = np.stack([means[labels == k].mean(axis=0) for k in range(10)])
    nearest = np.linalg.norm(means[:, None] - centers, axis=2).argmin(axis=1)
    assert (nearest == labels).mean() < 0.25


def test_fifty_thousand_shapes_take_under_two_minutes():
    start = time.perf_counter()
    for k in range(100):
        draw_labelled(np.random.default_rng(k))
    # 50,000 in under two minutes are 2.4 ms each; the machine may be busy.
    assert time.perf_counter() - start < 1.5


# ---- preprocessing


def test_the_preprocessing_is_the_datas_mean_and_deviation():
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8), dtype=np.uint8)
    images[:, 1] //= 4
    found = measure_preprocessing(Pictures(images, np.zeros(50, np.int64), ("a", "b")))
    scaled = images / 255
    assert np.allclose(found.mean, scaled.mean(axis=(0, 2, 3)), atol=1e-3)
    assert np.allclose(found.std, scaled.std(axis=(0, 2, 3)), atol=1e-3)


def test_a_constant_channel_is_not_divided_by_zero():
    images = np.full((4, 3, 8, 8), 9, np.uint8)
    assert measure_preprocessing(Pictures(images, np.zeros(4, np.int64), ("a", "b"))).std == (1, 1, 1)
