"""A video that is written by a thread of its own, while its later frames are still being decoded.

No lock is held while anybody waits: Ctrl-C may strike between any two operations. Knows nothing of
engines.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reelrt.errors import InputError
from reelrt.runtime.formats import Frames
from reelrt.runtime.ranges import span
from reelrt.runtime.video import FilePath, check_writable, write_video
from reelrt.wording import counted

AHEAD = 2
"""Parts of a video that are with the encoder at most: the one it works on, and the next."""
PATIENCE = 0.5
"""Seconds after which one who waits for the encoder looks whether it is still there."""


def targets(save_to: FilePath | Sequence[FilePath] | None, count: int, fps: float) -> list[Path | None]:
    """Where each video shall be written, checked before any work; None is nowhere.

    Raises:
        InputError: No paths, not as many as there are prompts, one twice, or a place that cannot be written.
    """
    if save_to is None:
        return [None] * count
    try:
        given = [save_to] if isinstance(save_to, str | bytes | os.PathLike) else [*save_to]
        paths = [Path(path) for path in given]
    except TypeError as error:
        raise InputError(f"save_to {save_to!r} is no path.", "Give one for each prompt.") from error
    if len(paths) != count:
        raise InputError(
            f"save_to names {counted(len(paths), 'file')} for {counted(count, 'prompt')}; give one each."
        )
    for path in paths:
        check_writable(path, fps)
    if len({path.parent.resolve() / path.name for path in paths}) != count:
        raise InputError("save_to names a file twice.")
    return [*paths]


@contextmanager
def nowhere() -> Iterator[Callable[[Frames], None]]:
    """Takes the place of `saving` for a video that is not saved."""
    yield lambda _part: None


@contextmanager
def saving(
    path: Path, count: int, metadata: Mapping[str, Any], fps: float
) -> Iterator[Callable[[Frames], None]]:
    """Write a video part by part, in the background.

    Args:
        path: Where; see `reelrt.runtime.video.Video.save`.
        count: Number of frames in all.
        metadata: How the video was made.
        fps: Frames per second.

    Yields:
        Takes the next part, uint8 [n, H, W, 3], which may not be changed any more. It waits while the
        encoder is `AHEAD` parts behind, and raises what has become of the file.

    Raises:
        InputError: The file cannot be written; what the block was doing ends at its next part. Whatever
            leaves the block early leaves no file, and in any case no thread.
    """
    writer = _Writer(path, count, metadata, fps)
    try:
        writer.thread.start()
        yield writer.take
        writer.finish()
    except BaseException:
        writer.stop()
        raise


class _Stopped(Exception):
    """The video will not be whole."""


class _Writer:
    """The thread, the parts on their way to it, and what became of the file."""

    def __init__(self, path: Path, count: int, metadata: Mapping[str, Any], fps: float) -> None:
        self._file = path, count, metadata, fps
        self._parts: queue.SimpleQueue[Frames | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(AHEAD):
            self._room.put(None)
        self._stopped = self._over = False
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._write, name="reelrt-encoder", daemon=True)

    def take(self, part: Frames) -> None:
        """Hand a part over, when there is room for it."""
        self._wait()
        if self._over:
            raise self._failure()
        self._parts.put(part)

    def finish(self) -> None:
        """Wait until the file is there."""
        self._parts.put(None)
        while not self._over:
            self._wait()
        self.thread.join()
        if self._error is not None:
            raise self._failure()

    def stop(self) -> None:
        """Give the file up, and wait until nothing of it is left."""
        self._stopped = True
        self._parts.put(None)
        while self.thread.is_alive() and not self._over:
            self._wait()
        if self._over:
            self.thread.join()

    def _wait(self) -> None:
        """Until a part was encoded, or all is over."""
        while not self._over:
            try:
                self._room.get(timeout=PATIENCE)
            except queue.Empty:
                continue
            return

    def _failure(self) -> BaseException:
        error, self._error = self._error, None
        return error or AssertionError("the encoder ended before the video did")

    def _write(self) -> None:
        path, count, metadata, fps = self._file
        try:
            with span("encode"):
                write_video(path, self._taken(), count, metadata, fps)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 (who waits for the file raises it)
            self._error = error
        finally:
            self._over = True
            self._room.put(None)

    def _taken(self) -> Iterator[Frames]:
        """Parts until the video is whole; one that was encoded makes room for another."""
        while (part := self._parts.get()) is not None and not self._stopped:
            yield part
            self._room.put(None)
        if self._stopped:
            raise _Stopped
