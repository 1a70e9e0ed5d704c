"""Video containers: how frames and one comment become a file, and the comment comes back.

One table, by file extension. Knows nothing of models, requests or where files may be written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from reelrt.errors import BackendError

if TYPE_CHECKING:
    from av import VideoStream

Frames = npt.NDArray[np.uint8]

# FFmpeg's and H.273's number for BT.709; untagged files leave the colours to the player's guess.
BT709 = 1
LIMITED_RANGE = 1
GIF_PALETTE_PIXELS = 1 << 20


def _write_stream(
    paths: Sequence[Path],
    parts: Iterable[Frames],
    fps: Fraction,
    comment: str,
    *,
    codec: str,
    options: dict[str, str],
    container_options: dict[str, str],
) -> None:
    import av

    parts = iter(parts)
    first = next(parts)
    height, width = first.shape[1:3]
    margin = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
    try:
        with av.open(f"file:{paths[0]}", "w", options=container_options) as container:
            container.metadata["comment"] = comment
            stream = cast("VideoStream", container.add_stream(codec, rate=fps, options=options))
            stream.height, stream.width = height + height % 2, width + width % 2
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED_RANGE
            for frame in chain.from_iterable(np.pad(part, margin, "edge") for part in chain([first], parts)):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                planes = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                container.mux(stream.encode(planes))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise BackendError(f"{codec} cannot encode {width}x{height} frames: {error}.") from error


def _write_mp4(paths: Sequence[Path], parts: Iterable[Frames], fps: Fraction, comment: str) -> None:
    """H.264 with the index in front, so that a browser plays it while it loads."""
    _write_stream(
        paths,
        parts,
        fps,
        comment,
        codec="libx264",
        options={"crf": "16", "preset": "medium"},
        container_options={"movflags": "+faststart"},
    )


def _write_webm(paths: Sequence[Path], parts: Iterable[Frames], fps: Fraction, comment: str) -> None:
    """VP9 in constant-quality mode, which libvpx enters only at bit rate 0."""
    _write_stream(
        paths,
        parts,
        fps,
        comment,
        codec="libvpx-vp9",
        options={"crf": "24", "b": "0", "row-mt": "1"},
        container_options={"fflags": "+bitexact"},  # else the track gets a random number
    )


def _write_gif(paths: Sequence[Path], parts: Iterable[Frames], fps: Fraction, comment: str) -> None:
    """A looping GIF with one palette for all frames, so that still areas do not flicker."""
    from PIL import Image

    frames = np.concatenate([*parts])
    colours = frames.reshape(-1, 3)
    colours = colours[:: -(-len(colours) // GIF_PALETTE_PIXELS)]
    palette = Image.fromarray(colours[None]).quantize(256)
    pictures = [Image.fromarray(frame).quantize(palette=palette) for frame in frames]
    # GIF counts hundredths of a second: round where each frame ends, not how long it lasts.
    ends = [round(100 * (index + 1) / fps) for index in range(len(frames))]
    durations = [10 * (end - begin) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    pictures[0].save(
        paths[0],
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=durations,
        loop=0,
        comment=comment.encode("ascii"),
    )


def _write_png(paths: Sequence[Path], parts: Iterable[Frames], _fps: Fraction, comment: str) -> None:
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", comment)
    for path, frame in zip(paths, chain.from_iterable(parts), strict=True):
        Image.fromarray(frame).save(path, format="PNG", pnginfo=text)


def _read_stream(path: Path) -> str:
    import av

    with av.open(f"file:{path}") as container:
        tags = {name.lower(): value for name, value in container.metadata.items()}
    return tags.get("comment", "")


def _read_picture(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as picture:
        comment = picture.info.get("comment") or picture.info.get("Comment") or ""
    return comment.decode("ascii", "replace") if isinstance(comment, bytes) else str(comment)


def _one_file(path: Path, _frames: int) -> list[Path]:
    return [path]


def _numbered(path: Path, frames: int) -> list[Path]:
    return [path.with_name(f"{path.stem}_{index:03d}{path.suffix}") for index in range(frames)]


@dataclass(frozen=True, slots=True)
class Format:
    """One way to keep a video.

    Attributes:
        write: Called as `write(paths, parts, fps, comment)`: the frames in one part or several, each
            encoded as it comes (but for GIF, whose palette needs all of them); the comment is ASCII.
        read: The comment of a file, or "".
        files: The files that a path and a number of frames stand for.
    """

    write: Callable[[Sequence[Path], Iterable[Frames], Fraction, str], None]
    read: Callable[[Path], str]
    files: Callable[[Path, int], list[Path]] = _one_file


FORMATS = {
    ".mp4": Format(_write_mp4, _read_stream),
    ".webm": Format(_write_webm, _read_stream),
    ".gif": Format(_write_gif, _read_picture),
    ".png": Format(_write_png, _read_picture, _numbered),
}
