"""The job service on a simulated GPU: stages beside the step from other threads, or one engine at a time."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

import reelrt
from reelrt.bundle.manifest import EngineSet
from reelrt.service.jobs import VideoRequest
from reelrt.service.jobservice import VideoService
from reelrt.service.options import ServiceOptions
from reelrt.service.turns import Turns
from tests.simulated.machine import Machine
from tests.unit.test_runtime_pipeline import make_engines

RED = VideoRequest("red circle", steps=6, seed=7, width=64, height=64, format="webm")


@pytest.fixture
def machine(monkeypatch):
    machine = Machine(monkeypatch)
    yield machine
    assert machine.driver.violations == []


@pytest.mark.parametrize("residency", ["all", "staged"])
def test_jobs_on_a_gpu_give_the_cpus_files(machine, tmp_path, residency):
    (tmp_path / "cpu").mkdir()
    source = EngineSet.load(make_engines(tmp_path / "cpu"))
    pipe = reelrt.load(machine.engines(source, tmp_path / "gpu").folder, residency=residency)
    cpu = reelrt.load(source.folder, threads=1)
    with VideoService({"toy": pipe}, ServiceOptions(tmp_path / "state", reserve=0)) as service:
        requests = [
            replace(RED, seed=seed, prompt=prompt) for seed, prompt in enumerate(["red", "blue", "square"])
        ]
        jobs = [service.submit(request) for request in requests]
        watched = [service.watch(job.id) for job in jobs]
        end = time.monotonic() + 100
        while any(service.get(job.id).live for job in jobs):
            assert time.monotonic() < end
            time.sleep(0.01)
        remix = service.submit(VideoRequest("red", remix_of=jobs[0].id, format="webm"))
        while service.get(remix.id).live:
            assert time.monotonic() < end
            time.sleep(0.01)
        for job_id in [job.id for job in (*jobs, remix)]:
            job = service.get(job_id)
            assert job.error is None
            video = cpu.generate(job.request.prompt, seed=job.request.seed, steps=6, size=(64, 64))
            backend = reelrt.read_metadata(service.file(job_id))["backend"]
            assert backend.startswith("tensorrt")
            video = replace(video, metadata={**video.metadata, "backend": backend})
            assert service.file(job_id).read_bytes() == video.save(tmp_path / "cpu.webm").read_bytes()
        previews = [event for each in watched for event in each.take() if event.kind == "preview"]
        assert residency == "all" or not previews
    del pipe, service


def test_a_stage_waits_for_the_launch_and_launches_wait_for_stages():
    turns, order = Turns(overlaps=False), []
    inside, go = threading.Event(), threading.Event()

    def stage():
        with turns.stage():
            order.append("stage")
            inside.set()
            go.wait(5)
            order.append("stage done")

    with turns.step():
        thread = threading.Thread(target=stage)
        thread.start()
        time.sleep(0.05)
        order.append("step done")
    assert inside.wait(5)
    threading.Timer(0.05, go.set).start()
    with turns.step():
        order.append("next step")
    thread.join()
    assert order == ["step done", "stage", "stage done", "next step"]
    free = Turns(overlaps=True)
    with free.step(), free.stage():
        pass
