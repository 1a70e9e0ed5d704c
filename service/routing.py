"""What the routes share: whose service, whose request, and how an answer is written."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from reelrt.service.jobservice import VideoService


async def service_of(request: Request) -> VideoService:
    """The job service of the application."""
    service: VideoService = request.app.state.service
    return service


async def owner_of(request: Request) -> str:
    """Who is asking."""
    return str(request.state.owner)


Service = Annotated[VideoService, Depends(service_of)]
Owner = Annotated[str, Depends(owner_of)]


def json_of(answer: BaseModel) -> JSONResponse:
    """An answer that nobody keeps: the next one may differ."""
    return JSONResponse(answer.model_dump(mode="json"), headers={"Cache-Control": "no-store"})
