"""The gRPC door of a real service: the same jobs as over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reelrt
from tests.serving import KEYS, SMALL, Served, finished, http, serving

pytest.importorskip("grpc", reason="the service extra is not installed")

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from reelrt.service import videos_pb2 as pb
from reelrt.service.videos_pb2_grpc import VideosStub

PROMPT = "a red circle moving right"
KEY = (("authorization", f"Bearer {KEYS[0]}"),)


@pytest.fixture(scope="module")
def served(tiny_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = {"api_keys": ",".join(KEYS), "grpc_port": 0, "queue": 2, "slots": 1, "streams": 2}
    with serving(tiny_engines, tmp_path_factory.mktemp("grpc") / "data", **limits) as running:
        yield running


@pytest.fixture(scope="module")
def channel(served: Served) -> Iterator[Any]:
    told = json.loads(served.data.with_suffix(".json").read_text())
    with grpc.insecure_channel(told["grpc"]) as channel:
        yield channel


@pytest.fixture
def videos(channel: Any) -> Iterator[Any]:
    stub = VideosStub(channel)
    yield stub
    for video in stub.List(pb.ListRequest(limit=100), metadata=KEY).videos:
        stub.Delete(pb.VideoRequest(id=video.id), metadata=KEY)


def refused(call: Any, *arguments: Any, **options: Any) -> Any:
    with pytest.raises(grpc.RpcError) as error:
        answer = call(*arguments, **options)
        list(answer)
    return error.value


def test_a_video_from_request_to_file(videos: Any, served: Served, tmp_path: Path) -> None:
    asked = videos.Submit(pb.SubmitRequest(prompt=PROMPT, seed=7, **SMALL), metadata=KEY)
    assert (asked.seed, asked.num_frames, asked.prompt) == (7, 2, PROMPT)
    events = list(videos.Watch(pb.WatchRequest(id=asked.id), metadata=KEY))
    assert events[-1].video.status == pb.COMPLETED
    chunks = videos.Download(pb.DownloadRequest(id=asked.id), metadata=KEY)
    path = tmp_path / "red.mp4"
    path.write_bytes(b"".join(chunk.data for chunk in chunks))
    assert reelrt.read_metadata(path)["seed"] == 7
    with http(served, KEYS[0]) as client:
        same = finished(client, {"id": asked.id})
        assert client.get(f"/v1/videos/{asked.id}/content").content == path.read_bytes()
    assert (same["seed"], same["status"]) == (7, "completed")
    remix = pb.SubmitRequest(prompt="a blue circle", remix_of=asked.id, remix_from=0.5)
    assert videos.Submit(remix, metadata=KEY).remixed_from_id == asked.id
    picture = videos.Download(pb.DownloadRequest(id=asked.id, variant=pb.THUMBNAIL), metadata=KEY)
    assert next(picture).data[:2] == b"\xff\xd8"


def test_a_job_is_watched_cancelled_and_deleted(videos: Any) -> None:
    long = pb.SubmitRequest(prompt="long", num_frames=16, num_inference_steps=100)
    job = videos.Submit(long, metadata=KEY)
    events = videos.Watch(pb.WatchRequest(id=job.id, previews=True), metadata=KEY)
    seen = []
    for event in events:
        seen.append(event)
        if event.preview:
            assert event.preview[:2] == b"\xff\xd8"
            videos.Cancel(pb.VideoRequest(id=job.id), metadata=KEY)
    assert seen[-1].video.status == pb.CANCELLED
    assert seen[-1].video.progress < 100
    progress = [event.video.progress for event in seen]
    assert progress == sorted(progress)
    assert videos.Get(pb.VideoRequest(id=job.id), metadata=KEY).status == pb.CANCELLED
    videos.Delete(pb.VideoRequest(id=job.id), metadata=KEY)
    assert refused(videos.Get, pb.VideoRequest(id=job.id), metadata=KEY).code() is grpc.StatusCode.NOT_FOUND


def test_what_is_wrong_has_its_status(videos: Any) -> None:
    codes = grpc.StatusCode
    wrong = [
        (videos.Submit, pb.SubmitRequest(prompt=" "), codes.INVALID_ARGUMENT),
        (videos.Submit, pb.SubmitRequest(prompt="x", num_inference_steps=-1), codes.INVALID_ARGUMENT),
        (videos.Submit, pb.SubmitRequest(prompt="x", guidance_scale=float("nan")), codes.INVALID_ARGUMENT),
        (videos.Submit, pb.SubmitRequest(prompt="x", remix_of="../../etc/passwd"), codes.NOT_FOUND),
        (videos.Submit, pb.SubmitRequest(prompt="x", model="none"), codes.NOT_FOUND),
        (videos.Get, pb.VideoRequest(id="../x"), codes.NOT_FOUND),
        (videos.List, pb.ListRequest(limit=1000), codes.INVALID_ARGUMENT),
        (videos.Watch, pb.WatchRequest(id="x"), codes.NOT_FOUND),
        (videos.Download, pb.DownloadRequest(id="x"), codes.NOT_FOUND),
    ]
    assert [refused(call, request, metadata=KEY).code() for call, request, _ in wrong] == [
        code for _, _, code in wrong
    ]
    long = pb.SubmitRequest(prompt="long", num_frames=16, num_inference_steps=100)
    full = refused(lambda: [videos.Submit(long, metadata=KEY) for _ in range(6)])
    assert full.code() is codes.RESOURCE_EXHAUSTED
    assert int(dict(full.trailing_metadata())["retry-after"]) >= 1
    early = videos.List(pb.ListRequest(limit=1), metadata=KEY).videos[0].id
    not_yet = refused(videos.Download, pb.DownloadRequest(id=early), metadata=KEY)
    assert not_yet.code() is codes.FAILED_PRECONDITION


def test_pages_and_idempotency(videos: Any) -> None:
    request = pb.SubmitRequest(prompt=PROMPT, idempotency_key="once", **SMALL)
    first, second = (videos.Submit(request, metadata=KEY).id for _ in range(2))
    assert first == second
    other = videos.Submit(pb.SubmitRequest(prompt="other", **SMALL), metadata=KEY).id
    page = videos.List(pb.ListRequest(limit=1), metadata=KEY)
    assert ([video.id for video in page.videos], page.has_more) == ([other], True)
    rest = videos.List(pb.ListRequest(limit=1, after=other), metadata=KEY)
    assert ([video.id for video in rest.videos], rest.has_more) == ([first], False)


@pytest.mark.parametrize(
    "metadata", [(), (("authorization", "Bearer wrong"),), (("authorization", KEYS[0]),)]
)
def test_a_wrong_key_opens_nothing(videos: Any, metadata: Any) -> None:
    code = refused(videos.List, pb.ListRequest(), metadata=metadata).code()
    assert code is grpc.StatusCode.UNAUTHENTICATED
    watch = refused(videos.Watch, pb.WatchRequest(id="x"), metadata=metadata)
    assert watch.code() is grpc.StatusCode.UNAUTHENTICATED


def test_one_key_sees_nothing_of_another(videos: Any) -> None:
    job = videos.Submit(pb.SubmitRequest(prompt=PROMPT, **SMALL), metadata=KEY)
    other = (("authorization", f"Bearer {KEYS[1]}"),)
    assert list(videos.List(pb.ListRequest(), metadata=other).videos) == []
    assert refused(videos.Get, pb.VideoRequest(id=job.id), metadata=other).code() is grpc.StatusCode.NOT_FOUND


def test_health_and_reflection(channel: Any) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "reelrt.v1.Videos"):
        found = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert found.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(reflection.ServerReflectionInfo(iter([request])))
    assert "reelrt.v1.Videos" in {each.name for each in answer.list_services_response.service}
