"""The HTTP door of a real service with keys and narrow limits: what it refuses, and in what words."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.serving import KEYS, SMALL, Served, finished, http, make, serving

pytest.importorskip("uvicorn", reason="the service extra is not installed")

MOST_BODY = 131_072
STREAMS, CONNECTIONS, MANY = 2, 32, 16
LONG = {"num_frames": 16, "num_inference_steps": 100}


@pytest.fixture(scope="module")
def served(tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = {
        "most_body": MOST_BODY,
        "body_seconds": 1,
        "sync_seconds": 0.5,
        "streams": STREAMS,
        "connections": CONNECTIONS,
        "queue": 2,
        "slots": 1,
    }
    folder = tmp_path_factory.mktemp("guarded")
    with serving(tiny_engines, folder / "data", api_keys=",".join(KEYS), **limits) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    """Of the first key; what it made is gone afterwards."""
    with http(served, KEYS[0]) as client:
        yield client
        for video in client.get("/v1/videos", params={"limit": 100}).json()["data"]:
            client.delete(f"/v1/videos/{video['id']}")


def error_of(answer: httpx.Response) -> tuple[int, str]:
    """Status and code, after a look at the form."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return answer.status_code, error["code"]


JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


def field(name: str, value: bytes, rest: bytes = b"") -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="' + name.encode() + b'"' + rest
    return head + b"\r\n\r\n" + value + b"\r\n"


@pytest.mark.parametrize(
    ("headers", "body", "status", "param"),
    [
        (JSON, b"{", 400, None),
        (JSON, b"", 400, None),
        (JSON, b"[]", 400, None),
        (JSON, b'{"prompt": "\xff\xfe"}', 400, None),
        (JSON, b'{"prompt": "\\ud800"}', 400, None),
        (JSON, b"[" * 2000, 400, None),
        (JSON, b"{}", 400, "prompt"),
        (JSON, b'{"prompt": " "}', 400, None),
        (JSON, b'{"prompt": 3}', 400, "prompt"),
        (JSON, b'{"prompt": "a\\u0000b"}', 400, "prompt"),
        (JSON, b'{"prompt": "x", "steps": 3}', 400, "steps"),
        (JSON, b'{"prompt": "x", "num_inference_steps": 0}', 400, "num_inference_steps"),
        (JSON, b'{"prompt": "x", "num_inference_steps": 60000}', 400, "num_inference_steps"),
        (JSON, b'{"prompt": "x", "num_inference_steps": true}', 400, "num_inference_steps"),
        (JSON, b'{"prompt": "x", "guidance_scale": NaN}', 400, "guidance_scale"),
        (JSON, b'{"prompt": "x", "seed": 9223372036854775808}', 400, "seed"),
        (JSON, b'{"prompt": "x", "size": "64x48", "width": 64, "height": 64}', 400, None),
        (JSON, b'{"prompt": "x", "size": "99999x99999"}', 400, None),
        (JSON, b'{"prompt": "x", "size": "../x"}', 400, "size"),
        (JSON, b'{"prompt": "x", "seconds": "4", "num_frames": 2}', 400, None),
        (JSON, b'{"prompt": "x", "solver": "../../etc/passwd"}', 400, "solver"),
        (JSON, b'{"prompt": "x", "output_path": "/tmp/x.mp4"}', 400, "output_path"),
        (JSON, b'{"prompt": "x", "lora": "a"}', 400, "lora"),
        (
            JSON,
            b'{"prompt": "x", "input_reference": {"image_url": "file:///etc/passwd"}}',
            400,
            "input_reference",
        ),
        (JSON, b'{"prompt": "x", "model": "none such"}', 404, None),
        ({"Content-Type": "text/plain"}, b"x", 415, None),
        ({}, b"x", 415, None),
        (FORM, b"", 400, None),
        (FORM, field("prompt", b"x") + field("prompt", b"y") + b"--x--", 400, "prompt"),
        (FORM, field("prompt", b"\xff") + b"--x--", 400, None),
        (
            FORM,
            field("prompt", b"x") + field("input_reference", b"y", b'; filename="../../y"') + b"--x--",
            400,
            None,
        ),
        (FORM, b"".join(field(f"f{number}", b"") for number in range(70)) + b"--x--", 400, None),
        ({"Content-Type": "multipart/form-data"}, field("prompt", b"x") + b"--x--", 400, None),
        (JSON, b'{"prompt": "' + b"x" * MOST_BODY + b'"}', 413, None),
    ],
)
def test_wrong_bodies_are_refused_by_name(
    client: httpx.Client, headers: dict[str, str], body: bytes, status: int, param: str | None
) -> None:
    answer = client.post("/v1/videos", content=body, headers=headers)
    assert error_of(answer)[0] == status, answer.text
    if param:
        assert answer.json()["error"]["param"] == param
    assert client.get("/v1/videos").json()["data"] == []


