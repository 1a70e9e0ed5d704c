"""The moving-shapes world: what is drawn is what its words say."""

from __future__ import annotations

import numpy as np
import pytest

from reelrt.calibration.prompts import pick_prompts, pick_scenes
from reelrt.calibration.shapes import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    Scene,
    all_captions,
    all_scenes,
    caption,
    coverage,
    draw,
    sample_track,
)


def test_every_combination_comes_once() -> None:
    scenes = all_scenes()
    assert len(set(scenes)) == len(scenes) == len(COLORS) * len(SHAPES) * len(MOTIONS) * len(BACKGROUNDS)
    assert Scene("red", "circle", "moving right", "black").prompt in {scene.prompt for scene in scenes}


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_track_does_what_its_motion_says_and_stays_in_the_picture(motion: str) -> None:
    for seed in range(50):
        track = sample_track(motion, 16, np.random.default_rng(seed))
        steps = {"x": np.diff(track.x), "y": np.diff(track.y), "radius": np.diff(track.radius)}
        still = {name for name, each in steps.items() if np.abs(each).max() < 1e-6}
        axis, sign = {
            "moving right": ("x", 1),
            "moving left": ("x", -1),
            "moving up": ("y", -1),
            "moving down": ("y", 1),
            "growing": ("radius", 1),
            "shrinking": ("radius", -1),
        }[motion]
        assert still == {"x", "y", "radius"} - {axis}
        assert (steps[axis] * sign > 0.005).all()
        for shape in SHAPES:
            covered = coverage(shape, track, (64, 64))
            edge = np.concatenate([covered[:, 0], covered[:, -1], covered[:, :, 0], covered[:, :, -1]])
            assert edge.max() == 0


def test_shapes_of_one_track_are_alike_in_area_and_unlike_in_outline() -> None:
    track = sample_track("growing", 16, np.random.default_rng(0))
    drawn = {shape: coverage(shape, track, (64, 64)) for shape in SHAPES}
    areas = np.stack([each.sum((1, 2)) for each in drawn.values()])
    assert areas.min() > 0
    assert (areas.max(0) / areas.min(0) < 1.25).all()
    for first, second in (("circle", "square"), ("circle", "triangle"), ("square", "triangle")):
        both = np.minimum(drawn[first], drawn[second]).sum()
        assert both / np.maximum(drawn[first], drawn[second]).sum() < 0.9


def test_a_drawing_has_the_colours_of_its_words() -> None:
    for scene in all_scenes()[::7]:
        track = sample_track(scene.motion, 3, np.random.default_rng(1))
        video = draw(scene, track, (96, 64))
        assert video.dtype == np.uint8
        assert video.shape == (3, 64, 96, 3)
        assert tuple(video[0, 0, 0]) == BACKGROUNDS[scene.background]
        x, y = round(float(track.x[0]) * 64), round(float(track.y[0]) * 64)
        assert tuple(video[0, y, x]) == COLORS[scene.color]


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="'star'"):
        coverage("star", sample_track("growing", 1, np.random.default_rng(0)), (64, 64))


def test_captions_are_those_that_are_listed_and_tell_scenes_apart() -> None:
    rng = np.random.default_rng(0)
    scene = Scene("purple", "square", "shrinking", "gray")
    listed = all_captions(scene)
    assert listed[0] == scene.prompt
    said = [caption(scene, rng) for _ in range(400)]
    assert set(said) <= set(listed)
    assert 120 < said.count(scene.prompt) < 280
    everything = [sentence for each in all_scenes() for sentence in all_captions(each)]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("count", [12, 24, 200, 300])
def test_prompts_ask_for_each_word_about_equally_often(count: int) -> None:
    scenes = pick_scenes(count, 3)
    assert len(scenes) == count
    assert len(set(scenes)) == min(count, len(all_scenes()))
    for name, words in (
        ("color", COLORS),
        ("shape", SHAPES),
        ("motion", MOTIONS),
        ("background", BACKGROUNDS),
    ):
        asked = [getattr(scene, name) for scene in scenes]
        counts = [asked.count(word) for word in words]
        assert max(counts) - min(counts) <= 2


def test_a_seed_gives_the_same_prompts_and_another_gives_others() -> None:
    assert pick_scenes(40, 1) == pick_scenes(40, 1)
    assert pick_scenes(40, 1)[:20] == pick_scenes(20, 1)
    assert pick_scenes(40, 1) != pick_scenes(40, 2)


def test_paraphrases_are_other_sentences_for_the_same_scenes() -> None:
    scenes = pick_scenes(30, 0)
    plain, other = pick_prompts(scenes, 0), pick_prompts(scenes, 0, paraphrases=True)
    assert plain == [scene.prompt for scene in scenes]
    for scene, sentence in zip(scenes, other, strict=True):
        assert sentence != scene.prompt
        assert sentence in all_captions(scene)
