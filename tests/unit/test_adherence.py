"""What an evaluation counts and shows, on drawn videos whose faults are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reelrt.calibration.adherence import Adherence, Outcome, Score
from reelrt.calibration.judge import judge
from reelrt.calibration.shapes import Scene, draw, sample_track
from reelrt.calibration.sheet import FRAME_SIDE, RED, SHOWN, Row, contact_sheet, small_frames
from reelrt.errors import InputError
from reelrt.evaluate import _minimum

ASKED = Scene("red", "circle", "moving right", "black")


def video(scene: Scene, seed: int = 0) -> np.ndarray:
    return draw(scene, sample_track(scene.motion, 16, np.random.default_rng(seed)))


@pytest.fixture(scope="module")
def run() -> Adherence:
    """Four videos: as asked, of another shape, of another motion, and with two frames swapped."""
    swapped = video(ASKED)
    swapped[[3, 9]] = swapped[[9, 3]]
    shown = [
        video(ASKED),
        video(Scene("red", "square", "moving right", "black")),
        video(Scene("red", "circle", "growing", "black")),
        swapped,
    ]
    outcomes = [
        Outcome(ASKED, ASKED.prompt, seed, judge(frames)) for seed, frames in enumerate(shown, start=7)
    ]
    return Adherence({"guidance": 2.0, "steps": 25}, outcomes)


def test_each_fault_counts_once_and_only_where_it_is(run: Adherence) -> None:
    assert [outcome.failed for outcome in run.outcomes] == [[], ["shape"], ["motion"], ["smooth"]]
    right = {name: score.right for name, score in run.scores.items()}
    assert right == {"color": 4, "background": 4, "motion": 3, "shape": 3, "smooth": 3, "everything": 1}
    assert {score.of for score in run.scores.values()} == {4}


def test_what_was_seen_instead_is_told(run: Adherence) -> None:
    assert run.confusion("shape") == {"circle": {"circle": 3, "square": 1}}
    assert run.confusion("motion") == {"moving right": {"growing": 1, "moving right": 3}}
    nothing = Outcome(ASKED, "x", 0, judge(np.zeros((16, 64, 64, 3), np.uint8)))
    assert Adherence({}, [nothing]).confusion("shape") == {"circle": {"none": 1}}


def test_the_document_holds_every_video_and_is_plain_json(run: Adherence) -> None:
    told = json.loads(json.dumps(run.document()))
    assert told["settings"] == {"guidance": 2.0, "steps": 25}
    assert told["scores"]["shape"]["percent"] == 75
    assert told["by_value"]["smooth"]["moving right"]["right"] == 3
    assert [each["seed"] for each in told["videos"]] == [7, 8, 9, 10]
    assert told["videos"][1]["seen"]["shape"] == "square"
    assert told["videos"][1]["asked"]["shape"] == "circle"
    assert told["videos"][1]["failed"] == ["shape"]
    assert "videos" not in run.document(videos=False)


def test_what_is_below_a_minimum(run: Adherence) -> None:
    assert run.below({"color": 100, "motion": 75, "shape": 75.1}) == {"shape": (75, 75.1)}
    assert run.below({}) == {}


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    # For 0 of n the upper end is z² / (n + z²); right and wrong mirror each other.
    [(190, 200, 91.04, 97.26), (0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (1, 2, 9.45, 90.55)],
)
def test_the_interval_is_wilsons(right: int, of: int, low: float, high: float) -> None:
    assert Score(right, of).interval == pytest.approx((low, high), abs=0.01)


def test_a_minimum_reads_as_written() -> None:
    assert _minimum(None) == {}
    assert _minimum("color=90, background=98,everything=7.5") == {
        "color": 90,
        "background": 98,
        "everything": 7.5,
    }
    for text in (
        "",
        "color",
        "colour=90",
        "color=",
        "color=x",
        "color=101",
        "color=-1",
        "color=nan",
        "a=b=c",
    ):
        with pytest.raises(InputError, match="NAME=PERCENT"):
            _minimum(text)


def test_a_sheet_shows_every_video_and_frames_the_wrong_ones_red() -> None:
    frames = small_frames(video(ASKED))
    assert frames.shape == (SHOWN, FRAME_SIDE, FRAME_SIDE, 3)
    assert np.array_equal(frames[0], video(ASKED)[0])
    assert np.array_equal(frames[-1], video(ASKED)[-1])
    rows = [
        Row(frames, ASKED.prompt),
        Row(frames, "a very long prompt, " * 9, ["shape", "motion"]),
        Row(frames, ""),
    ]
    sheet = np.asarray(contact_sheet(rows))
    red = (sheet == RED).all(-1)
    height, width = sheet.shape[0] // 2, sheet.shape[1] // 2
    right, wrong, below = red[:height, :width], red[:height, width:], red[height:]
    assert not right.any()
    assert not below.any()
    assert wrong.sum() > 2 * SHOWN * FRAME_SIDE
    found = [
        (y, x)
        for y in range(sheet.shape[0] - FRAME_SIDE)
        for x in range(20)
        if np.array_equal(sheet[y : y + FRAME_SIDE, x : x + FRAME_SIDE], frames[0])
    ]
    assert len(found) == 2  # the first column's two videos


def test_a_sheet_of_large_pictures_is_small() -> None:
    frames = small_frames(np.zeros((5, 240, 416, 3), np.uint8))
    assert frames.shape == (5, 36, 64, 3)
    assert contact_sheet([Row(frames, "x")]).size[0] < 400
