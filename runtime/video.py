"""A generated video: frames, final latents, how it was made; and its way to disk and back.

Files appear whole or not at all. Knows nothing of engines.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reelrt.bundle.files import atomic_files
from reelrt.errors import InputError
from reelrt.runtime.device_array import DeviceArray
from reelrt.runtime.formats import FORMATS, Format, Frames

SLOWEST, FASTEST = 0.1, 1000
"""Frames per second; below that, what players make of a file differs."""

FilePath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """What `TextToVideo.generate` returns.

    Attributes:
        frames: RGB frames, uint8 [F, H, W, 3].
        latents: The network's final latents, float32 [1, C, F, h, w].
        metadata: How it was made: `prompt`, `negative_prompt`, `seed`, `steps`, `guidance`,
            `solver`, `width`, `height`, `frames`, `model`, `model_sha256`, `reelrt`; `cut` when
            the prompt was too long. Plain JSON values. Equal metadata on one backend means equal
            bytes, unless the seed is None (the starting latents were given).
        timings: Wall-clock seconds of the stages `text`, `denoise` and `decode`. `denoise` counts
            from joining the batch to leaving it. With `generate(save_to=...)` also `encode`: from the
            last decoded frame to the finished file.
        peak_memory: Largest resident size of the process so far, in bytes; 0 where the system
            does not say.
        on_device: With `generate(on_device=True)`, `latents` and `frames` in the GPU's memory as well:
            arrays with `__cuda_array_interface__` and `__dlpack__`, the video's own and ready to be read.
        path: The file that `generate(save_to=...)` wrote, the first one for PNG; else None.
    """

    frames: npt.NDArray[np.uint8]
    latents: npt.NDArray[np.float32]
    metadata: Mapping[str, Any]
    timings: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    path: Path | None = None
    on_device: Mapping[str, DeviceArray] = field(default_factory=dict)

    def save(self, path: FilePath, fps: float = 8) -> Path:
        """Write the video; the extension chooses the format.

        `.mp4` is H.264 (playable in every browser), `.webm` VP9, `.gif` a looping GIF. `.png`
        writes lossless frames beside each other: `red.png` becomes `red_000.png`, `red_001.png`
        and so on. Odd widths and heights grow by one repeated pixel in MP4 and WebM. The metadata
        are written into every file.

        Args:
            path: Where to write; missing folders are made, an existing file is replaced.
            fps: Frames per second; PNG ignores it.

        Returns:
            The file that was written; the first one for PNG.

        Raises:
            InputError: Unknown extension, a place that cannot be written, a full disk, or an
                impossible frame rate. No partial file is left.
        """
        return write_video(path, [self.frames], len(self.frames), self.metadata, fps)


def write_video(
    path: FilePath, parts: Iterable[Frames], count: int, metadata: Mapping[str, Any], fps: float
) -> Path:
    """Write frames as they come; see `Video.save`, whose bytes they give.

    Args:
        path: Where to write.
        parts: Frames, uint8 [n, H, W, 3], `count` of them in all; whatever they raise leaves no file.
        count: Number of frames.
        metadata: Plain JSON values.
        fps: Frames per second.

    Returns:
        The file that was written; the first one for PNG.

    Raises:
        InputError: As `Video.save`.
    """
    target = Path(path)
    form = _format(target)
    check_rate(fps)
    paths = form.files(target, count)
    comment = json.dumps(dict(metadata))
    rate = Fraction(float(fps)).limit_denominator(1001)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_files(paths) as partial:
            form.write(partial, parts, rate, comment)
        for stale in _longer(form, target, len(paths)):
            stale.unlink()
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        name = getattr(error, "filename", None) or target
        raise InputError(f"cannot write {name}: {getattr(error, 'strerror', None) or error}.") from error
    return paths[0]


def first_file(path: FilePath, count: int) -> Path:
    """The file, the first one for PNG, that a path and a number of frames stand for."""
    target = Path(path)
    return _format(target).files(target, count)[0]


def _longer(form: Format, target: Path, count: int) -> Iterator[Path]:
    """The frames beyond a new video's end that an older, longer one of the same name left."""
    while form.files(target, count + 1) != form.files(target, count):
        path = form.files(target, count + 1)[-1]
        try:
            read_metadata(path)
        except InputError:  # not there, or not ours
            return
        yield path
        count += 1


def check_writable(path: FilePath, fps: float = 8) -> None:
    """Refuse, before any work, what `Video.save` would refuse.

    Raises:
        InputError: Unknown extension, a folder, a place that cannot be written, or an impossible
            frame rate.
    """
    target = Path(path)
    form = _format(target)
    check_rate(fps)
    parent = target
    try:
        if "\0" in str(target):
            raise ValueError("embedded null byte")
        for first in form.files(target, 1):
            if first.is_dir() or target.is_dir():
                raise InputError(f"{target if target.is_dir() else first} is a folder; name a file in it.")
        parent = next(folder for folder in target.absolute().parents if folder.exists())
        with tempfile.NamedTemporaryFile(dir=parent, prefix=f".{first.stem}.", suffix=first.suffix):
            pass  # as long a name as the file has while it is written
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write to {parent}: {reason}.") from error


def read_metadata(path: FilePath) -> dict[str, Any]:
    """How a saved video was made; see `Video.metadata`.

    Raises:
        InputError: Not a video that ReelRT wrote, or not readable.
    """
    source = Path(path)
    form = _format(source)
    if not source.is_file():
        raise InputError(f"{source} is no file.")
    try:
        comment = form.read(source)
    except (OSError, ValueError) as error:
        raise InputError(f"{source} cannot be read: {error}.") from error
    with suppress(ValueError):
        data = json.loads(comment)
        if isinstance(data, dict) and "reelrt" in data:
            return data
    raise InputError(f"{source} holds no ReelRT metadata.")


def check_rate(fps: float) -> None:
    """Refuse a frame rate that no file can have.

    Raises:
        InputError: It is none.
    """
    number = isinstance(fps, int | float | np.number) and not isinstance(fps, bool)
    if not (number and SLOWEST <= fps <= FASTEST):
        raise InputError(f"fps {fps!r} is not possible: give a number from {SLOWEST:g} to {FASTEST:g}.")


def _format(path: Path) -> Format:
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        known = ", ".join(FORMATS)
        raise InputError(f"{path} has an unknown extension {path.suffix!r}; choose one of {known}.")
    return form
