"""What both clients of the service share: addresses, requests, errors, events. Opens no connection."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
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


def headers(key: str | None) -> dict[str, str]:
    """The header that carries a key; none where there is no key."""
    key = os.environ.get(KEY_VARIABLE) if key is None else key
    return {"Authorization": f"Bearer {key}"} if key else {}


def address(url: str | None) -> str:
    """The address of a service, without its last `/v1`.

    Raises:
        InputError: It is none.
    """
    url = (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")
    try:
        parsed = httpx.URL(url)
        good = parsed.scheme in ("http", "https") and bool(parsed.host) and (parsed.port or 0) < 65536
    except httpx.InvalidURL:
        good = False
    if not good:
        raise InputError(f"{url!r} is no address of a service.", f"Write {DEFAULT_URL}, say.")
    return url.removesuffix("/v1")


def path_of(video_id: str, rest: str = "") -> str:
    """The path of a video, whatever its id is made of."""
    return f"/v1/videos/{quote(video_id, safe='')}{rest}"


def request_of(prompt: str, options: Mapping[str, Any], idempotency_key: str | None) -> dict[str, Any]:
    """Arguments of a POST. The key makes it safe to send it again when no answer came."""
    body = {"prompt": prompt, **{name: value for name, value in options.items() if value is not None}}
    return {"json": body, "headers": {"Idempotency-Key": idempotency_key or secrets.token_hex(16)}}


def checked(answer: httpx.Response) -> httpx.Response:
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


def unreachable(url: str, error: Exception) -> Unreachable:
    """The error for a service that does not answer."""
    return Unreachable(
        f"no service answers at {url}: {error or type(error).__name__}.",
        "Start one with `reelrt serve`, or name another with --url.",
    )


def document(answer: httpx.Response) -> dict[str, Any]:
    """The object that an answer holds.

    Raises:
        ServiceError: What the service says, or that it is none: something else answers there.
    """
    try:
        found = checked(answer).json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ServiceError(f"{answer.request.url} answers something else than a service.", "Is --url right?")
    return found


class Events:
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


def is_over(name: str, data: Mapping[str, Any]) -> bool:
    """Whether an event is the last one."""
    return name == "deleted" or (name == "video" and data["status"] in ENDS)


def ended(name: str, data: dict[str, Any]) -> Video:
    """The video of a last event.

    Raises:
        NotFoundError: It was deleted.
    """
    if name == "deleted":
        raise NotFoundError(f"{data['id']} was deleted.")
    return data


def pause(error: Exception, failures: int) -> float:
    """Seconds to wait before another try."""
    return error.retry_after if isinstance(error, QueueFullError) else FIRST_PAUSE * 2.0 ** (failures - 1)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[Callable[[bytes], object]]:
    """Where to write a file's bytes; it takes its place when all went well."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_files([target]) as (partial,), partial.open("wb") as file:
            yield file.write
    except OSError as error:
        name = getattr(error, "filename", None) or target
        raise InputError(f"cannot write {name}: {error.strerror or error}.") from error
