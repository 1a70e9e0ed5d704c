"""The HTTP door of a real service: what a client meets when all goes well."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

import reelrt
from tests.serving import SMALL, Served, events_of, finished, http, make, serving

pytest.importorskip("uvicorn", reason="the service extra is not installed")

PROMPT = "a red circle moving right on a black background"


@pytest.fixture(scope="module")
def served(tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tiny_engines, tmp_path_factory.mktemp("service") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    with http(served) as client:
        yield client


def test_a_video_from_request_to_file(served: Served, client: httpx.Client, tmp_path: Path) -> None:
    asked = make(client, PROMPT, seed=7, negative_prompt="blue", guidance_scale=3, solver="euler", fps=4)
    assert asked["object"] == "video"
    assert asked["status"] in ("queued", "in_progress", "completed")
    done = finished(client, asked)
    told = {name: done[name] for name in asked if name in ("seed", "prompt", "negative_prompt", "solver")}
    assert told == {"seed": 7, "prompt": PROMPT, "negative_prompt": "blue", "solver": "euler"}
    assert (done["status"], done["progress"], done["error"], done["queue_position"]) == (
        "completed",
        100,
        None,
        None,
    )
    assert (done["num_frames"], done["seconds"], done["size"]) == (
        2,
        "0.5",
        f"{done['width']}x{done['height']}",
    )
    assert done["created_at"] <= done["completed_at"] < done["expires_at"]
    assert done["inference_time_s"] > 0
    assert {"text", "denoise", "decode", "encode"} <= set(done["stage_durations"])

    file = client.get(f"/v1/videos/{done['id']}/content")
    assert (file.status_code, file.headers["content-type"]) == (200, "video/mp4")
    path = tmp_path / "made.mp4"
    path.write_bytes(file.content)
    made = reelrt.read_metadata(path)
    assert (made["prompt"], made["seed"], made["frames"], made["solver"]) == (PROMPT, 7, 2, "euler")

    for variant in ("thumbnail", "spritesheet"):
        picture = client.get(f"/v1/videos/{done['id']}/content", params={"variant": variant})
        assert picture.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(picture.content)).width >= done["width"]


def test_parts_of_a_file(client: httpx.Client) -> None:
    video = finished(client, make(client, "parts"))
    url = f"/v1/videos/{video['id']}/content"
    whole = client.get(url)
    part = client.get(url, headers={"Range": "bytes=10-29"})
    assert (part.status_code, part.content) == (206, whole.content[10:30])
    assert part.headers["content-range"] == f"bytes 10-29/{len(whole.content)}"
    end = client.get(url, headers={"Range": "bytes=-5", "If-Range": whole.headers["etag"]})
    assert (end.status_code, end.content) == (206, whole.content[-5:])
    changed = client.get(url, headers={"Range": "bytes=0-1", "If-Range": '"other"'})
    assert (changed.status_code, changed.content) == (200, whole.content)
    beyond = client.get(url, headers={"Range": f"bytes={len(whole.content)}-"})
    assert (beyond.status_code, beyond.json()["error"]["code"]) == (416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == f"bytes */{len(whole.content)}"
    assert client.get(url, headers={"Range": "lines=1-2"}).json()["error"]["code"] == "invalid_request"
    head = client.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))


def test_json_and_form_ask_for_the_same_video(client: httpx.Client) -> None:
    fields = {"prompt": PROMPT, "seed": 3, **SMALL}
    by_json = finished(client, client.post("/v1/videos", json=fields).json())
    form = {name: (None, str(value)) for name, value in fields.items()}
    by_form = finished(client, client.post("/v1/videos", files=form).json())
    files = [client.get(f"/v1/videos/{each['id']}/content").content for each in (by_json, by_form)]
    assert by_json["id"] != by_form["id"]
    assert files[0] == files[1]
    assert "result" in by_form["reused"]


def test_sync_answers_the_file_and_how_it_was_made(client: httpx.Client) -> None:
    answer = client.post("/v1/videos/sync", json={"prompt": "at once", "format": "webm", **SMALL})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/webm")
    video = client.get(f"/v1/videos/{answer.headers['x-request-id']}").json()
    assert (video["status"], str(video["seed"])) == ("completed", answer.headers["x-seed"])
    assert answer.content == client.get(f"/v1/videos/{video['id']}/content").content


def test_seconds_and_sizes_say_the_same_as_frames_and_pixels(client: httpx.Client) -> None:
    limits = client.get("/v1/models").json()["data"][0]["limits"]
    least = limits["size_multiple"] * -(-limits["width"]["minimum"] // limits["size_multiple"])
    video = make(client, "short", num_frames=None, seconds="0.5", fps=6, size=f"{least}x{least}")
    assert (video["num_frames"], video["width"], video["height"]) == (3, least, least)
    assert video["seconds"] == "0.5"


def test_events_tell_every_step_and_show_previews(client: httpx.Client) -> None:
    video = make(client, "watched", num_frames=8, num_inference_steps=30)
    events = list(events_of(client, video["id"]))
    videos = [data for name, data in events if name == "video"]
    progress = [data["progress"] for data in videos]
    assert progress == sorted(progress)
    assert len(set(progress)) > 5, "progress is told while it happens"
    assert (videos[-1]["status"], videos[-1]["progress"], events[-1][0]) == ("completed", 100, "video")
    previews = [data for name, data in events if name == "preview"]
    assert previews
    picture = previews[-1]["image"].removeprefix("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(picture))).format == "JPEG"
    again = list(events_of(client, video["id"]))
    assert [(name, data["status"]) for name, data in again] == [("video", "completed")]


def test_pages_of_the_list_hold_every_video_once(client: httpx.Client) -> None:
    made = [make(client, f"listed {number}")["id"] for number in range(5)]
    found: list[str] = []
    query: dict[str, str | int] = {"limit": 2}
    while True:
        page = client.get("/v1/videos", params=query).json()
        found += [video["id"] for video in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert found[:5] == made[::-1]
    assert len(found) == len(set(found))
    oldest = client.get("/v1/videos", params={"limit": 100, "order": "asc"}).json()["data"]
    assert [video["id"] for video in oldest] == found[::-1]


def test_delete_stops_a_running_job_and_removes_everything(served: Served, client: httpx.Client) -> None:
    video = make(client, "never done", num_frames=16, num_inference_steps=100)
    events = events_of(client, video["id"])
    while next(events)[1].get("progress", 0) < 5:
        pass
    assert client.delete(f"/v1/videos/{video['id']}").json() == {
        "id": video["id"],
        "object": "video.deleted",
        "deleted": True,
    }
    assert [name for name, _ in events][-1] == "deleted"
    for path in ("", "/content", "/events"):
        assert client.get(f"/v1/videos/{video['id']}{path}").status_code == 404
    assert client.delete(f"/v1/videos/{video['id']}").status_code == 404

    done = finished(client, make(client, "soon gone"))
    assert len(served.files(done["id"])) >= 3
    client.delete(f"/v1/videos/{done['id']}")
    assert served.files(done["id"]) == []


def test_an_idempotency_key_answers_the_same_video(client: httpx.Client) -> None:
    def send(prompt: str) -> httpx.Response:
        body = {"prompt": prompt, **SMALL}
        return client.post("/v1/videos", json=body, headers={"Idempotency-Key": "once"})

    first = send("once")
    assert send("once").json()["id"] == first.json()["id"]
    other = send("twice")
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")


def test_a_remix_goes_on_from_a_finished_video(client: httpx.Client) -> None:
    first = finished(client, make(client, PROMPT, num_inference_steps=8, seed=5))

    def ask() -> httpx.Response:
        body = {"prompt": "a blue circle", "remix_from": 0.5}
        return client.post(f"/v1/videos/{first['id']}/remix", json=body, headers={"Idempotency-Key": "remix"})

    answer = ask()
    assert answer.status_code == 200, answer.text
    second = finished(client, answer.json())
    assert (second["status"], second["remixed_from_video_id"]) == ("completed", first["id"])
    same = ("seed", "size", "num_frames", "num_inference_steps", "solver")
    assert {name: second[name] for name in same} == {name: first[name] for name in same}
    files = [client.get(f"/v1/videos/{each['id']}/content").content for each in (first, second)]
    assert files[0] != files[1]
    client.delete(f"/v1/videos/{first['id']}")
    assert ask().json()["id"] == second["id"]


def test_metrics_count_what_happened(client: httpx.Client) -> None:
    parser = pytest.importorskip("prometheus_client.parser")

    def figures() -> dict[str, float]:
        text = client.get("/metrics").text
        return {
            f"{sample.name}{sorted(sample.labels.items())}": sample.value
            for family in parser.text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = figures()
    finished(client, make(client, "counted"))
    after = figures()

    def grew(name: str) -> float:
        return sum(after[key] - before.get(key, 0) for key in after if key.startswith(name))

    assert (
        grew("reelrt_jobs_submitted_total") == grew("reelrt_jobs_ended_total[('status', 'completed')]") == 1
    )
    assert grew("reelrt_stage_seconds_count[('stage', 'encode')]") == 1
    assert grew("reelrt_step_seconds_count") >= 2
    assert grew("reelrt_http_requests_total[('method', 'POST')") == 1
    assert grew("reelrt_event_loop_gap_seconds_count") > 1
    assert 0.004 < after["reelrt_event_loop_longest_gap_seconds[]"] < 30


def test_the_first_request_finds_every_route_worked_out(
    tiny_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastapi

    from reelrt.service import documents
    from reelrt.service.application import Application
    from reelrt.service.config import read_settings
    from reelrt.service.jobservice import open_service

    def late(*_: object, **__: object) -> None:
        raise AssertionError("this is worked out while somebody waits")

    async def first(application: Any) -> list[int]:
        await application.warm_up()
        monkeypatch.setattr(fastapi.routing, "get_dependant", late)
        monkeypatch.setattr(documents, "get_openapi", late)
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            paths = ("/v1/videos", "/v1/models", "/metrics", "/", "/openapi.json", "/v1/videos/video_none")
            return [(await client.get(path)).status_code for path in paths]

    settings = read_settings({"engines": (tiny_engines,), "data": tmp_path / "data"})
    with open_service(settings.engines, settings.options) as service:
        assert asyncio.run(first(Application(service, settings))) == [200, 200, 200, 200, 200, 404]


def test_health_readiness_and_models(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok", "version": reelrt.__version__}
    assert client.get("/ready").json() == {"status": "ready"}
    model = client.get("/v1/models").json()["data"][0]
    assert model["object"] == "model"
    assert model["limits"]["solver"] in model["limits"]["solvers"]
    assert make(client, "named", model=model["id"])["model"] == model["id"]


def test_stopping_ends_open_event_streams_and_keeps_what_waits(tiny_engines: Path, tmp_path: Path) -> None:
    with serving(tiny_engines, tmp_path / "data", stop_seconds=0) as first, http(first) as client:
        video = make(client, "interrupted", num_frames=16, num_inference_steps=30)
        events = events_of(client, video["id"])
        while next(events)[1].get("progress", 0) < 5:
            pass
        began = time.monotonic()
        first.process.terminate()
        assert [name for name, _ in events if name == "deleted"] == []
        assert first.process.wait(30) == 0
        assert time.monotonic() - began < 15
    with serving(tiny_engines, tmp_path / "data") as second, http(second) as client:
        assert finished(client, video)["status"] == "completed"
