"""The metrics of a quality report, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reelrt.calibration.fidelity import (
    PSNR_CAP,
    median_interval,
    paired_difference,
    psnr,
    relative_errors,
    roughness,
    spread,
    ssim,
)


def picture(value: int, frames: int = 3) -> np.ndarray:
    return np.full((frames, 16, 16, 3), value, np.uint8)


def noisy(seed: int = 0, frames: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 24, 20, 3), np.uint8)


def test_psnr_is_ten_times_the_logarithm_of_peak_over_error():
    assert psnr(picture(100), picture(110)) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(picture(0), picture(255)) == pytest.approx(0)


def test_psnr_does_not_wrap_around_and_has_no_direction():
    assert psnr(picture(0), picture(255)) == psnr(picture(255), picture(0))


def test_psnr_takes_the_error_of_the_whole_video_not_the_mean_of_its_frames():
    other = picture(100, 4)
    other[0] = 120  # mean squared error 400 in one frame of four
    assert psnr(picture(100, 4), other) == pytest.approx(10 * math.log10(255**2 / 100))


def test_equal_videos_have_a_finite_psnr():
    assert psnr(noisy(), noisy()) == PSNR_CAP
    large = np.zeros((2, 512, 512, 3), np.uint8)
    one_off = large.copy()
    one_off[0, 0, 0, 0] = 1
    assert psnr(large, one_off) == PSNR_CAP


def test_ssim_of_flat_pictures_is_its_luminance_term():
    """Without variance, SSIM is (2ab + C1) / (a² + b² + C1) with C1 = (0.01 · 255)²."""
    a, b, c1 = 100, 150, (0.01 * 255) ** 2
    wanted = (2 * a * b + c1) / (a**2 + b**2 + c1)
    np.testing.assert_allclose(ssim(picture(a), picture(b)), wanted, rtol=1e-6)


def test_ssim_against_its_formula_at_one_window():
    """An 11 x 11 picture has exactly one whole window; its Gaussian sums are written out here."""
    one, other = noisy(1, 1)[:, :11, :11], noisy(2, 1)[:, :11, :11]
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(weights, weights)
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    channels = []
    for channel in range(3):
        x, y = (each[0, ..., channel].astype(float) for each in (one, other))
        mean_x, mean_y = (window * x).sum(), (window * y).sum()
        var_x, var_y = (window * x**2).sum() - mean_x**2, (window * y**2).sum() - mean_y**2
        both = (window * x * y).sum() - mean_x * mean_y
        top = (2 * mean_x * mean_y + c1) * (2 * both + c2)
        channels.append(top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))
    assert ssim(one, other)[0] == pytest.approx(np.mean(channels), rel=1e-4)


def test_ssim_is_one_for_equal_frames_only():
    other = noisy()
    other[1] = 255 - other[1]
    values = ssim(noisy(), other)
    assert values.shape == (3,)
    assert values[0] == values[2] == 1
    assert values[1] < 0.5


def test_roughness_is_the_distance_from_the_mean_of_the_neighbours():
    video = picture(100, 4)
    assert roughness(video) == 0
    video[1] = 130  # off by 30 from its neighbours' mean; pulls the next frame's mean up by 15
    assert roughness(video) == pytest.approx((30 + 15) / 2)


def test_an_even_fade_is_not_rough():
    fade = np.stack([np.full((16, 16, 3), 20 * index, np.uint8) for index in range(6)])
    assert roughness(fade) == 0


def test_two_frames_have_no_roughness():
    assert roughness(picture(3, 2)) is None


def test_relative_errors_are_norms_of_each_step():
    one = [np.array([[[[3.0, 4.0]]]], np.float32), np.array([[[[0.0, 2.0]]]], np.float32)]
    other = [np.array([[[[3.0, 4.5]]]], np.float32), np.array([[[[2.0, 2.0]]]], np.float32)]
    assert relative_errors(one, other) == pytest.approx([0.1, 1.0])
    assert relative_errors(one, one) == [0, 0]


def test_the_tail_of_a_spread_is_on_its_bad_side():
    values = [float(value) for value in range(101)]
    assert spread(values, high_is_good=True) == {"mean": 50, "percentile_5": 5, "worst": 0}
    assert spread(values, high_is_good=False) == {"mean": 50, "percentile_95": 95, "worst": 100}


def test_a_paired_difference_and_its_interval():
    """Agresti and Min's Wald + 2: b = 4 lost, c = 1 won of 100; z = 1.96."""
    reference = [True] * 90 + [False] * 10
    candidate = [False] * 4 + [True] * 86 + [True] + [False] * 9
    found = paired_difference(reference, candidate)
    assert (found["reference_percent"], found["candidate_percent"]) == (90, 87)
    assert (found["lost"], found["won"], found["difference_points"]) == (4, 1, -3)
    middle = -3 / 102
    half = 1.959964 * math.sqrt((4 + 1 + 1) - 9 / 102) / 102
    assert found["interval_points"] == pytest.approx([100 * (middle - half), 100 * (middle + half)])


def test_only_what_differs_widens_the_interval():
    right = [True, False] * 100
    low, high = paired_difference(right, right)["interval_points"]
    assert -1 < low < 0 < high < 1


def test_an_interval_stays_within_what_is_possible():
    low, high = paired_difference([True], [False])["interval_points"]
    assert low >= -100
    assert high <= 100


def test_the_interval_of_a_median_is_between_order_statistics():
    """For 10 values the ranks are 2 and 9: P(X <= 1) = 11 / 1024 = 1.1 %, P(X <= 2) = 5.5 %."""
    assert median_interval([float(value) for value in range(10, 0, -1)]) == (2, 9)
    assert median_interval([1.0] * 5 + [2.0]) == (1, 2)
    assert median_interval([1.0] * 5) is None
