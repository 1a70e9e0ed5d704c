"""The job service on a toy engine set: real ONNX Runtime, SQLite and files; launches one by one."""

from __future__ import annotations

import errno
import io
import os
import sqlite3
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import reelrt
from reelrt.bundle.manifest import EngineSet
from reelrt.errors import (
    BackendError,
    ConflictError,
    DeviceMemoryError,
    InputError,
    JobLimitError,
    NotFoundError,
    QueueFullError,
    StoppingError,
    StorageError,
)
from reelrt.runtime.loop import Request, StepLoop
from reelrt.runtime.ort import open_sessions
from reelrt.runtime.pipeline import TextToVideo
from reelrt.service import requests as service_requests
from reelrt.service.jobs import JobError, Remix, VideoRequest
from reelrt.service.jobservice import VideoService, open_service
from reelrt.service.options import ServiceOptions
from tests.gated import Gate
from tests.unit.test_runtime_pipeline import make_engines

RED = VideoRequest("red circle", steps=8, seed=7, width=64, height=64, format="webm")
LARGE = {"width": 80, "height": 64}
# WebM where bytes are compared: x264 gives the same frames other bytes now and then.


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    return EngineSet.load(make_engines(tmp_path_factory.mktemp("engines")))


@pytest.fixture(scope="module")
def pipe(engines):
    return reelrt.load(engines.folder, threads=1)


@pytest.fixture
def start(engines, tmp_path):
    """Starts services on one folder, one after the other, and closes what a test leaves open."""
    opened = []

    def start(*, is_open=True, **options):
        gate = Gate(open_sessions(engines, 1), is_open)
        settings = ServiceOptions(tmp_path / "state", **{"reserve": 0, **options})
        service = VideoService({"toy": TextToVideo(engines, gate)}, settings)
        opened.append((service, gate))
        return service, gate

    yield start
    for service, gate in opened:
        gate.open()
        service.close()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.002)


def over(service, job, owner=""):
    until(lambda: not service.get(job.id, owner).live)
    return service.get(job.id, owner)


def running(service, number, gate=None):
    """Wait until so many are in the batch; launches are let through for those that wait to join."""
    end = time.monotonic() + 20
    while service.figures().running["toy"] != number:
        assert time.monotonic() < end, "they did not join"
        if gate is not None and not gate.waiting.wait(0.02):
            continue
        if gate is not None and service.figures().running["toy"] != number:
            time.sleep(0.01)
            gate.let(1)
        time.sleep(0.002)


def file_of(pipe, request, folder):
    """The bytes that the bare runtime gives for a job's complete request."""
    video = pipe.generate(
        request.prompt,
        negative_prompt=request.negative_prompt,
        steps=request.steps,
        guidance=request.guidance,
        seed=request.seed,
        frames=request.frames,
        size=(request.width, request.height),
        solver=request.solver,
    )
    return video.save(folder / f"bare.{request.format}", request.fps).read_bytes()


@pytest.mark.parametrize("form", ["mp4", "webm"])
def test_a_jobs_file_is_the_runtimes(start, pipe, tmp_path, form):
    service, _ = start()
    job = over(service, service.submit(replace(RED, format=form, fps=12, negative_prompt="blue")))
    assert (job.status, job.progress, job.error, job.attempts) == ("completed", 100, None, 1)
    expected = file_of(pipe, job.request, tmp_path)
    if form == "webm":
        assert service.file(job.id).read_bytes() == expected
    found, wanted = (frames_of(path) for path in (service.file(job.id), tmp_path / f"bare.{form}"))
    assert np.abs(found.astype(int) - wanted).max() <= 8
    assert reelrt.read_metadata(service.file(job.id)) == reelrt.read_metadata(tmp_path / f"bare.{form}")
    assert set(job.timings) == {"queue", "text", "denoise", "decode", "encode"}
    assert job.created_at <= job.started_at <= job.completed_at < job.expires_at
    assert job.files == {name: service.file(job.id, "", name).stat().st_size for name in job.files}
    assert job.peak_memory > 1 << 20


def test_a_job_that_is_about_to_start_is_next(start, monkeypatch):
    service, gate = start()
    taken, go, open_step = threading.Event(), threading.Event(), gate.open_step

    def slow(shape):
        taken.set()
        assert go.wait(20)
        return open_step(shape)

    monkeypatch.setattr(gate, "open_step", slow)
    job = service.submit(RED)
    assert taken.wait(20)  # it is out of the line, and not in the batch yet
    assert (service.get(job.id).status, service.get(job.id).queue_position) == ("queued", 0)
    go.set()
    assert over(service, job).status == "completed"


