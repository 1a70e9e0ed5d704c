"""Reading a request's body: JSON or a form, into a checked request."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from reelrt.service.refusals import Refusal, of_validation

JSON_TYPE = "application/json"
FORM_TYPE = "multipart/form-data"
MOST_FIELDS = 64

Model = TypeVar("Model", bound=BaseModel)


async def read(request: Request, model: type[Model]) -> Model:
    """Read and check a body.

    Raises:
        Refusal: 400 for a wrong one, 415 for another media type, 408 and 413 from the guards.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == JSON_TYPE:
            return model.model_validate_json(await request.body(), strict=True)
        if kind == FORM_TYPE:
            return model.model_validate(await _form(request))
    except ValidationError as error:
        raise of_validation(error.errors(include_url=False, include_context=False)) from error
    raise Refusal(415, f"The body is {kind[:100] or 'of no type'}; send {JSON_TYPE} or {FORM_TYPE}.")


async def _form(request: Request) -> dict[str, object]:
    """The fields of a form, each text once; a file is refused."""
    body = await request.body()
    fields: dict[str, object] = {}
    async with request.form(max_files=MOST_FIELDS, max_fields=MOST_FIELDS) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                raise Refusal(
                    400, f"{name[:100]}: files are not supported here; leave it out.", param=name[:100]
                )
            if name in fields:
                raise Refusal(400, f"{name[:100]}: it is given more than once.", param=name[:100])
            fields[name] = value
    try:
        body.decode()
    except UnicodeDecodeError:
        raise Refusal(400, "The body is not UTF-8.") from None
    return fields
