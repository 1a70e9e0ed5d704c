"""Files as answers: whole, or the ranges that were asked for; errors in the service's form."""

from __future__ import annotations

import os
from pathlib import Path

from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from reelrt.service.refusals import Refusal

KEPT_SECONDS = 3600
"""How long a browser may keep a file; it never changes under its id."""
_SAYS = {400: "The Range header is malformed.", 416: "The file has no such range."}


class RangeFile(FileResponse):
    """A `FileResponse` whose refusals are the service's.

    Args:
        path: A file that no client named.
        media_type: Its media type.
        name: What a browser saves it as.
    """

    def __init__(self, path: Path, media_type: str, name: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(
            path,
            media_type=media_type,
            filename=name,
            content_disposition_type="inline",
            stat_result=os.stat(path),  # noqa: PTH116 (what Starlette wants)
            headers={"cache-control": f"private, max-age={KEPT_SECONDS}, immutable", **(headers or {})},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file, a part of it, or a refusal."""
        refused = False

        async def translated(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in _SAYS:
                refused = True
                size = self.headers["content-length"]
                headers = {"Content-Range": f"bytes */{size}"} if message["status"] == 416 else {}
                answer = Refusal(message["status"], _SAYS[message["status"]], headers=headers)
                raw, body = answer.raw
                await send({"type": "http.response.start", "status": answer.status, "headers": raw})
                await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
            elif not refused:
                await send(message)

        await super().__call__(scope, receive, translated)
