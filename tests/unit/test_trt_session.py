"""TensorRT sessions end to end on a simulated GPU: the same videos as ONNX Runtime, to the bit."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import reelrt
from reelrt.bundle.manifest import EngineSet
from reelrt.errors import BackendError, Cancelled, CompatibilityError, DeviceMemoryError, InputError
from reelrt.runtime.cuda import Stream
from reelrt.runtime.device_array import DeviceArray
from reelrt.runtime.loop import Request, StepLoop
from reelrt.runtime.noise import starting_noise
from reelrt.runtime.residency import plan_memory
from tests.simulated.driver import Status
from tests.simulated.machine import Machine
from tests.simulated.tensorrt import MISSING
from tests.unit.test_runtime_pipeline import make_engines, schedule

SHAPE = (4, 4, 4, 6)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> EngineSet:
    folder = tmp_path_factory.mktemp("onnxruntime")
    make_engines(folder)
    return EngineSet.load(folder)


@pytest.fixture(scope="module")
def cpu(source):
    return reelrt.load(source.folder, threads=1)


@pytest.fixture(params=MISSING)
def any_machine(request, monkeypatch):
    machine = Machine(monkeypatch, request.param)
    yield machine
    assert machine.driver.violations == []


@pytest.fixture
def machine(monkeypatch):
    machine = Machine(monkeypatch)
    yield machine
    assert machine.driver.violations == []


@pytest.fixture
def pipe(machine, source, tmp_path):
    return reelrt.load(machine.engines(source, tmp_path / "engines").folder)


def same(found, wanted):
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.latents.tobytes() == theirs.latents.tobytes()
        assert ours.frames.tobytes() == theirs.frames.tobytes()


PROMPTS = ["red circle", "blue", "square", "red square", "circle"]


@pytest.mark.parametrize("residency", ["all", "staged"])
def test_the_same_videos_as_onnx_runtime(any_machine, source, cpu, tmp_path, residency):
    """More prompts than slots, so that requests leave and join; several sizes; every version."""
    pipe = reelrt.load(any_machine.engines(source, tmp_path / "engines").folder, residency=residency)
    for options in ({"steps": 8, "solver": "two"}, {"steps": 3, "frames": 3, "size": (32, 64)}, {"steps": 1}):
        same(pipe.generate(PROMPTS, seed=3, **options), cpu.generate(PROMPTS, seed=3, **options))


def test_everything_is_gone_when_nobody_needs_it(machine, source, tmp_path):
    pipe = reelrt.load(machine.engines(source, tmp_path / "engines").folder)
    pipe.generate("red", steps=3)
    assert machine.driver.leaks()["device bytes"] > 0
    del pipe
    gc.collect()
    assert machine.driver.leaks() == {}


def request_of(pipe, seed, steps=10):
    table = schedule("two", steps).table(3.0, "split", 3)
    text = np.stack([pipe._text("")[0], pipe._text(PROMPTS[seed % 5])[0]])
    return Request(table, text, starting_noise(seed, SHAPE))


def test_between_the_first_and_the_last_step_there_are_only_graph_launches(machine, pipe):
    calls, loop = machine.driver.calls, StepLoop(pipe._sessions.open_step(SHAPE))
    first, second = loop.admit(request_of(pipe, 1)), loop.admit(request_of(pipe, 2))
    loop.step()
    loop.step()  # both sides have been run, and captured
    before = calls.copy()
    for _ in range(18):
        loop.step()
    made = calls - before
    quiet = {"cuCtxPushCurrent", "cuCtxPopCurrent", "cuEventSynchronize", "cuEventRecord"}
    assert {name: count for name, count in made.items() if name not in quiet} == {"cuGraphLaunch": 18}
    assert first.finished and second.finished


def test_a_request_allocates_and_copies_at_its_ends_alone(machine, pipe):
    """From the second video of a size on nothing is allocated at all."""
    pipe.generate("red", steps=10, seed=1)
    before = machine.driver.calls.copy()
    pipe.generate("red", steps=10, seed=2)
    made = machine.driver.calls - before
    rows = 20  # split guidance
    assert made["cuGraphLaunch"] == rows
    assert not {"cuMemAlloc", "cuMemHostAlloc", "cuMemFree", "cuStreamBeginCapture", "cuEventCreate"} & set(
        made
    )
    decoded = 2  # chunks of 3 and 1 frames
    assert made["enqueueV3"] == decoded
    assert made["cuMemcpyHtoDAsync"] == 3 + decoded  # table, text, latents
    assert made["cuMemcpyDtoHAsync"] == 1 + decoded


def test_two_launches_are_under_way_at_most(machine, pipe):
    loop = StepLoop(pipe._sessions.open_step(SHAPE))
    loop.admit(request_of(pipe, 1))
    stream = machine.driver._streams[pipe._sessions.stream.handle]
    for _ in range(10):
        loop.step()
        assert [work.name for work in stream.work].count("step") <= 2


def test_a_graph_for_each_side_and_number_of_slots(machine, pipe):
    session = pipe._sessions.open_step(SHAPE)
    loop = StepLoop(session)
    slots = [loop.admit(request_of(pipe, seed)) for seed in range(3)]
    for _ in range(3):
        loop.step()
    assert set(session._graphs) == {(3, 0), (3, 1)}
    loop.release(slots[0])
    for _ in range(3):
        loop.step()
    assert set(session._graphs) == {(3, 0), (3, 1), (2, 0), (2, 1)}
    assert session.graphs_off == ""


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"cuStreamBeginCapture": Status.CUDA_ERROR_NOT_SUPPORTED}, "CUDA_ERROR_NOT_SUPPORTED"),
        ("invalidated", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"),
        ({"cuGraphInstantiate": Status.CUDA_ERROR_OUT_OF_MEMORY}, "OUT_OF_MEMORY"),
        ("library", "TensorRT-RTX cannot capture step"),
    ],
)
def test_without_graphs_it_runs_on_and_says_why(machine, pipe, cpu, caplog, fault, reason):
    if fault == "library":
        machine.module.ICudaEngine.capturable = False
    elif fault == "invalidated":  # by a call of another thread, say
        stream = pipe._sessions.stream.handle
        machine.driver.faults = lambda call: (
            call == "cuStreamEndCapture" and machine.driver.invalidate(stream)
        )
    else:
        machine.driver.faults = fault.get
    same(pipe.generate(PROMPTS[:2], steps=5, seed=1), cpu.generate(PROMPTS[:2], steps=5, seed=1))
    (session,) = pipe._sessions._steps
    assert reason in session.graphs_off
    assert [r.levelname for r in caplog.records if "without CUDA graphs" in r.message] == ["WARNING"]
    assert machine.driver.calls["cuGraphLaunch"] == 0


def test_a_callers_stream_is_used(machine, source, cpu, tmp_path):
    """The service made a context and a stream with pycuda, say."""
    driver = machine.driver
    driver._stack().append(9)
    _, theirs = driver.cuStreamCreate(0)
    driver._stack().clear()

    class PycudaStream:
        handle = theirs

    pipe = reelrt.load(machine.engines(source, tmp_path / "engines").folder, stream=PycudaStream())
    same([pipe.generate("red", steps=4, seed=1)], [cpu.generate("red", steps=4, seed=1)])
    assert list(driver._streams) == [theirs]
    assert driver.calls["cuDevicePrimaryCtxRetain"] == 0
    del pipe
    gc.collect()
    assert list(driver._streams) == [theirs]  # it stays the caller's
    with pytest.raises(InputError, match="no CUDA stream"):
        reelrt.load(tmp_path / "engines", stream="mine")


def test_latents_come_and_go_in_device_memory(machine, pipe, cpu):
    """Another library's array goes in and ours comes out, with no byte through the host."""
    session = pipe._sessions.open_step(SHAPE)
    loop, request = StepLoop(session), request_of(pipe, 1, steps=4)
    slot = loop.admit(request)
    while not slot.finished:
        loop.step()
    wanted = loop.latents(slot)
    loop.release(slot)

    device, stream = pipe._sessions.device, pipe._sessions.stream
    theirs = device.allocate(request.latents.nbytes)
    host = device.pin(request.latents.nbytes).array(SHAPE, np.float32)
    host[...] = request.latents
    with device.current():
        stream.upload(theirs.pointer, host.ctypes.data, host.nbytes)
        stream.wait()
    array = DeviceArray(theirs.pointer, SHAPE, np.dtype(np.float32), theirs, stream.handle)
    before = machine.driver.calls.copy()
    slot = loop.admit(Request(request.table, request.text, array))
    while not slot.finished:
        loop.step()
    view = session.view(slot.row)
    assert (machine.driver.calls - before)["cuMemcpyHtoDAsync"] == 2  # table and text
    assert view.__cuda_array_interface__["shape"] == SHAPE
    with device.current():
        stream.download(host.ctypes.data, view.pointer, view.size)
        stream.wait()
    assert host.tobytes() == wanted.tobytes()
    with pytest.raises(InputError, match=r"float32 \(4,\).* is needed"):
        session.write(0, request.table, request.text, DeviceArray(theirs.pointer, (4,), array.dtype, theirs))


