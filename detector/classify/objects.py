"""Cut the objects of a detection data set out, with context, as pictures of one class each."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import cv2
import numpy as np
import torch
from pydantic import Field
from torchvision.ops import box_iou

from ..data.dataset import DetectionDataset
from ..data.sources import DataConfig, build_dataset
from ..data.tolerance import refuse_many
from ..settings import Pixels, Probability, checked
from .pictures import ArrayPictures, check_classes

BACKGROUND = "background"
# So many places are tried for a crop of background.
_TRIES = 20
_THREADS = 4


@checked
def cut_objects(
    dataset: DetectionDataset,
    strict: bool = False,
    *,
    size: Pixels = 64,
    context: Annotated[float, Field(ge=1, le=8)] = 1.5,
    background: Annotated[int, Field(ge=0, le=100)] = 0,
    max_iou: Probability = 0.1,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> ArrayPictures:
    """The objects as squares of `size` pixels, all in memory, with label - 1 as their label.

    Crowds are left out, and objects that VOC marks difficult. Past the picture's border its edge is repeated.

    strict: refuse the first picture that cannot be decoded instead of leaving its objects out.
    context: the side of the square over the longer side of the box.
    background: crops of background per picture, which make a class of their own, the last. They have the sizes of
        random objects of the data set, drawn by (seed, image id).
    max_iou: the largest IoU of background with a box, crowds and difficult objects included.

    ValueError: there is no object, there are fewer than two classes, or too many pictures cannot be decoded.
    """
    names = (*dataset.class_names, *([BACKGROUND] if background else []))
    check_classes(names, "the detection data without background")
    learned = ~(dataset.crowd | dataset.difficult)
    if not learned.any():
        raise ValueError(
            f"the detection data have no object to cut out: {len(dataset)} pictures, {len(dataset.boxes)} boxes"
        )
    shapes = (dataset.boxes[:, 2:] - dataset.boxes[:, :2])[learned]

    def cut(index: int) -> tuple[np.ndarray, np.ndarray] | str:
        """The crops (M, size, size, 3) and labels (M,) of a picture, or why it cannot be decoded."""
        try:
            image = dataset.image(index)
        except (ValueError, OSError) as error:
            if strict:
                raise
            return str(error)
        rows = np.arange(dataset.offsets[index], dataset.offsets[index + 1])
        rng = np.random.default_rng((seed, int(dataset.image_ids[index])))
        places = list(_free_places(rng, image.shape[:2], dataset.boxes[rows], shapes, background, max_iou))
        rows = rows[learned[rows]]
        crops = [cut_square(image, box, context, size) for box in [*dataset.boxes[rows], *places]]
        labels = [*(dataset.labels[rows] - 1), *[len(names) - 1] * len(places)]
        return np.array(crops, np.uint8).reshape(-1, size, size, 3), np.array(labels, np.int64)

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(cut, range(len(dataset))))
    left_out = tuple(reason for reason in found if isinstance(reason, str))
    refuse_many(left_out, len(dataset))
    crops, labels = map(np.concatenate, zip(*(f for f in found if not isinstance(f, str)), strict=True))
    images = np.ascontiguousarray(crops.transpose(0, 3, 1, 2))
    return ArrayPictures(images, labels, names, dataset.notes, (*dataset.left_out, *left_out))


class ObjectsSource(cut_objects.settings):
    """The objects of a detection data set; `detection` is the section `data` of a detector's recipe."""

    format: Literal["objects"]
    detection: DataConfig

    def load(self, split: str, class_names: tuple[str, ...] | None = None) -> ArrayPictures:
        """The "train", "val" or "test" objects."""
        if class_names and self.background:
            class_names = class_names[:-1]
        dataset = build_dataset(self.detection, split, class_names)
        settings = self.model_dump(exclude={"format", "detection"})
        return cut_objects(dataset, self.detection.strict, **settings)


def cut_square(image: np.ndarray, box: np.ndarray, context: float, size: int) -> np.ndarray:
    """The square around a box (4,) xyxy, `context` times its longer side: (H, W, 3) -> (size, size, 3) uint8."""
    height, width = image.shape[:2]
    box = np.clip(box, 0, [width, height, width, height])
    side = max(1, round(context * float((box[2:] - box[:2]).max())))
    left, top = np.floor((box[:2] + box[2:] - side) / 2 + 0.5).astype(int)
    inside = image[max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)]
    beyond = [-top, top + side - height, -left, left + side - width]
    if max(beyond) > 0:
        inside = cv2.copyMakeBorder(inside, *(max(0, int(b)) for b in beyond), cv2.BORDER_REPLICATE)
    return cv2.resize(inside, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)


def _free_places(
    rng: np.random.Generator,
    image_size: tuple[int, int],
    boxes: np.ndarray,
    shapes: np.ndarray,
    count: int,
    max_iou: float,
) -> Iterator[np.ndarray]:
    """Boxes (4,) xyxy within the picture that hardly overlap `boxes` (M, 4), with a random one of `shapes` (S, 2).

    There are fewer than `count` where the tries find no room.
    """
    for _ in range(count):
        for _ in range(_TRIES):
            shape, place = shapes[rng.integers(len(shapes))], rng.random(2)
            room = np.array(image_size[::-1]) - shape
            box = np.concatenate([place * room, place * room + shape])
            overlaps = box_iou(torch.from_numpy(box[None]), torch.from_numpy(boxes))
            if (room >= 0).all() and not (overlaps > max_iou).any():
                yield box
                break
