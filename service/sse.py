"""A job's events as server-sent events: `video` (the object), `preview` (a small picture), `deleted`."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from reelrt.service import answers
from reelrt.service.events import Subscription
from reelrt.service.jobs import PICTURE_TYPE, Event

KEEP_ALIVE_SECONDS = 15.0
"""A comment is sent after that long without an event: proxies take silence for death."""
RETRY = "retry: 2000\n\n"


class Streams:
    """How many event streams are open, and whether the service is about to stop.

    Args:
        most: Most of them at once.
    """

    def __init__(self, most: int) -> None:
        self.most, self.open = most, 0
        self._wakers: set[asyncio.Event] = set()
        self.stopping = False

    @property
    def full(self) -> bool:
        """Whether another one would be too many."""
        return self.open >= self.most

    def add(self, waker: asyncio.Event) -> None:
        """Count one; `waker` is set when all shall end."""
        self.open += 1
        self._wakers.add(waker)

    def remove(self, waker: asyncio.Event) -> None:
        """Count it no longer."""
        if waker in self._wakers:
            self._wakers.discard(waker)
            self.open -= 1

    def stop(self) -> None:
        """Let all end: an open stream would keep the server from stopping."""
        self.stopping = True
        for waker in self._wakers:
            waker.set()


def bell() -> tuple[asyncio.Event, Callable[[], None]]:
    """An event of the running loop, and what sets it from any thread."""
    loop, rung = asyncio.get_running_loop(), asyncio.Event()

    def ring() -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(rung.set)

    return rung, ring


def text_of(event: Event) -> str:
    """One event as it goes over the wire."""
    if event.kind == "preview":
        image = f"data:{PICTURE_TYPE};base64,{base64.b64encode(event.image).decode()}"
        data = json.dumps({"id": event.job.id, "progress": event.job.progress, "image": image})
        return f"event: preview\ndata: {data}\n\n"
    if event.kind == "deleted":
        return f"event: deleted\ndata: {json.dumps({'id': event.job.id})}\n\n"
    return f"event: video\ndata: {answers.video(event.job).model_dump_json()}\n\n"


async def events(subscription: Subscription, waker: asyncio.Event, streams: Streams) -> AsyncIterator[str]:
    """The events of a subscription until its last one; comments while nothing happens.

    Args:
        subscription: Closed at the end, whatever ends it.
        waker: What the subscription sets when there is something to take.
        streams: Where this one is counted.
    """
    try:
        yield RETRY
        while not streams.stopping:
            waker.clear()
            for event in subscription.take():
                yield text_of(event)
                if event.last:
                    return
            try:
                await asyncio.wait_for(waker.wait(), KEEP_ALIVE_SECONDS)
            except asyncio.TimeoutError:
                yield ": still here\n\n"
    finally:
        subscription.close()
        streams.remove(waker)
