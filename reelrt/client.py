"""A client of the service: `Client`, and `AsyncClient` with the same methods to be awaited.

Needs httpx (`pip install 'reelrt[service]'`), and nothing of the engines.

    with Client("http://127.0.0.1:8000") as client:
        video = client.create("a red circle moving right on a black background", seed=7)
        client.wait(video["id"], print)
        client.download(video["id"], "red.mp4")
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx

from reelrt import wire
from reelrt.errors import QueueFullError, ServiceError
from reelrt.wire import Models, Told, Unreachable, Video

__all__ = ["AsyncClient", "Client", "Unreachable", "Video"]


class Client:
    """A service, from one thread or many.

    Args:
        url: Its address; by default `$REELRT_URL`, else http://127.0.0.1:8000.
        api_key: By default `$REELRT_API_KEY`, else none.

    Raises:
        InputError: The address is none. All methods: what the service refuses as wrong.
        Unreachable: All methods: nobody answers there.
        QueueFullError: `create` and `remix`: the queue is full; `retry_after` seconds.
        ServiceError: All methods: any other error that the service answers.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None) -> None:
        self.url = wire.address(url)
        self._http = httpx.Client(base_url=self.url, headers=wire.headers(api_key), timeout=wire.PATIENCE)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def create(self, prompt: str, *, idempotency_key: str | None = None, **options: Any) -> Video:
        """Ask for a video.

        Args:
            prompt: What to show.
            idempotency_key: Answers the same video when it is sent again; drawn by default.
            **options: Fields of the request: `num_inference_steps`, `guidance_scale`, `seed`, `size`, ...
        """
        return self._post("/v1/videos", wire.request_of(prompt, options, idempotency_key))

    def remix(
        self, video_id: str, prompt: str, *, idempotency_key: str | None = None, **options: Any
    ) -> Video:
        """Ask for a variation of a finished video; `remix_from` is the share that is taken over."""
        return self._post(wire.path_of(video_id, "/remix"), wire.request_of(prompt, options, idempotency_key))

    def get(self, video_id: str) -> Video:
        """A video as it is now."""
        return self._json("GET", wire.path_of(video_id))

    def list(self, after: str | None = None, limit: int = 20, order: str = "desc") -> dict[str, Any]:
        """A page of videos: `data`, `has_more`, `last_id`."""
        query = {"limit": limit, "order": order, **({"after": after} if after else {})}
        return self._json("GET", "/v1/videos", params=query)

    def delete(self, video_id: str) -> dict[str, Any]:
        """Cancel a video and remove it."""
        return self._json("DELETE", wire.path_of(video_id))

    def models(self) -> Models:
        """The models and what they take."""
        found: Models = self._json("GET", "/v1/models")["data"]
        return found

    def events(self, video_id: str, previews: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events of a video until it is over: `video`, `preview` or `deleted`, and their data."""
        parser, path = wire.Events(), wire.path_of(video_id, "/events")
        with (
            self._caught(),
            self._http.stream(
                "GET", path, params={"previews": str(previews).lower()}, timeout=wire.SILENCE
            ) as answer,
        ):
            if not answer.is_success:
                answer.read()
            for line in wire.checked(answer).iter_lines():
                if event := parser.feed(line):
                    yield event

    def wait(self, video_id: str, told: Told | None = None) -> Video:
        """Follow a video until it is over; a broken stream is taken up again.

        Args:
            video_id: The video.
            told: Called with every event.

        Returns:
            The video as it was last; its status says how it ended.

        Raises:
            NotFoundError: It was deleted.
        """
        failures = 0
        while True:
            error: ServiceError = Unreachable(f"{self.url} ended the stream of {video_id} too early.")
            try:
                for name, data in self.events(video_id, previews=False):
                    failures = 0
                    if told:
                        told(name, data)
                    if wire.is_over(name, data):
                        return wire.ended(name, data)
            except (Unreachable, QueueFullError) as broken:
                error = broken
            failures += 1
            if failures > wire.RETRIES:
                raise error
            time.sleep(wire.pause(error, failures))

    def download(self, video_id: str, path: str | os.PathLike[str], variant: str = "video") -> Path:
        """Write a file of a finished video; it appears whole or not at all."""
        target = Path(path)
        with (
            self._caught(),
            self._http.stream(
                "GET", wire.path_of(video_id, "/content"), params={"variant": variant}
            ) as answer,
        ):
            if not answer.is_success:
                answer.read()
            chunks = wire.checked(answer).iter_bytes()
            with wire.writing(target) as write:
                for chunk in chunks:
                    write(chunk)
        return target

    def _post(self, path: str, arguments: dict[str, Any]) -> Video:
        return self._json("POST", path, **arguments)

    def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        with self._caught():
            return wire.document(self._http.request(method, path, **arguments))

    @contextlib.contextmanager
    def _caught(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise wire.unreachable(self.url, error) from error


class AsyncClient:
    """`Client` for asyncio: the same methods, to be awaited or iterated over with `async for`."""

    def __init__(self, url: str | None = None, api_key: str | None = None) -> None:
        self.url = wire.address(url)
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=wire.headers(api_key), timeout=wire.PATIENCE
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def create(self, prompt: str, *, idempotency_key: str | None = None, **options: Any) -> Video:
        """See `Client.create`."""
        return await self._post("/v1/videos", wire.request_of(prompt, options, idempotency_key))

    async def remix(
        self, video_id: str, prompt: str, *, idempotency_key: str | None = None, **options: Any
    ) -> Video:
        """See `Client.remix`."""
        return await self._post(
            wire.path_of(video_id, "/remix"), wire.request_of(prompt, options, idempotency_key)
        )

    async def get(self, video_id: str) -> Video:
        """See `Client.get`."""
        return await self._json("GET", wire.path_of(video_id))

    async def list(self, after: str | None = None, limit: int = 20, order: str = "desc") -> dict[str, Any]:
        """See `Client.list`."""
        query = {"limit": limit, "order": order, **({"after": after} if after else {})}
        return await self._json("GET", "/v1/videos", params=query)

    async def delete(self, video_id: str) -> dict[str, Any]:
        """See `Client.delete`."""
        return await self._json("DELETE", wire.path_of(video_id))

    async def models(self) -> Models:
        """See `Client.models`."""
        found: Models = (await self._json("GET", "/v1/models"))["data"]
        return found

    async def events(self, video_id: str, previews: bool = True) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """See `Client.events`."""
        parser, path = wire.Events(), wire.path_of(video_id, "/events")
        try:
            async with self._http.stream(
                "GET", path, params={"previews": str(previews).lower()}, timeout=wire.SILENCE
            ) as answer:
                if not answer.is_success:
                    await answer.aread()
                async for line in wire.checked(answer).aiter_lines():
                    if event := parser.feed(line):
                        yield event
        except httpx.HTTPError as error:
            raise wire.unreachable(self.url, error) from error

    async def wait(self, video_id: str, told: Told | None = None) -> Video:
        """See `Client.wait`."""
        failures = 0
        while True:
            error: ServiceError = Unreachable(f"{self.url} ended the stream of {video_id} too early.")
            try:
                async for name, data in self.events(video_id, previews=False):
                    failures = 0
                    if told:
                        told(name, data)
                    if wire.is_over(name, data):
                        return wire.ended(name, data)
            except (Unreachable, QueueFullError) as broken:
                error = broken
            failures += 1
            if failures > wire.RETRIES:
                raise error
            await asyncio.sleep(wire.pause(error, failures))

    async def download(self, video_id: str, path: str | os.PathLike[str], variant: str = "video") -> Path:
        """See `Client.download`."""
        target = Path(path)
        try:
            async with self._http.stream(
                "GET", wire.path_of(video_id, "/content"), params={"variant": variant}
            ) as answer:
                if not answer.is_success:
                    await answer.aread()
                chunks = wire.checked(answer).aiter_bytes()
                with wire.writing(target) as write:
                    async for chunk in chunks:
                        await asyncio.to_thread(write, chunk)
        except httpx.HTTPError as error:
            raise wire.unreachable(self.url, error) from error
        return target

    async def _post(self, path: str, arguments: dict[str, Any]) -> Video:
        return await self._json("POST", path, **arguments)

    async def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            answer = await self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise wire.unreachable(self.url, error) from error
        return wire.document(answer)