class Cupy:
    """Stands for another library's array, with values of a stream of its own on their way to it."""

    def __init__(self, pipe, values):
        self.device, self.stream = pipe._sessions.device, Stream(pipe._sessions.device)
        self.buffer = self.device.allocate(values.nbytes)
        self.host = self.device.pin(values.nbytes).array(values.shape, values.dtype)
        self.host[...] = values
        with self.device.current():
            self.stream.upload(self.buffer.pointer, self.host.ctypes.data, values.nbytes)
        self.shape, self.dtype = values.shape, values.dtype

    @property
    def __cuda_array_interface__(self):
        data, stream = (self.buffer.pointer, False), self.stream.handle
        shape, kind = self.shape, self.dtype.str
        return {
            "version": 3,
            "shape": shape,
            "typestr": kind,
            "data": data,
            "strides": None,
            "stream": stream,
        }


@pytest.mark.parametrize("residency", ["all", "staged"])
def test_generate_takes_latents_of_the_gpu(machine, source, cpu, tmp_path, residency):
    """For one prompt and for several; from another library's stream; no byte of them through the host."""
    pipe = reelrt.load(machine.engines(source, tmp_path / "engines").folder, residency=residency)
    noise = np.concatenate([cpu.starting_latents(seed) for seed in (3, 4)])
    for prompts, given in ((PROMPTS[:2], noise), (PROMPTS[:3], noise[:1])):
        theirs = Cupy(pipe, given)
        pipe.generate(prompts, steps=2, seed=1)
        before = machine.driver.calls.copy()
        found = pipe.generate(prompts, steps=4, latents=theirs)
        uploads = (machine.driver.calls - before)["cuMemcpyHtoDAsync"]
        theirs.buffer.close()  # theirs again
        same(found, cpu.generate(prompts, steps=4, latents=given))
        assert found[0].metadata["seed"] is None
        before = machine.driver.calls.copy()
        pipe.generate(prompts, steps=4, latents=given)
        assert (machine.driver.calls - before)["cuMemcpyHtoDAsync"] == uploads + len(prompts)


