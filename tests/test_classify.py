"""Augmentation of classifiers' pictures, batches, normalisation, and measures."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from backbones import IMAGENET, Preprocessing
from detector.classify.augment import BatchAugment, ClassifierAugment, PictureAugment, center_crop
from detector.classify.measures import Measures, format_measures
from detector.classify.normalize import Normalize
from detector.classify.pictures import Pictures
from detector.classify.samples import Samples, whole_batch
from detector.data.loader import TrainBatches

RANDOM = np.random.default_rng(0).integers(1, 256, (40, 3, 16, 12), dtype=np.uint8)


def pictures():
    return Pictures(RANDOM, np.arange(40) % 3, ("a", "b", "c"))


# ---- augmentation


def test_padding_crops_each_picture_at_a_place_of_its_own():
    augment = BatchAugment(ClassifierAugment(padding=4, horizontal_flip=0), 40, 0, fill=(0, 0, 0))
    found = augment(RANDOM, 0, np.arange(40))
    padded = np.pad(RANDOM, ((0, 0), (0, 0), (4, 4), (4, 4)))
    places = set()
    for before, after in zip(padded, found, strict=True):
        fits = [
            (y, x)
            for y in range(9)
            for x in range(9)
            if np.array_equal(before[:, y : y + 16, x : x + 12], after)
        ]
        assert len(fits) == 1
        places.update(fits)
    assert len(places) > 20 and {y for y, _ in places} == set(range(9))


def test_flips_are_of_half_of_the_pictures_and_whole():
    augment = BatchAugment(ClassifierAugment(horizontal_flip=0.5), 40, 0)
    found = augment(RANDOM, 0, np.arange(40))
    flipped = [np.array_equal(a, b[..., ::-1]) for a, b in zip(found, RANDOM, strict=True)]
    same = [np.array_equal(a, b) for a, b in zip(found, RANDOM, strict=True)]
    assert 10 < sum(flipped) < 30 and sum(flipped) + sum(same) == 40
    vertical = BatchAugment(ClassifierAugment(horizontal_flip=0, vertical_flip=1), 40, 0)
    assert np.array_equal(vertical(RANDOM, 0, np.arange(40)), RANDOM[:, :, ::-1])


def test_the_padding_has_the_colour_that_is_given():
    augment = BatchAugment(ClassifierAugment(padding=4), 40, 0, fill=(7, 8, 9))
    images = np.full((40, 3, 16, 12), 200, np.uint8)
    found = augment(images, 0, np.arange(40))
    assert [set(np.unique(found[:, k])) for k in range(3)] == [{7, 200}, {8, 200}, {9, 200}]


@pytest.mark.parametrize("size", [None, 8])
def test_a_picture_is_augmented_alike_in_any_batch_and_anew_in_each_epoch(size):
    samples = Samples(pictures(), size, ClassifierAugment(padding=4), seed=3)
    whole, labels, indices, _ = samples.__getitems__([(1, k) for k in range(40)])
    assert indices.tolist() == list(range(40))
    for rows in ([5], [30, 2, 17]):
        images, found, places, _ = samples.__getitems__([(1, k) for k in rows])
        assert (
            torch.equal(images, whole[rows]) and torch.equal(found, labels[rows]) and places.tolist() == rows
        )
    assert not torch.equal(samples.__getitems__([(2, k) for k in range(40)])[0], whole)
    other = Samples(pictures(), size, ClassifierAugment(padding=4), seed=4)
    assert not torch.equal(other.__getitems__([(1, k) for k in range(40)])[0], whole)


def test_the_number_of_workers_changes_nothing():
    samples = Samples(pictures(), 8, ClassifierAugment(), seed=3)
    read = []
    for workers in (0, 2):
        batches = TrainBatches(np.ones(40), 16, 0)
        loader = DataLoader(samples, batch_sampler=batches, num_workers=workers, collate_fn=whole_batch)
        read.append(list(loader))
    assert [len(batch.labels) for batch in read[0]] == [len(batch.labels) for batch in read[1]]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(*read, strict=True))


def test_the_data_are_not_changed_by_augmenting():
    before = RANDOM.copy()
    Samples(pictures(), None, ClassifierAugment(horizontal_flip=1)).__getitems__([(0, k) for k in range(40)])
    assert np.array_equal(before, RANDOM)


def test_a_random_part_of_a_picture_is_resized_as_albumentations_does():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    augment = PictureAugment(ClassifierAugment(horizontal_flip=0), 24, 0)
    found = [augment(image, 0, index) for index in range(3)]
    assert {f.shape for f in found} == {(24, 24, 3)} and not np.array_equal(found[0], found[1])
    whole = ClassifierAugment(scale=(1, 1), ratio=(1.4, 1.4), horizontal_flip=1)
    flipped = PictureAugment(whole, 24, 0)(image, 0, 0).astype(int)
    kept = PictureAugment(whole.model_copy(update={"horizontal_flip": 0}), 24, 0)(image, 0, 0)
    assert np.array_equal(flipped[:, ::-1], kept)


@pytest.mark.parametrize(("height", "width"), [(300, 500), (500, 300), (20, 31)])
def test_evaluation_sees_the_middle(height, width):
    image = np.zeros((height, width, 3), np.uint8)
    image[height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4] = 255
    found = center_crop(image, 28)
    assert found.shape == (28, 28, 3)
    rows, columns = np.nonzero(found[..., 0] > found.max() / 2)
    assert abs(rows.mean() - 13.5) <= 1 and abs(columns.mean() - 13.5) <= 1


def test_the_middle_of_a_long_picture_takes_no_more_than_its_square():
    long = np.zeros((1, 32_000, 3), np.uint8)
    long[:, 15_999] = 255
    # Enlarged as a whole, it would take 9 GB.
    assert center_crop(long, 224).shape == (224, 224, 3) and center_crop(long, 224).min() == 255


@pytest.mark.parametrize("wrong", [{"scale": (0.5, 0.1)}, {"ratio": (0, 1)}, {"padding": -1}])
def test_a_wrong_setting_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ClassifierAugment(**wrong)


def test_pictures_in_files_need_a_size():
    with pytest.raises(ValueError, match="size is None; accepted for pictures in files"):
        Samples(Pictures(np.array(["a.png"]), np.zeros(1, np.int64), ("a", "b")), None)


# ---- normalisation


@pytest.mark.parametrize(
    "preprocessing", [IMAGENET, Preprocessing((104.0, 117.0, 128.0), (1.0, 2.0, 1.0), "bgr", 255.0)]
)
def test_normalisation_is_the_detectors(preprocessing):
    from detector.model.conventions import Conventions
    from detector.model.network_input import NetworkTransform

    images = torch.from_numpy(RANDOM)
    found = Normalize(preprocessing)(images)
    transform = NetworkTransform(16, 16, preprocessing, Conventions())
    for image, expected in zip(images, found, strict=True):
        torch.testing.assert_close(transform.normalize(image / 255), expected, rtol=1e-4, atol=1e-4)
    assert not Normalize(preprocessing).state_dict()


# ---- measures


def test_measures_count_top1_top5_and_confusion():
    logits = torch.eye(7)[torch.tensor([0, 1, 1, 6])] * 9 + torch.arange(7) / 10
    labels = torch.tensor([0, 1, 2, 0])
    measures = Measures(7)
    measures.add(logits[:3], labels[:3])
    measures.add(logits[3:], labels[3:])
    found = measures.summary("abcdefg")
    # The second picture of class 0 is taken for 6, and 0 is the last of seven by its logit.
    assert (found["pictures"], found["top1"]) == (4, 0.5)
    # Of the third, 1 6 5 4 3 come before 2.
    assert found["top5"] == 0.5
    assert found["confusion"][0] == [1, 0, 0, 0, 0, 0, 1] and found["confusion"][2][1] == 1
    assert [row["accuracy"] for row in found["classes"][:4]] == [0.5, 1.0, 0.0, None]
    assert found["mean_accuracy"] == 0.5 and found["classes"][0]["taken_for"] == "g"
    json.dumps(found, allow_nan=False)


def test_top5_equals_a_sort():
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 12), torch.randint(12, (200,))
    measures = Measures(12)
    measures.add(logits, labels)
    order = logits.argsort(dim=1, descending=True)
    assert measures.summary("abcdefghijkl")["top5"] == (order[:, :5] == labels[:, None]).any(1).float().mean()


def test_top5_of_five_classes_says_nothing():
    measures = Measures(5)
    measures.add(torch.randn(3, 5), torch.tensor([0, 1, 4]))
    assert measures.summary("abcde")["top5"] is None


def test_no_picture_has_no_measure():
    found = Measures(3).summary("abc")
    assert found["top1"] is None and found["mean_accuracy"] is None
    assert format_measures(found).startswith("0 pictures: none")


def test_the_table_puts_the_worst_class_first():
    measures = Measures(3)
    measures.add(torch.eye(3)[[0, 0, 1]], torch.tensor([0, 1, 1]))
    lines = format_measures(measures.summary(("ant", "bee", "cat"))).splitlines()
    assert lines[0] == "3 pictures: top-1 66.67%, mean of classes 75.00%"
    assert [line.split()[0] for line in lines[3:]] == ["bee", "ant", "cat"]
    assert lines[3].split() == ["bee", "2", "0.500", "ant"]


def test_logits_of_another_number_of_classes_are_refused():
    with pytest.raises(ValueError, match=r"logits are \(2, 4\); accepted: \(N, 3\)"):
        Measures(3).add(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
