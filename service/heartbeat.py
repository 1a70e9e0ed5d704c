"""The event loop's heartbeat: how long the loop lets wait what is due. Knows neither requests nor jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

SECONDS = 0.02
"""Between two beats of a loop that nothing holds up."""


class Heartbeat:
    """Tells the time from each beat to the next, which is never less than what held the loop up.

    Args:
        told: Called on the loop with that time in seconds; returns at once.
    """

    def __init__(self, told: Callable[[float], None]) -> None:
        self._told = told
        self._next: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to beat on the running loop."""
        loop = asyncio.get_running_loop()
        self._next = loop.call_later(SECONDS, self._beat, loop, loop.time())

    def _beat(self, loop: asyncio.AbstractEventLoop, last: float) -> None:
        now = loop.time()
        self._told(now - last)
        self._next = loop.call_later(SECONDS, self._beat, loop, now)

    def stop(self) -> None:
        """Beat no more."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