def test_a_solver_that_scales_its_noise_takes_it_through_the_host(machine, pipe, cpu):
    noise = cpu.starting_latents(3)
    found = pipe.generate("red", steps=4, solver="two", latents=Cupy(pipe, noise))  # 2.0 times the noise
    same([found], [cpu.generate("red", steps=4, solver="two", latents=noise)])


def test_impossible_latents_of_the_gpu(machine, pipe, cpu):
    for values, message in (
        (np.zeros((4, 4, 4, 6), np.float32), r"latents have shape \(4, 4, 4, 6\); give \[1 or 1"),
        (np.zeros((1, 4, 4, 4, 6), np.float16), "are float16. Make them float32"),
        (np.zeros((1, 4, 9, 4, 6), np.float32), "frames 9 is not available"),
    ):
        with pytest.raises(InputError, match=message):
            pipe.generate("red", steps=1, latents=Cupy(pipe, values))
    with pytest.raises(InputError, match="these engines run on the CPU"):
        cpu.generate("red", steps=1, latents=Cupy(pipe, cpu.starting_latents(1)))
    with pytest.raises(InputError, match="on_device is for engines of a GPU"):
        cpu.generate("red", steps=1, on_device=True)


@pytest.mark.parametrize("residency", ["all", "staged"])
def test_latents_and_frames_stay_on_the_gpu(machine, source, cpu, tmp_path, residency):
    """Two videos, each with memory of its own, which outlives the pipeline."""
    pipe = reelrt.load(machine.engines(source, tmp_path / "engines").folder, residency=residency)
    assert pipe.generate("red", steps=1).on_device == {}
    wanted = cpu.generate(PROMPTS[:2], steps=4, seed=1)
    found = pipe.generate(PROMPTS[:2], steps=4, seed=1, on_device=True)
    same(found, wanted)
    fetch = pipe._sessions.fetch
    for ours, theirs in zip(found, wanted, strict=True):
        assert set(ours.on_device) == {"latents", "frames"}
        interface = ours.on_device["frames"].__cuda_array_interface__
        assert (interface["shape"], interface["typestr"]) == (theirs.frames.shape, "|u1")
        assert fetch(ours.on_device["latents"]).tobytes() == theirs.latents.tobytes()
        assert fetch(ours.on_device["frames"]).tobytes() == theirs.frames.tobytes()
        again = pipe.generate(
            "red", steps=1, latents=ours.on_device["latents"]
        )  # a video's latents are noise
        assert again.frames.tobytes() == cpu.generate("red", steps=1, latents=theirs.latents).frames.tobytes()
    del pipe, fetch, again
    gc.collect()
    sizes = sum(array.size for video in found for array in video.on_device.values())
    assert machine.driver.used == sizes
    del found, ours
    gc.collect()
    assert machine.driver.leaks() == {}


