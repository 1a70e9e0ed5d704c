"""Event streams whose client goes away at a bad moment, or never reads: nothing of them is left."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the service extra is not installed")
pytest.importorskip("grpc", reason="the service extra is not installed")

import grpc
import uvicorn

from reelrt.service import sse
from reelrt.service import videos_pb2 as pb
from reelrt.service.connections import protocol
from reelrt.service.events import Hub
from reelrt.service.rpc import Door
from reelrt.service.videos_pb2_grpc import VideosStub


def test_a_client_that_is_gone_before_the_first_byte_leaves_no_stream() -> None:
    async def body() -> Any:
        yield "never sent"

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        await asyncio.Event().wait()  # what was sent before is still unread

    closed: list[bool] = []
    stream = sse.EventStream(body(), lambda: closed.append(True))
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, receive, send), 10))
    assert closed == [True]


def test_a_crowd_is_refused_one_after_the_other_and_others_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    asleep, most, sleep = 0, 0, asyncio.sleep

    async def watched(seconds: float) -> None:
        nonlocal asleep, most
        asleep += 1
        most = max(most, asleep)
        await sleep(seconds)
        asleep -= 1

    monkeypatch.setattr(asyncio, "sleep", watched)
    told: list[Any] = []

    async def application(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        told.append(message.get("status"))

    async def scene() -> None:
        guard = sse.FewStreams(application, sse.Streams(0))
        scope = {"type": "http", "method": "GET", "path": "/v1/videos/video_1/events"}
        crowd = [asyncio.ensure_future(guard(scope, receive, send)) for _ in range(600)]
        await sleep(0)
        await guard({**scope, "path": "/health"}, receive, send)
        assert told == [200]
        await asyncio.gather(*crowd)

    asyncio.run(asyncio.wait_for(scene(), 60))
    assert (told.count(429), most) == (600, 1)


class _Slow:
    """A job service that takes its time to subscribe."""

    def __init__(self) -> None:
        self.hub, self.asked, self.go, self.made = Hub(), threading.Event(), threading.Event(), 0

    def watch(self, job_id: str, _owner: str, *, previews: bool, notify: Any) -> Any:
        self.asked.set()
        self.go.wait(10)
        subscription = self.hub.subscribe(job_id, notify, previews)
        self.made += 1
        return subscription


def test_a_call_cancelled_while_it_subscribes_leaves_no_subscription() -> None:
    service, streams = _Slow(), sse.Streams(4)

    async def scene() -> None:
        door = Door(service, (), streams, ("127.0.0.1", 0), 1 << 20, 16)  # type: ignore[arg-type]
        await door.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{door.port}") as channel:
            call = VideosStub(channel).Watch(pb.WatchRequest(id="a"))
            reading = asyncio.ensure_future(call.read())
            await asyncio.to_thread(service.asked.wait, 10)
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            while streams.open:  # the server has seen it
                await asyncio.sleep(0.01)
            service.go.set()
            while not service.made:
                await asyncio.sleep(0.01)
            for _ in range(200):
                if not len(service.hub):
                    break
                await asyncio.sleep(0.01)
        await door.stop(0)

    asyncio.run(asyncio.wait_for(scene(), 20))
    assert service.made == 1
    assert len(service.hub) == 0
    service.hub.close()


def test_a_client_that_never_reads_is_let_go() -> None:
    """The application sends without end; nobody reads; the connection ends all the same."""
    gone: list[float] = []

    async def application(_scope: Any, receive: Any, send: Any) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def pour() -> None:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})

        pouring = asyncio.ensure_future(pour())
        await receive()
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.append(loop.time() - began)
        pouring.cancel()

    async def scene() -> None:
        async with served(application, protocol(8, 5, unread=0.3)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(GET)
            while not gone:
                await asyncio.sleep(0.02)
            writer.close()
            del reader

    asyncio.run(asyncio.wait_for(scene(), 20))
    assert 0.2 < gone[0] < 5


def test_a_connection_that_is_reset_is_not_kept() -> None:
    """Nor left to the garbage collector: Python looks so seldom that thousands would pile up."""
    kind = protocol(8, 5)
    seen: list[weakref.ref[Any]] = []

    class Watched(kind):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            seen.append(weakref.ref(self))

    async def application(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def scene() -> None:
        async with served(application, Watched, timeout_keep_alive=60) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(GET)
            await reader.readuntil(b"ok")
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()
            while seen[0]() is not None:
                await asyncio.sleep(0.01)

    gc.collect()
    gc.disable()
    try:
        asyncio.run(asyncio.wait_for(scene(), 10))
    finally:
        gc.enable()


GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@asynccontextmanager
async def served(application: Any, kind: Any, **options: Any) -> AsyncIterator[int]:
    """The port of a server with this protocol, while the block runs."""
    words = {"ws": "none", "lifespan": "off", "log_level": "error", "port": 0, **options}
    server = uvicorn.Server(uvicorn.Config(application, http=kind, **words))
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving
