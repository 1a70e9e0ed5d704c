"""Starting latents from a seed, the same on every platform and numpy version.

The bits are Philox 4x64-10 with the seed as its key, a counter-based generator whose raw stream
numpy fixes for good (its distributions may change). Normal deviates are Box and Muller's: of each
pair of 53-bit uniforms u, v in [0, 1), sqrt(-2 ln(1 - u)) times cos(2 pi v) and sin(2 pi v), in
float64, rounded to float32.
"""

from __future__ import annotations

import math
import os

import numpy as np
import numpy.typing as npt

from reelrt.errors import InputError

MAX_SEED = 2**63 - 1


def draw_seed() -> int:
    """A seed of 32 bits from the operating system."""
    return int.from_bytes(os.urandom(4), "little")


def check_seed(seed: int) -> None:
    """Refuse a seed that is not a whole number from 0 to 2**63 - 1.

    Raises:
        InputError: It is not.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed {seed!r} is not possible: give a whole number from 0 to 2**63 - 1.")


def starting_noise(seed: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Normal deviates of unit variance.

    Args:
        seed: 0 to 2**63 - 1.
        shape: Shape of the result.

    Returns:
        float32 of the given shape, in C order of the stream.
    """
    check_seed(seed)
    count = math.prod(shape)
    raw = np.random.Philox(key=int(seed)).random_raw(count + count % 2)
    uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2 * np.log1p(-uniform[0::2]))
    angle = 2 * np.pi * uniform[1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.ravel()[:count].reshape(shape).astype(np.float32)