def test_a_request_is_completed_with_the_models_own_values(start):
    service, _ = start()
    asked = service.submit(VideoRequest("red", steps=3)).request
    assert (asked.model, asked.width, asked.height, asked.frames) == ("toy", 48, 32, 4)
    assert (asked.steps, asked.guidance, asked.solver, asked.fps) == (3, 3.0, "one", 8)
    assert 0 <= asked.seed < 2**32


def test_joining_a_running_batch_changes_no_byte(start, pipe, tmp_path):
    service, gate = start(is_open=False)
    first = service.submit(RED)
    gate.let(5)
    until(lambda: len(gate.batches) == 5)
    second = service.submit(replace(RED, prompt="blue square", seed=8, steps=5, solver="two", guidance=2.0))
    until(lambda: service._board.task(second.id).prepared is not None)
    gate.open()
    jobs = [over(service, job) for job in (first, second)]
    assert gate.batches == [1] * 6 + [2] * 10  # one launch was under way when the second came
    for job in jobs:
        assert service.file(job.id).read_bytes() == file_of(pipe, job.request, tmp_path)
    assert service.figures().batch_sizes == {"toy": {1: gate.batches.count(1), 2: gate.batches.count(2)}}


def test_at_most_as_many_as_there_are_slots(start):
    service, gate = start(slots=2, is_open=False)
    jobs = [service.submit(replace(RED, seed=seed)) for seed in range(5)]
    running(service, 2, gate)
    assert [service.get(job.id).queue_position for job in jobs] == [None, None, 0, 1, 2]
    gate.open()
    assert {over(service, job).status for job in jobs} == {"completed"}
    assert max(gate.batches) == 2
    assert service.models()[0].slots == 2


