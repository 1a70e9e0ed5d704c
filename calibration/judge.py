"""What a moving-shapes video shows, read from its pixels alone: deterministic, numpy only.

The object is what differs from the background that the border shows; its outline, track and size
follow from that mask. Knows nothing of prompts, engines or how a video was made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reelrt.calibration.shapes import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    SQUARE_HALF_SIDE,
    TRIANGLE_CIRCUMRADIUS,
    Scene,
    Track,
    coverage,
)

Array = npt.NDArray[np.float32]

ATTRIBUTES = ("color", "background", "motion", "shape", "smooth")

# Shorter side, in pixels, that larger videos are averaged down to.
WORKING_SIDE = 64
# Part of the picture on each side that counts as border.
BORDER = 1 / 32
# Distances of RGB values in 0..255. The closest two colours are 110 apart, the backgrounds 194;
# a jump is nearly as much from one frame to the next, a slow change of colour is none.
COLOR_REACH = 80.0
BACKGROUND_REACH = 80.0
CONTRAST = 45.0
FLICKER = 70.0
# Parts of the picture's area: the brightest core that gives the contrast, and the least object.
CORE_AREA = 0.02
LEAST_AREA = 0.01
# Overlap (intersection over union) with the best fitting shape: over all frames, and in each one.
OVERLAP = 0.7
FRAME_OVERLAP = 0.5
# Lengths are parts of the shorter side. A drawn object travels 0.39 or grows by 0.13 in radius.
TRAVEL, GROWTH = 0.39, 0.13
LEAST_MOTION, SECOND_MOTION = 0.35, 0.6
# Largest change of speed from one frame to the next: in steps of the motion (two neighbours that
# are swapped make 3), and at least. An object that only moves may breathe a little.
JUMP_STEPS = 2.4
JUMP_PLACE, JUMP_SIZE, JUMP_BREATH = 0.04, 0.015, 0.03


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a video shows; an attribute is None where the pixels show no value of it.

    Attributes:
        color: Of the object.
        background: Its colour.
        motion: What the object does; None as well for fewer than 3 frames.
        shape: Of the object.
        smooth: Whether the object is there in every frame and moves, grows and keeps its colour
            and outline without a jump.
    """

    color: str | None
    background: str | None
    motion: str | None
    shape: str | None
    smooth: bool

    def right(self, scene: Scene) -> dict[str, bool]:
        """Which of `ATTRIBUTES` are as the scene asks; a smooth motion is always asked for."""
        wanted = {"smooth": True, **{name: getattr(scene, name) for name in ATTRIBUTES[:-1]}}
        return {name: getattr(self, name) == wanted[name] for name in ATTRIBUTES}


def judge(frames: npt.NDArray[np.uint8]) -> Verdict:
    """Say what a video shows.

    Args:
        frames: RGB, uint8 [F, H, W, 3]; frames evenly spread in time, 32 pixels or more each way.

    Raises:
        ValueError: Another shape or dtype.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}; give uint8 [F, H, W, 3]")
    pixels = _smooth(_smaller(frames))
    borders = _borders(pixels)
    border = np.median(borders, axis=0)
    background = _nearest(border, BACKGROUNDS, BACKGROUND_REACH)
    distance = np.linalg.norm(pixels - border, axis=-1)
    contrast = float(np.median(_core(distance)))
    if contrast < CONTRAST:
        return Verdict(None, background, None, None, smooth=False)
    mask = np.clip(2 * distance / contrast - 0.5, 0, 1)  # noise and half of a blurred edge fall off
    areas = mask.mean((1, 2))
    present = areas >= LEAST_AREA
    if present.sum() < min(3, len(frames)):
        return Verdict(None, background, None, None, smooth=False)
    pixels, mask = pixels[present], mask[present]
    colors = _colors(pixels, mask)
    color = _nearest(np.median(colors, axis=0), COLORS, COLOR_REACH)
    x, y, radius = _track(mask)
    shape, overlaps = _shape(mask, x, y, radius)
    time = np.linspace(-0.5, 0.5, len(frames), dtype=np.float32)[present]
    motion = _motion(time, x, y, radius)
    resizes = motion in ("growing", "shrinking")
    steady = bool(
        present.all()
        and _largest_step(borders) < FLICKER
        and _largest_step(colors) < FLICKER
        and overlaps.min() >= FRAME_OVERLAP
        and _is_even(np.stack([x, y], axis=-1), JUMP_PLACE)
        and _is_even(radius[:, None], JUMP_SIZE if resizes else JUMP_BREATH)
    )
    return Verdict(color, background, motion, shape, steady)


def _smaller(frames: npt.NDArray[np.uint8]) -> Array:
    """Frames as float32, large ones averaged over blocks."""
    block = min(frames.shape[1:3]) // WORKING_SIDE
    if block < 2:
        return frames.astype(np.float32)
    count, height, width = frames.shape[0], frames.shape[1] // block, frames.shape[2] // block
    blocks = frames[:, : height * block, : width * block].reshape(count, height, block, width, block, 3)
    means: Array = blocks.mean((2, 4), dtype=np.float32)
    return means


def _smooth(pixels: Array) -> Array:
    """Means over 3 x 3 pixels: less noise, and an area that is exact to a part of a pixel."""
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    means: Array = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9
    return means


def _borders(pixels: Array) -> Array:
    """Median colour of each frame's border, [F, 3]; an object may cover a part of it."""
    width = max(1, round(min(pixels.shape[1:3]) * BORDER))
    sides = (pixels[:, :width], pixels[:, -width:], pixels[:, :, :width], pixels[:, :, -width:])
    ring = np.concatenate([side.reshape(len(pixels), -1, 3) for side in sides], axis=1)
    colors: Array = np.median(ring, axis=1).astype(np.float32)
    return colors


