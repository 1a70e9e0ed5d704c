"""What stands before every route: keys, hosts, sizes and times of bodies, and the headers of every answer.

Pure ASGI. Knows nothing of videos, and reads no body: it counts what passes by.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reelrt.service.refusals import Refusal

OPEN_PATHS = ("/", "/health", "/ready", "/openapi.json")
"""What needs no key, beside the page's files: nothing there is anybody's."""
PAGE = "/page/"
ANONYMOUS = ""
"""Who asks when no key is needed."""

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


def is_loopback(host: str) -> bool:
    """Whether a host, a name or an address, is this machine alone."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def owner_of(key: str) -> str:
    """The name a key's jobs and limits are kept under; the key cannot be read off it."""
    return "key-" + hashlib.sha256(key.encode()).hexdigest()[:12]


def owner_for(header: str, keys: Sequence[str]) -> str | None:
    """Who sends an `Authorization` header; None where its key is none of the keys.

    Every key is compared with, each in the same time, whichever is right.
    """
    if not keys:
        return ANONYMOUS
    scheme, _, given = header.partition(" ")
    found = None
    for key in keys:
        if hmac.compare_digest(key.encode(), given.strip().encode("utf-8", "surrogateescape")):
            found = owner_of(key)
    return found if scheme.lower() == "bearer" else None


class Keys:
    """Asks for an API key, as `Authorization: Bearer KEY`, and says who is asking.

    Sets `scope["state"]["owner"]`.

    Args:
        app: What is guarded.
        keys: The keys that are good; none: everybody may.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        header = Headers(scope=scope).get("authorization", "")
        owner = ANONYMOUS if is_open(scope["path"]) else owner_for(header, self._keys)
        if owner is None:
            challenge = {"WWW-Authenticate": 'Bearer realm="reelrt"'}
            await refuse(Refusal(401, "The API key is missing or wrong.", headers=challenge), send)
            return
        scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith(PAGE)


class SameSite:
    """Refuses what another site's page makes a browser send.

    A page elsewhere must neither reach a service without a key through a name of its own that resolves
    to this machine (so a loopback service answers to loopback names alone), nor post forms to it.

    Args:
        app: What is guarded.
        loopback: Whether the service listens on a loopback address without a key.
    """

    def __init__(self, app: ASGIApp, loopback: bool) -> None:
        self._app, self._loopback = app, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 421 or 403, or pass the request on."""
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            await refuse(refusal, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._loopback and not is_loopback(_hostname(f"//{host}")):
            return Refusal(421, f"This service answers to localhost, not to {host[:100]!r}.")
        origin = headers.get("origin")
        if origin is None:
            foreign = headers.get("sec-fetch-site") == "cross-site" and scope["method"] not in ("GET", "HEAD")
        else:
            foreign = _netloc(origin) != host.lower()
        return Refusal(403, "Pages of other sites may not use this service.") if foreign else None


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _netloc(url: str) -> str:
    """Host and port of a URL; empty where there is none."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""


class Bodies:
    """Ends requests whose body is too large or comes too slowly.

    Args:
        app: What is guarded.
        most: Largest body, in bytes.
        seconds: Longest time from the first byte of the head to the last one of the body.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413 or 408, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most:
            await refuse(self._too_large(), send)
            return
        ends, seen, started, over = time.monotonic() + self._seconds, 0, False, False

        async def counted() -> Message:
            nonlocal seen, over
            if over:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, ends - time.monotonic()))
            except asyncio.TimeoutError:
                text = f"The body took longer than {self._seconds:g} seconds."
                raise Refusal(408, text, headers={"Connection": "close"}) from None
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise self._too_large()
            over = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except Refusal as refusal:
            if started:
                raise
            await refuse(refusal, send)

    def _too_large(self) -> Refusal:
        return Refusal(413, f"The body is larger than {self._most} bytes.", headers={"Connection": "close"})


class SecurityHeaders:
    """Adds to every answer what tells a browser to trust nothing else."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str] = SECURITY_HEADERS) -> None:
        self._app = app
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._headers]
            await send(message)

        await self._app(scope, receive, headed if scope["type"] == "http" else send)


async def refuse(refusal: Refusal, send: Send) -> None:
    """Send a refusal as the whole answer."""
    headers, body = refusal.raw
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