def test_progress_is_of_launches(start):
    service, gate = start(is_open=False)
    job = service.submit(RED)
    seen = []
    for done in range(1, 16):
        gate.let(1)
        until(lambda done=done: service._board.task(job.id).done == done)
        seen.append(service.get(job.id).progress)
    assert seen == [100 * done // 16 for done in range(1, 16)]


def test_another_size_waits_until_the_batch_is_empty(start):
    service, gate = start(is_open=False)
    small = service.submit(RED)
    running(service, 1)
    large = service.submit(replace(RED, **LARGE))
    until(lambda: service._board.task(large.id).prepared is not None)
    gate.let(3)
    until(lambda: len(gate.batches) >= 3)
    assert service.get(large.id).queue_position == 0
    gate.open()
    assert {over(service, job).status for job in (small, large)} == {"completed"}
    assert gate.batches == [1] * 32 and gate.shapes == [(4, 4, 8, 8), (4, 4, 8, 10)]


@pytest.mark.parametrize(("waiting", "stream"), [(LARGE, {}), ({}, LARGE)], ids=["large", "small"])
def test_a_stream_of_one_size_does_not_starve_another(start, waiting, stream):
    """What starts is replaced at once by another of its size; after four the other one has its turn."""
    service, gate = start(is_open=False, jobs_per_owner=0)
    first = [service.submit(replace(RED, steps=2 + seed, seed=seed, **stream)) for seed in range(2)]
    running(service, 2, gate)
    late = service.submit(replace(RED, seed=100, **waiting))
    later = []
    while service.get(late.id).status == "queued":
        assert len(later) < 40, "it starves"
        if sum(service.get(job.id).status == "queued" for job in later) < 3:
            later.append(service.submit(replace(RED, steps=2, seed=len(later) + 2, **stream)))
            until(lambda: service._board.task(later[-1].id).prepared is not None)
        gate.let(1)
        gate.waiting.wait(1)
        time.sleep(0.005)
    assert sum(service.get(job.id).status != "queued" for job in later) == 4
    gate.open()
    assert over(service, late).status == "completed"
    assert {over(service, job).status for job in (*first, *later)} == {"completed"}


def test_cancelling_acts_before_the_next_launch(start):
    service, gate = start(is_open=False)
    jobs = [service.submit(replace(RED, seed=seed)) for seed in range(2)]
    running(service, 2, gate)
    gate.let(2)
    until(lambda: gate.batches[-1:] == [2])
    cancelled = service.cancel(jobs[0].id)
    assert (cancelled.status, cancelled.queue_position) == ("cancelled", None)
    seen = len(gate.batches)
    gate.open()
    assert over(service, jobs[1]).status == "completed"
    assert set(gate.batches[seen + 1 :]) == {1}  # one launch was under way
    assert service.get(jobs[0].id) == cancelled
    with pytest.raises(ConflictError, match="cancelled; it has no files"):
        service.file(jobs[0].id)


def test_what_waits_or_is_over_can_be_cancelled_too(start):
    service, gate = start(is_open=False, slots=1)
    first, second = (service.submit(replace(RED, seed=seed)) for seed in range(2))
    running(service, 1)
    assert service.cancel(second.id).status == "cancelled"
    gate.open()
    done = over(service, first)
    assert service.cancel(first.id) == done
    assert max(gate.batches) == 1 and len(gate.batches) == 16


def test_deleting_leaves_nothing(start, tmp_path):
    service, gate = start(is_open=False)
    waiting, second = service.submit(RED), service.submit(replace(RED, seed=8))
    running(service, 2, gate)
    with service.watch(waiting.id) as subscription:
        service.delete(waiting.id)
        until(lambda: [event.kind for event in subscription.take()][-1:] == ["deleted"])
    gate.open()
    over(service, second)
    service.delete(second.id)
    for job in (waiting, second):
        with pytest.raises(NotFoundError):
            service.get(job.id)
        with pytest.raises(NotFoundError):
            service.delete(job.id)
    # `os.walk` does not mind a folder that goes while it looks.
    until(lambda: not any("video_" in str(each) for each in os.walk(tmp_path / "state")))
    assert service.list() == ([], False)
    assert service.figures().results_bytes == service.figures().trajectory_bytes == 0


def test_a_repeated_request_with_a_key_is_the_same_job(start):
    service, _ = start()
    job = service.submit(VideoRequest("red", steps=2), "ann", "k1")
    assert service.submit(VideoRequest("red", steps=2), "ann", "k1").id == job.id
    done = over(service, job, "ann")
    assert service.submit(VideoRequest("red", steps=2), "ann", "k1") == done
    assert service.submit(VideoRequest("red", steps=2), "bob", "k1").id != job.id
    with pytest.raises(ConflictError, match="'k1' was used for another request"):
        service.submit(VideoRequest("red", steps=3), "ann", "k1")
    with pytest.raises(InputError, match="1 to 255 letters"):
        service.submit(VideoRequest("red", steps=3), "ann", "k" * 256)


def test_a_repeated_remix_with_a_key_is_the_same_job_when_its_parent_is_gone(start):
    service, _ = start()
    parent = over(service, service.submit(RED))
    asked = Remix(parent.id, {"prompt": "blue circle", "remix_from": 0.5})
    first = over(service, service.submit(asked, idempotency_key="a"))
    assert (first.status, first.request.seed, first.request.format) == ("completed", RED.seed, "webm")
    service.delete(parent.id)
    assert service.submit(asked, idempotency_key="a").id == first.id
    with pytest.raises(ConflictError, match="another request"):
        service.submit(replace(asked, changes={"prompt": "green circle"}), idempotency_key="a")
    with pytest.raises(NotFoundError, match=parent.id):
        service.submit(asked, idempotency_key="b")


def test_the_same_key_from_many_threads_is_one_job(start):
    service, _ = start()
    ids = []
    threads = [
        threading.Thread(target=lambda: ids.append(service.submit(RED, "", "once").id)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8 and len(set(ids)) == 1
    assert service.figures().submitted == 1


def test_a_full_queue_and_an_owners_limit_say_when_to_come_back(start):
    service, gate = start(is_open=False, slots=1, queue_size=2, jobs_per_owner=2)
    service.submit(RED, "ann")
    running(service, 1)
    gate.let(3)
    until(lambda: len(gate.batches) == 3)
    service.submit(RED, "ann")
    with pytest.raises(JobLimitError, match=r"2 jobs of this key wait or run. Try again in \d+ s"):
        service.submit(replace(RED, seed=1), "ann")
    service.submit(RED, "bob")
    with pytest.raises(QueueFullError, match="the queue is full: 2 jobs wait") as refusal:
        service.submit(RED, "cid")
    assert not isinstance(refusal.value, JobLimitError)
    recent = service._meter.recent("toy")
    assert refusal.value.retry_after == max(1.0, recent * (16 - service._board.tasks()[0].done))
    assert service.figures().rejected == {"owner_limit": 1, "queue_full": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "empty"),
        ({"prompt": "x" * 10_001}, "10001 letters"),
        ({"prompt": "\ud800"}, "UTF-8"),
        ({"steps": 11}, "up to 10"),
        ({"steps": 2.5}, "whole number"),
        ({"width": None}, "width and height belong together"),
        ({"width": 48, "height": 31}, "height 31"),
        ({"frames": 9}, "frames 9"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"solver": "three"}, "'three'"),
        ({"seed": -1}, "seed -1"),
        ({"fps": 0}, "fps 0"),
        ({"format": "gif"}, "format 'gif'"),
        ({"priority": 11}, "priority 11"),
        ({"priority": True}, "priority True"),
        ({"deadline": 0}, "deadline 0"),
        ({"deadline": float("nan")}, "deadline nan"),
        ({"latents": "a\nb"}, "latents"),
        ({"latents": ""}, "latents ''"),
        ({"remix_from": 0.5}, "without remix_of"),
        ({"model": "../toy\0"}, "model"),
    ],
)
def test_what_is_not_possible_is_refused_at_the_door(start, changes, message):
    service, _ = start()
    with pytest.raises(InputError, match=message):
        service.submit(replace(RED, **changes))
    assert service.list() == ([], False)
    assert service.figures().rejected == {"invalid": 1}


