"""From a picture to what the network sees, and the loader: draws are a function of (seed, epoch, image id)."""

import pickle
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from detector.config import AugmentConfig
from detector.data.dataset import DetectionDataset
from detector.data.loader import EvalBatches, TrainBatches, TransformedDataset, build_loader
from detector.data.transforms import EvalTransform, TrainTransform, clip_boxes, resize
from detector.model.network_input import network_size

KEY = (0, 0, 1)
EVERYTHING = AugmentConfig(
    horizontal_flip=0.5, vertical_flip=0.5, scale=(0.7, 1.3), crop=0.7, brightness=0.4, contrast=0.3, hue=0.1
)


def picture(height=48, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def target_of(*boxes, image_id=1):
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": np.arange(1, len(boxes) + 1), "image_id": image_id}


def train_transform(size=48, **augment):
    return TrainTransform(size, 4 * size, AugmentConfig(**{"horizontal_flip": 0, **augment}))


def make_dataset(folder, sizes, same_picture=False):
    """A data set of noise pictures with one box each; sizes are (height, width)."""
    for i, (height, width) in enumerate(sizes):
        cv2.imwrite(str(folder / f"{i}.png"), picture(height, width, seed=0 if same_picture else i))
    number = len(sizes)
    return DetectionDataset(
        class_names=("thing",),
        category_ids=[7],
        image_paths=[str(folder / f"{i}.png") for i in range(number)],
        image_ids=100 + np.arange(number),
        image_sizes=sizes,
        offsets=np.arange(number + 1),
        boxes=[[4, 5, 20, 18]] * number,
        labels=[1] * number,
        areas=[208] * number,
        crowd=[False] * number,
        difficult=[False] * number,
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Thirteen pictures, eight wide and five tall."""
    return make_dataset(tmp_path_factory.mktemp("pictures"), [(24, 32)] * 4 + [(32, 24)] * 5 + [(24, 36)] * 4)


def loader_of(dataset, num_workers=0, batch_size=2, seed=0, augment=EVERYTHING):
    batches = TrainBatches(dataset.aspect_ratios(), batch_size, seed)
    transformed = TransformedDataset(dataset, TrainTransform(24, 48, augment), seed)
    return build_loader(transformed, batches, num_workers, pin_memory=False), batches


def read(loader, batches, epoch=0, start=0):
    """An epoch's batches as plain lists, to compare with ==."""
    batches.set_epoch(epoch, start)
    return [
        [
            (t["image_id"], image.tolist(), t["boxes"].tolist(), t["labels"].tolist(), t["original_size"])
            for image, t in zip(images, targets, strict=True)
        ]
        for images, targets in loader
    ]


def ids(batches):
    return [[sample[0] for sample in batch] for batch in batches]


# The transforms


def test_boxes_are_clipped_at_the_border_and_those_with_nothing_left_dropped():
    boxes = np.array([[-5, -5, 10, 10], [60, 40, 70, 60], [64, 0, 80, 10], [0, -9, 10, 0]], dtype=np.float32)
    boxes, labels = clip_boxes(boxes, np.array([1, 2, 3, 4]), (48, 64))
    assert boxes.tolist() == [[0, 0, 10, 10], [60, 40, 64, 48]] and labels.tolist() == [1, 2]


def test_augmentation_never_sees_a_box_outside_the_picture():
    transform = train_transform(horizontal_flip=1.0, crop=1.0)
    _, target = transform(picture(), target_of([-30, -5, 20, 20], [70, 0, 90, 10]), KEY)
    assert target["labels"].tolist() == [1]


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (37, 91), (200, 121)])
def test_resizing_equals_the_models_own_to_within_the_rounding_to_bytes(size):
    image = picture(*size)
    wanted_size = network_size(*size, 60, 96)
    ours, boxes = resize(image, np.array([[4, 6, 20, 30]], dtype=np.float32), wanted_size)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    wanted = F.interpolate(tensor, size=wanted_size, mode="bilinear", align_corners=False)[0]
    assert (torch.from_numpy(ours).permute(2, 0, 1) - wanted).abs().max() <= 1
    factors = np.array([wanted_size[1] / size[1], wanted_size[0] / size[0]] * 2)
    np.testing.assert_allclose(boxes[0], [4, 6, 20, 30] * factors, rtol=1e-6)


def test_evaluation_resizes_and_carries_the_original_size():
    image, target = EvalTransform(24, 96)(picture(48, 64), target_of([4, 6, 20, 30], image_id=9), KEY)
    assert image.shape == (3, 24, 32) and image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[2, 3, 10, 15]] and target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [1] and target["labels"].dtype == torch.int64
    assert (target["image_id"], target["original_size"]) == (9, (48, 64))


