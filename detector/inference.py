"""Detect objects in pictures: `Detector.load(path)(image)`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backbones.messages import check_choice

from . import processes
from .ahead import ahead
from .checkpoint import Checkpoint, load_checkpoint
from .data.images import load_image, to_rgb
from .model.boxes import check_boxes
from .model.faster_rcnn import C4FasterRCNN
from .model.speed import apply_speed, compile_model
from .model.speed import optimize as optimize_model

Picture = str | Path | Image.Image | np.ndarray | Tensor
Boxes = Tensor | np.ndarray | Sequence[Sequence[float]]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Detections:
    """The objects found in one image, by descending score.

    boxes: (M, 4) float32 xyxy, pixels of the image as given; labels: (M,) int64 in 1..K-1; scores: (M,) float32;
    class_names: the detector's foreground names, `class_names[label - 1]`;
    features: (M, C5) float32, the RoI head's vector of each box, if asked for.
    class_scores: (M, K) float32, the probabilities of all classes, background first, if asked for.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    class_names: tuple[str, ...]
    features: Tensor | None = None
    class_scores: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def names(self) -> list[str]:
        """The class name of each box."""
        return [self.class_names[label - 1] for label in self.labels.tolist()]

    def above(self, score_thresh: float) -> "Detections":
        """The detections with a score above `score_thresh`, as a call with this threshold gives them."""
        kept = self.scores > score_thresh
        columns = {name: value[kept] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **columns)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Plain objects for JSON: box xyxy, label, name, score."""
        rows = zip(self.boxes.tolist(), self.labels.tolist(), self.names, self.scores.tolist(), strict=True)
        return [
            {"box": box, "label": label, "name": name, "score": score} for box, label, name, score in rows
        ]


class Detector:
    """A trained detector for pictures of any kind.

    detector = Detector.load("runs/shapes/best.safetensors")
    detections = detector("street.jpg", score_thresh=0.5)
    """

    def __init__(
        self, model: C4FasterRCNN, class_names: Sequence[str], device: str | torch.device = "cpu"
    ) -> None:
        self.model = model.eval().to(device)
        self.class_names = tuple(class_names)
        self.device = torch.device(device)

    @classmethod
    def load(
        cls,
        source: str | Path | Checkpoint,
        device: str | torch.device | None = None,
        *,
        optimize: bool = True,
        compile: bool = False,
        dtype: str = "float32",
    ) -> "Detector":
        """Load a detector from the path of a checkpoint, or from a `Checkpoint` in memory.

        device: None chooses the GPU if there is one, else the CPU.
        optimize: use the fused form of the network, equal up to rounding; False keeps the modules as trained.
        compile: run trunk and head through torch.compile, once for all image sizes (a minute at the first image).
        dtype: "float32", "bf16" or "fp16", of trunk and RoI head; the last two need `optimize`.
        """
        check_choice("dtype", dtype, DTYPES)
        if dtype != "float32" and not optimize:
            raise ValueError(f"dtype={dtype!r} casts the optimised network, and optimize is False")
        checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source)
        model = apply_speed(checkpoint.build(), checkpoint.config.speed).to(choose_device(device))
        if optimize:
            model = optimize_model(model, dtype=DTYPES[dtype])
        if compile:
            compile_model(model)
        return cls(model, checkpoint.class_names, choose_device(device))

    def __call__(
        self,
        image: Picture | list[Picture],
        *,
        score_thresh: float | None = None,
        features: bool = False,
        class_scores: bool = False,
        class_agnostic_nms: bool | None = None,
        channel_order: str = "rgb",
    ) -> Detections | list[Detections]:
        """Detect objects in one picture: a path, a PIL image, an (H, W, 3) uint8 array or a (3, H, W) tensor.

        A list of pictures gives a list. Pictures of one padded size run together. Those of other sizes run apart,
        because padding would move the numbers at the edges: each gives what it gives alone, up to rounding.

        score_thresh: only higher scores are returned; None takes the recipe's, which is 0.05 by default.
        features: also return the RoI head's vector of each box. class_scores: also return all class probabilities.
        class_agnostic_nms: whether a detection suppresses those of other classes too; None takes the recipe's.
        channel_order: "rgb", or "bgr" as OpenCV reads pictures; of an array or a tensor.
        ValueError or TypeError: as in `to_tensor`.
        """
        if score_thresh is not None and not 0 <= score_thresh <= 1:
            raise ValueError(f"score_thresh is {score_thresh!r}; accepted: 0 to 1")
        options = {
            "vectors": features,
            "class_scores": class_scores,
            "score_thresh": score_thresh,
            "class_agnostic_nms": class_agnostic_nms,
        }
        if isinstance(image, list):
            return self._detect([_pixels(each, channel_order) for each in image], options)
        return self._detect([_pixels(image, channel_order)], options)[0]

    def stream(
        self,
        pictures: Iterable[Picture],
        *,
        batch_size: int = 1,
        num_threads: int = 2,
        channel_order: str = "rgb",
        **options: Any,
    ) -> Iterator[Detections]:
        """The detections of many pictures, in order. Threads decode the next pictures while the network runs.

        A few pictures are in memory at a time. The other arguments are those of a call. A picture that cannot be read
        raises its error in its turn, after the detections of all pictures before it.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; accepted: 1 or more")

        def read(picture: Picture) -> Tensor:
            pixels = _pixels(picture, channel_order)
            # The host does not wait for a copy from pinned memory.
            return pixels.pin_memory() if self.device.type == "cuda" and not pixels.is_cuda else pixels

        source, error = ahead(read, pictures, num_threads), None
        while error is None:
            batch: list[Tensor] = []
            try:
                while len(batch) < batch_size:
                    batch.append(next(source))
            # A StopIteration at the end.
            except Exception as stopped:
                error = stopped
            yield from self(batch, **options)
        if not isinstance(error, StopIteration):
            raise error

    @torch.inference_mode()
    def _detect(self, pixels: list[Tensor], options: dict[str, Any]) -> list[Detections]:
        """N x (3, H, W) uint8, or float in [0, 1] -> the detections of each, in order."""

        def detect(pixels: list[Tensor], _: None) -> list[Detections]:
            images = [_as_float(each.to(self.device, non_blocking=True)) for each in pixels]
            found = self.model.detect(images, **options)
            counts = [len(each["boxes"]) for each in found]
            # All images together, because each copy makes the host wait for a GPU.
            whole = {name: torch.cat([each[name] for each in found]).cpu() for name in found[0]}
            if "vectors" in whole:
                whole["features"] = whole.pop("vectors").float()
            columns = [[part.clone() for part in values.split(counts)] for values in whole.values()]
            return [
                Detections(class_names=self.class_names, **dict(zip(whole, own, strict=True)))
                for own in zip(*columns, strict=True)
            ]

        return self.model.transform.by_padded_size(detect, pixels)

    @torch.inference_mode()
    def features(self, image: Picture, boxes: Boxes, *, channel_order: str = "rgb") -> Tensor:
        """The RoI head's vectors, (M, C5) float32, of boxes (M, 4) xyxy in pixels of the picture.

        Boxes may lie partly outside the picture. The trunk runs once for all of them. For the vectors of detections,
        call `detector(image, features=True)`.
        """
        tensor = to_tensor(image, channel_order).to(self.device)
        return self.model.region_vectors([tensor], [check_boxes(boxes).to(self.device)])[0].float().cpu()


