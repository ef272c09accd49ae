"""Boxes with class names and scores drawn on pictures, readable at any size and brightness."""

import colorsys
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]


def draw_boxes(
    image: np.ndarray | torch.Tensor,
    boxes: Any,
    labels: Any,
    class_names: Sequence[str],
    scores: Any = None,
    font_path: str | None = None,
) -> np.ndarray:
    """The picture with its boxes, each tagged with class name and score, as a new (H, W, 3) uint8 RGB array.

    Args:
        image: (H, W, 3) uint8 RGB array, or (3, H, W) tensor, uint8 or float in [0, 1].
        boxes: (M, 4) xyxy pixels of this picture; parts outside it are cut off.
        labels: (M,) class ids 1..K-1, which also choose the colours.
        class_names: K-1 foreground names; `class_names[label - 1]` is written.
        scores: (M,) in [0, 1]; if given, they are written after the name with two digits.
        font_path: of a TrueType or OpenType font; None takes a font of the system where Pillow's lacks a character.

    Lines and letters grow with the picture. Boxes of high score are drawn over those of low score. Their tags are
    placed first. Tags avoid each other if there is room.

    ValueError: another kind of image, lengths that do not agree, labels outside 1..K-1, or no font in `font_path`.
    """
    return np.array(draw_image(image, boxes, labels, class_names, scores, font_path))


def draw_image(
    image: np.ndarray | torch.Tensor,
    boxes: Any,
    labels: Any,
    class_names: Sequence[str],
    scores: Any = None,
    font_path: str | None = None,
) -> Image.Image:
    """What `draw_boxes` gives, as Pillow's image: to save it, the quicker form."""
    picture = Image.fromarray(_to_array(image))
    boxes, labels = _to_numbers(boxes).reshape(-1, 4), _to_numbers(labels).reshape(-1).astype(int)
    scores = None if scores is None else _to_numbers(scores).reshape(-1)
    _check_lengths(boxes, labels, class_names, scores)
    texts = [class_names[label - 1] for label in labels]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores, strict=True)]
    first_to_last = range(len(boxes)) if scores is None else np.argsort(-scores, kind="stable")
    draw = ImageDraw.Draw(picture)
    scale = math.sqrt(picture.width * picture.height)
    line_width = 1 if scale < 200 else max(2, round(scale / 300))
    for index in reversed(first_to_last):
        _draw_outline(draw, boxes[index], class_color(labels[index]), line_width)
    _draw_tags(
        draw,
        [boxes[index] for index in first_to_last],
        [texts[index] for index in first_to_last],
        [class_color(labels[index]) for index in first_to_last],
        font=load_font("".join(class_names), max(10, round(scale / 42)), font_path),
    )
    return picture


