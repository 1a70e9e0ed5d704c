"""Clients of a real service: `reelrt.client`, the commands, and the `openai` package."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reelrt
from reelrt.errors import ConflictError, InputError, NotFoundError, QueueFullError
from tests.commands import ENVIRONMENT
from tests.commands import reelrt as run_reelrt
from tests.serving import KEYS, SMALL, Served, serving

pytest.importorskip("uvicorn", reason="the service extra is not installed")

from reelrt.client import AsyncClient, Client, Unreachable

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def served(tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("clients")
    with serving(tiny_engines, folder / "data", api_keys=KEYS[0], queue=2, slots=1) as running:
        yield running


def test_a_client_from_request_to_file(served: Served, tmp_path: Path) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    with Client(served.url, KEYS[0]) as client:
        asked = client.create(PROMPT, seed=7, **SMALL)
        done = client.wait(asked["id"], lambda *event: told.append(event))
        assert (done["status"], done["seed"]) == ("completed", 7)
        assert told[-1] == ("video", done)
        file = client.download(done["id"], tmp_path / "folder" / "red.mp4")
        assert reelrt.read_metadata(file)["seed"] == 7
        assert client.download(done["id"], tmp_path / "red.jpg", "thumbnail").read_bytes()[:2] == b"\xff\xd8"
        remix = client.remix(done["id"], "a blue circle", remix_from=0.5)
        assert remix["remixed_from_video_id"] == done["id"]
        assert client.wait(remix["id"])["status"] == "completed"
        assert [video["id"] for video in client.list(limit=2)["data"]] == [remix["id"], done["id"]]
        assert client.models()[0]["id"] == done["model"]
        for video in (remix, done):
            assert client.delete(video["id"])["deleted"]
        with pytest.raises(NotFoundError):
            client.get(done["id"])


def test_a_client_raises_what_the_service_says(served: Served, tmp_path: Path) -> None:
    with Client(served.url, KEYS[0]) as client:
        with pytest.raises(InputError, match="num_inference_steps"):
            client.create(PROMPT, num_inference_steps=-1)
        long = client.create(PROMPT, num_frames=16, num_inference_steps=100)
        with pytest.raises(ConflictError):
            client.download(long["id"], tmp_path / "early.mp4")
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(QueueFullError) as full:
            for _ in range(6):
                client.create(PROMPT, num_frames=16, num_inference_steps=100)
        assert full.value.retry_after >= 1
        for video in client.list(limit=100)["data"]:
            client.delete(video["id"])
    with Client(served.url, "no-key-of-this-service") as client, pytest.raises(reelrt.ReelError, match="key"):
        client.models()
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unreachable, match="reelrt serve"):
        client.models()


def test_the_async_client_does_the_same(served: Served, tmp_path: Path) -> None:
    async def all_of_it() -> None:
        async with AsyncClient(served.url, KEYS[0]) as client:
            videos = await asyncio.gather(*(client.create(f"{PROMPT} {n}", **SMALL) for n in range(2)))
            done = await asyncio.gather(*(client.wait(video["id"]) for video in videos))
            assert [video["status"] for video in done] == ["completed"] * 2
            path = await client.download(done[0]["id"], tmp_path / "red.mp4")
            assert reelrt.read_metadata(path)["prompt"] == f"{PROMPT} 0"
            assert len((await client.list(limit=2))["data"]) == 2
            names = [name async for name, _ in client.events(done[0]["id"])]
            assert names == ["video"]
            for video in done:
                await client.delete(video["id"])
            with pytest.raises(NotFoundError):
                await client.get(done[0]["id"])

    asyncio.run(all_of_it())


def test_the_commands(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, "REELRT_URL", served.url)
    monkeypatch.setitem(ENVIRONMENT, "REELRT_API_KEY", KEYS[0])
    few = ("--steps", 2, "--frames", 2)
    made = run_reelrt("submit", PROMPT, *few, "--seed", 7, "-o", tmp_path / "red.webm", "--json")
    assert made.returncode == 0, made.stderr
    video = json.loads(made.stdout)
    assert (video["status"], video["path"]) == ("completed", str(tmp_path / "red.webm"))
    assert reelrt.read_metadata(tmp_path / "red.webm")["seed"] == 7
    asked = json.loads(run_reelrt("submit", PROMPT, *few, "--json").stdout)
    watched = run_reelrt("watch", asked["id"])
    assert (watched.returncode, "completed" in watched.stdout) == (0, True), watched.stderr
    assert asked["id"] in run_reelrt("list").stdout
    gone = run_reelrt("cancel", asked["id"], video["id"], "--json")
    assert [each["deleted"] for each in json.loads(gone.stdout)["cancelled"]] == [True, True]
    again = run_reelrt("watch", asked["id"], "--json")
    assert (again.returncode, json.loads(again.stdout)["error"]["type"]) == (11, "NotFoundError")
    wrong = run_reelrt("submit", PROMPT, "--steps", 5000)
    assert (wrong.returncode, "steps" in wrong.stderr) == (2, True)


def test_the_openai_package(served: Served, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEYS[0], max_retries=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # OpenAI's own service has ended
        video = client.videos.create(prompt=PROMPT, seconds="0.5", extra_body={"num_inference_steps": 2})
        assert video.status in ("queued", "in_progress")
        video = client.videos.create_and_poll(prompt=PROMPT, seconds="0.25", poll_interval_ms=100)
        assert (video.status, video.progress, video.seconds) == ("completed", 100, "0.25")
        assert client.videos.retrieve(video.id) == video
        assert next(iter(client.videos.list(limit=1))).id == video.id
        assert len([each.id for each in client.videos.list(limit=1)]) == 2
        path = tmp_path / "red.mp4"
        client.videos.download_content(video.id).write_to_file(path)
        assert reelrt.read_metadata(path)["prompt"] == PROMPT
        assert client.videos.download_content(video.id, variant="thumbnail").read()[:2] == b"\xff\xd8"
        assert client.videos.remix(video.id, prompt="another").remixed_from_video_id == video.id
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)
        with pytest.raises(openai.BadRequestError) as refused:
            client.videos.create(prompt=PROMPT, extra_body={"num_inference_steps": 5000})
        assert refused.value.param == "num_inference_steps"
        assert client.models.list().data[0].id == video.model
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()