def choose_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; None chooses the GPU if there is one, and "cuda" the process's own.

    ValueError: it cannot be used here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(processes.own_gpu() if str(name) == "cuda" else name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            # Pinned memory, peaks of memory and streams are those of the current device.
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(
            f"device {str(name)!r} cannot be used; available here: {', '.join(available)}"
        ) from error
    return device


def to_tensor(image: Picture, channel_order: str = "rgb") -> Tensor:
    """A picture as (3, H, W) float32 RGB in [0, 1]; `image` and errors are those of `_pixels`."""
    return _as_float(_pixels(image, channel_order))


def _as_float(pixels: Tensor) -> Tensor:
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels.float()


def _pixels(image: Picture, channel_order: str = "rgb") -> Tensor:
    """A picture as (3, H, W) RGB, uint8 or float in [0, 1].

    image: a path, a PIL image, a uint8 array (H, W, 3) or grey (H, W), or a tensor (3, H, W), uint8 or float in [0, 1].
    ValueError: another shape or range, or an unreadable file. TypeError: another type.
    """
    check_choice("channel_order", channel_order, ("rgb", "bgr"))
    if isinstance(image, (str, Path)):
        image, channel_order = load_image(image), "rgb"
    elif isinstance(image, Image.Image):
        image, channel_order = to_rgb(image, "the PIL image"), "rgb"
    if isinstance(image, Tensor):
        return _check_tensor(image).flip(0) if channel_order == "bgr" else _check_tensor(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"an image is a path, PIL image, array or tensor; got {type(image).__name__}")
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(
            f"the array is {image.shape} {image.dtype}; accepted: (H, W, 3) or (H, W) uint8, not empty"
        )
    if channel_order == "bgr":
        image = image[:, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _check_tensor(image: Tensor) -> Tensor:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"the tensor is {tuple(image.shape)}; accepted: (3, H, W), not empty")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise TypeError(f"the tensor is {image.dtype}; accepted: uint8, or floating point in [0, 1]")
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise ValueError(
            f"the tensor has values from {float(image.min()):.4g} to {float(image.max()):.4g}; accepted: [0, 1], not "
            "normalised (the detector does that), or uint8 0 to 255"
        )
    return image