def test_kernels_are_kept_beside_the_engines(machine, source, tmp_path, caplog):
    engines = machine.engines(source, tmp_path / "engines")
    with caplog.at_level(logging.INFO, "reelrt"):
        reelrt.load(engines.folder).generate("red", steps=2)
    assert "compiled for this GPU the first time" in caplog.text
    kept = {path.name for path in engines.folder.glob("*.cache")}
    assert kept == {f"{stage}.engine.cache" for stage in engines.engines}
    caplog.clear()
    with caplog.at_level(logging.INFO, "reelrt"):
        reelrt.load(engines.folder).generate("red", steps=2)
    assert "compiled" not in caplog.text
    (engines.folder / "step.engine.cache").write_bytes(b"of another GPU")
    with caplog.at_level(logging.INFO, "reelrt"):
        reelrt.load(engines.folder).generate("red", steps=2)
    assert "step.engine.cache is of another driver or GPU" in caplog.text
    assert (engines.folder / "step.engine.cache").read_bytes().startswith(b"kernels")


def test_a_folder_that_cannot_be_written_to_is_no_error(machine, source, tmp_path):
    engines = machine.engines(source, tmp_path / "engines")
    (engines.folder / "step.engine.cache").mkdir()
    reelrt.load(engines.folder).generate("red", steps=2)


def test_cancelling_and_ctrl_c_leave_it_usable(pipe, cpu):
    wanted = cpu.generate(PROMPTS, steps=5, seed=1)
    for stop in (Cancelled, KeyboardInterrupt):
        cancel = threading.Event()

        def progress(what, done, total, stop=stop, cancel=cancel):
            if (what, done) == ("denoise", 6):
                cancel.set()
                if stop is KeyboardInterrupt:
                    raise KeyboardInterrupt

        with pytest.raises(stop):
            pipe.generate(PROMPTS, steps=5, seed=1, progress=progress, should_cancel=cancel.is_set)
        same(pipe.generate(PROMPTS, steps=5, seed=1), wanted)


def test_another_size_after_cancelling_waits_for_what_is_under_way(pipe, cpu):
    """The last size's contexts and graphs may not go while the GPU is busy with them."""
    pipe.generate("red", steps=5, seed=1)
    cancel = threading.Event()

    def progress(what, done, total):
        if (what, done) == ("denoise", 6):
            cancel.set()

    with pytest.raises(Cancelled):
        pipe.generate("red", steps=5, seed=1, progress=progress, should_cancel=cancel.is_set)
    other = {"steps": 2, "seed": 1, "frames": 3, "size": (32, 64)}
    same([pipe.generate("red", **other)], [cpu.generate("red", **other)])


