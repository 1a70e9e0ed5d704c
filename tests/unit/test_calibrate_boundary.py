"""`reelrt calibrate` refuses what cannot work before it records anything, and leaves nothing."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from reelrt.calibration.pairs import from_file
from reelrt.calibration.prompt_sets import MOST_CHARACTERS, read_prompts
from reelrt.calibration.recorder import Feed
from reelrt.calibration.sensitivity import sweep
from reelrt.calibration.trajectories import Trajectories, write_prompt
from reelrt.cli import app
from reelrt.errors import InputError, IntegrityError
from tests.commands import tree
from tests.copies import with_precision
from tests.graphs import tiny_bundle

runner = CliRunner()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with an FP32 bundle, an INT8 one, a file of eight prompts and one of a single prompt."""
    tiny_bundle(tmp_path / "bundle")
    with_precision(tiny_bundle(tmp_path / "int8"), {"step": "int8"})
    with_precision(tiny_bundle(tmp_path / "fp16"), {"step": "fp16"})
    (tmp_path / "eight.txt").write_text("\n".join(f"thing {n} of kind {n * n}" for n in range(8)))
    (tmp_path / "one.txt").write_text("a cat\n")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bundle", "-o", "bundle/sub"), "sub lies in the bundle"),
        (("bundle", "-o", "out", "--work", "bundle"), "the folder for trajectories"),
        (("bundle", "-o", "out", "--work", "bundle/w"), "lies in the bundle"),
        (("bundle", "-o", "out", "--work", "out"), "which is written as a whole"),
        (("bundle", "-o", "out", "--work", "out/w"), "which is written as a whole"),
        (("bundle", "-o", "out", "--work", "eight.txt"), "eight.txt is a file"),
        (("int8", "-o", "out"), "step of"),
        (("fp16", "-o", "out"), "calibrating starts from FP32 weights"),
        (("bundle", "-o", "out", "--samples", "1", "--prompts", "one.txt"), "2 samples are too few"),
        (("bundle", "-o", "out", "--keep", "nosuchlayer"), "keep 'nosuchlayer' fits none of the"),
        (("bundle", "-o", "out", "--steps", "5000"), "steps 5000 is not available"),
        (("bundle", "-o", "out", "--steps", "1", "--samples", "3"), "are not possible with 1 step: give 1"),
        (
            ("bundle", "-o", "out", "--frames", "5000"),
            "frames 5000 is not available: a bundle that is run as it is takes 1 to 1024.",
        ),
        (("bundle", "-o", "out", "--seed", str(2**63 - 1)), "too large for 8 prompts"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_recorded(place: Path, words, message, monkeypatch):
    monkeypatch.chdir(place)
    if not {"--keep", "eight.txt"} & set(words):  # what is in the graph and on the disk comes after all else
        looked = "reelrt.calibration.bundles.check_installed"
        monkeypatch.setattr(looked, lambda: pytest.fail("it looked for ModelOpt first"))
    before = tree(place)
    more = () if "--prompts" in words else ("--prompts", "eight.txt")
    steps = () if "--steps" in words else ("--steps", "2")
    made = runner.invoke(app, ["calibrate", *words, *more, *steps, "--precision", "int8", "--json"])
    error = json.loads(made.stdout)["error"]
    assert (made.exit_code in (2, 7), message in error["message"]) == (True, True), error
    assert "engines" not in error.get("remedy", ""), "nothing is built here"
    assert tree(place) == before
    assert not (place / "out.work").exists()


def test_fp16_graphs_are_refused_before_anything_is_recorded(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    made = runner.invoke(app, ["calibrate", "fp16", "-o", "out", "--precision", "fp16", "--json"])
    assert "has FP16 weights" in json.loads(made.stdout)["error"]["message"]
    assert not (place / "out.work").exists()


def test_the_mark_some_editors_begin_a_file_with_is_no_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# a comment\na cat\n", encoding="utf-8-sig")
    assert read_prompts(file) == ["a cat"]
    assert [each.prompt for each in from_file(file, 0, 10)] == ["a cat"]


def test_a_prompt_that_is_too_long_is_refused_with_how_long_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * (MOST_CHARACTERS + 1))
    with pytest.raises(InputError, match="at most 2,000"):
        read_prompts(tmp_path / "long.txt")


@pytest.mark.parametrize("text", ["[]", "{", '{"prompts": 3}', "[" * 100_000, "\x00"])
def test_a_damaged_list_of_trajectories_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "trajectories.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"trajectories\.json cannot be read"):
        Trajectories.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"errors": {"a": "b"}}', "[" * 100_000])
def test_a_damaged_sweep_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    settings = SimpleNamespace(prompts=("a",), seed=0, size=None, frames=None)
    recorded: object = type("Recorded", (), {"settings": settings, "__len__": lambda _: 1})()
    with pytest.raises(IntegrityError, match=r"sweep\.json cannot be read"):
        sweep(SimpleNamespace(sha256=""), recorded, None, [], tmp_path / "sweep.json", method="max")  # type: ignore[arg-type]


def test_too_small_a_disk_is_told_before_a_folder_is_made(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    words = ("calibrate", "bundle", "-o", "out", "--precision", "int8", "--prompts", "eight.txt", "--json")
    error = json.loads(runner.invoke(app, [*words, "--steps", "2"]).stdout)["error"]
    assert "out.work has 0 MiB free" in error["message"]
    assert not (place / "out.work").exists()


def test_a_disk_that_fills_up_while_recording_is_named(tmp_path: Path) -> None:
    latents, ids = np.zeros((4, 2, 8, 8), np.float32), np.zeros((2, 77), np.int64)
    feed = Feed(latents[None], np.zeros((1, 9), np.float32), 0, np.zeros((2, 77, 8), np.float32))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as failed:
            write_prompt(tmp_path / "prompt", [(0, feed)], ids, latents, latents)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed.value.filename == str(tmp_path / "prompt")
    assert list(tmp_path.iterdir()) == []