@pytest.mark.parametrize(
    ("flip", "axis", "box"),
    [
        ("horizontal_flip", 2, [64 - 20, 6, 64 - 4, 30]),  # x1, x2 -> width - x2, width - x1
        ("vertical_flip", 1, [4, 48 - 30, 20, 48 - 6]),
    ],
)
def test_a_flip_mirrors_pixels_and_boxes(flip, axis, box):
    image, target = train_transform(**{flip: 1.0})(picture(), target_of([4, 6, 20, 30]), KEY)
    assert torch.equal(image, torch.from_numpy(picture()).permute(2, 0, 1).flip(axis))
    np.testing.assert_allclose(target["boxes"], [box], atol=1e-4)


def test_a_crop_keeps_every_box_whole_with_its_pixels():
    boxes = [[10, 8, 30, 20], [40, 25, 50, 33]]
    whole, sizes = torch.from_numpy(picture()).permute(2, 0, 1), set()
    for image_id in range(20):
        image, target = train_transform(crop=1.0)(picture(), target_of(*boxes), (0, 0, image_id))
        sizes.add(tuple(image.shape))
        assert target["labels"].tolist() == [1, 2]
        for before, after in zip(boxes, target["boxes"].round().int().tolist(), strict=True):
            (a1, b1, a2, b2), (x1, y1, x2, y2) = before, after
            assert torch.equal(image[:, y1:y2, x1:x2], whole[:, b1:b2, a1:a2])
    assert len(sizes) > 5


def test_a_crop_cuts_less_than_a_pixel_off_boxes_between_pixels():
    box = np.array([10.3, 8.6, 30.7, 20.2])
    for image_id in range(20):
        _, target = train_transform(crop=1.0)(picture(), target_of(box), (0, 0, image_id))
        x1, y1, x2, y2 = target["boxes"][0].tolist()
        np.testing.assert_allclose([x2 - x1, y2 - y1], [20.4, 11.6], atol=1)


def test_scale_jitter_stays_within_its_bounds_and_moves_boxes_along():
    transform, widths = train_transform(scale=(0.5, 1.5)), []
    for image_id in range(30):
        image, target = transform(picture(), target_of([0, 0, 64, 48], [16, 12, 32, 24]), (0, 0, image_id))
        height, width = image.shape[1:]
        widths.append(width)
        assert 24 <= height <= 72 and abs(height / 48 - width / 64) < 0.03
        wanted = [[0, 0, width, height], [width / 4, height / 4, width / 2, height / 2]]
        np.testing.assert_allclose(target["boxes"], wanted, rtol=1e-4, atol=1e-3)
        assert target["original_size"] == (48, 64)
    assert min(widths) < 45 and max(widths) > 80


def test_colour_jitter_leaves_boxes_and_size():
    jitter = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2}
    image, target = train_transform(**jitter)(picture(), target_of([4, 6, 20, 30]), KEY)
    assert image.shape == (3, 48, 64) and image.dtype == torch.uint8
    assert not torch.equal(image, torch.from_numpy(picture()).permute(2, 0, 1))
    np.testing.assert_allclose(target["boxes"], [[4, 6, 20, 30]], atol=1e-4)


def test_nothing_configured_changes_nothing():
    image, target = train_transform()(picture(), target_of([4.25, 6, 20, 30]), KEY)
    assert torch.equal(image, torch.from_numpy(picture()).permute(2, 0, 1))
    np.testing.assert_allclose(target["boxes"], [[4.25, 6, 20, 30]], atol=1e-4)


def test_an_image_without_boxes_passes_everything():
    for image_id in range(10):
        _, target = TrainTransform(48, 96, EVERYTHING)(picture(), target_of(), (0, 0, image_id))
        assert target["boxes"].shape == (0, 4) and target["boxes"].dtype == torch.float32
        assert target["labels"].shape == (0,) and target["labels"].dtype == torch.int64


def test_boxes_over_the_whole_picture_of_odd_sizes_pass_everything():
    for image_id in range(20):
        height, width = 37 + image_id, 91 - image_id
        target = target_of([0, 0, width, height], [width - 1, height - 1, width, height])
        _, target = TrainTransform(50, 90, EVERYTHING)(picture(height, width), target, (0, 0, image_id))
        assert target["labels"].tolist() == [1, 2]


def test_draws_are_a_function_of_seed_epoch_and_image_id():
    transform = TrainTransform(48, 96, EVERYTHING)

    def draw(*key):
        return transform(picture(), target_of([4, 6, 20, 30]), key)[0].tolist()

    first = draw(1, 2, 3)
    others = [draw(0, 2, 3), draw(1, 3, 3), draw(1, 2, 4)]  # these must not disturb the first's draw
    assert draw(1, 2, 3) == first
    assert first not in others and len({str(other) for other in others}) == 3


# The loader


def test_the_number_of_workers_changes_nothing_over_two_epochs(dataset):
    loader, batches = loader_of(dataset)
    alone = [read(loader, batches, epoch) for epoch in (0, 1)]
    assert alone[0] != alone[1]
    for num_workers in (1, 3):
        loader, batches = loader_of(dataset, num_workers)
        assert [read(loader, batches, epoch) for epoch in (0, 1)] == alone