def test_a_failed_launch_is_an_error_and_the_next_video_is_right(machine, pipe, cpu):
    wanted = [cpu.generate("red", steps=6, seed=4)]
    for name in ("cuGraphLaunch", "enqueueV3", "cuMemcpyDtoHAsync", "cuEventSynchronize"):
        left = [3 if name != "cuMemcpyDtoHAsync" else 1]

        def fault(call, name=name, left=left):
            left[0] -= call == name
            return Status.CUDA_ERROR_LAUNCH_FAILED if call == name and left[0] == 0 else None

        pipe.generate("blue", steps=6, seed=4)
        machine.driver.faults = fault
        with pytest.raises(BackendError):
            pipe.generate(["red"] * 3, steps=6, seed=4)
        machine.driver.faults = lambda call: None
        same([pipe.generate("red", steps=6, seed=4)], wanted)


def test_staged_holds_one_engine_at_a_time(machine, source, tmp_path):
    engines = machine.engines(source, tmp_path / "engines")
    pipe = reelrt.load(engines.folder, residency="staged")
    assert pipe._sessions._opened == {}
    for stage in ("text_encoder", "step", "vae_decoder"):
        pipe._sessions._open(stage)
        assert list(pipe._sessions._opened) == [stage]
    pipe.generate(PROMPTS, steps=3, seed=1)
    assert list(pipe._sessions._opened) == ["vae_decoder"]


WEIGHTS = 1 << 20


@pytest.fixture
def streamable(any_machine, source, tmp_path):
    """A step whose weights can stay with the host; all of the engines need more than there is."""
    engines = any_machine.engines(source, tmp_path / "engines", streamable=WEIGHTS)
    staged = plan_memory(engines, "staged")
    any_machine.driver.total = any_machine.driver.used + staged.total - WEIGHTS // 2
    return engines


def test_weights_are_streamed_where_nothing_else_fits(streamable, any_machine, cpu, caplog):
    pipe = reelrt.load(streamable.folder)
    plan = pipe._sessions.memory().plan
    assert plan.residency == "streamed"
    assert 0 < plan.budget < WEIGHTS and plan.streams == WEIGHTS - plan.budget
    assert "of the step's weights streamed" in str(plan)
    assert [r.levelname for r in caplog.records if "without CUDA graphs" in r.message] == ["WARNING"]
    for options in ({"steps": 4, "solver": "two"}, {"steps": 2, "frames": 3, "size": (32, 64)}):
        same(pipe.generate(PROMPTS, seed=3, **options), cpu.generate(PROMPTS, seed=3, **options))
    assert any_machine.driver.calls["cuGraphLaunch"] == any_machine.driver.calls["cuStreamBeginCapture"] == 0
    assert list(pipe._sessions._opened) == ["vae_decoder"]  # one at a time
    assert pipe._sessions.memory().peak <= plan.total <= any_machine.driver.total
    (session,) = pipe._sessions._steps
    assert session.graphs_off == "weights are streamed"
    del pipe, session
    gc.collect()
    assert any_machine.driver.leaks() == {}


def test_what_fits_is_not_streamed(machine, source, cpu, tmp_path):
    engines = machine.engines(source, tmp_path / "engines", streamable=WEIGHTS)
    assert reelrt.load(engines.folder)._sessions.memory().plan.residency == "all"
    pipe = reelrt.load(engines.folder, residency="streamed")
    assert pipe._sessions.memory().plan.streams == 0
    same([pipe.generate("red", steps=3, seed=1)], [cpu.generate("red", steps=3, seed=1)])
    assert machine.driver.calls["cuGraphLaunch"] > 0  # nothing is streamed, so it is captured


