"""Draw smooth backgrounds and filled shapes: the parts of the generated pictures.

Coordinates are pixels, x right and y down; the centre of the first pixel is at (0.5, 0.5).
"""

import cv2
import numpy as np

_SUBPIXEL_BITS = 4  # OpenCV draws in 1/16 pixels


def _cross() -> np.ndarray:
    """The outer corners lie on the circle."""
    x = np.array([-1, 1, 1, 3, 3, 1, 1, -1, -1, -3, -3, -1]) / 10**0.5
    return np.stack([x, np.roll(x, 3)], axis=1)


def _arc(radius: float, start: float, end: float, center: float = 0.0) -> np.ndarray:
    """Points of a circle about (center, 0), by angles in units of pi: (24, 2)."""
    turns = np.pi * np.linspace(start, end, 24)
    return np.stack([center + radius * np.cos(turns), radius * np.sin(turns)], axis=1)


def _heart() -> np.ndarray:
    t = 2 * np.pi * np.arange(48) / 48
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 17


# name -> number of corners, and the radius of every second one
_STARS = {
    "circle": (64, 1.0),
    "triangle": (3, 1.0),
    "square": (4, 1.0),
    "pentagon": (5, 1.0),
    "star": (10, 0.45),
}
# name -> corners (P, 2)
_OUTLINES = {
    "cross": _cross(),
    "arrow": np.array([(1, 0), (0, 1), (0, 0.4), (-0.9, 0.4), (-0.9, -0.4), (0, -0.4), (0, -1)]),
    "crescent": np.concatenate([_arc(1.0, 0.3, 1.7), _arc(0.86, 1.6, 0.4, 0.5)]),
    "half": _arc(1.0, 0.5, 1.5) + [0.4, 0],
    "heart": _heart(),
}


def draw_background(generator: np.random.Generator, size: int) -> np.ndarray:
    """A cloudy gradient of two colours, at times striped, with a few thin lines: (size, size, 3) float32."""
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = generator.uniform(0, 2 * np.pi)
    along = columns * np.cos(angle) + rows * np.sin(angle)
    mix = 0.6 * (along - along.min()) / np.ptp(along) + 0.4 * _clouds(generator, size)
    if generator.random() < 0.4:
        frequency = generator.uniform(8, 30)
        mix += 0.12 * np.sin(2 * np.pi * frequency * (columns * np.sin(angle) - rows * np.cos(angle)))
    start, end = (random_color(generator, saturation=(0.1, 0.45), value=(0.35, 0.95)) for _ in range(2))
    canvas = (start + np.clip(mix, 0, 1)[:, :, None] * (end - start)).astype(np.float32)
    for _ in range(generator.integers(0, 4)):
        ends = _fixed_point(generator.uniform(-0.1, 1.1, (2, 2)) * size)
        # OpenCV smooths edges on 8-bit images only.
        line = np.zeros((size, size), np.uint8)
        cv2.line(line, *ends.tolist(), 255, 1, cv2.LINE_AA, _SUBPIXEL_BITS)
        blend(canvas, line, random_color(generator, saturation=(0, 0.5), value=(0.2, 1)))
    return canvas


def _clouds(generator: np.random.Generator, size: int) -> np.ndarray:
    """Smooth noise of three scales, from 0 to 1: (size, size) float32."""
    total = np.zeros((size, size), np.float32)
    for cells in (3, 6, 14):
        coarse = generator.random((cells, cells), np.float32) / cells
        total += cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return (total - total.min()) / np.ptp(total)


def random_color(
    generator: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]
) -> np.ndarray:
    """A colour of any hue: (3,) float32 RGB, 0..255."""
    hue = generator.uniform(0, 360)
    color = np.float32([[[hue, generator.uniform(*saturation), generator.uniform(*value)]]])
    return cv2.cvtColor(color, cv2.COLOR_HSV2RGB)[0, 0] * 255


def outline_of(name: str, angle: float) -> np.ndarray:
    """Corners of a shape within a circle of diameter 2 about the origin, y down, turned by `angle`: (P, 2) float64."""
    if name in _OUTLINES:
        x, y = _OUTLINES[name].T
        return np.stack(
            [x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], axis=1
        )
    num_corners, inner = _STARS[name]
    turns = 2 * np.pi * np.arange(num_corners) / num_corners
    radii = np.where(np.arange(num_corners) % 2, inner, 1.0)
    return np.stack([np.sin(turns + angle) * radii, -np.cos(turns + angle) * radii], axis=1)


def cover(outline: np.ndarray, size: int) -> np.ndarray:
    """A filled outline's coverage of each pixel, in 255ths: (P, 2) -> (size, size) uint8."""
    canvas = np.zeros((size, size), np.uint8)
    # OpenCV puts the centre of a pixel at a whole number; our coordinates put it at a half.
    cv2.fillPoly(canvas, [_fixed_point(outline - 0.5)], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
    return canvas


def _fixed_point(points: np.ndarray) -> np.ndarray:
    """(P, 2) pixels -> (P, 2) int32 in OpenCV's units of 1/16 pixel."""
    return np.round(points * 2**_SUBPIXEL_BITS).astype(np.int32)


def blend(canvas: np.ndarray, mask: np.ndarray, color: np.ndarray) -> None:
    """Lay a colour, (3,) or (size, size, 3), over the canvas in place, weighted by the mask.

    canvas: (size, size, 3) float32; mask: (size, size) uint8, 255 is opaque.
    """
    canvas += mask[:, :, None].astype(np.float32) / 255 * (color - canvas).astype(np.float32)
