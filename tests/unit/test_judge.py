"""The judge against drawn videos, whose content is known, as drawn and as a model would blur them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from reelrt.calibration.judge import ATTRIBUTES, Verdict, judge
from reelrt.calibration.shapes import BACKGROUNDS, Scene, Track, all_scenes, draw, sample_track

Frames = npt.NDArray[np.uint8]
RED = Scene("red", "square", "moving right", "black")


def video(scene: Scene, rng: np.random.Generator, frames: int = 16) -> Frames:
    return draw(scene, sample_track(scene.motion, frames, rng))


def worn(frames: Frames, rng: np.random.Generator) -> Frames:
    """Blurred by 1.5 pixels, too bright or too dark, and noisy, as generated videos are or worse."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets**2) / (2 * 1.5**2)).astype(np.float32)
    weights /= weights.sum()
    out = np.pad(frames.astype(np.float32), ((0, 0), (5, 5), (5, 5), (0, 0)), "edge")
    height, width = frames.shape[1:3]
    out = sum(weight * out[:, k : k + height] for k, weight in enumerate(weights))
    out = sum(weight * out[:, :, k : k + width] for k, weight in enumerate(weights))
    noise = 8 * rng.standard_normal(frames.shape, np.float32)
    out = out * rng.uniform(0.88, 1.12) + rng.uniform(-12, 12) + noise
    pixels: Frames = np.clip(np.round(out), 0, 255).astype(np.uint8)
    return pixels


def as_drawn(frames: Frames, _rng: np.random.Generator) -> Frames:
    return frames


CONDITIONS = pytest.mark.parametrize("condition", [as_drawn, worn], ids=lambda each: each.__name__)


@CONDITIONS
@pytest.mark.parametrize("frames", [16, 8, 4])
def test_right_in_99_of_100_for_each_attribute(condition, frames: int) -> None:
    rights = []
    for index, scene in enumerate(all_scenes()):
        rng = np.random.default_rng([0, index])
        rights.append(judge(condition(video(scene, rng, frames), rng)).right(scene))
    for name in ATTRIBUTES:
        assert np.mean([right[name] for right in rights]) >= 0.99, name


@pytest.mark.parametrize("size", [(48, 32), (64, 96), (320, 256)])
def test_other_sizes_are_judged_as_well(size: tuple[int, int]) -> None:
    for index, scene in enumerate(all_scenes()[::11]):
        track = sample_track(scene.motion, 16, np.random.default_rng(index))
        assert all(judge(draw(scene, track, size)).right(scene).values()), scene


def test_a_judgement_is_the_same_every_time_and_leaves_the_frames_alone() -> None:
    rng = np.random.default_rng(0)
    frames = worn(video(RED, rng), rng)
    before = frames.copy()
    assert judge(frames) == judge(frames)
    assert np.array_equal(frames, before)


@CONDITIONS
@pytest.mark.parametrize("frames", [16, 4])
def test_a_jump_is_seen(condition, frames: int) -> None:
    """Two frames swapped, one of another video, one without the object: each is not smooth."""
    missed, scenes = [], all_scenes()
    for index, scene in enumerate(scenes[::2]):
        rng = np.random.default_rng([7, index])
        whole = condition(video(scene, rng, frames), rng)
        at, other_at = rng.choice(frames, 2, replace=False)
        swapped = whole.copy()
        swapped[[at, other_at]] = whole[[other_at, at]]
        # One that differs in colour and motion: a frame of a like video may well fit in.
        other = next(
            each
            for each in (scenes[i] for i in rng.permutation(len(scenes)))
            if each.color != scene.color and each.motion != scene.motion
        )
        mixed = whole.copy()
        mixed[at] = condition(video(other, rng, frames), rng)[at]
        empty = whole.copy()
        empty[at] = np.median(whole[at, 0], axis=0)
        missed += [
            (kind, scene)
            for kind, each in (("swapped", swapped), ("mixed", mixed), ("empty", empty))
            if judge(each).smooth
        ]
    assert missed == []


def test_neighbouring_frames_swapped_are_a_jump() -> None:
    for scene in all_scenes()[::12]:
        frames = video(scene, np.random.default_rng(3))
        for at in range(15):
            swapped = frames.copy()
            swapped[[at, at + 1]] = frames[[at + 1, at]]
            assert not judge(swapped).smooth, (scene, at)


def test_a_jump_does_not_hide_what_is_shown() -> None:
    frames = video(RED, np.random.default_rng(1))
    frames[5] = BACKGROUNDS["black"]
    assert judge(frames) == Verdict("red", "black", "moving right", "square", smooth=False)


def test_a_frame_where_the_object_is_in_two_places_is_no_smooth_motion() -> None:
    """The mean of its neighbours far away has its centroid just where it should be."""
    frames = video(RED, np.random.default_rng(2))
    frames[8] = np.maximum(frames[0], frames[15])
    assert judge(frames).smooth is False


def test_a_colour_that_changes_slowly_is_no_jump_and_one_that_changes_at_once_is() -> None:
    track = sample_track("moving right", 16, np.random.default_rng(0))
    blue, purple = (
        draw(Scene(color, "circle", "moving right", "black"), track) for color in ("blue", "purple")
    )
    share = np.linspace(0, 1, 16)[:, None, None, None]
    assert judge(np.round(blue * (1 - share) + purple * share).astype(np.uint8)).smooth
    assert not judge(np.concatenate([blue[:8], purple[8:]])).smooth


def test_an_object_that_stands_still_has_no_motion_and_no_jump() -> None:
    still = np.full(16, 0.5, np.float32)
    found = judge(draw(RED, Track(still, still, still * 0.4)))
    assert found == Verdict("red", "black", None, "square", smooth=True)
    assert found.right(RED) == {
        "color": True,
        "background": True,
        "motion": False,
        "shape": True,
        "smooth": True,
    }


def test_a_diagonal_motion_is_none_of_the_six() -> None:
    across = np.linspace(0.3, 0.7, 16, dtype=np.float32)
    found = judge(draw(RED, Track(across, across, np.full(16, 0.2, np.float32))))
    assert found.motion is None
    assert found.smooth


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_no_object_is_right_in_nothing_but_the_background(background: str) -> None:
    rng = np.random.default_rng(0)
    empty = np.full((16, 64, 64, 3), BACKGROUNDS[background], np.uint8)
    for frames in (empty, worn(empty, rng)):
        assert judge(frames) == Verdict(None, background, None, None, smooth=False)


def test_noise_shows_nothing() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    found = judge(frames)
    assert (found.motion, found.shape, found.smooth) == (None, None, False)


def test_colours_that_have_no_name_here_get_none() -> None:
    frames = np.full((16, 64, 64, 3), (200, 120, 200), np.uint8)
    frames[:, 24:40, 24:40] = (20, 130, 130)
    found = judge(frames)
    assert (found.color, found.background, found.shape) == (None, None, "square")


def test_a_single_frame_has_everything_but_a_motion() -> None:
    frames = video(RED, np.random.default_rng(4))[:1]
    assert judge(frames) == Verdict("red", "black", None, "square", smooth=True)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((16, 64, 64, 3), np.float32),
        np.zeros((16, 64, 64), np.uint8),
        np.zeros((16, 64, 64, 4), np.uint8),
        np.zeros((0, 64, 64, 3), np.uint8),
    ],
)
def test_what_is_no_video_is_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        judge(frames)
