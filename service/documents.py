"""The OpenAPI document: every answer that can come, and no other."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from reelrt import __version__
from reelrt.service.bodies import FORM_TYPE, JSON_TYPE
from reelrt.service.guards import is_open
from reelrt.service.refusals import ErrorAnswer
from reelrt.service.schemas import UNSUPPORTED, CreateVideo, RemixVideo

FORM = "Form"
REFERENCE = "#/components/schemas/{model}"
ANYWHERE = (400, 403, 408, 413, 421, 500)
"""What the guards before the routes answer, and what nobody hopes for."""
DESCRIPTION = (
    "Videos from text on one device. The routes and fields are OpenAI's and vLLM-Omni's; errors are "
    "`{error: {message, type, param, code}}`."
)


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Statuses that are errors, for a route's `responses`."""
    retry = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return {
        status: {
            "model": ErrorAnswer,
            "description": HTTPStatus(status).phrase,
            **({"headers": retry} if status == 429 else {}),
        }
        for status in statuses
    }


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """A body that is JSON or a form."""
    names = {JSON_TYPE: model.__name__, FORM_TYPE: f"{model.__name__}{FORM}"}
    content = {kind: {"schema": {"$ref": REFERENCE.format(model=name)}} for kind, name in names.items()}
    return {"requestBody": {"required": True, "content": content}}


def _form(schema: dict[str, Any]) -> dict[str, Any]:
    """A model's schema for a form, which has no null, and leaves out what is refused unless null."""
    properties = {
        name: {**each, "anyOf": [one for one in each["anyOf"] if one != {"type": "null"}]}
        if "anyOf" in each
        else each
        for name, each in schema["properties"].items()
        if name not in UNSUPPORTED
    }
    for each in properties.values():
        each.pop("default", None)
    return {**schema, "properties": properties}


def describe(app: FastAPI, with_keys: bool) -> None:
    """Give an application its document.

    Args:
        app: All routes are in it.
        with_keys: Whether the service asks for an API key.
    """
    _, made = models_json_schema(
        [(CreateVideo, "validation"), (RemixVideo, "validation")], ref_template=REFERENCE
    )

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(
                title="ReelRT", version=__version__, description=DESCRIPTION, routes=app.routes
            )
            schemas = found["components"]["schemas"]
            schemas.update(made["$defs"])
            schemas.update({f"{name}{FORM}": _form(schema) for name, schema in made["$defs"].items()})
            for name in ("HTTPValidationError", "ValidationError"):  # they are answered as ErrorAnswer
                schemas.pop(name, None)
            for path, operations in found["paths"].items():
                for operation in operations.values():
                    _complete(operation, with_keys and not is_open(path))
            if with_keys:
                found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
    document()  # now: the first request for it would stall all others


def _complete(operation: dict[str, Any], with_key: bool) -> None:
    answers = operation["responses"]
    answers.pop("422", None)
    content = {JSON_TYPE: {"schema": {"$ref": REFERENCE.format(model=ErrorAnswer.__name__)}}}
    for status in (*ANYWHERE, *((401,) if with_key else ())):
        answers.setdefault(str(status), {"description": HTTPStatus(status).phrase, "content": content})
    if with_key:
        operation["security"] = [{"key": []}]
