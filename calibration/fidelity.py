"""How far a candidate is from a reference: frames, latents, smoothness, shares of right videos.

Plain functions of arrays. Knows no bundle, no prompt and no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reelrt.calibration.adherence import QUANTILE

Frames = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

PEAK = 255
PSNR_CAP = 100.0
"""Decibels that stand for equal frames, and for any closer than that."""
LEAST_SIDE = 11
"""Width of SSIM's window, in pixels: the least width and height of a frame."""


def psnr(reference: Frames, candidate: Frames) -> float:
    """Peak signal-to-noise ratio of a whole video, in decibels; 100 for equal ones.

    10 log10(255² / mean squared error), the mean over every frame, pixel and channel; at most 100,
    which one value in 154,000 that is off by one level comes to.

    Args:
        reference: RGB, uint8 [F, H, W, 3].
        candidate: The same shape.
    """
    error = float(np.mean((reference.astype(np.float64) - candidate) ** 2))
    return PSNR_CAP if error == 0 else min(10 * math.log10(PEAK**2 / error), PSNR_CAP)


def ssim(reference: Frames, candidate: Frames) -> npt.NDArray[np.float64]:
    """Structural similarity of each frame, float64 [F]; 1 for equal ones.

    As Wang et al. 2004 (IEEE Transactions on Image Processing 13, 600-612) have it: a Gaussian window
    of 11 pixels with a standard deviation of 1.5, K1 = 0.01, K2 = 0.03, a range of 255, population
    covariances; the mean over the pixels whose window is whole, and over red, green and blue.

    Args:
        reference: RGB, uint8 [F, H, W, 3], at least 11 pixels each way.
        candidate: The same shape.
    """
    from skimage.metrics import structural_similarity

    return np.array(
        [
            structural_similarity(
                one,
                other,
                data_range=PEAK,
                channel_axis=-1,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            for one, other in zip(reference, candidate, strict=True)
        ]
    )


def roughness(frames: Frames) -> float | None:
    """How far frames are from the mean of their two neighbours, in grey levels; None below 3 frames.

    The mean absolute difference over every inner frame, pixel and channel: 0 for a still picture or
    an even fade, more for faster motion, flicker and jumps. It is VBench's motion smoothness (Huang et
    al. 2024, CVPR, 21807-21818) with the mean of two frames in place of its interpolating network, so
    it says something beside the reference's own value only.

    Args:
        frames: RGB, uint8 [F, H, W, 3].
    """
    if len(frames) < 3:
        return None
    levels = frames.astype(np.float32)
    return float(np.abs(levels[1:-1] - (levels[:-2] + levels[2:]) / 2).mean(dtype=np.float64))


def relative_errors(reference: Sequence[Float32], candidate: Sequence[Float32]) -> list[float]:
    """||candidate - reference|| / ||reference|| of the latents after each step, Euclidean norms.

    Args:
        reference: Latents after each step, float32 [C, F, h, w] each.
        candidate: As many, of the same shape.
    """
    wide = ((one.astype(np.float64), other) for one, other in zip(reference, candidate, strict=True))
    return [float(np.linalg.norm(other - one) / np.linalg.norm(one)) for one, other in wide]


def spread(values: Sequence[float], *, high_is_good: bool) -> dict[str, float]:
    """Mean, the worst value, and the percentile that all but the worst 5 % reach.

    Args:
        values: One per prompt, at least one.
        high_is_good: Whether the worst is the least (SSIM) or the largest (an error).
    """
    tail = 5 if high_is_good else 95
    return {
        "mean": float(np.mean(values)),
        f"percentile_{tail}": float(np.percentile(values, tail)),
        "worst": float(min(values) if high_is_good else max(values)),
    }


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a median that holds for any distribution; None for fewer than 6 values.

    Its ends are order statistics whose ranks the binomial distribution gives (David and Nagaraja
    2003, Order Statistics, section 7.1).
    """
    count, rank, tail = len(values), 0, 0
    while tail + math.comb(count, rank) <= 0.025 * 2**count:
        tail += math.comb(count, rank)
        rank += 1
    ordered = sorted(values)
    return (ordered[rank - 1], ordered[count - rank]) if rank else None


def paired_difference(reference: Sequence[bool], candidate: Sequence[bool]) -> dict[str, Any]:
    """How many more of the same prompts a candidate gets right, in points with a 95 % interval.

    The interval is Wald's with half a video added to each cell of the two-by-two table (Agresti and
    Min 2005, Statistics in Medicine 24, 729-740); only prompts that one of the two gets right and the
    other does not widen it.

    Args:
        reference: Whether each of its videos is right.
        candidate: The same for the candidate, in the same order.
    """
    count = len(reference)
    lost = sum(one and not other for one, other in zip(reference, candidate, strict=True))
    won = sum(other and not one for one, other in zip(reference, candidate, strict=True))
    middle = (won - lost) / (count + 2)
    half = QUANTILE * math.sqrt(won + lost + 1 - (won - lost) ** 2 / (count + 2)) / (count + 2)
    low, high = (100 * min(max(middle + sign * half, -1.0), 1.0) for sign in (-1, 1))
    return {
        "reference_percent": 100 * sum(reference) / count,
        "candidate_percent": 100 * sum(candidate) / count,
        "difference_points": 100 * (won - lost) / count,
        "interval_points": [low, high],
        "lost": lost,
        "won": won,
    }
