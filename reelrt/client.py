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
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from reelrt.bundle.files import atomic_files
from reelrt.errors import ConflictError, InputError, NotFoundError, QueueFullError, ServiceError

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE, KEY_VARIABLE = "REELRT_URL", "REELRT_API_KEY"
ENDS = ("completed", "failed", "deleted")
PATIENCE = httpx.Timeout(30.0)
SILENCE = httpx.Timeout(30.0, read=60.0)
"""An event stream says something every 15 seconds."""
RETRIES, FIRST_PAUSE = 5, 0.5

Video = dict[str, Any]
"""The service's object of a video; docs/service.md has its fields."""
Models = list[dict[str, Any]]
Told = Callable[[str, dict[str, Any]], None]
"""Called with the name and the data of each event."""


class Unreachable(ServiceError):
    """No service answers at an address."""


def _headers(key: str | None) -> dict[str, str]:
    key = os.environ.get(KEY_VARIABLE) if key is None else key
    return {"Authorization": f"Bearer {key}"} if key else {}


def _address(url: str | None) -> str:
    url = (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url!r} is no address of a service.", f"Write {DEFAULT_URL}, say.")
    return url.removesuffix("/v1")


def _path(video_id: str, rest: str = "") -> str:
    return f"/v1/videos/{quote(video_id, safe='')}{rest}"


def _request(prompt: str, options: Mapping[str, Any], idempotency_key: str | None) -> dict[str, Any]:
    """Arguments of a POST. The key makes it safe to send it again when no answer came."""
    body = {"prompt": prompt, **{name: value for name, value in options.items() if value is not None}}
    return {"json": body, "headers": {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}}


def _checked(answer: httpx.Response) -> httpx.Response:
    """The answer, if it is none of an error; its body has been read.

    Raises:
        ServiceError: What the service says.
    """
    if answer.is_success:
        return answer
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"{answer.request.url} answered {answer.status_code} {answer.reason_phrase}."
    if answer.status_code == 429:
        raise QueueFullError(message.partition(" Try again")[0], float(answer.headers.get("retry-after", 1)))
    kinds: dict[int, type[ServiceError | InputError]] = {
        400: InputError,
        404: NotFoundError,
        409: ConflictError,
    }
    raise kinds.get(answer.status_code, ServiceError)(message)


def _unreachable(url: str, error: Exception) -> Unreachable:
    return Unreachable(
        f"no service answers at {url}: {error or type(error).__name__}.",
        "Start one with `reelrt serve`, or name another with --url.",
    )


class _Events:
    """Lines of a stream of server-sent events to events."""

    def __init__(self) -> None:
        self._name, self._data = "message", ""

    def feed(self, line: str) -> tuple[str, dict[str, Any]] | None:
        """The event that a line ends, if it ends one."""
        if not line:
            done = (self._name, json.loads(self._data)) if self._data else None
            self._name, self._data = "message", ""
            return done
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            self._name = value
        elif field == "data":
            self._data += value
        return None


