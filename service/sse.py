"""A job's events as server-sent events: `video` (the object), `preview` (a small picture), `deleted`."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

import anyio
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from reelrt.service import answers
from reelrt.service.events import Subscription
from reelrt.service.guards import refuse
from reelrt.service.jobs import PICTURE_TYPE, Event
from reelrt.service.refusals import Refusal

KEEP_ALIVE_SECONDS = 15.0
"""A comment is sent after that long without an event: proxies take silence for death."""
REFUSAL_SECONDS = 0.005
"""Between two refusals of a stream."""
RETRY = "retry: 2000\n\n"


class Streams:
    """How many event streams are open, and whether the service is about to stop.

    Args:
        most: Most of them at once.
        refused: Called for each one too many.
    """

    def __init__(self, most: int, refused: Callable[[], None] = lambda: None) -> None:
        self.most, self.open, self._refused = most, 0, refused
        self._wakers: set[asyncio.Event] = set()
        self.stopping = False

    @property
    def full(self) -> bool:
        """Whether another one would be too many."""
        return self.open >= self.most

    def refusal(self) -> Refusal | None:
        """The answer to who wants another one, if it is no."""
        if self.stopping:
            return Refusal(503, "The service is stopping.", headers={"Retry-After": "5"})
        if not self.full:
            return None
        self._refused()
        headers = {"Retry-After": "5", "Connection": "close"}
        return Refusal(429, f"{self.most} event streams are open already.", headers=headers)

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


class FewStreams:
    """Refuses an event stream that is one too many before it is looked at, and one after the other.

    Who is refused asks again at once, and thousands of refusals a second would leave no time for others.

    Args:
        app: What is guarded.
        streams: The open ones.
    """

    def __init__(self, app: ASGIApp, streams: Streams) -> None:
        self._app, self._streams, self._turn = app, streams, asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 429 or 503, or pass the request on."""
        wanted = scope["type"] == "http" and scope["method"] == "GET" and scope["path"].endswith("/events")
        if wanted and (refusal := self._streams.refusal()):
            async with self._turn:
                await asyncio.sleep(0 if self._streams.stopping else REFUSAL_SECONDS)
            await refuse(refusal, send)
        else:
            await self._app(scope, receive, send)


class EventStream(StreamingResponse):
    """A `StreamingResponse` that ends as soon as its client is gone, not when it next has to say something.

    Args:
        events: The events; closed at the end, whatever ends it.
        done: Called then. A generator that was never begun, as nothing could be sent, would not do it.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], done: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events, self._done = events, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 (ASGI's)
        """Send the events."""
        try:
            async with anyio.create_task_group() as group:

                async def listen() -> None:
                    await self.listen_for_disconnect(receive)
                    group.cancel_scope.cancel()

                group.start_soon(listen)
                with suppress(OSError):  # the client is gone
                    await self.stream_response(send)
                group.cancel_scope.cancel()
        finally:
            self._done()
            with anyio.CancelScope(shield=True):
                await self._events.aclose()


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


async def events(
    subscription: Subscription, waker: asyncio.Event, streams: Streams
) -> AsyncGenerator[str, None]:
    """The events of a subscription until its last one; comments while nothing happens.

    Args:
        subscription: Whose.
        waker: What the subscription sets when there is something to take.
        streams: Whether the service is about to stop.
    """
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