@pytest.mark.parametrize(
    "video_id",
    [
        "..",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "..%5c..%5cx",
        "video_%00",
        "%ff%fe",
        "x" * 5000,
        "video_' OR 1=1 --",
    ],
)
def test_no_id_leads_to_a_file(client: httpx.Client, video_id: str) -> None:
    for path in ("", "/content", "/events", "/remix"):
        url = httpx.URL(
            str(client.base_url), raw_path=f"/v1/videos/{video_id}{path}".replace(" ", "%20").encode()
        )
        answer = client.post(url, json={"prompt": "x"}) if path == "/remix" else client.get(url)
        assert error_of(answer) == (404, "not_found"), answer.text


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/videos", "GET, POST"),
        ("POST", "/health", "GET"),
        ("GET", "/v1/videos/sync", "POST"),
        ("POST", "/", "GET, HEAD"),
    ],
)
def test_other_methods_are_told_which_ones_there_are(
    client: httpx.Client, method: str, path: str, allowed: str
) -> None:
    answer = client.request(method, path)
    assert (error_of(answer), answer.headers["allow"]) == ((405, "method_not_allowed"), allowed)


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up", "after=video_none"])
def test_wrong_pages_are_refused(client: httpx.Client, query: str) -> None:
    assert error_of(client.get(f"/v1/videos?{query}"))[0] in (400, 404)


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer wrong", f"Basic {KEYS[0]}", f"Bearer {KEYS[0]}x", "Bearer \xe9"]
)
def test_a_wrong_key_opens_nothing(served: Served, header: str) -> None:
    with http(served) as anybody:
        headers = {b"Authorization": header.encode("latin-1")} if header else {}
        for path in ("/v1/videos", "/v1/models", "/metrics", "/v1/videos/x/events"):
            answer = anybody.get(path, headers=headers)
            assert error_of(answer) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"].startswith("Bearer")
        for path in ("/", "/health", "/ready", "/openapi.json", "/page/main.js"):
            assert anybody.get(path).status_code == 200


def test_one_key_sees_nothing_of_another(served: Served, client: httpx.Client) -> None:
    video = finished(client, make(client, "mine"))
    with http(served, KEYS[1]) as other:
        assert other.get("/v1/videos").json()["data"] == []
        for path in ("", "/content", "/events"):
            assert error_of(other.get(f"/v1/videos/{video['id']}{path}"))[0] == 404
        assert error_of(other.delete(f"/v1/videos/{video['id']}"))[0] == 404
    assert client.get(f"/v1/videos/{video['id']}").status_code == 200


def test_a_full_queue_says_when_to_come_again(client: httpx.Client) -> None:
    answers = [client.post("/v1/videos", json={"prompt": f"long {n}", **LONG}) for n in range(6)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) >= 2
    assert error_of(refused[0])[0] == 429
    assert int(refused[0].headers["retry-after"]) >= 1
    taken = [client.get(f"/v1/videos/{each.json()['id']}").json() for each in answers if each.is_success]
    positions = [video["queue_position"] for video in taken if video["status"] == "queued"]
    about_to_start = positions[:2] == [0, 0]  # and so out of the line
    assert positions[about_to_start:] == list(range(len(positions) - about_to_start))


