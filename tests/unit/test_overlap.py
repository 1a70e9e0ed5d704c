"""Stages from several threads: beside the step on a stream of their own, or between its launches."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import reelrt
from reelrt.bundle.manifest import EngineSet
from reelrt.errors import BackendError, DeviceMemoryError
from reelrt.runtime.loop import Request, StepLoop
from reelrt.runtime.noise import starting_noise
from reelrt.runtime.residency import choose_memory, plan_memory
from reelrt.runtime.session import GpuSessions, run_each
from tests.simulated.driver import Status
from tests.simulated.machine import Machine
from tests.unit.test_runtime_pipeline import make_engines, schedule

SHAPE = (4, 4, 4, 6)
ROWS = 20
KINDS = ["onnxruntime", "beside", "between", "staged"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> EngineSet:
    folder = tmp_path_factory.mktemp("onnxruntime")
    make_engines(folder)
    return EngineSet.load(folder)


@pytest.fixture(scope="module")
def cpu(source):
    return reelrt.load(source.folder, threads=1)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine(monkeypatch)
    yield machine
    assert machine.driver.violations == []


@pytest.fixture
def folder(machine, source, tmp_path):
    return machine.engines(source, tmp_path / "engines").folder


def load(kind, machine, source, folder):
    if kind == "onnxruntime":
        return reelrt.load(source.folder, threads=2)
    if kind == "beside":
        return reelrt.load(folder)
    if kind == "staged":
        return reelrt.load(folder, residency="staged")
    machine.driver._stack().append(1)
    _, stream = machine.driver.cuStreamCreate(0)
    machine.driver._stack().pop()
    return reelrt.load(folder, stream=stream)


@pytest.fixture(params=KINDS)
def pipe(request, machine, source, folder):
    pipe = load(request.param, machine, source, folder)
    if request.param != "onnxruntime":
        assert pipe._sessions.overlaps == (request.param == "beside")
    return pipe


def request_of(pipe, seed, prompt="red circle"):
    table = schedule("two", ROWS // 2).table(3.0, "split", 3)
    text = np.stack([pipe._text("")[0], pipe._text(prompt)[0]])
    return Request(table, text, starting_noise(seed, SHAPE))


def denoise(pipe, seed, before_step=lambda: None):
    loop = StepLoop(pipe._sessions.open_step(SHAPE))
    slot = loop.admit(request_of(pipe, seed))
    while not slot.finished:
        before_step()
        loop.step()
    return loop.latents(slot)


def quiet(pipe, cpu):
    """What gives the bits to compare with; ONNX Runtime's own differ with its number of threads."""
    return cpu if isinstance(pipe._sessions, GpuSessions) else pipe


TOKENS = {"tokens": np.array([[0, 2, 4, 1, 1, 1]], np.int64)}


def test_stages_run_while_another_thread_steps(pipe, cpu):
    """Text encoder and decoder from two threads during every launch of a third; all of it to the bit."""
    latents = [starting_noise(seed, (4, 3 - seed % 2, 4, 6))[None] for seed in range(4)]
    text = cpu._sessions.run("text_encoder", TOKENS)["text"]
    frames = [cpu._sessions.run("vae_decoder", {"latents": each})["frames"] for each in latents]
    over, ran = threading.Event(), {"text": 0, "frames": 0}

    def encode():
        while not over.is_set() or not ran["text"]:
            assert np.array_equal(pipe._sessions.run("text_encoder", TOKENS)["text"], text)
            ran["text"] += 1

    def decode():
        while not over.is_set() or ran["frames"] < 4:
            which = ran["frames"] % 4
            found = pipe._sessions.run("vae_decoder", {"latents": latents[which]})["frames"]
            assert np.array_equal(found, frames[which])
            ran["frames"] += 1

    wanted = [denoise(quiet(pipe, cpu), seed) for seed in range(3)]
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(encode), pool.submit(decode)]
        try:
            found = [denoise(pipe, seed) for seed in range(3)]
        finally:
            over.set()
        for other in others:
            other.result(60)
    assert [each.tobytes() for each in found] == [each.tobytes() for each in wanted]
    assert min(ran.values()) >= 1


def test_a_stage_may_run_between_any_two_launches(pipe, cpu):
    """From the thread that steps: with `staged`, each time throws the step engine out."""
    text = cpu._sessions.run("text_encoder", TOKENS)["text"]

    def encode():
        assert np.array_equal(pipe._sessions.run("text_encoder", TOKENS)["text"], text)

    assert denoise(pipe, 1, encode).tobytes() == denoise(quiet(pipe, cpu), 1).tobytes()


