"""The page's files: read once, from this package; no path of a request ever reaches the disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from reelrt.service.refusals import Refusal

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
INDEX = "index.html"


def page_routes() -> APIRouter:
    """`/` and `/page/NAME`, which the OpenAPI document leaves out."""
    router = APIRouter(include_in_schema=False)
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in TYPES}
    tags = {name: f'"{hashlib.sha256(body).hexdigest()[:32]}"' for name, body in files.items()}

    def answer(name: str, request: Request) -> Response:
        if name not in files:
            raise Refusal(404, f"There is nothing at {request.url.path[:200]}.")
        headers = {"ETag": tags[name], "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(files[name], media_type=TYPES[Path(name).suffix], headers=headers)

    @router.get("/")
    @router.head("/")
    async def page(request: Request) -> Response:
        return answer(INDEX, request)

    @router.get("/page/{name}")
    @router.head("/page/{name}")
    async def part(name: str, request: Request) -> Response:
        return answer(name, request)

    return router
