"""The ranges of sizes that a set's engines shall accept: one profile per stage.

`--size` and `--frames` name the largest video and the one the engines are tuned for, because that
is what decides how much memory they take. Everything smaller that the model can make is accepted
too. Knows specs and geometry; knows no backend.
"""

from __future__ import annotations

from reelrt.bundle.spec import DECODER_FRAMES, MAX_TABLE_ROWS, Geometry, Profile, Range, StageSpec
from reelrt.errors import RangeError

LARGEST_SIDE, MOST_FRAMES, MOST_VIDEOS = 32768, 1024, 64
"""Beyond these no device has the memory; a slip of the finger is told at once."""
SMALLEST_CELLS = 2
"""A graph with dynamic axes is exported for sizes from 2 up; torch sets 1 apart."""


def default_batch(memory_gib: float) -> int:
    """Videos at once by default: what is left beside the weights of a small model.

    Args:
        memory_gib: The GPU's memory; 0 when it is not known.
    """
    return 1 if memory_gib < 8 else 2 if memory_gib < 16 else 4


def check_size(geometry: Geometry, size: tuple[int, int] | None, frames: int | None) -> tuple[int, int, int]:
    """The largest width, height (pixels) and frame count, the model's own where none is given.

    Raises:
        RangeError: Not a size or a number of frames that this model can make.
    """
    width, height = size if size is not None else (geometry.width, geometry.height)
    unit, smallest = geometry.size_multiple, _smallest(geometry) * geometry.spatial_scale
    for name, value in (("width", width), ("height", height)):
        if not smallest <= value <= LARGEST_SIDE or value % unit:
            value_in = min(max(value, smallest), LARGEST_SIDE)
            below, above = value_in // unit * unit, -(-value_in // unit) * unit
            near = f"{below} or {above}" if below != above else f"{below}"
            allowed = f"this model takes multiples of {unit} pixels from {smallest} to {LARGEST_SIDE}"
            raise RangeError(name, value, allowed, f"The nearest is {near}.")
    count = geometry.frames if frames is None else frames
    if not SMALLEST_CELLS <= count <= MOST_FRAMES:
        raise RangeError("frames", count, f"this model takes {SMALLEST_CELLS} to {MOST_FRAMES}")
    return width, height, count


def profiles(geometry: Geometry, width: int, height: int, frames: int, batch: int) -> dict[str, Profile]:
    """The profile of every stage.

    Args:
        geometry: The model's fixed sizes.
        width: Largest width in pixels; engines are tuned for it.
        height: Largest height in pixels.
        frames: Largest number of frames.
        batch: Most videos at once; engines are tuned for one.

    Raises:
        RangeError: The batch is less than 1, or absurd.
    """
    if not 1 <= batch <= MOST_VIDEOS:
        raise RangeError("batch", batch, f"engines take 1 to {MOST_VIDEOS}")
    scale, smallest = geometry.spatial_scale, _smallest(geometry)
    height, width = height // scale, width // scale
    picture = {
        "height": Range(smallest, height, height),
        "width": Range(smallest, width, width),
    }
    chunk = min(DECODER_FRAMES, frames)
    return {
        # The runtime encodes a prompt when it comes and decodes a video when it is done.
        "text_encoder": {"batch": Range(1, 1, 2)},
        "step": {
            "batch": Range(1, 1, batch),
            "rows": Range(1, min(50, MAX_TABLE_ROWS), MAX_TABLE_ROWS),
            "frames": Range(SMALLEST_CELLS, frames, frames),
            **picture,
        },
        "vae_decoder": {"batch": Range(1, 1, 1), "frames": Range(1, chunk, chunk), **picture},
    }


def describe_profile(profile: Profile) -> str:
    """A profile in one line: `batch=1:1:4 frames=2:16:16`, minimum, tuned, maximum."""
    return " ".join(f"{axis}={r.min}:{r.opt}:{r.max}" for axis, r in profile.items())


def input_shapes(spec: StageSpec, profile: Profile) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Input name to its smallest, tuned and largest shape."""
    sizes = [{axis: getattr(r, which) for axis, r in profile.items()} for which in ("min", "opt", "max")]
    return {name: tuple(tensor.shape(each) for each in sizes) for name, tensor in spec.inputs.items()}


def _smallest(geometry: Geometry) -> int:
    """The smallest height or width in latent cells."""
    cells = geometry.size_multiple // geometry.spatial_scale
    return cells * -(-SMALLEST_CELLS // cells)