def test_workers_and_epochs_do_not_repeat_each_other(tmp_path):
    same = make_dataset(tmp_path, [(24, 32)] * 6, same_picture=True)
    loader, batches = loader_of(same, 2, batch_size=1, augment=AugmentConfig(brightness=0.5, contrast=0.5))
    seen = [str(batch[0][1]) for epoch in (0, 1) for batch in read(loader, batches, epoch)]
    assert len(set(seen)) == 12


def test_starting_within_an_epoch_gives_exactly_its_remaining_batches(dataset):
    loader, batches = loader_of(dataset)
    whole = read(loader, batches, epoch=3)
    assert read(loader, batches, epoch=3, start=4) == whole[4:]
    assert read(loader, batches, epoch=3, start=len(whole)) == []
    following = read(loader, batches, epoch=4) + read(loader, batches, epoch=5)
    batches.set_epoch(3, start=4, until=6)
    assert list(map(len, loader.batch_sampler)) == [len(batch) for batch in whole[4:] + following]
    assert [target["image_id"] for _, targets in loader for target in targets] == [
        row[0] for batch in whole[4:] + following for row in batch
    ]


def test_reading_takes_nothing_from_the_global_random_state(dataset):
    loader, batches = loader_of(dataset)
    before = torch.get_rng_state()
    read(loader, batches)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_image_comes_once_an_epoch_in_another_order(dataset):
    batches = TrainBatches(dataset.aspect_ratios(), 4, seed=0)
    orders = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        epoch_batches = list(batches)
        assert len(epoch_batches) == len(batches) == 4  # 13 images
        assert {key[0] for batch in epoch_batches for key in batch} == {epoch}
        orders.append([key[1] for batch in epoch_batches for key in batch])
        assert sorted(orders[-1]) == list(range(13))
    assert orders[0] != orders[1] != orders[2]


def test_only_the_leftovers_batch_mixes_orientations(dataset):
    tall = dataset.aspect_ratios() > 1
    batches = TrainBatches(dataset.aspect_ratios(), 2, seed=0)
    for epoch in range(5):  # 5 tall and 8 wide: one tall one is left over
        batches.set_epoch(epoch)
        kinds = sorted({*tall[[i for _, i in batch]]} == {True} for batch in batches if len(batch) == 2)
        assert kinds == [False] * 4 + [True] * 2
    three = TrainBatches(dataset.aspect_ratios(), 3, seed=0)  # 5 = 3 + 2, 8 = 6 + 2: four are left over
    mixed = [batch for batch in three if len({*tall[[i for _, i in batch]]}) == 2]
    assert len(mixed) <= 2


def test_without_grouping_orientations_mix(dataset):
    tall = dataset.aspect_ratios() > 1
    batches = TrainBatches(dataset.aspect_ratios(), 6, seed=0, group=False)
    assert any(len({*tall[[i for _, i in batch]]}) == 2 for batch in batches)


@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_evaluation_reads_each_image_once_like_shapes_together(dataset, batch_size):
    ratios = dataset.aspect_ratios()
    batches = EvalBatches(ratios, batch_size)
    order = [index for batch in batches for _, index in batch]
    assert sorted(order) == list(range(13)) and len(list(batches)) == len(batches)
    assert np.all(np.diff(ratios[order]) >= 0)


def test_annotations_are_held_in_flat_arrays_of_some_fifty_bytes_a_box():
    num_images, num_boxes = 2000, 20_000
    held = DetectionDataset(
        class_names=("thing",),
        category_ids=[1],
        image_paths=[f"{i:06d}.jpg" for i in range(num_images)],
        image_ids=range(num_images),
        image_sizes=[(48, 64)] * num_images,
        offsets=np.arange(num_images + 1) * 10,
        boxes=[[0, 0, 1, 1]] * num_boxes,
        labels=[1] * num_boxes,
        areas=[1] * num_boxes,
        crowd=[False] * num_boxes,
        difficult=[False] * num_boxes,
    )
    arrays = [value for value in vars(held).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 10 and all(array.dtype != object for array in arrays)
    # 4 x 8 + 8 + 8 + 1 + 1 = 50 bytes a box, and 10 x 4 + 3 x 8 = 64 an image
    assert len(pickle.dumps(held)) < 50 * num_boxes + 64 * num_images + 10_000


LEFT_AT_EXIT = """
import atexit, multiprocessing
from detector.data.loader import build_loader
atexit.register(lambda: print(len(multiprocessing.active_children()), "left"))
loader = build_loader([0, 1, 2], [[0], [1]], 2, pin_memory=False, collate=list)
print(list(loader), list(loader), len(multiprocessing.active_children()))
"""


def test_the_workers_of_a_living_loader_end_before_what_was_registered_earlier():
    """torch's own wait at exit is registered when the workers start: five seconds a worker, where batches are pinned."""
    done = subprocess.run([sys.executable, "-c", LEFT_AT_EXIT], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["[[0], [1]] [[0], [1]] 2", "0 left"], done.stderr