def class_color(label: int) -> Color:
    """The RGB colour of a class id, the same in every picture and run; it shows on black and on white."""
    index = int(label) - 1
    # Steps by the golden ratio never repeat a hue, and hues of successive labels are far apart.
    hue = index * 0.618034 % 1
    red, green, blue = colorsys.hls_to_rgb(hue, (0.5, 0.36, 0.62)[index % 3], 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def fit(image: np.ndarray, boxes: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture (H, W, 3) with its longer side at `side` pixels, and its boxes (M, 4) there."""
    scale = side / max(image.shape[:2])
    size = tuple(max(1, round(length * scale)) for length in image.shape[1::-1])
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, size, interpolation=interpolation), boxes * scale


def tile(images: Sequence[np.ndarray], columns: int, gap: int = 8, background: int = 255) -> np.ndarray:
    """A contact sheet: (H, W, 3) uint8 pictures of any sizes, centred in equal cells, `columns` in a row.

    ValueError: there are no pictures, or `columns` is below 1.
    """
    if not images:
        raise ValueError("tile needs at least one picture, got none")
    if columns < 1:
        raise ValueError(f"columns is {columns}; accepted is 1 or more")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    sheet = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3), background, dtype=np.uint8
    )
    for index, image in enumerate(images):
        top = index // columns * (height + gap) + (height - image.shape[0]) // 2
        left = index % columns * (width + gap) + (width - image.shape[1]) // 2
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def _to_array(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """An image as its own (H, W, 3) uint8 array."""
    if isinstance(image, torch.Tensor) and image.ndim == 3 and image.shape[0] == 3:
        image = image.detach().cpu()
        if image.is_floating_point():
            image = (image.float().nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8)
        image = image.permute(1, 2, 0).numpy()
    if not (
        isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
    ):
        shape, dtype = tuple(getattr(image, "shape", ())), getattr(image, "dtype", "no dtype")
        kind = f"{type(image).__name__} of shape {shape}, {dtype}"
        raise ValueError(f"image is a {kind}; accepted are a (H, W, 3) uint8 array and a (3, H, W) tensor")
    return np.ascontiguousarray(image)


def _to_numbers(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _check_lengths(
    boxes: np.ndarray, labels: np.ndarray, class_names: Sequence[str], scores: np.ndarray | None
) -> None:
    if len(labels) != len(boxes) or (scores is not None and len(scores) != len(boxes)):
        num_scores = "" if scores is None else f", {len(scores)} scores"
        raise ValueError(f"{len(boxes)} boxes, {len(labels)} labels{num_scores}; each box has one of each")
    if len(labels) and not np.isin(labels, np.arange(1, len(class_names) + 1)).all():
        given, accepted = f"{labels.min()}..{labels.max()}", f"1..{len(class_names)}"
        raise ValueError(f"labels are {given}; accepted are {accepted}, the places of the class names")


def _draw_outline(draw: ImageDraw.ImageDraw, box: np.ndarray, color: Color, line_width: int) -> None:
    """Draw a coloured line around the box (4,) xyxy and, if there is room, a thin black or white one inside it.

    One of the two lines stands out from any background.
    """
    width, height = draw.im.size
    left, top = np.clip(box[:2], 0, (width - 1, height - 1)).round().astype(int).tolist()
    right, bottom = np.clip(box[2:] - 1, (left, top), (width - 1, height - 1)).round().astype(int).tolist()
    draw.rectangle((left, top, right, bottom), outline=color, width=line_width)
    if line_width > 1 and min(right - left, bottom - top) > 8 * line_width:
        inside = (left + line_width, top + line_width, right - line_width, bottom - line_width)
        draw.rectangle(inside, outline=_contrast(color), width=max(1, line_width // 3))


def _draw_tags(
    draw: ImageDraw.ImageDraw,
    boxes: Sequence[np.ndarray],
    texts: Sequence[str],
    colors: Sequence[Color],
    font: ImageFont.FreeTypeFont,
) -> None:
    """Draw a filled tag at each box (4,) xyxy, in the order given, at the place where it covers earlier tags least."""
    pad = max(1, int(font.size) // 6)
    ascent, descent = font.getmetrics()
    taken = np.empty((0, 4))
    for box, text, color in zip(boxes, texts, colors, strict=True):
        size = (math.ceil(font.getlength(text)) + 2 * pad, ascent + descent + pad)
        place = _choose_place(box, size, draw.im.size, taken)
        taken = np.concatenate([taken, [place]])
        draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
        draw.text((place[0] + pad, place[1] + pad // 2), text, fill=_contrast(color), font=font)


def load_font(text: str, size: int, path: str | None = None) -> ImageFont.FreeTypeFont:
    """The font of `path`, or one that has the characters of `text`: Pillow's own, else one of the system.

    Where it lacks some, a warning says so once. ValueError: `path` is no font that can be read.
    """
    path = _find_font("".join(sorted(set(text))), path)
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@cache
def _find_font(text: str, path: str | None) -> str | None:
    """The path of the font for `text`; None: Pillow's own."""
    try:
        lacking = _lacking(ImageFont.truetype(path, 20) if path else ImageFont.load_default(20), text)
    except OSError as error:
        raise ValueError(f"{path}: not a font that can be read ({error})") from None
    if lacking and path is None:
        for file in _system_fonts():
            with suppress(OSError):
                still = _lacking(ImageFont.truetype(file, 20), text)
                path, lacking = (file, still) if len(still) < len(lacking) else (path, lacking)
            if not lacking:
                break
    if lacking:
        warnings.warn(
            f"no letters for {lacking!r} in {path or 'the fonts of this system'}: drawings show boxes "
            "in their place. Install a font that has them, or name it by --font or font_path",
            stacklevel=2,
        )
    return path


def _system_fonts() -> Iterator[str]:
    """The paths of matplotlib's own font and of the system's, the regular ones first."""
    from matplotlib import font_manager, get_data_path

    yield f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    found = font_manager.findSystemFonts()
    # A last resort draws boxes with the name of a script.
    yield from sorted((f for f in found if "LastResort" not in f), key=lambda f: ("Regular" not in f, f))


def _lacking(font: ImageFont.FreeTypeFont, text: str) -> str:
    """The characters for which a font draws what it draws for no character."""
    none = bytes(font.getmask("\U0010ffff"))
    return "".join(char for char in text if not char.isspace() and bytes(font.getmask(char)) == none)


def _choose_place(
    box: np.ndarray, size: tuple[int, int], picture: tuple[int, int], taken: np.ndarray
) -> Rectangle:
    """Choose a tag's place among those at the box's corners: the first that covers least of `taken`.

    All places are inside the picture. box: (4,) xyxy. size, picture: (width, height) of the tag and of the picture.
    taken: (T, 4) xyxy, the tags already there.
    """
    left, top, right, bottom = box
    width, height = size
    corners = [
        (left, top - height),
        (right - width, top - height),
        (left, top),
        (left, bottom),
        (right - width, bottom),
        (left, bottom - height),
        (right - width, bottom - height),
        (right, top),
        (left - width, top),
    ]
    highest = np.maximum(np.subtract(picture, size), 0)
    begins = np.minimum(corners, highest).clip(min=0).round()
    places = np.concatenate([begins, begins + size], axis=1).astype(int)
    # (9, T, 2): the sides of what each place covers of each tag.
    sides = np.minimum(places[:, None, 2:], taken[:, 2:]) - np.maximum(places[:, None, :2], taken[:, :2])
    covered = sides.clip(min=0).prod(axis=2).sum(axis=1)
    return tuple(places[covered.argmin()].tolist())


def _contrast(color: Color) -> Color:
    """Black on bright colours, white on dark ones, by relative luminance (ITU-R BT.601)."""
    red, green, blue = color
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)
