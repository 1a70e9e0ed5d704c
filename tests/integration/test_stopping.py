"""Ctrl-C, SIGTERM and a full disk: nothing half-written, no process left, and the old results stay."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.commands import PROMPT, Stopped, may_mount, on_small_disk, reelrt, stop, tree
from tests.models import shorten

pytestmark = pytest.mark.timeout(600)  # the first test exports the model

SIGNALS = [
    pytest.param(signal.SIGINT, 1, 130, id="Ctrl-C"),
    pytest.param(signal.SIGINT, 3, 130, id="impatient Ctrl-C"),
    pytest.param(signal.SIGTERM, 1, 143, id="SIGTERM"),
]


@pytest.fixture
def place(work: Path, tmp_path: Path) -> Path:
    """A model whose schedules are soon compiled, a bundle and an engine set."""
    for kind in ("model", "bundle", "engines"):
        shutil.copytree(work / kind, tmp_path / kind)
    shorten(tmp_path / "model")
    return tmp_path


def check(stopped: Stopped, code: int) -> None:
    assert stopped.code == code, stopped.errors
    assert stopped.left == []
    assert "Traceback" not in stopped.errors
    last = stopped.errors.rstrip("\n").splitlines()[-1:]
    assert last == ["Error: interrupted; nothing is left half-written."]


@pytest.mark.parametrize(("number", "times", "code"), SIGNALS[1:])
def test_stopping_an_export(place: Path, number: signal.Signals, times: int, code: int) -> None:
    before = tree(place)

    def half_done(_: str) -> bool:
        return any(place.glob(".bundle.*.partial/schedules.safetensors"))

    words = ("export", "model", "-o", "bundle", "--cfg", "batched")
    check(stop(*words, folder=place, when=half_done, number=number, times=times), code)
    assert tree(place) == before


@pytest.mark.parametrize(("number", "times", "code"), SIGNALS)
def test_stopping_a_build(place: Path, number: signal.Signals, times: int, code: int) -> None:
    before = tree(place)

    def half_done(_: str) -> bool:
        return any(place.glob(".engines.*.partial/.reelrt-*"))

    words = ("build", "bundle", "-o", "engines", "--backend", "onnxruntime", "--frames", 8)
    check(stop(*words, folder=place, when=half_done, number=number, times=times), code)
    assert tree(place) == before
    again = reelrt("build", "bundle", "-o", "engines", "--backend", "onnxruntime", folder=place)
    assert (again.returncode, "up to date" in again.stderr) == (0, True)


@pytest.mark.parametrize(("number", "times", "code"), SIGNALS)
def test_stopping_a_generation(place: Path, number: signal.Signals, times: int, code: int) -> None:
    (place / "red-1.mp4").write_bytes(b"an older video")
    before = tree(place)
    words = ("generate", "engines", *[PROMPT] * 8, "-o", "red.mp4", "--steps", 100)
    stopped = stop(*words, folder=place, when=lambda told: "text:" in told, number=number, times=times)
    check(stopped, code)
    assert "denoise:" not in stopped.errors
    assert tree(place) == before


needs_mount = pytest.mark.skipif(not may_mount(), reason="this user may not mount a small file system")


@needs_mount
@pytest.mark.parametrize("size", ["8k", "90k"])
def test_a_disk_that_fills_up_during_an_export(work: Path, tmp_path: Path, size: str) -> None:
    """Full at the tokenizer, or at a graph."""
    model = shorten(Path(shutil.copytree(work / "model", tmp_path / "model")))
    disk = tmp_path / "disk"
    made = on_small_disk(size, disk, "export", model, "-o", disk / "bundle")
    full(made.returncode, made.stdout, made.stderr)


@needs_mount
@pytest.mark.parametrize("size", ["8k", "200k", "1300k"])
def test_a_disk_that_fills_up_during_a_build(work: Path, tmp_path: Path, size: str) -> None:
    """Full at the first engine, at another, or at the schedules."""
    disk = tmp_path / "disk"
    words = ("build", work / "bundle", "-o", disk / "engines", "--backend", "onnxruntime")
    made = on_small_disk(size, disk, *words)
    full(made.returncode, made.stdout, made.stderr)


@needs_mount
@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif", "png"])
def test_a_disk_that_fills_up_during_a_generation(work: Path, tmp_path: Path, suffix: str) -> None:
    disk = tmp_path / "disk"
    words = ("generate", work / "engines", PROMPT, "-o", disk / f"red.{suffix}", "--steps", 1, "--fps", 8)
    made = on_small_disk("4k", disk, *words)
    full(made.returncode, made.stdout, made.stderr)


def full(code: int, out: str, errors: str) -> None:
    assert (code, out) == (7, ""), errors
    last = errors.rstrip("\n").splitlines()[-1]
    assert last.startswith("Error: ")
    assert "No space left on device" in last or "the disk is full" in last
    assert "Traceback" not in errors