def _over(name: str, data: Mapping[str, Any]) -> bool:
    return name == "deleted" or (name == "video" and data["status"] in ENDS)


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
        self.url = _address(url)
        self._http = httpx.Client(base_url=self.url, headers=_headers(api_key), timeout=PATIENCE)

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
        return self._post("/v1/videos", _request(prompt, options, idempotency_key))

    def remix(
        self, video_id: str, prompt: str, *, idempotency_key: str | None = None, **options: Any
    ) -> Video:
        """Ask for a variation of a finished video; `remix_from` is the share that is taken over."""
        return self._post(_path(video_id, "/remix"), _request(prompt, options, idempotency_key))

    def get(self, video_id: str) -> Video:
        """A video as it is now."""
        return self._json("GET", _path(video_id))

    def list(self, after: str | None = None, limit: int = 20, order: str = "desc") -> dict[str, Any]:
        """A page of videos: `data`, `has_more`, `last_id`."""
        query = {"limit": limit, "order": order, **({"after": after} if after else {})}
        return self._json("GET", "/v1/videos", params=query)

    def delete(self, video_id: str) -> dict[str, Any]:
        """Cancel a video and remove it."""
        return self._json("DELETE", _path(video_id))

    def models(self) -> Models:
        """The models and what they take."""
        found: Models = self._json("GET", "/v1/models")["data"]
        return found

    def events(self, video_id: str, previews: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events of a video until it is over: `video`, `preview` or `deleted`, and their data."""
        parser, path = _Events(), _path(video_id, "/events")
        with (
            self._caught(),
            self._http.stream(
                "GET", path, params={"previews": str(previews).lower()}, timeout=SILENCE
            ) as answer,
        ):
            if not answer.is_success:
                answer.read()
            for line in _checked(answer).iter_lines():
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
                    if _over(name, data):
                        return _ended(name, data)
            except (Unreachable, QueueFullError) as broken:
                error = broken
            failures += 1
            if failures > RETRIES:
                raise error
            time.sleep(_pause(error, failures))

    def download(self, video_id: str, path: str | os.PathLike[str], variant: str = "video") -> Path:
        """Write a file of a finished video; it appears whole or not at all."""
        target = Path(path)
        with (
            self._caught(),
            self._http.stream("GET", _path(video_id, "/content"), params={"variant": variant}) as answer,
        ):
            if not answer.is_success:
                answer.read()
            chunks = _checked(answer).iter_bytes()
            with _writing(target) as write:
                for chunk in chunks:
                    write(chunk)
        return target

    def _post(self, path: str, arguments: dict[str, Any]) -> Video:
        return self._json("POST", path, **arguments)

    def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        with self._caught():
            found: dict[str, Any] = _checked(self._http.request(method, path, **arguments)).json()
        return found

    @contextlib.contextmanager
    def _caught(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise _unreachable(self.url, error) from error


class AsyncClient:
    """`Client` for asyncio: the same methods, to be awaited or iterated over with `async for`."""

    def __init__(self, url: str | None = None, api_key: str | None = None) -> None:
        self.url = _address(url)
        self._http = httpx.AsyncClient(base_url=self.url, headers=_headers(api_key), timeout=PATIENCE)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def create(self, prompt: str, *, idempotency_key: str | None = None, **options: Any) -> Video:
        """See `Client.create`."""
        return await self._post("/v1/videos", _request(prompt, options, idempotency_key))

    async def remix(
        self, video_id: str, prompt: str, *, idempotency_key: str | None = None, **options: Any
    ) -> Video:
        """See `Client.remix`."""
        return await self._post(_path(video_id, "/remix"), _request(prompt, options, idempotency_key))

    async def get(self, video_id: str) -> Video:
        """See `Client.get`."""
        return await self._json("GET", _path(video_id))

    async def list(self, after: str | None = None, limit: int = 20, order: str = "desc") -> dict[str, Any]:
        """See `Client.list`."""
        query = {"limit": limit, "order": order, **({"after": after} if after else {})}
        return await self._json("GET", "/v1/videos", params=query)

    async def delete(self, video_id: str) -> dict[str, Any]:
        """See `Client.delete`."""
        return await self._json("DELETE", _path(video_id))

    async def models(self) -> Models:
        """See `Client.models`."""
        found: Models = (await self._json("GET", "/v1/models"))["data"]
        return found

    async def events(self, video_id: str, previews: bool = True) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """See `Client.events`."""
        parser, path = _Events(), _path(video_id, "/events")
        try:
            async with self._http.stream(
                "GET", path, params={"previews": str(previews).lower()}, timeout=SILENCE
            ) as answer:
                if not answer.is_success:
                    await answer.aread()
                async for line in _checked(answer).aiter_lines():
                    if event := parser.feed(line):
                        yield event
        except httpx.HTTPError as error:
            raise _unreachable(self.url, error) from error

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
                    if _over(name, data):
                        return _ended(name, data)
            except (Unreachable, QueueFullError) as broken:
                error = broken
            failures += 1
            if failures > RETRIES:
                raise error
            await asyncio.sleep(_pause(error, failures))

    async def download(self, video_id: str, path: str | os.PathLike[str], variant: str = "video") -> Path:
        """See `Client.download`."""
        target = Path(path)
        try:
            async with self._http.stream(
                "GET", _path(video_id, "/content"), params={"variant": variant}
            ) as answer:
                if not answer.is_success:
                    await answer.aread()
                chunks = _checked(answer).aiter_bytes()
                with _writing(target) as write:
                    async for chunk in chunks:
                        await asyncio.to_thread(write, chunk)
        except httpx.HTTPError as error:
            raise _unreachable(self.url, error) from error
        return target

    async def _post(self, path: str, arguments: dict[str, Any]) -> Video:
        return await self._json("POST", path, **arguments)

    async def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            answer = await self._http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise _unreachable(self.url, error) from error
        found: dict[str, Any] = _checked(answer).json()
        return found


def _ended(name: str, data: dict[str, Any]) -> Video:
    if name == "deleted":
        raise NotFoundError(f"{data['id']} was deleted.")
    return data


def _pause(error: Exception, failures: int) -> float:
    return error.retry_after if isinstance(error, QueueFullError) else FIRST_PAUSE * 2.0 ** (failures - 1)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[Callable[[bytes], object]]:
    """Where to write a file's bytes; it takes its place when all went well."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_files([target]) as (partial,), partial.open("wb") as file:
            yield file.write
    except OSError as error:
        name = getattr(error, "filename", None) or target
        raise InputError(f"cannot write {name}: {error.strerror or error}.") from error