def test_others_jobs_are_unknown(start):
    service, _ = start()
    job = over(service, service.submit(RED, "ann"), "ann")
    calls = (service.get, service.cancel, service.delete, service.watch, service.file)
    for call in calls:
        for job_id, owner in (
            (job.id, "bob"),
            (job.id, ""),
            ("video_0", "ann"),
            ("../ann", "ann"),
            ("\0", "ann"),
        ):
            with pytest.raises(NotFoundError, match="there is no job"):
                call(job_id, owner)
    with pytest.raises(NotFoundError, match="there is no model 'other'"):
        service.submit(replace(RED, model="other"))
    with pytest.raises(InputError, match="variant 'raw'"):
        service.file(job.id, "ann", "raw")
    assert len(job.id) == 38 and job.id.startswith("video_")


def test_lists_have_pages(start):
    service, _ = start(jobs_per_owner=0)
    ids = [service.submit(VideoRequest("red", steps=1), "ann").id for _ in range(5)]
    service.submit(VideoRequest("red", steps=1), "bob")
    jobs, more = service.list("ann", limit=2)
    assert ([job.id for job in jobs], more) == (ids[:-3:-1], True)
    jobs, more = service.list("ann", limit=3, after=jobs[-1].id)
    assert ([job.id for job in jobs], more) == (ids[2::-1], False)
    jobs, more = service.list("ann", limit=2, order="asc", after=ids[0])
    assert ([job.id for job in jobs], more) == (ids[1:3], True)
    with pytest.raises(NotFoundError):
        service.list("bob", after=ids[0])
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}):
        with pytest.raises(InputError):
            service.list("ann", **wrong)


@pytest.mark.parametrize("when", ["waiting", "running"])
def test_a_deadline_ends_a_job(start, when):
    service, gate = start(is_open=False, slots=1)
    first = service.submit(replace(RED, deadline=0.7 if when == "running" else None))
    running(service, 1)
    second = service.submit(replace(RED, seed=8, deadline=0.7 if when == "waiting" else None))
    late, other = (first, second) if when == "running" else (second, first)
    time.sleep(0.8)
    if when == "running":
        gate.let(1)
    failed = over(service, late)
    assert (failed.status, failed.error.code) == ("failed", "deadline_exceeded")
    gate.open()
    assert over(service, other).status == "completed"


def test_an_engine_that_fails_with_several_tries_each_alone(start, pipe, tmp_path):
    service, gate = start(is_open=False)
    jobs = [service.submit(replace(RED, seed=seed)) for seed in range(3)]
    running(service, 3, gate)
    gate.let(2)
    until(lambda: gate.batches[-1:] == [3])
    gate.faults["step"] += [BackendError("the engine failed.")]
    gate.open()
    jobs = [over(service, job) for job in jobs]
    assert [job.status for job in jobs] == ["completed"] * 3
    assert gate.batches[-48:] == [1] * 48 and gate.batches[-49] == 3
    assert service.file(jobs[2].id).read_bytes() == file_of(pipe, jobs[2].request, tmp_path)


@pytest.mark.parametrize("stage", ["text_encoder", "step", "vae_decoder"])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BackendError("the engine failed."), "backend_error"),
        (DeviceMemoryError("100 MiB were wanted and 7 MiB are free."), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("a bug"), "internal_error"),
    ],
)
def test_an_engine_that_fails_fails_one_job_and_the_next_is_right(start, pipe, tmp_path, stage, error, code):
    service, gate = start(preview_every=0)
    gate.faults[stage] += [error]
    failed = over(service, service.submit(replace(RED, negative_prompt="blue")))
    assert (failed.status, failed.error.code) == ("failed", code)
    assert code == "internal_error" or str(error) in failed.error.message
    assert failed.files == {}
    done = over(service, service.submit(replace(RED, negative_prompt="blue")))
    assert service.file(done.id).read_bytes() == file_of(pipe, done.request, tmp_path)
    assert service.health().ready
    assert service.figures().ended == {"failed": 1, "completed": 1}