def test_streaming_is_refused_with_the_reason(machine, source, tmp_path, monkeypatch):
    plain = machine.engines(source, tmp_path / "plain")
    with pytest.raises(InputError, match="was not built for weight streaming.*--weight-streaming"):
        reelrt.load(plain.folder, residency="streamed")
    engines = machine.engines(source, tmp_path / "engines", streamable=WEIGHTS)
    pipe = reelrt.load(engines.folder, residency="streamed")
    monkeypatch.setattr(machine.module.ICudaEngine, "streamable_weights_size", 0)
    with pytest.raises(
        BackendError, match=r"cannot stream the weights of .*step\.engine.*--weight-streaming"
    ):
        pipe.generate("red", steps=1)
    pipe._sessions._library.features = frozenset({"runtime_config"})
    with pytest.raises(BackendError, match="this version of TensorRT-RTX streams no weights.*'staged'"):
        pipe.generate("red", steps=1)
    machine.driver.total = 1000
    with pytest.raises(DeviceMemoryError, match=r"needs .*weights streamed\) and .* are free"):
        reelrt.load(engines.folder)
    with pytest.raises(DeviceMemoryError, match="--weight-streaming or"):
        reelrt.load(plain.folder)


def test_memory_is_what_was_planned(machine, source, tmp_path):
    engines = machine.engines(source, tmp_path / "engines")
    for residency in ("all", "staged"):
        pipe = reelrt.load(engines.folder, residency=residency)
        pipe.generate(PROMPTS, steps=3, frames=8, size=(64, 64), seed=1)
        use = pipe._sessions.memory()
        assert use.plan == plan_memory(engines, residency, overlap=residency == "all")
        assert 0 < use.allocated <= use.peak <= use.plan.total
        assert use.allocated <= machine.driver.used
        del pipe
        gc.collect()


