"""A seed is the same noise everywhere, and the noise is normal."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from reelrt.errors import InputError
from reelrt.runtime.noise import draw_seed, starting_noise

SHAPE = (4, 16, 8, 8)


def test_known_values():
    """From the published definition of Philox 4x64-10, computed here with Python's own integers."""

    def philox(counter, key):
        lanes, keys = [counter, 0, 0, 0], [key, 0]
        for _ in range(10):
            one = 0xD2E7470EE14C6C93 * lanes[0]
            two = 0xCA5A826395121157 * lanes[2]
            low, high = (lambda x: x & (2**64 - 1)), (lambda x: x >> 64)
            lanes = [high(two) ^ lanes[1] ^ keys[0], low(two), high(one) ^ lanes[3] ^ keys[1], low(one)]
            keys = [(keys[0] + 0x9E3779B97F4A7C15) % 2**64, (keys[1] + 0xBB67AE8584CAA73B) % 2**64]
        return lanes

    raw = [word >> 11 for counter in (1, 2) for word in philox(counter, 7)]
    expected = []
    for u, v in zip(raw[0::2], raw[1::2], strict=True):
        radius = math.sqrt(-2 * math.log1p(-u / 2**53))
        expected += [radius * math.cos(2 * math.pi * v / 2**53), radius * math.sin(2 * math.pi * v / 2**53)]
    assert np.allclose(starting_noise(7, (8,)), expected, rtol=1e-6, atol=0)


def test_known_bytes():
    digest = hashlib.sha256(np.round(starting_noise(7, SHAPE), 4).tobytes()).hexdigest()
    assert digest == "44d022f7a12bf7022226e0767c401a81e240a6792cd741f797139e324b94572d"


def test_unit_normal():
    noise = starting_noise(3, (100_000,)).astype(np.float64)
    assert abs(noise.mean()) < 0.015
    assert abs(noise.std() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.1
    assert abs((noise**3).mean()) < 0.05
    inside = np.mean(np.abs(noise) < 1)
    assert abs(inside - math.erf(1 / math.sqrt(2))) < 0.01


def test_seeds_and_shapes():
    noise = starting_noise(7, SHAPE)
    assert noise.dtype == np.float32 and noise.shape == SHAPE and noise.flags.c_contiguous
    assert np.array_equal(noise, starting_noise(np.int64(7), SHAPE))
    neighbour = starting_noise(8, SHAPE)
    assert abs(np.corrcoef(noise.ravel(), neighbour.ravel())[0, 1]) < 0.05
    assert starting_noise(2**63 - 1, (3, 1)).shape == (3, 1)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "7", True, None])
def test_impossible_seeds(seed):
    with pytest.raises(InputError, match="seed"):
        starting_noise(seed, SHAPE)


def test_drawn_seeds_differ():
    seeds = {draw_seed() for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)
