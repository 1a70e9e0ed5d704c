"""`reelrt evaluate adherence` as a user runs it, on the engines of a tiny random model."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from PIL import Image

import reelrt
from reelrt.calibration.adherence import measure
from reelrt.calibration.judge import judge
from reelrt.errors import InputError, RangeError
from reelrt.runtime.pipeline import TextToVideo
from tests.commands import reelrt as run_reelrt
from tests.commands import stop, tree

pytestmark = pytest.mark.timeout(600)  # the first test exports the model
COMMAND = ("evaluate", "adherence")
QUICK = (*COMMAND, "--prompts", 3, "--steps", 2)


@pytest.fixture(scope="module")
def pipe(work: Path) -> TextToVideo:
    return reelrt.load(work / "engines")


def test_a_table_a_json_and_a_sheet(work: Path, tmp_path: Path) -> None:
    made = run_reelrt(*QUICK, work / "engines", "-o", tmp_path / "new" / "out")
    assert made.returncode == 0, made.stderr
    for word in ("color", "background", "motion", "shape", "smooth", "everything", "%", "adherence.json"):
        assert word in made.stdout
    files = sorted(path.name for path in (tmp_path / "new" / "out").iterdir())
    assert files == ["adherence.json", "adherence.png"]
    (run,) = json.loads((tmp_path / "new" / "out" / "adherence.json").read_text(encoding="utf-8"))["runs"]
    manifest = json.loads((work / "engines" / "manifest.json").read_text(encoding="utf-8"))
    assert run["settings"]["model_sha256"] == manifest["pipeline"]["model"]["sha256"]
    assert run["settings"]["steps"] == 2
    assert [video["seed"] for video in run["videos"]] == [0, 1, 2]
    for name in ("color", "background", "motion", "shape", "smooth"):
        failed = sum(name in video["failed"] for video in run["videos"])
        assert run["scores"][name]["right"] == 3 - failed
    with Image.open(tmp_path / "new" / "out" / "adherence.png") as sheet:
        assert sheet.width > 6 * 64


def test_several_guidance_scales_are_measured_on_the_same_prompts(work: Path, tmp_path: Path) -> None:
    words = ("--guidance", 1, "--guidance", 2.5, "--json", "--seed", 4, "--paraphrases", "--solver", "unipc")
    made = run_reelrt(*QUICK, work / "engines", "-o", tmp_path, *words)
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert [run["settings"]["guidance"] for run in told["runs"]] == [1, 2.5]
    names = ["adherence.json", "adherence-1.png", "adherence-2.5.png"]
    assert told["wrote"] == [str(tmp_path / name) for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    first, second = json.loads((tmp_path / "adherence.json").read_text(encoding="utf-8"))["runs"]
    asked = [(video["prompt"], video["seed"]) for video in first["videos"]]
    assert asked == [(video["prompt"], video["seed"]) for video in second["videos"]]
    assert first["settings"]["solver"] == "unipc"
    assert first["settings"]["paraphrases"] is True


def test_below_its_minimum_it_still_writes_and_ends_with_8(work: Path, tmp_path: Path) -> None:
    made = run_reelrt(*QUICK, work / "engines", "-o", tmp_path, "--minimum", "everything=100", "--json")
    assert made.returncode == 8, made.stderr
    assert json.loads(made.stdout)["runs"][0]["scores"]["everything"]["right"] == 0
    assert "everything is right in 0.0 % of the videos" in made.stderr
    assert (tmp_path / "adherence.json").is_file()
    assert run_reelrt(*QUICK, work / "engines", "-o", tmp_path, "--minimum", "motion=0").returncode == 0


def test_verdicts_are_those_of_the_frames_that_generate_gives(pipe: TextToVideo) -> None:
    seen, told = [], []
    found = measure(
        pipe,
        prompts=3,
        steps=2,
        seed=5,
        look=lambda outcome, frames: seen.append((outcome, judge(frames))),
        progress=lambda what, done, total: told.append((done, total)),
    )
    assert [outcome for outcome, _ in seen] == list(found.outcomes)
    assert all(outcome.verdict == verdict for outcome, verdict in seen)
    alone = pipe.generate(found.outcomes[2].prompt, steps=2, seed=7)
    assert judge(alone.frames) == found.outcomes[2].verdict
    assert told == sorted(told)
    assert (told[0], told[-1]) == ((0, 3), (3, 3))


def test_what_the_engines_do_not_have_is_refused(pipe: TextToVideo) -> None:
    with pytest.raises(RangeError, match="steps 101"):
        measure(pipe, prompts=1, steps=101)
    with pytest.raises(InputError, match="seed -1"):
        measure(pipe, prompts=1, seed=-1)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("nowhere",), 4, "there is no folder nowhere"),
        (("nowhere", "--prompts", "0"), 2, "prompts 0"),
        (("nowhere", "--guidance", "nan"), 2, "guidance nan"),
        (("nowhere", "--minimum", "colour=90"), 2, "'colour=90'"),
        (("nowhere", "-o", "file"), 7, "/file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_input_is_one_sentence(
    words: tuple[str, ...], code: int, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    made = run_reelrt(*COMMAND, "-o", "out", *words, folder=tmp_path)
    assert (made.returncode, made.stdout) == (code, "")
    assert sentence in made.stderr
    assert made.stderr.count("\n") == 1
    assert tree(tmp_path) == before


def test_ctrl_c_leaves_what_was_there(work: Path, tmp_path: Path) -> None:
    (tmp_path / "adherence.json").write_text("before", encoding="utf-8")
    before = tree(tmp_path)
    words = (
        *COMMAND,
        work / "engines",
        "-o",
        ".",
        "--prompts",
        12,
        "--steps",
        10,
        "--guidance",
        1,
        "--guidance",
        2,
    )

    def half_done(told: str) -> bool:
        return "guidance 1:" in told

    stopped = stop(*words, folder=tmp_path, when=half_done, number=signal.SIGINT)
    assert stopped.code == 130, stopped.errors
    assert "guidance 2:" not in stopped.errors
    assert "Traceback" not in stopped.errors
    assert tree(tmp_path) == before
