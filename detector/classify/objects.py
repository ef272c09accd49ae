"""Cut the objects of a detection data set out, with context, as pictures of one class each."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import cv2
import numpy as np
import torch
from pydantic import Field
from torchvision.ops import box_iou

from ..data.dataset import DetectionDataset
from ..data.sources import DataConfig, build_dataset
from ..data.tolerance import refuse_many
from ..draws import tagged
from ..settings import Pixels, Probability, checked
from .pictures import Pictures, check_classes

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
) -> Pictures:
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
    easy = replace(dataset, use_difficult=False)
    cutter = _Cutter(easy, shapes, size, context, background, max_iou, seed)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(cutter.crops if strict else cutter.crops_or_reason, range(len(dataset))))
    left_out = tuple(reason for reason in found if isinstance(reason, str))
    refuse_many(left_out, len(dataset))
    crops, labels = map(np.concatenate, zip(*(f for f in found if not isinstance(f, str)), strict=True))
    images = np.ascontiguousarray(crops.transpose(0, 3, 1, 2))
    return Pictures(images, labels, names, dataset.notes, (*dataset.left_out, *left_out))


class ObjectsSource(cut_objects.settings):
    """The objects of a detection data set; `detection` is the section `data` of a detector's recipe."""

    format: Literal["objects"]
    detection: DataConfig

    def load(self, split: str, class_names: tuple[str, ...] | None = None) -> Pictures:
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


@dataclass(frozen=True)
class _Cutter:
    """Cuts one picture after another, by the settings of `cut_objects`. shapes: (S, 2) width and height of objects."""

    dataset: DetectionDataset
    shapes: np.ndarray
    size: int
    context: float
    background: int
    max_iou: float
    seed: int

    def crops_or_reason(self, index: int) -> tuple[np.ndarray, np.ndarray] | str:
        """The crops of a picture, or why it cannot be decoded."""
        try:
            return self.crops(index)
        except (ValueError, OSError) as error:
            return str(error)

    def crops(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The crops (M, size, size, 3) uint8 of a picture and their labels (M,) int64, background last."""
        image, target = self.dataset.image(index), self.dataset.target(index)
        places = list(self._free_places(index))
        boxes = [*target["boxes"], *places]
        crops = np.array([cut_square(image, box, self.context, self.size) for box in boxes], np.uint8)
        labels = np.append(target["labels"] - 1, [len(self.dataset.class_names)] * len(places))
        return crops.reshape(-1, self.size, self.size, 3), labels.astype(np.int64)

    def _free_places(self, index: int) -> Iterator[np.ndarray]:
        """Boxes (4,) xyxy for background. There are fewer than asked for where the tries find no room."""
        data = self.dataset
        boxes = torch.from_numpy(data.boxes[data.offsets[index] : data.offsets[index + 1]])
        rng = np.random.default_rng(tagged("background", self.seed, int(data.image_ids[index])))
        for _ in range(self.background):
            for _ in range(_TRIES):
                shape, place = self.shapes[rng.integers(len(self.shapes))], rng.random(2)
                room = data.image_sizes[index, ::-1] - shape
                box = np.concatenate([place * room, place * room + shape])
                overlaps = box_iou(torch.from_numpy(box[None]), boxes)
                if (room >= 0).all() and not (overlaps > self.max_iou).any():
                    yield box
                    break