def _core(distance: Array) -> Array:
    """How far the object stands out in each frame, [F]: the median of the most distant pixels."""
    flat = distance.reshape(len(distance), -1)
    count = max(1, round(flat.shape[1] * CORE_AREA))
    core: Array = np.median(np.partition(flat, -count, axis=1)[:, -count:], axis=1)
    return core


def _colors(pixels: Array, mask: Array) -> Array:
    """Mean colour of the object in each frame, [F, 3], without its edge."""
    inside = np.maximum(mask - 0.8, 1e-6)[..., None]
    colors: Array = (pixels * inside).sum((1, 2)) / inside.sum((1, 2))
    return colors


def _track(mask: Array) -> tuple[Array, Array, Array]:
    """Centroid x and y and the radius of the circle of equal area, each [F], in shorter sides."""
    height, width = mask.shape[1:]
    unit, total = min(height, width), mask.sum((1, 2))
    x = mask.sum(1) @ (np.arange(width, dtype=np.float32) + 0.5) / total
    y = mask.sum(2) @ (np.arange(height, dtype=np.float32) + 0.5) / total
    return x / unit, y / unit, np.sqrt(total / np.pi) / unit


def _shape(mask: Array, x: Array, y: Array, radius: Array) -> tuple[str | None, Array]:
    """The shape whose drawing at the same centroid and area overlaps best, and its overlaps [F]."""
    size, area = (mask.shape[2], mask.shape[1]), np.pi * radius**2
    circumradius = np.sqrt(area * 4 / 27**0.5)
    tracks = {
        "circle": Track(x, y, radius),
        "square": Track(x, y, np.sqrt(area) / 2 / SQUARE_HALF_SIDE),
        # A drawn triangle's centroid lies below the middle of its bounding box.
        "triangle": Track(x, y - circumradius / 4, circumradius / TRIANGLE_CIRCUMRADIUS),
    }
    best, score, overlaps = "", -1.0, np.zeros(len(mask), np.float32)
    for shape in SHAPES:
        drawn = coverage(shape, tracks[shape], size)
        both, either = np.minimum(mask, drawn).sum((1, 2)), np.maximum(mask, drawn).sum((1, 2))
        overlap = float(both.sum() / either.sum())
        if overlap > score:
            best, score, overlaps = shape, overlap, both / either
    return best if score >= OVERLAP else None, overlaps


def _motion(time: Array, x: Array, y: Array, radius: Array) -> str | None:
    """What straight lines through the track say, if one change is clearly the largest."""
    if len(time) < 3:
        return None
    slopes = np.polyfit(time, np.stack([x, y, radius], axis=-1), 1)[0]
    changes = slopes / (TRAVEL, TRAVEL, GROWTH)
    order = np.argsort(-np.abs(changes))
    largest, second = np.abs(changes)[order[:2]]
    if largest < LEAST_MOTION or second > SECOND_MOTION * largest:
        return None
    axis, sign = order[0], int(np.sign(changes[order[0]]))
    if axis == 2:
        return "growing" if sign > 0 else "shrinking"
    direction = (sign, 0) if axis == 0 else (0, sign)
    return next(motion for motion, each in DIRECTIONS.items() if each == direction)


def _is_even(values: Array, least: float) -> bool:
    """Whether values [F, D] never change speed by more than some of their steps, or `least`."""
    if len(values) < 3:
        return True
    step = np.linalg.norm(values[-1] - values[0]) / (len(values) - 1)
    return bool(np.linalg.norm(np.diff(values, 2, axis=0), axis=-1).max() <= max(JUMP_STEPS * step, least))


def _largest_step(colors: Array) -> float:
    """Largest distance between the colours of two neighbouring frames."""
    return float(np.linalg.norm(np.diff(colors, axis=0), axis=-1).max(initial=0))


def _nearest(value: Array, names: dict[str, tuple[int, int, int]], reach: float) -> str | None:
    """The name of the nearest colour, if one is within reach."""
    distances = {name: float(np.linalg.norm(value - color)) for name, color in names.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= reach else None
