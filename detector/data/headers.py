"""Compare pictures with what their annotations say of them, before training.

Only headers are read. Letters: N images, M boxes.
"""

from dataclasses import replace

import numpy as np

from .dataset import DetectionDataset, offsets_of, size_message
from .images import MAX_PIXELS, read_sizes
from .records import find_faulty_boxes
from .tolerance import MAX_LEFT_OUT, refuse_many

# A difference of so many pixels, or of this share of a side, may come from rounding or trimming.
_FEW_PIXELS = 2
_SMALL_SHARE = 0.01


def settle_sizes(
    dataset: DetectionDataset,
    *,
    strict: bool = False,
    max_left_out: float = MAX_LEFT_OUT,
    max_pixels: int = MAX_PIXELS,
) -> DetectionDataset:
    """Give every image the size of its picture, with boxes to match; leave out images whose picture cannot be used.

    If a size differs by a few pixels, boxes are clipped to the picture. If it differs by one factor for both sides,
    boxes are scaled. `notes` counts both. A picture is left out if it is missing or unreadable, if its sides are
    swapped, or if its size differs in another way; `left_out` has a sentence for each. An annotated size of 0 means
    unknown, and agrees with every picture.

    strict: refuse the first picture that is not as annotated. max_left_out: the share of pictures that may be left out.

    Raises:
        ValueError: `strict` refuses a picture, or too many are left out. The message lists the first ones.
    """
    sizes, reasons = read_sizes(dataset.image_paths.tolist(), max_pixels=max_pixels)
    stated = np.where(dataset.image_sizes > 0, dataset.image_sizes, sizes)
    clipped, scaled, refused = _compare(stated, sizes)

    def tell(row: int) -> str:
        expected, got = (tuple(each[row].tolist()) for each in (stated, sizes))
        return reasons.get(int(row)) or size_message(str(dataset.image_paths[row]), expected, got)

    differ, kept = np.flatnonzero(clipped | scaled | refused), ~refused
    if strict and len(differ):
        raise ValueError(
            f"{tell(differ[0])} (strict refuses any; {len(differ)} picture(s) are not as annotated)"
        )
    left_out = [tell(row) for row in np.flatnonzero(refused)]
    refuse_many(left_out, len(dataset), max_left_out)
    ways = (clipped, "by a few pixels, and boxes are clipped"), (scaled, "by a factor, and boxes are scaled")
    notes = [
        f"{mask.sum()} of {len(mask)} pictures differ from their annotations {how}; the first: {tell(mask.argmax())}"
        for mask, how in ways
        if mask.any()
    ]
    settled = replace(dataset, image_sizes=sizes, notes=(*dataset.notes, *notes))
    if left_out:
        settled = replace(settled.subset(kept), left_out=(*dataset.left_out, *left_out))
    if not notes:
        return settled
    return _fit_boxes(settled, np.where(scaled[:, None], sizes / stated, 1)[kept], clipped[kept])


def scale_of(stated: tuple[int, int], size: tuple[int, int]) -> tuple[float, float] | None:
    """The factors on y and x from an annotated (height, width) to a picture's; None: the picture is another one.

    A picture that differs by a few pixels was cut, and has factors of 1.
    """
    _, scaled, refused = _compare(np.array([stated]), np.array([size]))
    if refused[0]:
        return None
    return (size[0] / stated[0], size[1] / stated[1]) if scaled[0] else (1.0, 1.0)


def _compare(stated: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which images need clipped boxes, scaled boxes, or are refused: three (N,) masks.

    stated, sizes: (N, 2) height and width in the annotations and of the picture; a size of -1 is unreadable.
    """
    gap = np.abs(sizes - stated)
    # The longer side has the more exact factor.
    longer = np.arange(len(stated)), stated.argmax(axis=1)
    factor = (sizes[longer] / stated[longer])[:, None]
    differs, swapped = gap.any(axis=1), (sizes == stated[:, ::-1]).all(axis=1)
    close = (gap <= _FEW_PIXELS).all(axis=1)
    uniform = (np.abs(sizes - stated * factor) <= 1).all(axis=1)
    near = (gap <= _SMALL_SHARE * stated).all(axis=1)
    usable = differs & ~swapped & (sizes > 0).all(axis=1)
    scaled = usable & uniform & ~close
    clipped = usable & ~scaled & (close | near)
    return clipped, scaled, (sizes <= 0).any(axis=1) | (differs & ~scaled & ~clipped)


def _fit_boxes(dataset: DetectionDataset, factors: np.ndarray, clipped: np.ndarray) -> DetectionDataset:
    """Scale the boxes of each image by (N, 2) factors of y and x, and clip those of `clipped` (N,) to the image.

    A box that this leaves without area is skipped, with a sentence in `problems`. Areas change as their boxes do.
    """
    image = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    sizes = dataset.image_sizes[image]
    boxes = dataset.boxes * factors[image][:, [1, 0, 1, 0]]
    boxes = np.where(clipped[image][:, None], boxes.clip(0, sizes[:, [1, 0, 1, 0]]), boxes)
    grown = _areas(boxes) / _areas(dataset.boxes)
    changed = (boxes != dataset.boxes).any(axis=1)
    faults = {row: fault for row, fault in find_faulty_boxes(boxes, sizes).items() if changed[row]}
    problems = [f"{dataset.image_paths[image[row]]} {fault}, and is skipped" for row, fault in faults.items()]
    refuse_many(problems, len(boxes), kind="objects")
    kept = np.ones(len(boxes), bool)
    kept[list(faults)] = False
    return replace(
        dataset,
        offsets=offsets_of(np.bincount(image[kept], minlength=len(dataset))),
        boxes=boxes[kept],
        areas=np.where(changed, dataset.areas * grown, dataset.areas)[kept],
        problems=(*dataset.problems, *problems),
        **{name: getattr(dataset, name)[kept] for name in ("labels", "crowd", "difficult")},
    )


def _areas(boxes: np.ndarray) -> np.ndarray:
    """(M, 4) xyxy -> (M,)."""
    return np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