def test_numbers_that_are_not_finite_fail_their_job_alone(start):
    service, gate = start(is_open=False)
    broken, good = service.submit(replace(RED, solver="broken")), service.submit(replace(RED, seed=8))
    running(service, 2, gate)
    gate.open()
    failed = over(service, broken)
    assert (failed.status, failed.error.code) == ("failed", "backend_error")
    assert "not finite" in failed.error.message
    assert over(service, good).status == "completed"
    assert 2 in gate.batches


def test_a_full_disk_fails_the_job_and_not_the_service(start, monkeypatch, tmp_path):
    service, _ = start()
    full = OSError(errno.ENOSPC, "No space left on device")
    for name in ("reelrt.service.results.synchronise", "reelrt.service.pictures.spritesheet"):
        with monkeypatch.context() as patch:
            patch.setattr(name, lambda *_: (_ for _ in ()).throw(full))
            failed = over(service, service.submit(RED))
        assert failed.error == JobError("disk_full", failed.error.message) and failed.files == {}
    assert [*(tmp_path / "state" / "results").iterdir(), *(tmp_path / "state" / "partial").iterdir()] == []
    assert over(service, service.submit(RED)).status == "completed"


@contextmanager
def full_database(service):
    """SQLite itself says that there is no more room."""
    connection = service._store._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        connection.execute("CREATE TABLE padding AS SELECT zeroblob(100000)")
    yield
    connection.execute("PRAGMA max_page_count = 1000000000")


def test_a_database_without_room_refuses_what_it_cannot_keep(start):
    service, _ = start(jobs_per_owner=0)
    accepted = []
    with full_database(service):
        with pytest.raises(StorageError, match="full") as refusal:
            while len(accepted) < 500:
                accepted += [service.submit(replace(RED, steps=1, seed=len(accepted), prompt="red " * 500))]
        assert refusal.value.code == "disk_full"
    assert {over(service, job).live for job in accepted} <= {False}
    assert over(service, service.submit(RED)).status == "completed"


def test_what_is_deleted_makes_the_room_to_write_that_down(start, monkeypatch):
    service, _ = start()
    done, remove = over(service, service.submit(RED)), service._store.remove

    def full_until_the_files_are_gone(job_id):
        if service._results.path(job_id, "video") is not None:
            raise StorageError("full", code="disk_full")
        return remove(job_id)

    monkeypatch.setattr(service._store, "remove", full_until_the_files_are_gone)
    service.delete(done.id)
    with pytest.raises(NotFoundError):
        service.get(done.id)


def test_a_disk_that_fails_otherwise_keeps_the_files_of_what_it_cannot_delete(start, monkeypatch):
    service, _ = start()
    done = over(service, service.submit(RED))
    with monkeypatch.context() as patch:
        patch.setattr(service._store, "remove", lambda _: (_ for _ in ()).throw(StorageError("broken")))
        with pytest.raises(StorageError):
            service.delete(done.id)
    assert service.file(done.id).stat().st_size == done.files["video"]


def test_the_quota_is_kept_and_no_finished_file_goes_for_it(start):
    service, _ = start(quota=10_000)
    jobs = []
    with pytest.raises(StorageError, match="the results take"):
        for seed in range(20):
            jobs.append(over(service, service.submit(replace(RED, seed=seed))))
            if jobs[-1].status == "failed":
                service._results.quota = service._results.bytes  # what is left holds no video
    assert jobs[-1].error.code == "quota_exceeded"
    done = [job for job in jobs if job.status == "completed"]
    assert done and all(service.file(job.id).stat().st_size == job.files["video"] for job in done)
    assert not service.health().ready
    service.delete(done[0].id)
    assert service.health().ready


def test_what_a_disk_refuses_is_told_without_a_path(start, monkeypatch, tmp_path, caplog):
    service, _ = start()
    denied = PermissionError(errno.EACCES, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr("reelrt.service.results.synchronise", lambda *_: (_ for _ in ()).throw(denied))
        failed = over(service, service.submit(RED))
    assert failed.error.message == "the video's files cannot be written: Permission denied."
    service._store._connection.execute("PRAGMA query_only = on")
    with pytest.raises(StorageError, match="the job store cannot be used: attempt to write") as refusal:
        service.submit(RED)
    assert str(tmp_path) not in str(refusal.value)
    assert str(tmp_path / "state" / "jobs.sqlite") in caplog.text  # for who runs it
    service._store._connection.execute("PRAGMA query_only = off")


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("sqlite3.connect", sqlite3.OperationalError("unable to open database file")),
        ("reelrt.service.lock.os.open", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_start_on_a_full_disk_names_the_folder_and_what_to_do(start, monkeypatch, tmp_path, what, error):
    with monkeypatch.context() as patch:
        patch.setattr(what, lambda *_, **__: (_ for _ in ()).throw(error))
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=1 << 30, used=1 << 30, free=0))
        with pytest.raises(StorageError) as refusal:
            start()
    assert str(refusal.value) == (
        f"the disk of {tmp_path / 'state'} is full. Free some space there, or name another folder (--data)."
    )
    start()


