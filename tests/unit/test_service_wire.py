"""What the clients of the service make of addresses and of answers that are not the service's."""

from __future__ import annotations

import pytest

from reelrt.errors import InputError, ServiceError

httpx = pytest.importorskip("httpx", reason="the service extra is not installed")

from reelrt import wire  # noqa: E402


@pytest.mark.parametrize(
    "url",
    ["http://[::1", "http://a:99999", "http://a:b", "ftp://a", "http://", "localhost:8000", "http://a\n"],
)
def test_what_is_no_address_is_said_to_be_none(url: str) -> None:
    with pytest.raises(InputError, match="is no address of a service"):
        wire.address(url)


@pytest.mark.parametrize("url", ["http://localhost", "https://[::1]:65535/v1/", "http://a/behind/a/proxy"])
def test_what_is_an_address_is_taken(url: str) -> None:
    assert wire.address(url) == url.rstrip("/").removesuffix("/v1")


@pytest.mark.parametrize("text", ["<html>", "[1]", ""])
def test_an_answer_of_something_else_is_no_traceback(text: str) -> None:
    answer = httpx.Response(200, text=text, request=httpx.Request("GET", "http://a/v1/models"))
    with pytest.raises(ServiceError, match="answers something else than a service"):
        wire.document(answer)
