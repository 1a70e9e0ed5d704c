"""Videos written while they are decoded: the bytes of `Video.save`, and nothing left behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

import reelrt
from reelrt.errors import BackendError, Cancelled, InputError
from reelrt.runtime import formats
from reelrt.runtime.saving import AHEAD, saving
from tests.strikes import strike
from tests.unit.test_runtime_pipeline import make_engines
from tests.unit.test_video import decode, make_video


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return reelrt.load(make_engines(tmp_path_factory.mktemp("engines")), threads=1)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "reelrt-encoder"]


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif", "png"])
def test_the_bytes_are_those_of_save(tmp_path, suffix):
    video = make_video(width=62, height=47)
    with saving(tmp_path / "parts" / f"a.{suffix}", 6, video.metadata, 12) as take:
        for begin, end in ((0, 3), (3, 4), (4, 6)):
            take(video.frames[begin:end])
    video.save(tmp_path / "whole" / f"a.{suffix}", fps=12)
    parts, whole = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("parts", "whole"))
    assert parts == whole


def test_generate_writes_while_it_decodes(pipe, tmp_path):
    video = pipe.generate("red circle", steps=2, seed=7, save_to=tmp_path / "new" / "a.mp4", fps=5)
    assert video.path == tmp_path / "new" / "a.mp4"
    frames, rate, _ = decode(video.path)
    assert (frames.shape, rate) == (video.frames.shape, 5)
    assert set(video.timings) == {"text", "denoise", "decode", "encode"}
    assert reelrt.read_metadata(video.path) == dict(video.metadata)
    paths = [tmp_path / f"{name}.png" for name in ("one", "two")]
    videos = pipe.generate(["red", "blue"], steps=2, seed=7, save_to=paths)
    assert [v.path.name for v in videos] == ["one_000.png", "two_000.png"]
    for name, each in zip(("one", "two"), videos, strict=True):
        each.save(tmp_path / "saved.png")
        for index in range(4):
            ours, saved = (tmp_path / f"{stem}_{index:03d}.png" for stem in (name, "saved"))
            assert ours.read_bytes() == saved.read_bytes()
    assert pipe.generate("red", steps=1).path is None


@pytest.mark.parametrize(
    ("prompt", "save_to", "message"),
    [
        ("red", "a.avi", "unknown extension"),
        ("red", ["a.mp4", "b.mp4"], "save_to names 2 files for 1 prompt"),
        (["red", "blue"], "a.mp4", "save_to names 1 file for 2 prompts"),
        (["red", "blue"], ["a.mp4", "a.mp4"], "save_to names a file twice"),
        (["red", "blue"], ["a.mp4", Path("a.mp4").absolute()], "save_to names a file twice"),
        ("red", 5, "save_to 5 is no path"),
        ("red", b"a.mp4", "save_to b'a.mp4' is no path"),
        (["red", "blue"], ["a.mp4", None], "is no path"),
        ("red", "x" * 300 + ".mp4", "File name too long"),
        ("red", "x" * 250 + ".mp4", "File name too long"),
        ("red", "x\0/a.mp4", "null"),
        ("red", "/proc/nowhere/a.mp4", "cannot write to /proc"),
    ],
)
def test_impossible_files_are_refused_before_any_work(pipe, prompt, save_to, message):
    told = []
    with pytest.raises(InputError, match=message):
        pipe.generate(prompt, steps=1, save_to=save_to, progress=lambda *each: told.append(each))
    assert told == []


def test_a_slow_encoder_is_waited_for(tmp_path, monkeypatch):
    """Never more than `AHEAD` parts are with it, however fast they come."""
    gate, encoded, handed = threading.Semaphore(0), [], []

    def write(paths, parts, fps, comment):
        for part in parts:
            gate.acquire()
            encoded.append(part)
        paths[0].write_bytes(b"whole")

    monkeypatch.setitem(formats.FORMATS, ".mp4", formats.Format(write, lambda path: ""))

    def hand_over():
        with saving(tmp_path / "a.mp4", 6, {}, 8) as take:
            for index in range(6):
                take(np.full((1, 2, 2, 3), index, np.uint8))
                handed.append(index)

    thread = threading.Thread(target=hand_over)
    thread.start()
    for done in range(5):
        wanted = min(done + AHEAD, 6)
        for _ in range(400):
            if len(handed) >= wanted:
                break
            time.sleep(0.005)
        time.sleep(0.02)
        assert len(handed) == wanted
        gate.release()
    gate.release()
    thread.join()
    assert [int(part.flat[0]) for part in encoded] == list(range(6))
    assert (tmp_path / "a.mp4").read_bytes() == b"whole"


@pytest.mark.parametrize(
    "stop", [Cancelled("cancelled."), KeyboardInterrupt(), BackendError("the decoder failed.")]
)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_what_ends_the_decoding_leaves_the_old_file(tmp_path, stop, after):
    old = tmp_path / "a.mp4"
    old.write_bytes(b"what was there before")
    with pytest.raises(type(stop)), saving(old, 6, {}, 8) as take:
        for _ in range(after):
            take(np.zeros((1, 16, 16, 3), np.uint8))
        raise stop
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert old.read_bytes() == b"what was there before"


def test_a_failing_encoder_ends_the_decoding(pipe, tmp_path, monkeypatch):
    def write(paths, parts, fps, comment):
        next(iter(parts))
        paths[0].write_bytes(b"half")
        raise OSError(28, "No space left on device", str(paths[0]))

    monkeypatch.setitem(formats.FORMATS, ".mp4", formats.Format(write, lambda path: ""))
    taken = []
    with pytest.raises(InputError, match="No space left"), saving(tmp_path / "a.mp4", 99, {}, 8) as take:
        for index in range(99):
            take(np.zeros((1, 2, 2, 3), np.uint8))
            taken.append(index)
    assert len(taken) <= AHEAD + 1
    with pytest.raises(InputError, match="No space left"):
        pipe.generate("red", steps=1, save_to=tmp_path / "b.mp4")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert pipe.generate("red", steps=1, save_to=tmp_path / "b.mp4").path.is_file()


def test_cancelling_while_it_decodes(pipe, tmp_path):
    told = []
    with pytest.raises(Cancelled, match="decode"):
        pipe.generate(
            "red",
            steps=1,
            save_to=tmp_path / "a.mp4",
            progress=lambda *each: told.append(each),
            should_cancel=lambda: told[-1] == ("decode", 4, 4),
        )
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_at_any_moment_leaves_a_whole_file_or_none(pipe, tmp_path):
    video = pipe.generate("red", steps=1, seed=1, save_to=tmp_path / "wanted.mp4")
    wanted, path, calls = video.frames.shape, tmp_path / "a.mp4", 0

    def suffer():
        nonlocal calls
        calls += 1
        if path.exists():  # of the call before
            path.rename(tmp_path / f"whole-{calls}.mp4")
        with saving(path, 4, video.metadata, 8) as take:
            for part in pipe.decode(video.latents):
                take(part)

    assert strike(suffer, seconds=2, pause=0.03) > 2
    for _ in range(200):  # a second strike, while it was being removed, does not wait for that
        if not [each for each in threading.enumerate() if each.name == "reelrt-encoder"]:
            break
        time.sleep(0.01)
    path.unlink(missing_ok=True)
    for whole in tmp_path.glob("whole-*.mp4"):
        assert decode(whole)[0].shape == wanted
        whole.unlink()
    assert [each.name for each in tmp_path.iterdir()] == ["wanted.mp4"]