def test_a_disk_that_is_nearly_full_is_not_filled(start):
    service, _ = start(reserve=1 << 60)
    with pytest.raises(StorageError, match="bytes left"):
        service.submit(RED)


def test_what_has_expired_is_removed(start, tmp_path):
    service, _ = start(retention=1)
    job = over(service, service.submit(RED))
    until(lambda: service.list() == ([], False))
    assert time.time() >= job.expires_at
    # `os.walk` does not mind a folder that goes while it looks.
    until(lambda: not any("video_" in str(each) for each in os.walk(tmp_path / "state")))


def test_two_services_cannot_share_a_folder(start):
    service, _ = start()
    with pytest.raises(StorageError, match="another service uses"):
        start()
    service.close()
    start()


def test_a_stopped_service_puts_its_jobs_back(start, pipe, tmp_path):
    service, gate = start(is_open=False, slots=2)
    jobs = [service.submit(replace(RED, seed=seed), "ann", f"k{seed}") for seed in range(4)]
    running(service, 2, gate)
    gate.let(3)
    until(lambda: len(gate.batches) >= 3)
    service.drain(grace=0.05)
    with pytest.raises(StoppingError):
        service.submit(RED)
    threading.Timer(0.1, gate.let, [1]).start()
    service.close()
    service.close()
    names = {each.name for each in threading.enumerate()}
    assert not [name for name in names if name.startswith("reelrt-") and name != "reelrt-lane"]

    service, _ = start()
    for number, job in enumerate(jobs):
        done = over(service, job, "ann")
        assert (done.status, done.attempts, done.created_at) == ("completed", 1, job.created_at)
        assert service.file(job.id, "ann").read_bytes() == file_of(pipe, done.request, tmp_path)
        assert service.submit(replace(RED, seed=number), "ann", f"k{number}") == done


def test_draining_lets_running_jobs_end(start):
    service, gate = start(is_open=False, slots=1)
    first, second = (service.submit(replace(RED, seed=seed)) for seed in range(2))
    running(service, 1)
    threading.Timer(0.1, gate.open).start()
    service.drain(grace=20)
    assert service.get(first.id).status == "completed"
    assert service.get(second.id).status == "queued"
    assert not service.health().ready and service.health().alive


def test_the_same_request_again_costs_nothing(start):
    service, gate = start()
    first = over(service, service.submit(RED))
    launches = len(gate.batches)
    again = service.submit(replace(RED, priority=3))
    assert (again.status, again.reused, again.files) == ("completed", ("result",), first.files)
    assert again.id != first.id and len(gate.batches) == launches
    service.delete(first.id)
    assert service.file(again.id).stat().st_size == again.files["video"]
    assert over(service, service.submit(replace(RED, fps=9))).reused == ("prompt",)
    assert "result" not in over(service, service.submit(RED, "bob"), "bob").reused
    figures = service.figures()
    assert (figures.cache_hits["result"], figures.cache_misses["result"]) == (1, 3)
    assert (figures.cache_hits["prompt"], figures.cache_misses["prompt"]) == (4, 2)


def test_the_same_noise_for_another_prompt(start):
    service, _ = start()
    named = replace(RED, seed=None, latents="mine")
    first = service.submit(named)
    second = service.submit(replace(named, prompt="blue"))
    other = service.submit(named, "bob")
    assert first.request.seed == second.request.seed != other.request.seed
    assert (first.reused, second.reused) == ((), ("latents",))
    with pytest.raises(ConflictError, match="those of seed"):
        service.submit(replace(named, seed=first.request.seed + 1))
    figures = service.figures()
    assert (figures.cache_hits["latents"], figures.cache_misses["latents"]) == (2, 2)
    service.close()
    service, _ = start()
    assert service.submit(replace(named, prompt="square")).request.seed == first.request.seed


def run_from(pipe, parent, request, step):
    """A remix by hand: the parent's prompt for so many steps, then the other one."""
    (plans) = [service_requests.replan(each, pipe) for each in (parent, request)]
    (one, _), (two, _) = [pipe.encode(plan) for plan in plans]
    loop = StepLoop(pipe.sessions.open_step(plans[0].shape))
    rows = step * 2
    slot = loop.admit(Request(one.table[:rows], one.text, one.latents))
    while not slot.finished:
        loop.step()
    state = loop.state(slot)
    loop.release(slot)
    slot = loop.admit(Request(two.table[rows:], two.text, state))
    while not slot.finished:
        loop.step()
    return np.concatenate(list(pipe.decode(loop.latents(slot)[None])))


