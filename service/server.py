"""Running the service: opens the job service, listens, and stops without losing anything."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from reelrt.errors import InputError
from reelrt.service.application import Application
from reelrt.service.config import Settings
from reelrt.service.connections import protocol
from reelrt.service.jobservice import VideoService, open_service

if TYPE_CHECKING:
    from reelrt.service.rpc import Door

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 20
HEAD_BYTES = 32 * 1024
Started = Callable[[dict[str, str], list[str]], None]


class _Server(uvicorn.Server):
    """A server that ends its event streams first, and whose stop is a good end and no signal's.

    Args:
        config: uvicorn's.
        application: What it serves.
        other: Makes the door beside it, once there is an event loop.
        started: Called with that door once both listen.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        application: Application,
        other: Callable[[], Door | None],
        started: Callable[[Door | None], None],
    ) -> None:
        super().__init__(config)
        self._application, self._other, self._started = application, other, started
        self._door: Door | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGINT, SIGTERM and SIGHUP, and leave the handlers as they were."""
        if threading.current_thread() is not threading.main_thread():  # signals are somebody else's
            yield
            return
        every = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        numbers = [each for each in every if signal.getsignal(each) is not signal.SIG_IGN]  # nohup's
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (uvicorn's)
        """Stop; a second Ctrl-C does not wait for open answers."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        with suppress(RuntimeError):
            asyncio.get_running_loop().call_soon_threadsafe(self._application.streams.stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await self._application.warm_up()
        self._door = self._other()
        if self._door is not None:
            await self._door.start()
        await super().startup(sockets)
        if self.started:
            self._started(self._door)
            self._application.heartbeat.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close what is open."""
        self._application.streams.stop()
        self._application.heartbeat.stop()
        if self._door is not None:
            await self._door.stop()
        await super().shutdown(sockets)


def serve(settings: Settings, started: Started) -> None:
    """Run the service until a signal ends it; then running jobs end, or go back into the queue.

    Args:
        settings: The configuration.
        started: Called with the address of each door and the names of the models, once requests are answered.

    Raises:
        InputError: No engine set is named, or the address cannot be listened on.
        ReelError: An engine set cannot be opened, or the data folder is in use.
    """
    if not settings.engines:
        raise InputError("no engine set is named.", "Name one: `reelrt serve build/engines`.")
    _preload()
    with (
        listening(settings.host, settings.port) as sockets,
        open_service(settings.engines, settings.options) as service,
    ):
        try:
            run(service, settings, sockets, lambda *told: _settled(started, *told))
        finally:
            gc.unfreeze()
        log.info("stopping: running jobs have %g s to end", settings.stop_seconds)
        service.drain(settings.stop_seconds)


def _settled(started: Started, addresses: dict[str, str], models: list[str]) -> None:
    """Take all that is loaded out of the garbage collector's sight, then say that requests are answered.

    Each of its looks through all that the libraries have made would hold the event loop up.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # it looks again once a quarter is new of what was there last time: nothing, now
    started(addresses, models)


def _preload() -> None:
    """Load the libraries that the first video needs: later it would hold the event loop up."""
    import av  # noqa: F401
    import numpy.random  # noqa: F401
    import PIL.Image

    PIL.Image.preinit()


def run(
    service: VideoService,
    settings: Settings,
    sockets: list[socket.socket],
    started: Started,
) -> None:
    """Answer requests until a signal ends it."""
    application = Application(service, settings)
    config = uvicorn.Config(
        application,
        loop="asyncio",
        http=protocol(settings.connections, settings.body_seconds),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=HEAD_BYTES,
    )

    def door() -> Door | None:
        if settings.grpc_port is None:
            return None
        from reelrt.service.rpc import Door

        where = (settings.host, settings.grpc_port)
        return Door(
            service, settings.keys, application.streams, where, settings.most_body, settings.connections
        )

    def told(door: Door | None) -> None:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        addresses = {"http": f"http://{host}:{sockets[0].getsockname()[1]}"}
        if door is not None:
            addresses["grpc"] = f"{host}:{door.port}"
        started(addresses, [info.name for info in service.models()])

    _Server(config, application, door, told).run(sockets)


@contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets of an address, bound before anything is loaded, so that a taken port is told at once.

    Raises:
        InputError: It cannot be listened on.
    """
    sockets: list[socket.socket] = []
    try:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, where = found[0]
            sockets.append(socket.socket(family, kind, protocol))
            sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sockets[0].bind(where)
        except OSError as error:
            raise InputError(f"cannot listen on {host} port {port}: {error.strerror}.") from error
        yield sockets
    finally:
        for each in sockets:
            each.close()
