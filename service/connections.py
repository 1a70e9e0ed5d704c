"""How long a connection may say nothing, or leave unread what it was sent, and how many there may be.

uvicorn waits for ever for the head of a request; a device has some thousand descriptors to lose.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

UNREAD_SECONDS = 60.0
"""Longest time that a client takes nothing of what is being sent: a file, or an event stream's place."""


def protocol(most: int, seconds: float, unread: float = UNREAD_SECONDS) -> type[H11Protocol]:
    """Uvicorn's HTTP protocol with these limits.

    Args:
        most: Connections open at once; one more is closed.
        seconds: Longest time from the connection, or the first byte of a further request, to the end
            of the head.
        unread: Longest time in seconds that the buffers to the client stay full.
    """

    class Limited(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()
            else:
                self._begin()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._end()
            elif self._deadline is None:
                self._begin()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end()
            self._read()
            super().connection_lost(exc)
            # uvicorn forgets this after a reset; timer and connection would keep each other for very long.
            self._unset_keepalive_if_required()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(unread, self._give_up)

        def resume_writing(self) -> None:
            self._read()
            super().resume_writing()

        def _read(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _begin(self) -> None:
            self._deadline = self.loop.call_later(seconds, self._give_up)

        def _end(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self.transport.abort()  # one that is closing, too, and waits for what is unread

    return Limited
