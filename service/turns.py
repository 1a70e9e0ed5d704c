"""Whose turn it is on a device where stages cannot run beside the step: theirs first, and whole.

With one engine loaded at a time, a decoder that took turns with the step for every few frames would have
both loaded anew each time. So a stage is done in one go, and launches wait for as long. Where stages
overlap with the step, nobody waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """Turns of one model's stages and its step.

    Args:
        overlaps: Whether stages run beside the step.
    """

    def __init__(self, overlaps: bool) -> None:
        self._overlaps = overlaps
        self._changed = threading.Condition()
        self._stages, self._busy = 0, False

    @contextmanager
    def stage(self) -> Iterator[None]:
        """Run a stage: after the launch that is under way, and before the next one."""
        with self._changed:
            self._stages += 1
        try:
            with self._alone(lambda: not self._busy):
                yield
        finally:
            with self._changed:
                self._stages -= 1
                self._changed.notify_all()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Launch: when no stage wants to run."""
        with self._alone(lambda: not self._busy and not self._stages):
            yield

    @contextmanager
    def _alone(self, free: Callable[[], bool]) -> Iterator[None]:
        if self._overlaps:
            yield
            return
        with self._changed:
            self._changed.wait_for(free)
            self._busy = True
        try:
            yield
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
