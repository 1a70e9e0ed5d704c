"""How long a connection may say nothing, and how many there may be.

uvicorn waits for ever for the head of a request; a device has some thousand descriptors to lose.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol(most: int, seconds: float) -> type[H11Protocol]:
    """Uvicorn's HTTP protocol with both limits.

    Args:
        most: Connections open at once; one more is closed.
        seconds: Longest time from the connection, or the first byte of a further request, to the end
            of the head.
    """

    class Limited(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

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
            super().connection_lost(exc)

        def _begin(self) -> None:
            self._deadline = self.loop.call_later(seconds, self._give_up)

        def _end(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            if not self.transport.is_closing():
                self.transport.abort()

    return Limited
