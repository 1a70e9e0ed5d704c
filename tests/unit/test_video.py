"""A saved video plays, says how it was made, and is never half there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from reelrt.errors import InputError
from reelrt.runtime.video import Video, check_writable, read_metadata

METADATA = {
    "prompt": "ein \u201eroter\u201c Kreis \u7ea2\u8272\n, moving; a=b",
    "negative_prompt": "",
    "seed": 2**63 - 1,
    "steps": 25,
    "guidance": 7.5,
    "solver": "ddim",
    "width": 64,
    "height": 48,
    "frames": 6,
    "model": "m",
    "model_sha256": "00ff",
    "reelrt": "0.1.0",
}


def make_video(width=64, height=48, frames=6, metadata=METADATA):
    """A red square that moves right over a black background."""
    pixels = np.zeros((frames, height, width, 3), np.uint8)
    for index, frame in enumerate(pixels):
        frame[8:40, 4 * index : 4 * index + 24] = 220, 40, 40
    return Video(pixels, np.zeros((1, 4, frames, height // 8, width // 8), np.float32), metadata)


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        # Said in full, so that no version of PyAV guesses.
        colours = {"src_colorspace": "ITU709", "dst_color_range": "JPEG"}
        frames = [
            frame.reformat(format="rgb24", **colours).to_ndarray() for frame in container.decode(video=0)
        ]
        return np.stack(frames), stream.average_rate, stream.codec_context


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "h264"), ("a.webm", "vp9")])
def test_film_comes_back(tmp_path, name, codec):
    video = make_video()
    path = video.save(tmp_path / name, fps=12)
    frames, rate, context = decode(path)
    assert frames.shape == video.frames.shape
    assert rate == 12
    assert context.codec.canonical_name == codec
    assert context.pix_fmt == "yuv420p"
    inside = frames[2, 20, 20].astype(int)
    assert np.abs(inside - (220, 40, 40)).max() <= 6
    assert np.abs(frames.astype(int) - video.frames).mean() < 3
    assert read_metadata(path) == METADATA


def test_mp4_index_stands_in_front(tmp_path):
    data = make_video().save(tmp_path / "a.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_colours_are_tagged(tmp_path):
    for name in ("a.mp4", "a.webm"):
        _, _, context = decode(make_video().save(tmp_path / name))
        assert (context.colorspace, context.color_range) == (1, 1)  # BT.709, limited


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_odd_sizes_grow_by_one_pixel(tmp_path, name):
    video = make_video(width=63, height=47)
    frames, _, _ = decode(video.save(tmp_path / name))
    assert frames.shape == (6, 48, 64, 3)


def test_gif_plays_at_the_asked_rate(tmp_path):
    video = make_video()
    path = video.save(tmp_path / "a.GIF", fps=8)
    with Image.open(path) as gif:
        durations = []
        for index in range(gif.n_frames):
            gif.seek(index)
            durations.append(gif.info["duration"])
        gif.seek(2)
        pixel = np.array(gif.convert("RGB"))[20, 20]
    assert len(durations) == 6
    assert abs(sum(durations) - 750) <= 10  # milliseconds
    assert np.abs(pixel.astype(int) - (220, 40, 40)).max() <= 8
    assert read_metadata(path) == METADATA


def test_png_frames_are_exact(tmp_path):
    video = make_video()
    first = video.save(tmp_path / "a.png")
    assert first == tmp_path / "a_000.png"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"a_{index:03d}.png" for index in range(6)]
    for name, frame in zip(names, video.frames, strict=True):
        assert np.array_equal(np.array(Image.open(tmp_path / name)), frame)
        assert read_metadata(tmp_path / name) == METADATA


def test_a_shorter_video_leaves_no_frames_of_a_longer_one(tmp_path):
    (tmp_path / "a_006.png").write_bytes(b"somebody else's")
    make_video().save(tmp_path / "a.png")
    video = make_video()
    replace(video, frames=video.frames[:2]).save(tmp_path / "a.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_000.png", "a_001.png", "a_006.png"]


def test_a_frame_that_cannot_be_replaced_leaves_all_of_the_old_ones(tmp_path):
    make_video().save(tmp_path / "a.png")
    (tmp_path / "a_004.png").unlink()
    (tmp_path / "a_004.png").mkdir()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png") if path.is_file()}
    video = make_video()
    with pytest.raises(InputError, match=r"cannot write .*a_004\.png"):
        replace(video, frames=255 - video.frames).save(tmp_path / "a.png")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png") if path.is_file()} == before


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
@pytest.mark.parametrize("fps", [0.1, 1000])
def test_the_slowest_and_the_fastest(tmp_path, suffix, fps):
    path = make_video().save(tmp_path / f"a{suffix}", fps=np.float32(fps))
    if suffix != ".gif":
        with av.open(str(path)) as container:
            assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-3)


def test_same_video_same_bytes(tmp_path):
    for suffix in (".mp4", ".webm", ".gif"):
        one, two = (make_video().save(tmp_path / f"{name}{suffix}") for name in "ab")
        assert one.read_bytes() == two.read_bytes(), suffix


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif", "png"])
def test_any_name_will_do(tmp_path, monkeypatch, suffix):
    """A colon is no protocol to the muxer, a percent sign no pattern."""
    monkeypatch.chdir(tmp_path)
    for name in ("a: 50%03d \u7ea2", "-i"):
        path = make_video().save(f"{name}.{suffix}")
        assert path.name.startswith(name)
        assert read_metadata(path) == METADATA


def test_an_existing_file_is_replaced_and_folders_are_made(tmp_path):
    path = tmp_path / "new" / "folder" / "a.mp4"
    make_video().save(path)
    before = path.read_bytes()
    make_video(metadata={**METADATA, "seed": 1}).save(path)
    assert path.read_bytes() != before
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("name", ["a.avi", "a", "a.mp4.txt"])
def test_unknown_extension_names_the_known_ones(tmp_path, name):
    for call in (lambda p: check_writable(p), lambda p: make_video().save(p), read_metadata):
        with pytest.raises(InputError, match=r"\.mp4, \.webm, \.gif, \.png"):
            call(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    for path in (tmp_path / "file" / "a.mp4", tmp_path / "folder.mp4", Path("/proc/none/a.mp4")):
        with pytest.raises(InputError):
            check_writable(path)
        with pytest.raises(InputError, match="cannot write"):
            make_video().save(path)
    check_writable(tmp_path / "not" / "yet" / "a.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.mp4"]


@pytest.mark.parametrize("fps", [0, -1, 0.001, 1001, float("nan"), float("inf"), "8", None, True, 10**400])
def test_impossible_frame_rates(tmp_path, fps):
    with pytest.raises(InputError, match="fps"):
        make_video().save(tmp_path / "a.mp4", fps=fps)
    with pytest.raises(InputError, match="fps"):
        check_writable(tmp_path / "a.mp4", fps)


FULL_DISK = """
import resource, sys
import numpy as np
from reelrt.errors import InputError
from reelrt.runtime.video import Video
noise = np.random.default_rng(0).integers(0, 255, (16, 128, 128, 3), dtype=np.uint8)
video = Video(noise, np.zeros((1, 4, 16, 16, 16), np.float32), {"reelrt": "0"})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    video.save(sys.argv[1])
except InputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif", "png"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, suffix):
    """The limit on file sizes stands for a full disk: write fails in the middle of the file."""
    old = tmp_path / f"a.{suffix}"
    old.write_bytes(b"what was there before")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(old)], capture_output=True, text=True, check=True
    )
    assert "cannot write" in done.stdout, done
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert old.read_bytes() == b"what was there before"


def test_foreign_files_have_no_metadata(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    (tmp_path / "broken.mp4").write_bytes(b"not a film")
    with pytest.raises(InputError, match="no ReelRT metadata"):
        read_metadata(tmp_path / "foreign.png")
    with pytest.raises(InputError, match="cannot be read"):
        read_metadata(tmp_path / "broken.mp4")
    with pytest.raises(InputError, match="no file"):
        read_metadata(tmp_path / "missing.mp4")