def test_two_loops_by_turns(pipe, cpu):
    """Step sessions of two sizes, say; their launches alternate."""
    wanted = [denoise(quiet(pipe, cpu), seed).tobytes() for seed in (1, 2)]
    loops = [StepLoop(pipe._sessions.open_step(SHAPE)) for _ in range(2)]
    slots = [loop.admit(request_of(pipe, seed)) for seed, loop in enumerate(loops, 1)]
    for _ in range(ROWS):
        for loop in loops:
            loop.step()
    assert [loop.latents(slot).tobytes() for loop, slot in zip(loops, slots, strict=True)] == wanted


def test_the_next_chunk_decodes_while_one_is_used(machine, folder, cpu):
    """When the first chunk is there, the second one was started; each has buffers of its own."""
    pipe = reelrt.load(folder)
    latents = starting_noise(1, (4, 8, 4, 6))[None]
    wanted = list(cpu.decode(latents))
    list(pipe.decode(latents))
    before = machine.driver.calls.copy()
    started = []
    for part, theirs in zip(pipe.decode(latents), wanted, strict=True):
        started.append((machine.driver.calls - before)["enqueueV3"])
        assert np.array_equal(part, theirs)
    assert started == [2, 3, 3]
    made = machine.driver.calls - before
    assert made["cuStreamWaitEvent"] == 3  # a third stream copies to the host
    assert not {"cuMemAlloc", "cuMemHostAlloc", "cuEventCreate", "cuStreamSynchronize"} & set(made)


def test_copies_have_a_stream_of_their_own(machine, folder):
    sessions = reelrt.load(folder)._sessions
    lane = sessions._lane
    assert len({sessions.stream.handle, lane.stream.handle, lane.copies.handle}) == 3
    driver = machine.driver
    latents = {"latents": starting_noise(1, (4, 3, 4, 6))[None]}
    result = sessions.submit("vae_decoder", latents)
    waiting = {
        name: [work.name for work in driver._streams[stream.handle].work]
        for name, stream in (("run", lane.stream), ("copy", lane.copies))
    }
    assert waiting == {"run": ["upload", "vae_decoder", "event"], "copy": ["wait", "download", "event"]}
    result()


def test_buffers_are_not_used_again_before_their_result_was_taken(machine, folder, cpu):
    sessions = reelrt.load(folder)._sessions
    inputs = [{"latents": starting_noise(seed, (4, 3, 4, 6))[None]} for seed in range(4)]
    wanted = [cpu._sessions.run("vae_decoder", each)["frames"] for each in inputs]
    results = [sessions.submit("vae_decoder", each) for each in inputs]
    for each in inputs:
        each["latents"][...] = np.nan  # the caller's to change
    for result, theirs in zip(reversed(results), reversed(wanted), strict=True):
        assert np.array_equal(result()["frames"], theirs)
    (calls,) = sessions._calls.values()
    assert len(calls) == 4
    older = results.pop()
    newer = sessions.submit("vae_decoder", inputs[0])
    taken = newer.call
    del older, results, result  # they had the same buffers before
    assert taken.busy
    newer()
    sessions.submit("vae_decoder", inputs[0])  # nobody asks
    gc.collect()
    assert not any(call.busy for call in calls)
    again = {"latents": starting_noise(2, (4, 3, 4, 6))[None]}
    assert np.array_equal(sessions.run("vae_decoder", again)["frames"], wanted[2])
    assert len(calls) == 4


def test_decoding_that_is_given_up_changes_nothing(pipe, cpu):
    latents = starting_noise(1, (4, 8, 4, 6))[None]
    parts = pipe.decode(latents)
    assert isinstance(parts, Iterator)
    next(parts)
    other = pipe.generate("red", steps=2, seed=1, frames=8)
    assert np.array_equal(other.frames, cpu.generate("red", steps=2, seed=1, frames=8).frames)
    del parts
    assert np.array_equal(np.concatenate([*pipe.decode(latents)]), np.concatenate([*cpu.decode(latents)]))


def test_a_failed_decode_is_told_and_the_next_is_right(machine, folder, cpu):
    pipe = reelrt.load(folder)
    latents = starting_noise(1, (4, 8, 4, 6))[None]
    wanted = np.concatenate([*cpu.decode(latents)])
    for call in (
        "enqueueV3",
        "cuEventSynchronize",
        "cuMemcpyDtoHAsync",
        "cuStreamWaitEvent",
        "cuEventRecord",
    ):
        for nth in (1, 2):
            left = [nth]

            def fault(name, call=call, left=left):
                left[0] -= name == call
                return Status.CUDA_ERROR_LAUNCH_FAILED if name == call and left[0] == 0 else None

            machine.driver.faults = fault
            with pytest.raises(BackendError):
                list(pipe.decode(latents))
            machine.driver.faults = lambda name: None
            assert np.array_equal(np.concatenate([*pipe.decode(latents)]), wanted)


