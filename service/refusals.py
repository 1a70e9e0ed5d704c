"""Errors as OpenAI's API words them: `{"error": {message, type, param, code}}`, whatever went wrong.

Knows statuses and words; not when they are due.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

log = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "request_too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    421: "wrong_host",
    429: "too_many_requests",
    500: "server_error",
    503: "unavailable",
    507: "storage_full",
}


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str = Field(description="One or two sentences: what is wrong, and what to do about it.")
    type: str = Field(description="invalid_request_error, authentication_error, server_error, …")
    param: str | None = Field(description="The field that is wrong, where it is one.")
    code: str = Field(description="The error's name, for programs.")


class ErrorAnswer(BaseModel):
    """The answer to a request that was refused or failed."""

    error: ErrorBody


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: What is wrong, one sentence.
        code: The error's name for programs; by default the status's.
        param: The field that is wrong.
        headers: More headers of the answer: `Retry-After`, say.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status, HTTPStatus(status).name.lower())
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The document that says it."""
        kind = _TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)

    @property
    def raw(self) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Headers and body of the answer, for who speaks ASGI."""
        body = json.dumps(self.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **self.headers}
        return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()], body


def answer_in_this_form(app: FastAPI) -> None:
    """Let every error of an application be answered in this form."""

    @app.exception_handler(Refusal)
    async def refused(_request: Request, error: Refusal) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        messages = {
            404: f"There is nothing at {request.url.path}.",
            405: f"{request.url.path} does not take {request.method}.",
        }
        message = messages.get(error.status_code, str(error.detail))
        headers = {"Allow": _allowed(request)} if error.status_code == 405 else error.headers
        return Refusal(error.status_code, message, headers=headers).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return Refusal(500, "The service failed; its log says where.").response()


def _allowed(request: Request) -> str:
    """The methods that a path takes, those of all its documented routes; a file of the page is read."""
    operations: dict[str, Any] = request.app.openapi()["paths"]
    parts = request.url.path.split("/")
    methods = {
        method.upper()
        for path, each in operations.items()
        if _alike(path.split("/"), parts) and not (parts[-1] == "sync" and path.endswith("}"))
        for method in each
    }
    return ", ".join(sorted(methods or {"GET", "HEAD"}))


def _alike(pattern: list[str], parts: list[str]) -> bool:
    pairs = zip(pattern, parts, strict=False)
    return len(pattern) == len(parts) and all(one in (other, "{video_id}") for one, other in pairs)


def of_validation(errors: Any) -> Refusal:
    """The first of pydantic's errors as a refusal; the rest would follow from it or come next."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(where) or None
    text = str(first["msg"]).removeprefix("Value error, ")
    message = f"{param}: {text}." if param else f"{text}."
    return Refusal(400, message.replace("..", "."), param=param)