def test_event_streams_are_limited_and_given_back(client: httpx.Client) -> None:
    video = make(client, "watched by many", **LONG)
    url = f"/v1/videos/{video['id']}/events"
    with ExitStack() as open_ones:
        streams = [open_ones.enter_context(client.stream("GET", url)).iter_lines() for _ in range(STREAMS)]
        assert {next(stream) for stream in streams} == {"retry: 2000"}
        with ThreadPoolExecutor(MANY) as pool:
            crowd = [pool.submit(client.get, url) for _ in range(50)]
            while not all(each.done() for each in crowd):
                for path in ("/health", "/v1/videos", f"/v1/videos/{video['id']}"):
                    assert client.get(path).status_code == 200
        refused = [each.result() for each in crowd]
        assert {error_of(answer) for answer in refused} == {(429, "too_many_requests")}
        assert {answer.headers["retry-after"] for answer in refused} == {"5"}
    ends = time.monotonic() + 10
    while True:
        with client.stream("GET", url) as answer:
            if answer.status_code == 200:
                return
        assert time.monotonic() < ends, "a closed stream still counts"
        time.sleep(0.1)


def raw(served: Served, head: str, *parts: bytes, pause: float = 0.0) -> bytes:
    """What is answered to bytes as they are, sent in parts."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        for part in parts:
            time.sleep(pause)
            try:
                connection.sendall(part)
            except OSError:
                break
        answer = b""
        with suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                answer += chunk
        return answer


POST = "\n".join(
    [
        "POST /v1/videos HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {KEYS[0]}",
        "Content-Type: application/json",
        "",
    ]
)


def test_a_slow_body_is_not_waited_for(served: Served) -> None:
    began = time.monotonic()
    answer = raw(served, f"{POST}Content-Length: 100\n\n", *[b"{"] * 50, pause=0.2)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("parts", [[], [b"X-Slow: 1\r\n"] * 30], ids=["silent", "slow"])
def test_a_head_that_does_not_end_is_not_waited_for(served: Served, parts: list[bytes]) -> None:
    began = time.monotonic()
    assert raw(served, "GET /health HTTP/1.1\nHost: localhost\n", *parts, pause=0.2) == b""
    assert time.monotonic() - began < 15


def test_connections_are_limited_and_given_back(served: Served, client: httpx.Client) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with ExitStack() as open_ones:
        for _ in range(3 * CONNECTIONS):
            open_ones.enter_context(socket.create_connection((host, int(port)), timeout=20))
        ends = time.monotonic() + 15  # silent ones are closed after a second
        while not answers(client):
            assert time.monotonic() < ends, "silent connections keep the others out"
            time.sleep(0.1)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.HTTPError:
        return False


def test_a_body_without_end_is_cut_off(served: Served) -> None:
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    answer = raw(served, f"{POST}Transfer-Encoding: chunked\n\n", *[chunk] * 10)
    assert answer.startswith(b"HTTP/1.1 413 ")
    huge = raw(served, f"{POST}Content-Length: 99999999999999\n\n")
    assert huge.startswith(b"HTTP/1.1 413 ")


def test_pages_of_other_sites_are_refused(served: Served, client: httpx.Client) -> None:
    body = {"prompt": "x", **SMALL}
    foreign = client.post("/v1/videos", json=body, headers={"Origin": "https://elsewhere.example"})
    assert error_of(foreign) == (403, "forbidden")
    own = client.post("/v1/videos", json=body, headers={"Origin": served.url})
    assert own.status_code == 200


def test_without_a_key_only_names_of_this_machine_are_answered(tiny_engines: Path, tmp_path: Path) -> None:
    with serving(tiny_engines, tmp_path / "data") as served, http(served) as client:
        rebound = client.get("/v1/videos", headers={"Host": "attacker.example"})
        assert error_of(rebound) == (421, "wrong_host")
        for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
            assert client.get("/v1/videos", headers={"Host": host}).status_code == 200


def test_every_answer_is_in_the_openapi_document(
    served: Served, client: httpx.Client, tmp_path: Path
) -> None:
    pytest.importorskip("schemathesis")
    assert client.get("/v1/videos").json()["data"] == []
    # What a model takes (sizes, frames, solvers) is no part of the document, so valid forms may be refused.
    unsaid = ["--exclude-checks", "positive_data_acceptance", "--warnings", "off"]
    words = [
        f"{served.url}/openapi.json",
        "--checks",
        "all",
        *unsaid,
        "--phases",
        "coverage,stateful",
        "-n",
        "3",
        "--seed",
        "1",
        "--no-color",
    ]
    key = ["-H", f"Authorization: Bearer {KEYS[0]}", "--request-timeout", "60", "--max-response-time", "60"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", *words, *key]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, "\n".join(line[:400] for line in result.stdout.splitlines())
    assert "Tested: 13" in result.stdout
