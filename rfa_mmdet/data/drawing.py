"""Draw shapes on textured backgrounds.

Canvases are (H, W, 3) arrays of float in BGR, 0 to 255.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

CLASSES = ("circle", "square", "triangle", "star")
# Objects with a smaller visible fraction are left out.
MIN_VISIBLE = 0.75
# Between a shape and its surroundings, as a distance in CIE Lab (black to white is 100).
MIN_CONTRAST = 40.0

# The longer side of the box in pixels, and how often it is drawn from that range. The longest
# are limited by the image.
_SIDES = ((18, 31), (36, 88), (100, 1000))
_SIDE_ODDS = (0.35, 0.5, 0.15)
_MAX_SIDE = 0.85
# Largest rotation from the upright position, in radians. A larger one would be more natural, but
# needs more images than a CPU can train on in minutes.
_MAX_TURN = np.deg2rad(15)
# Number of corners, and the distance of every second one from the centre (of the others: 1).
_OUTLINES = {"circle": (48, 1), "square": (4, 1), "triangle": (3, 1), "star": (10, 0.45)}
# Attempts to place an object before it is left out.
_TRIES = 30


class Shape(NamedTuple):
    """A shape in an image."""

    label: int
    polygon: np.ndarray  # (N, 2) of x, y; a pixel is the square from (x, y) to (x + 1, y + 1)
    mask: np.ndarray  # (H, W) of bool: the whole shape, covered by others or not
    visible: np.ndarray  # (H, W) of bool: what no later shape covers


def draw_image(
    rng: Generator, image_size: tuple[int, int], max_objects: int
) -> tuple[np.ndarray, list[Shape]]:
    """Draw one image.

    Args:
        rng (Generator): Where all chance comes from.
        image_size (tuple[int, int]): Width and height.
        max_objects (int): Maximum number of shapes; there is at least one.

    Returns:
        tuple[np.ndarray, list]: (H, W, 3) of uint8 in BGR, and the shapes, later ones in front.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> image, shapes = draw_image(rng, (96, 64), max_objects=3)
        >>> image.shape, 1 <= len(shapes) <= 3
        ((64, 96, 3), True)
    """
    width, height = image_size
    canvas = _background(rng, width, height)
    # The largest first: in front, it would hide all others.
    sides = sorted(
        (_random_side(rng, image_size) for _ in range(rng.integers(1, max_objects + 1))),
        reverse=True,
    )
    shapes: list[Shape] = []
    for side in sides:
        for _ in range(_TRIES):
            shape, alpha = _random_shape(rng, side, image_size)
            behind = [s._replace(visible=s.visible & ~shape.mask) for s in shapes]
            if any(s.visible.sum() < MIN_VISIBLE * s.mask.sum() for s in behind):
                continue
            colour = _contrasting_colour(rng, canvas, shape.mask)
            if colour is None:
                continue
            canvas += alpha[..., None] * (_shaded(rng, colour, width, height) - canvas)
            shapes = [*behind, shape]
            break
    if not shapes:  # a background on which no colour stands out; rare, so simply draw another
        return draw_image(rng, image_size, max_objects)

    if rng.random() < 0.4:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 0.9))
    canvas += rng.normal(0, rng.uniform(1, 7), canvas.shape)
    return _to_bytes(canvas), shapes


def _background(rng: Generator, width: int, height: int) -> np.ndarray:
    noise = np.zeros((height, width))
    for octave in range(5):
        cells = rng.normal(size=(3 * 2**octave, 3 * 2**octave))
        smooth = cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC)
        noise += np.asarray(smooth, float) / 1.7**octave
    first = rng.uniform(30, 225, 3)
    second = first + rng.normal(0, 45, 3)
    share = 1 / (1 + np.exp(-rng.uniform(1, 3) * noise[..., None]))
    canvas = first + share * (second - first)

    canvas += _waves(rng, width, height, cycles=(0.1, 0.4), amplitude=(0, 40))  # a gradient
    if rng.random() < 0.6:  # stripes
        canvas += _waves(rng, width, height, cycles=(4, 20), amplitude=(4, 20))
    canvas += rng.normal(0, rng.uniform(1, 8), (height, width, 1))
    return np.clip(canvas, 0, 255)


def _waves(rng, width, height, cycles, amplitude) -> np.ndarray:
    """Return (H, W, 3): a sine in a random direction, with this many cycles per image."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width] / max(width, height)
    phase = 2 * np.pi * rng.uniform(*cycles) * (x * np.cos(angle) + y * np.sin(angle))
    wave = np.sin(phase + rng.uniform(0, 2 * np.pi))
    return wave[..., None] * rng.uniform(*amplitude) * rng.uniform(0.5, 1, 3)


