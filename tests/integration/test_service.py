"""The job service on a real small model, and killed while it works."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

import reelrt
from reelrt.bundle.manifest import EngineSet
from reelrt.runtime.ort import open_sessions
from reelrt.runtime.pipeline import TextToVideo
from reelrt.service.jobs import VideoRequest
from reelrt.service.jobservice import VideoService
from reelrt.service.options import ServiceOptions
from tests.gated import Gate
from tests.killing import Ledger, kill_once, options, prove
from tests.unit.test_runtime_pipeline import make_engines

pytestmark = pytest.mark.timeout(900)  # the first test exports a model

RED = VideoRequest(
    "a red circle moving right on a black background",
    width=64,
    height=64,
    frames=4,
    steps=6,
    seed=7,
    format="webm",  # x264 gives the same frames other bytes now and then
)
LARGE = {"frames": 16, "steps": 3}


@pytest.fixture
def service(small_engines, tmp_path):
    sessions = Gate(open_sessions(EngineSet.load(small_engines), 2))
    pipe = TextToVideo(EngineSet.load(small_engines), sessions)
    with VideoService({"small": pipe}, ServiceOptions(tmp_path / "state", reserve=0)) as service:
        service.gate = sessions
        yield service


def over(service, job):
    end = time.monotonic() + 120
    while service.get(job.id).live:
        assert time.monotonic() < end
        time.sleep(0.01)
    return service.get(job.id)


def bare(pipe, job, folder):
    asked = job.request
    video = pipe.generate(
        asked.prompt,
        steps=asked.steps,
        guidance=asked.guidance,
        seed=asked.seed,
        frames=asked.frames,
        size=(asked.width, asked.height),
        solver=asked.solver,
    )
    return video.save(folder / f"bare.{asked.format}", asked.fps).read_bytes()


def test_jobs_that_share_a_batch_give_the_runtimes_bytes(service, small_pipe, tmp_path):
    """Other prompts, solvers and lengths; they come one after the other into a running batch."""
    others = [
        replace(RED, steps=25, guidance=3.0),
        replace(RED, prompt="a blue square growing on a gray background", seed=1, solver="unipc"),
        replace(RED, prompt="a green triangle", seed=2, solver="dpmpp_2m", steps=9),
        replace(RED, seed=3, guidance=1.0, steps=12),
        replace(RED, seed=4, solver="euler"),
    ]
    service.gate.shut()
    jobs = [service.submit(others[0])]
    assert service.gate.waiting.wait(60)
    jobs += [service.submit(request) for request in others[1:]]
    while len(service.gate.batches) < 9:
        service.gate.let(1)
        time.sleep(0.05)
    service.gate.open()
    jobs = [over(service, job) for job in jobs]
    assert service.gate.batches[0] == 1 and max(service.gate.batches) == 4
    for job in jobs:
        assert job.error is None
        assert service.file(job.id).read_bytes() == bare(small_pipe, job, tmp_path)


@pytest.mark.parametrize("solver", ["ddim", "unipc", "dpmpp_2m", "deis"])
def test_a_remix_with_the_same_prompt_is_the_same_video(service, solver):
    """Nothing of a multistep solver's history is lost on its way over the disk."""
    parent = over(service, service.submit(replace(RED, solver=solver, steps=8)))
    launches = len(service.gate.batches)
    remix = over(service, service.submit(VideoRequest(RED.prompt, remix_of=parent.id, format="webm")))
    assert len(service.gate.batches) - launches == 8
    assert service.file(remix.id).read_bytes() == service.file(parent.id).read_bytes()
    other = over(service, service.submit(VideoRequest("a blue square", remix_of=parent.id, format="webm")))
    assert service.file(other.id).read_bytes() != service.file(parent.id).read_bytes()


def test_large_and_small_videos_both_get_their_turn(service):
    """Streams of both sizes at once: each finishes in the time of its own and a few others."""
    jobs = []
    for seed in range(12):
        jobs.append(service.submit(replace(RED, seed=seed, steps=3)))
        if seed % 4 == 1:
            jobs.append(service.submit(replace(RED, seed=seed, **LARGE)))
    done = [over(service, job) for job in jobs]
    assert {job.status for job in done} == {"completed"}
    starts = sorted(done, key=lambda job: job.started_at)
    for place, job in enumerate(starts):
        before = [each for each in starts[:place] if each.created_at > job.created_at]
        assert len(before) <= 4


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "engines").mkdir()
    return make_engines(tmp_path / "engines")


def test_a_killed_service_loses_nothing(toy, tmp_path):
    ledger = Ledger()
    for seed in range(5):
        kill_once(toy, tmp_path / "state", ledger, seed, deeds=60)
    outcomes = prove(toy, tmp_path / "state", ledger)
    assert ledger.faults == []
    assert ledger.kills == 5 and len(ledger.accepted) > 5 and outcomes["completed"] > 0
    assert ledger.killed_while["jobs in_progress"] > 0


def test_the_proof_finds_what_is_wrong(toy, tmp_path):
    """A file gone, one cut short, one exchanged, a job nobody asked for, and one that was never there."""
    folder, ledger = tmp_path / "state", Ledger()
    kill_once(toy, folder, ledger, 3, deeds=60)
    prove(toy, folder, ledger)
    assert ledger.faults == []
    pipe = reelrt.load(toy, threads=1)
    with VideoService({"toy": pipe}, options(folder)) as service:
        jobs = [
            over(service, service.submit(replace(RED, seed=100 + seed), "", f"t{seed}")) for seed in range(4)
        ]
        for number, job in enumerate(jobs[:3]):
            ledger.asked[f"t{number}"] = replace(RED, seed=100 + number).to_json()
            ledger.accepted[f"t{number}"] = job.id
        paths = [service.file(job.id) for job in jobs]
        other = service.file(jobs[3].id).read_bytes()
    ledger.accepted["x"], ledger.asked["x"] = "video_never", RED.to_json()
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:100].ljust(paths[1].stat().st_size, b"\0"))
    paths[2].write_bytes(other[: paths[2].stat().st_size].ljust(paths[2].stat().st_size, b"\0"))
    outcomes = prove(toy, folder, ledger)
    found = "\n".join(ledger.faults)
    assert outcomes["file_lost"] == 1  # found at the start, and told
    for job, what in ((jobs[1], "cannot be read"), (jobs[2], "")):
        assert any(job.id in fault and what in fault for fault in ledger.faults), found
    assert "video_never was accepted and is not there" in found
    assert f"nobody asked for {{'{jobs[3].id}'}}" in found