def test_more_memory_than_planned_is_told(machine, source, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("reelrt.runtime.trt.SLACK_BYTES", 0)
    monkeypatch.setattr("reelrt.runtime.trt.TOLERATED", 0.01)
    pipe = reelrt.load(machine.engines(source, tmp_path / "engines").folder)
    pipe.generate("red", steps=3)
    pipe.generate("red", steps=3)
    assert [r.levelname for r in caplog.records if "planned were" in r.message] == ["WARNING"]


def test_what_does_not_fit_is_refused_with_the_plan(monkeypatch, source, tmp_path):
    machine = Machine(monkeypatch, memory=1000)
    engines = machine.engines(source, tmp_path / "engines")
    with pytest.raises(
        DeviceMemoryError, match=r"needs 1\.9 MiB \(.*one at a time\).* free.*--size"
    ) as error:
        reelrt.load(engines.folder)
    assert "activations 1.7 MiB" in error.value.plan
    assert error.value.exit_code == 6
    with pytest.raises(DeviceMemoryError, match="residency='staged'"):
        reelrt.load(engines.folder, residency="all")
    with pytest.raises(InputError, match="residency 'none' is not known"):
        reelrt.load(engines.folder, residency="none")
    gc.collect()
    assert set(machine.driver.leaks()) <= {"contexts"}  # the caught error holds the device


def test_out_of_memory_frees_everything_and_a_smaller_video_works(machine, pipe, cpu):
    small = {"steps": 3, "frames": 2, "size": (32, 32), "seed": 1}
    large = {"steps": 3, "frames": 8, "size": (64, 64), "seed": 1}
    pipe.generate("red", **small)
    machine.driver.total = machine.driver.used + 20_000  # another program took the rest
    for _ in range(3):
        with pytest.raises(DeviceMemoryError, match="MiB.*Planned were .*ask for a smaller") as caught:
            pipe.generate(PROMPTS[:3], **large)
        assert caught.value.plan
        assert machine.driver.used == 0
        same([pipe.generate("red", **small)], [cpu.generate("red", **small)])
    machine.driver.total = 1 << 28
    same(pipe.generate(PROMPTS[:3], **large), cpu.generate(PROMPTS[:3], **large))


@pytest.mark.parametrize("nth", range(1, 14))
def test_any_allocation_may_fail(machine, source, cpu, tmp_path, nth):
    left = [nth]

    def fault(call):
        if call not in ("cuMemAlloc", "TensorRT"):
            return None
        left[0] -= 1
        return Status.CUDA_ERROR_OUT_OF_MEMORY if left[0] == 0 else None

    folder = machine.engines(source, tmp_path / "engines").folder
    pipe = None
    machine.driver.faults = fault
    with pytest.raises(DeviceMemoryError):
        pipe = reelrt.load(folder, residency="staged")
        pipe.generate(PROMPTS[:3], steps=2, seed=1)
    gc.collect()
    assert machine.driver.used == 0
    same(pipe.generate(PROMPTS[:3], steps=2, seed=1), cpu.generate(PROMPTS[:3], steps=2, seed=1))


def test_engines_that_do_not_open(machine, source, tmp_path, monkeypatch):
    engines = machine.engines(source, tmp_path / "engines")
    (engines.folder / "step.engine").write_text("no engine", encoding="utf-8")
    with pytest.raises(BackendError, match="cannot open .*step.engine: Serialization assertion"):
        reelrt.load(engines.folder, check=False)
    (engines.folder / "step.engine").write_bytes(b"")
    with pytest.raises(BackendError, match=r"cannot open .*step\.engine: "):
        reelrt.load(engines.folder, check=False)
    monkeypatch.setattr(machine.module, "__version__", "1.6.0")
    with pytest.raises(CompatibilityError, match=r"built by TensorRT-RTX 1\.7\.1; 1\.6\.0 is installed"):
        reelrt.load(engines.folder, check=False)
    monkeypatch.setattr(machine.module, "__version__", "1.3.0")
    with pytest.raises(BackendError, match=r"1\.3\.0 is too old; 1\.4"):
        reelrt.load(engines.folder, check=False)


def test_a_driver_too_old_for_the_library(machine, source, tmp_path, monkeypatch):
    engines = machine.engines(source, tmp_path / "engines")

    class Runtime:
        def __init__(self, logger):
            logger.log(machine.module.Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("factory function returned nullptr")

    monkeypatch.setattr(machine.module, "Runtime", Runtime)
    with pytest.raises(BackendError, match="does not start: CUDA init.* 35. Update the NVIDIA driver"):
        reelrt.load(engines.folder)


def test_a_shape_the_engine_refuses_is_named(pipe):
    session = pipe._sessions.open_step((4, 4, 4, 14))
    request = request_of(pipe, 1)
    with pytest.raises(BackendError, match=r"refuses the shape .* of state: .* outside the profile"):
        session.write(0, request.table, request.text, np.zeros((4, 4, 4, 14), np.float32))


def test_a_step_that_was_freed_says_so(pipe):
    session = pipe._sessions.open_step(SHAPE)
    pipe._sessions.release()
    for use in (lambda: session.launch(1), lambda: session.read(0), lambda: session.move(1, 0)):
        with pytest.raises(BackendError, match="write its requests again"):
            use()


def test_sessions_hold_no_cycle(machine, source, tmp_path):
    """The pipeline frees the last size's buffers before it allocates the next one's."""
    pipe = reelrt.load(machine.engines(source, tmp_path / "engines").folder)
    step = weakref.ref(pipe._sessions.open_step(SHAPE))
    assert step() is None
    assert Path(pipe.engines.folder).is_dir()


@pytest.mark.parametrize("rows", [6, 7])
def test_a_request_goes_on_from_its_state(machine, pipe, cpu, rows):
    """Between two steps and between the two passes of one, in a batch of others."""
    table = schedule("two", 9).table(3.0, "split", 3)
    request = Request(table, np.zeros((2, 6, 2), np.float32) + 0.1, starting_noise(5, SHAPE))
    states = []
    for each in (pipe, cpu):
        loop = StepLoop(each.sessions.open_step(SHAPE))
        slot = loop.admit(request)
        while slot.done < rows:
            loop.step()
        states.append(loop.state(slot))
        loop.release(slot)
        other = loop.admit(request)
        loop.step()
        resumed = loop.admit(Request(table[rows:], request.text, states[-1]))
        while not resumed.finished:
            loop.step()
        loop.release(other)
        states.append(loop.latents(resumed))
    whole = StepLoop(cpu.sessions.open_step(SHAPE))
    slot = whole.admit(request)
    while not slot.finished:
        whole.step()
    assert states[0].shape == (3, *SHAPE) and states[0].tobytes() == states[2].tobytes()
    assert states[1].tobytes() == states[3].tobytes() == whole.latents(slot).tobytes()