def frames_of(path):
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_remix_costs_half_and_goes_on_where_the_other_was(start, pipe, tmp_path):
    service, gate = start()
    parent = over(service, service.submit(replace(RED, solver="two", steps=10)))
    until(lambda: service._trajectories.steps(parent.id) == [2, 5, 8])
    launches = len(gate.batches)
    same = service.submit(VideoRequest("red circle", remix_of=parent.id, format="webm"))
    other = service.submit(VideoRequest("blue square", remix_of=parent.id, remix_from=0.75, format="webm"))
    service.delete(parent.id)  # what a remix needs is its own
    same, other = over(service, same), over(service, other)
    assert len(gate.batches) - launches <= 10 + 4
    assert service.file(same.id).read_bytes() == file_of(pipe, parent.request, tmp_path)
    assert same.reused == ("prompt",)
    expected = run_from(pipe, parent.request, other.request, 8)
    video = reelrt.Video(expected, np.zeros(0, np.float32), reelrt.read_metadata(service.file(other.id)))
    assert service.file(other.id).read_bytes() == video.save(tmp_path / "by-hand.webm", 8).read_bytes()
    assert service.figures().cache_hits["trajectory"] == 2
    assert not list((tmp_path / "state" / "inputs").iterdir())


def test_a_remix_that_cannot_be_is_refused(start):
    service, gate = start(remix_points=(0.5,))
    parent = over(service, service.submit(RED))
    until(lambda: service._trajectories.steps(parent.id) == [4])
    remix = VideoRequest("blue", remix_of=parent.id)
    with pytest.raises(ConflictError, match=r"no state at 0.25 of its schedule. It has some at 0.5"):
        service.submit(replace(remix, remix_from=0.25))
    for wrong in (
        {"steps": 9},
        {"seed": 8},
        {"solver": "two"},
        {"width": 80, "height": 64},
        {"remix_from": 1.0},
    ):
        with pytest.raises(InputError):
            service.submit(replace(remix, **wrong))
    with pytest.raises(NotFoundError):
        service.submit(remix, "bob")
    service._trajectories.remove(parent.id)
    with pytest.raises(ConflictError, match="none any more"):
        service.submit(remix)
    gate.shut()
    waiting = service.submit(replace(RED, seed=9))
    with pytest.raises(ConflictError, match="only a completed job"):
        service.submit(replace(remix, remix_of=waiting.id))
    assert service.figures().cache_misses["trajectory"] == 2


def test_a_watcher_sees_how_a_job_comes_about(start):
    service, gate = start(is_open=False, slots=1, preview_every=3)
    first, job = service.submit(RED), service.submit(replace(RED, seed=8))
    told, events = threading.Event(), []

    def seen(kind):
        while not (found := [event for event in events if event.kind == kind]):
            assert told.wait(10), f"no {kind}"
            told.clear()
            events.extend(subscription.take())
        return found[-1]

    running(service, 1)
    with service.watch(job.id, notify=told.set) as subscription:
        assert seen("queued").job.queue_position == 0
        service.cancel(first.id)
        gate.let(1)
        seen("progress")
        gate.let(3)
        picture = Image.open(io.BytesIO(seen("preview").image))
        assert (picture.format, picture.size) == ("JPEG", (64, 64))
        gate.open()
        assert seen("completed") is events[-1]
        assert events[-1].last and events[-1].job == service.get(job.id)
        assert not any(event.last for event in events[:-1])
    assert service.figures().watchers == 0
    with service.watch(first.id) as subscription:
        assert [event.kind for event in subscription.wait(5)] == ["cancelled"]
        assert subscription.wait(5) == []


def test_what_happens_while_a_watch_begins_is_not_undone(start, monkeypatch):
    service, gate = start(is_open=False)
    job = service.submit(RED)
    running(service, 1, gate)
    with service.watch(job.id) as other:
        look = service.get

        def slow(*words):
            found = look(*words)
            gate.let(2)
            while max(event.job.progress for event in other.wait(20)) <= found.progress:
                pass
            return found

        monkeypatch.setattr(service, "get", slow)
        with service.watch(job.id) as subscription:
            seen = subscription.take()
    assert [event.kind for event in seen] == ["progress"]
    assert seen[0].job.progress > 0