def test_out_of_memory_in_one_thread_tells_the_other(machine, folder, cpu):
    """What steps loses its memory and says so; nothing hangs, and the next video is right."""
    pipe = reelrt.load(folder)
    wanted = cpu.generate("red", steps=5, seed=1)
    pipe.generate("red", steps=5, seed=1)
    failed = []

    def disturb(what, done, total):
        if (what, done) != ("denoise", 4):
            return
        machine.driver.faults = {"cuMemAlloc": Status.CUDA_ERROR_OUT_OF_MEMORY}.get

        def decode():
            try:
                pipe._sessions.run("vae_decoder", {"latents": np.zeros((1, 4, 2, 8, 8), np.float32)})
            except DeviceMemoryError as error:
                failed.append(error.plan)
            machine.driver.faults = lambda name: None

        thread = threading.Thread(target=decode)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()

    with pytest.raises(BackendError, match="write its requests again"):
        pipe.generate("red", steps=5, seed=1, progress=disturb)
    assert failed and failed[0]
    again = pipe.generate("red", steps=5, seed=1)
    assert again.frames.tobytes() == wanted.frames.tobytes()


def test_what_was_freed_does_not_come_back_with_the_next_request(machine, folder):
    """Memory was freed between two requests; the second one's does not make the first one whole again."""
    pipe = reelrt.load(folder)
    session = pipe._sessions.open_step(SHAPE)
    loop = StepLoop(session)
    first = loop.admit(request_of(pipe, 1))
    loop.step()
    pipe._sessions.release()
    second = loop.admit(request_of(pipe, 2))
    for use in (loop.step, lambda: loop.latents(first), lambda: session.move(0, 2), lambda: loop.view(first)):
        with pytest.raises(BackendError, match="write its requests again"):
            use()
    assert np.array_equal(loop.latents(second), request_of(pipe, 2).latents)


@pytest.mark.parametrize("kind", ["onnxruntime", "beside"])
def test_the_next_requests_prompt_is_encoded_while_this_one_denoises(kind, machine, source, folder, cpu):
    pipe = load(kind, machine, source, folder)
    begun, encoded, found = threading.Event(), threading.Event(), {}

    def first(what, done, total):
        if (what, done) == ("denoise", 2):
            begun.set()
            assert encoded.wait(30)  # with the first request still in the loop

    def second(what, done, total):
        if what == "text" and done == total:
            encoded.set()

    def follow():
        assert begun.wait(30)
        found["second"] = pipe.generate("blue square", steps=3, seed=2, progress=second)

    thread = threading.Thread(target=follow)
    thread.start()
    found["first"] = pipe.generate("red circle", steps=3, seed=1, progress=first)
    thread.join(60)
    for name, prompt, seed in (("first", "red circle", 1), ("second", "blue square", 2)):
        assert found[name].frames.tobytes() == cpu.generate(prompt, steps=3, seed=seed).frames.tobytes()


def test_overlap_is_planned_and_given_up_where_it_does_not_fit(machine, folder):
    engines = EngineSet.load(folder)
    beside, between = (plan_memory(engines, "all", overlap=each) for each in (True, False))
    decoder = beside.buffers["vae_decoder"]
    assert beside.aside > decoder > 0
    assert beside.total > between.total
    assert "other stages beside the step" in str(beside)
    assert choose_memory(engines, beside.total, None) == beside
    assert choose_memory(engines, beside.total - 1, None) == between
    assert choose_memory(engines, beside.total, "all", overlap=False) == between
    assert choose_memory(engines, beside.total, "staged") == plan_memory(engines, "staged")
    machine.driver.total = machine.driver.used + beside.total - 1
    pipe = reelrt.load(folder)
    assert not pipe._sessions.overlaps
    pipe.generate(["red", "blue"], steps=2, seed=1, frames=8, size=(64, 64))
    assert pipe._sessions.memory().peak <= pipe._sessions.memory().plan.total


def test_who_overlaps(source, machine, folder):
    assert isinstance(reelrt.load(folder)._sessions, GpuSessions)
    cpu = reelrt.load(source.folder, threads=1)._sessions
    assert not isinstance(cpu, GpuSessions)
    assert [set(each) for each in run_each(cpu, "text_encoder", [TOKENS, TOKENS])] == [{"text"}] * 2