def _random_side(rng: Generator, image_size: tuple[int, int]) -> float:
    longest = _MAX_SIDE * min(image_size)
    low, high = _SIDES[rng.choice(len(_SIDES), p=_SIDE_ODDS)]
    if low > longest:
        low, high = _SIDES[1]
    return rng.uniform(low, min(high, longest))


def _random_shape(
    rng: Generator, side: float, image_size: tuple[int, int]
) -> tuple[Shape, np.ndarray]:
    """Return a shape whose box has this longer side, and how much of each pixel it covers."""
    label = int(rng.integers(len(CLASSES)))
    corners, inner = _OUTLINES[CLASSES[label]]
    # The first corner points up; a square stands on a side.
    first = -np.pi / 2 + (np.pi / 4 if corners == 4 else 0)
    angle = first + rng.uniform(-_MAX_TURN, _MAX_TURN)
    turns = angle + 2 * np.pi * np.arange(corners) / corners
    radii = np.where(np.arange(corners) % 2, inner, 1)
    polygon = radii[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    polygon *= side / np.ptp(polygon, axis=0).max()
    # A pixel of margin: VOC's xmax, as mmdet reads it, is one beyond the last pixel (_write_voc).
    room = np.array(image_size) - 2 - np.ptp(polygon, axis=0)
    polygon += 1 + rng.uniform(0, 1, 2) * room - polygon.min(axis=0)
    polygon = polygon.round(2)

    alpha = _coverage(polygon, image_size)
    # Less than half a pixel is enough: the tips of a star are thinner than one.
    mask = alpha >= 0.3
    return Shape(label, polygon, mask, mask), alpha


def _coverage(polygon: np.ndarray, image_size: tuple[int, int], scale: int = 4) -> np.ndarray:
    """Return (H, W): the share of each pixel that lies in the polygon."""
    width, height = image_size
    fine = np.zeros((height * scale, width * scale), np.float32)
    points = np.round(polygon * scale - 0.5).astype(np.int32)
    cv2.fillPoly(fine, [points], 1.0)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)


def _contrasting_colour(
    rng: Generator, canvas: np.ndarray, mask: np.ndarray, tries: int = 20
) -> np.ndarray | None:
    """Return a random colour that stands out from nearly all that surrounds the mask."""
    around = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool) & ~mask
    surroundings = _lab(canvas[around])
    for colour in rng.uniform(0, 255, (tries, 3)):
        distances = np.linalg.norm(surroundings - _lab(colour[None]), axis=1)
        if np.percentile(distances, 10) >= MIN_CONTRAST:
            return colour
    return None


def _lab(colours: np.ndarray) -> np.ndarray:
    """Return (N, 3) in CIE Lab for (N, 3) in BGR."""
    scaled = np.clip(colours, 0, 255).astype(np.float32)[None] / 255
    return cv2.cvtColor(scaled, cv2.COLOR_BGR2Lab)[0]


def _shaded(rng: Generator, colour: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return a canvas of the colour, lit from one side and with some grain."""
    light = _waves(rng, width, height, cycles=(0.3, 1), amplitude=(0, 18))
    return np.clip(colour + light + rng.normal(0, rng.uniform(0, 5), light.shape), 0, 255)


def _to_bytes(canvas: np.ndarray) -> np.ndarray:
    return np.clip(canvas.round(), 0, 255).astype(np.uint8)
