"""The moving-shapes world: what its videos show, how they are drawn and how captions name them.

Holds the attributes, the renderer and the caption templates that the bundled model is trained
on and judged by. Knows nothing of networks or files.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 215, 50),
    "white": (245, 245, 245),
    "purple": (150, 50, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (8, 8, 8), "gray": (120, 120, 120)}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {
    "moving right": (1, 0),
    "moving left": (-1, 0),
    "moving up": (0, -1),
    "moving down": (0, 1),
}
MOTIONS: tuple[str, ...] = (*DIRECTIONS, "growing", "shrinking")

# Half-widths that give the three shapes about the same area as a circle of radius 1.
SQUARE_HALF_SIDE = 0.9
TRIANGLE_CIRCUMRADIUS = 1.45


@dataclass(frozen=True, slots=True)
class Scene:
    """What one video shows; every field is a word of its prompt."""

    color: str
    shape: str
    motion: str
    background: str

    @property
    def prompt(self) -> str:
        """The canonical sentence for this scene."""
        return f"a {self.color} {self.shape} {self.motion} on a {self.background} background"


def all_scenes() -> list[Scene]:
    """Every combination of the attributes: 6 colours x 3 shapes x 6 motions x 2 backgrounds."""
    return [Scene(*words) for words in itertools.product(COLORS, SHAPES, MOTIONS, BACKGROUNDS)]


@dataclass(frozen=True, slots=True)
class Track:
    """Where the object is in each frame, in units of the picture's shorter side.

    Attributes:
        x: Centre, rightwards from the left edge, float32 [F].
        y: Centre, downwards from the top edge, float32 [F].
        radius: Radius of the circle of about equal area, float32 [F].
    """

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.float32]
    radius: npt.NDArray[np.float32]


def sample_track(motion: str, frames: int, rng: np.random.Generator) -> Track:
    """Draw a smooth track for a motion, entirely inside a unit square.

    Args:
        motion: One of `MOTIONS`.
        frames: Number of frames.
        rng: Source of randomness; equal states give equal tracks.
    """
    time = np.linspace(-0.5, 0.5, frames, dtype=np.float32)
    if motion in DIRECTIONS:
        dx, dy = DIRECTIONS[motion]
        travel, slack, across = rng.uniform(0.36, 0.42), rng.uniform(-0.02, 0.02), rng.uniform(-0.1, 0.1)
        along = 0.5 + slack + travel * time
        fixed = np.full_like(time, 0.5 + across)
        radius = np.full_like(time, rng.uniform(0.19, 0.21))
        x = (along if dx > 0 else 1 - along) if dx else fixed
        y = (along if dy > 0 else 1 - along) if dy else fixed
        return Track(x.astype(np.float32), y.astype(np.float32), radius)
    small, large = rng.uniform(0.12, 0.14), rng.uniform(0.25, 0.27)
    radius = small + (large - small) * (time + 0.5)
    if motion == "shrinking":
        radius = radius[::-1].copy()
    x, y = (np.full_like(time, 0.5 + rng.uniform(-0.1, 0.1)) for _ in range(2))
    return Track(x, y, radius.astype(np.float32))


def coverage(shape: str, track: Track, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """How much of each pixel the object covers, anti-aliased over one pixel.

    Args:
        shape: One of `SHAPES`.
        track: The object's centre and radius per frame.
        size: (width, height) in pixels.

    Returns:
        float32 [F, H, W] in 0..1.
    """
    width, height = size
    unit = min(width, height)
    x = (np.arange(width, dtype=np.float32) + 0.5)[None, None, :] - track.x[:, None, None] * unit
    y = (np.arange(height, dtype=np.float32) + 0.5)[None, :, None] - track.y[:, None, None] * unit
    radius = track.radius[:, None, None] * unit
    if shape == "circle":
        distance = np.sqrt(x * x + y * y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - SQUARE_HALF_SIDE * radius
    elif shape == "triangle":
        circumradius = TRIANGLE_CIRCUMRADIUS * radius
        y = y - circumradius / 4  # the bounding box, not the centroid, sits on the track
        sides = np.maximum(np.abs(x) * (3**0.5 / 2) - y / 2, y)
        distance = sides - circumradius / 2
    else:
        raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")
    covered: npt.NDArray[np.float32] = np.clip(0.5 - distance, 0, 1).astype(np.float32)
    return covered


def draw(scene: Scene, track: Track, size: tuple[int, int] = (64, 64)) -> npt.NDArray[np.uint8]:
    """Render a scene.

    Args:
        scene: What to draw.
        track: Where the object is in each frame.
        size: (width, height) in pixels.

    Returns:
        uint8 RGB frames [F, H, W, 3].
    """
    alpha = coverage(scene.shape, track, size)[..., None]
    color = np.asarray(COLORS[scene.color], np.float32)
    background = np.asarray(BACKGROUNDS[scene.background], np.float32)
    return np.round(background + alpha * (color - background)).astype(np.uint8)


_VERBS: dict[str, tuple[str, ...]] = {
    "moving right": ("moving right", "moves right", "moving to the right", "going right", "sliding right"),
    "moving left": ("moving left", "moves left", "moving to the left", "going left", "sliding left"),
    "moving up": ("moving up", "moves up", "moving upwards", "going up", "rising"),
    "moving down": ("moving down", "moves down", "moving downwards", "going down", "falling"),
    "growing": ("growing", "grows", "getting bigger", "becoming larger", "expanding"),
    "shrinking": ("shrinking", "shrinks", "getting smaller", "becoming smaller", "contracting"),
}
_TEMPLATES: tuple[str, ...] = (
    "a {color} {shape} {verb} on a {background} background",
    "{color} {shape}, {verb}, {background} backdrop",
    "{color} {shape} {verb}, {background} background",
    "a {color} {shape} is {verb} on {background}",
    "on a {background} background, a {color} {shape} {verb}",
    "a {background} background and a {color} {shape} {verb}",
    "video of a {color} {shape} {verb} in front of a {background} backdrop",
    "the {color} {shape} {verb} against a {background} background",
)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence for a scene: half the time the canonical prompt, else a paraphrase."""
    if rng.random() < 0.5:
        return scene.prompt
    template = _TEMPLATES[rng.integers(len(_TEMPLATES))]
    verbs = _VERBS[scene.motion]
    return template.format(
        color=scene.color,
        shape=scene.shape,
        verb=verbs[rng.integers(len(verbs))],
        background=scene.background,
    )


def all_captions(scene: Scene) -> list[str]:
    """Every sentence `caption` can give for a scene, the canonical prompt first."""
    sentences = {scene.prompt: None}
    for template, verb in itertools.product(_TEMPLATES, _VERBS[scene.motion]):
        words = {"color": scene.color, "shape": scene.shape, "background": scene.background}
        sentences[template.format(verb=verb, **words)] = None
    return list(sentences)