def test_a_slow_watcher_holds_nothing_up_and_misses_nothing_that_counts(start):
    service, _ = start()
    subscriptions = []
    job = service.submit(RED)
    subscriptions = [service.watch(job.id) for _ in range(500)]
    over(service, job)
    until(lambda: all(each._ended for each in subscriptions))
    for each in subscriptions:
        events = each.take()
        assert len(events) <= 4 and events[-1].kind == "completed"
        each.close()
    assert service.figures().watchers == 0


def test_pictures_of_a_finished_video(start):
    service, _ = start()
    job = over(service, service.submit(replace(RED, **LARGE)))
    thumbnail, sheet = (Image.open(service.file(job.id, "", each)) for each in ("thumbnail", "spritesheet"))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", (80, 64))
    assert sheet.size == (160, 128)  # four frames, two by two
    frames = frames_of(service.file(job.id))
    middle = np.asarray(sheet)[64:, :80].astype(int)  # the third
    assert np.abs(middle - frames[2]).mean() < 12


def test_several_models(engines, tmp_path):
    options = ServiceOptions(tmp_path / "state", reserve=0, threads=1)
    with open_service([engines.folder, engines.folder], options) as service:
        assert [model.name for model in service.models()] == ["toy", "toy-2"]
        jobs = [service.submit(replace(RED, model=name)) for name in ("toy", "toy-2", None)]
        assert [job.request.model for job in jobs] == ["toy", "toy-2", "toy"]
        assert {over(service, job).status for job in jobs} == {"completed"}
        (model, _) = service.models()
        assert model.limits == {"width": (16, 80), "height": (16, 64), "frames": (2, 8), "steps": (1, 10)}
    with pytest.raises(InputError, match="no engine set"):
        open_service([], options)


def test_options_that_cannot_be(tmp_path):
    for wrong in ({"slots": 0}, {"queue_size": 0}, {"quota": 0}, {"ageing": 0}, {"remix_points": (1.0,)}):
        with pytest.raises(InputError):
            ServiceOptions(tmp_path, **wrong)


def test_a_watcher_that_fails_is_let_go(start):
    service, gate = start(is_open=False)
    job = service.submit(RED)
    calls = []

    def notify():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("the event loop is closed")

    service.watch(job.id, notify=notify)
    other = service.watch(job.id)
    gate.open()
    assert over(service, job).status == "completed"
    until(lambda: service.figures().watchers == 1)
    until(lambda: any(event.kind == "completed" for event in other.take()))
    other.close()


def test_a_cancellation_that_cannot_be_kept_is_no_cancellation(start, monkeypatch):
    service, gate = start(is_open=False)
    job = service.submit(RED)
    running(service, 1)
    with monkeypatch.context() as patch:
        patch.setattr(service._store, "finish", lambda _: (_ for _ in ()).throw(StorageError("full")))
        with pytest.raises(StorageError):
            service.cancel(job.id)
    gate.open()
    assert over(service, job).status == "completed"


def test_a_failure_that_cannot_be_written_yet_is_told_and_written_later(start, monkeypatch):
    service, gate = start()
    gate.faults["step"] += [BackendError("the engine failed.")]
    with monkeypatch.context() as patch:
        patch.setattr(service._store, "finish", lambda _: (_ for _ in ()).throw(StorageError("full")))
        failed = over(service, service.submit(RED))
        assert (failed.status, failed.error.code) == ("failed", "backend_error")
        assert service._store.get(failed.id).live
    until(lambda: service._store.get(failed.id).status == "failed")
    assert service.get(failed.id).error == failed.error


def test_too_little_memory_for_three_is_room_for_two(start):
    service, gate = start(is_open=False)
    jobs = [service.submit(replace(RED, seed=seed)) for seed in range(3)]
    running(service, 3, gate)
    gate.faults["step"] += [DeviceMemoryError("100 MiB were wanted and 7 MiB are free.")]
    gate.open()
    assert {over(service, job).status for job in jobs} == {"completed"}
    assert service.models()[0].slots == 2
    seen = len(gate.batches)
    later = [service.submit(replace(RED, seed=10 + seed)) for seed in range(4)]
    assert {over(service, job).status for job in later} == {"completed"}
    assert max(gate.batches[seen:]) <= 2


def test_a_start_on_a_damaged_database_names_the_folder_and_what_to_do(start, tmp_path):
    service, _ = start()
    over(service, service.submit(RED))
    service.close()
    database = tmp_path / "state" / "jobs.sqlite"
    content = database.read_bytes()
    database.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with pytest.raises(StorageError) as refusal:
        start()
    assert str(refusal.value).startswith(
        f"{tmp_path / 'state'} cannot be used: database disk image is malformed"
    )
    assert str(refusal.value).endswith("Is it writable, and the disk sound?")
    assert refusal.value.__cause__ is not refusal.value
