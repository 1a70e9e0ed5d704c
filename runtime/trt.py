"""TensorRT and TensorRT-RTX as backends of the runtime: an opened engine set, and its memory.

The step runs on one stream, in order. The other stages run there too, between its launches, or where
the memory plan has room for it on a stream beside, with activations of their own and a third stream
that copies results to the host. One lock, the turn, is held while something is loaded, allocated, freed
or put on a stream, not while a launch or a result is waited for. How the step engine is driven stands in
`reelrt.runtime.trt_step`, the other stages' buffers in `reelrt.runtime.trt_call`, what differs between
versions of the library in `reelrt.runtime.trt_library`.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from reelrt.bundle.manifest import EngineSet
from reelrt.errors import DeviceMemoryError
from reelrt.runtime.cuda import Device, Event, Stream, mib, stream_handle
from reelrt.runtime.device_array import DeviceArray, as_device_array
from reelrt.runtime.execution import Scratch
from reelrt.runtime.residency import MemoryPlan, choose_memory
from reelrt.runtime.session import Array, Result
from reelrt.runtime.trt_call import Call, Lane, Started
from reelrt.runtime.trt_library import OpenedEngine, load_library
from reelrt.runtime.trt_step import Gpu, TrtStep

log = logging.getLogger("reelrt")

CALLS_KEPT = 2
"""Sizes of a stage whose buffers are kept: a decoder's full chunk and the last, smaller one."""
STREAMED = "weights are streamed"
"""Why a streamed step is not captured: the library copies weights by itself meanwhile."""
TOLERATED, SLACK_BYTES = 1.1, 32 * 2**20
"""How far the memory in use may be above the plan before a warning says so."""


def open_sessions(
    engines: EngineSet,
    threads: int | None = None,
    *,
    stream: object = None,
    residency: str | None = None,
) -> TrtSessions:
    """Open a `tensorrt` or `tensorrt_rtx` engine set on the GPU.

    Args:
        engines: The engine set.
        threads: Not used: the GPU does the work.
        stream: A caller's CUDA stream, of any library, that everything shall run on, in order; it
            must outlive the sessions. None makes one, and others beside it where the memory suffices.
        residency: One of `reelrt.runtime.residency.RESIDENCIES`; None takes the first that fits.

    Raises:
        BackendError: The library or the driver is missing, too old, or refuses an engine.
        CompatibilityError: Another version of the library built the engines.
        DeviceMemoryError: The engines do not fit into the GPU's memory.
        InputError: No stream, or no residency.
    """
    del threads
    device = Device(0 if stream is None else stream_handle(stream))
    with device.current():
        library = load_library(engines)
    free, _ = device.memory()
    plan = choose_memory(engines, free, residency, overlap=stream is None)
    return TrtSessions(engines, library, device, Stream(device, stream), plan)


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Device memory in bytes.

    Attributes:
        plan: What was planned.
        allocated: Our own buffers and the scratch block, counted.
        peak: The most of these so far.
        engines: What loading the engines took from the GPU's free memory; what other processes
            did meanwhile is in it.
    """

    plan: MemoryPlan
    allocated: int
    peak: int
    engines: int


class TrtSessions:
    """An opened engine set; see `reelrt.runtime.session.GpuSessions`.

    Args:
        engines: The engine set.
        library: TensorRT or TensorRT-RTX.
        device: The GPU.
        stream: Where everything runs.
        plan: Which engines are loaded when.
    """

    def __init__(
        self, engines: EngineSet, library: Any, device: Device, stream: Stream, plan: MemoryPlan
    ) -> None:
        self.device, self.stream = device, stream
        self._engines, self._library, self._plan = engines, library, plan
        self._opened: dict[str, OpenedEngine] = {}
        self._taken: dict[str, int] = {}
        self._calls: OrderedDict[tuple[str, tuple[tuple[str, int], ...]], list[Call]] = OrderedDict()
        self._steps: WeakSet[TrtStep] = WeakSet()
        self._turn = threading.RLock()
        self._scratch = Scratch(device, stream)
        self._lane = Lane(stream, stream, self._scratch)
        if plan.overlap:
            beside = Stream(device)
            self._lane = Lane(beside, Stream(device), Scratch(device, beside))
        self._told = False
        if plan.streams:
            log.warning(
                "%s of the step's weights are streamed while it runs, and it runs without CUDA graphs",
                mib(plan.streams),
            )
        if plan.residency == "all":
            with self._guarded():
                for name in engines.engines:
                    self._open(name)

    @property
    def overlaps(self) -> bool:
        """Whether other stages run beside the step."""
        return self._plan.overlap

    def run(self, stage: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a stage once on arrays of any size within its profile."""
        return self.submit(stage, inputs)()

    def submit(
        self, stage: str, inputs: Mapping[str, Array], into: Mapping[str, DeviceArray] | None = None
    ) -> Result:
        """Start a stage; its buffers are used again when the result was asked for, or dropped."""
        engine = self._engines.engines[stage]
        sizes = {
            str(axis): extent
            for name, spec in engine.spec.inputs.items()
            for axis, extent in zip(spec.axes, np.shape(inputs[name]), strict=True)
            if isinstance(axis, str)
        }
        with self._guarded():
            started = Started(self._free_call(stage, sizes), self._recovering, self._finished)
            started.call.start(inputs, into or {})
        return started

    def receive(self, array: object) -> DeviceArray:
        """View another library's array."""
        with self.device.current():
            return as_device_array(array, self.stream.handle)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """Device memory of the caller's, not initialised."""
        kind = np.dtype(dtype)
        with self._guarded():
            buffer = self.device.allocate(prod(shape) * kind.itemsize)
        return DeviceArray(buffer.pointer, shape, kind, buffer)

    def copy(self, source: DeviceArray) -> DeviceArray:
        """A copy in device memory of the caller's, when it is done."""
        target = self.empty(source.shape, source.dtype)
        with self._guarded(), self.device.current():
            self._after(source)
            self.stream.copy(target.pointer, source.pointer, source.size)
            self.stream.wait()
        return target

    def fetch(self, source: DeviceArray) -> Array:
        """A copy in the host's memory, when it is done."""
        with self._guarded(), self.device.current():
            host = self.device.pin(source.size).array(source.shape, source.dtype)
            self._after(source)
            self.stream.download(host.ctypes.data, source.pointer, source.size)
            self.stream.wait()
        return host.copy()

    def _after(self, source: DeviceArray) -> None:
        """Let our stream wait for the one whose work an array is the result of."""
        if source.stream and source.stream != self.stream.handle:
            event = Event(self.device)
            Stream(self.device, source.stream).record(event)
            self.stream.follow(event)

    def _free_call(self, stage: str, sizes: Mapping[str, int]) -> Call:
        """Buffers for a size that nobody waits for; the sizes used last are kept."""
        opened = self._open(stage)
        key = stage, tuple(sorted(sizes.items()))
        if key not in self._calls:
            same = [each for each in self._calls if each[0] == stage]
            for old in same[: max(len(same) - CALLS_KEPT + 1, 0)]:
                for call in self._calls.pop(old):
                    call.close()
            self._calls[key] = []
        self._calls.move_to_end(key)
        free = next((call for call in self._calls[key] if not call.busy), None)
        if free is None:
            free = Call(self.device, self._lane, self._engines.engines[stage], opened, sizes)
            self._calls[key].append(free)
        return free

    def open_step(self, latents: tuple[int, int, int, int]) -> TrtStep:
        """Allocate the step's buffers for latents [C, F, h, w]."""
        gpu = Gpu(
            self.device,
            self.stream,
            self._scratch,
            lambda: self._open("step"),
            self._turn,
            self._guarded,
            self._finished,
            STREAMED if self._plan.streams else "",
        )
        step = TrtStep(gpu, self._engines.engines["step"], latents)
        with self._turn:
            self._steps.add(step)
        return step

    def memory(self) -> MemoryUse:
        """The device memory in use now, beside what was planned."""
        return MemoryUse(self._plan, self.device.allocated, self.device.peak, sum(self._taken.values()))

    def release(self) -> None:
        """Free everything on the device; whatever is asked for next is loaded again."""
        with self._turn, self.device.current():
            for step in self._steps:
                step.release()
            for stage in list(self._opened):
                self._close(stage)
            self._scratch.release()
            self._lane.scratch.release()

    def __del__(self) -> None:
        """Free what the library holds while the context is current, which no collector sees to."""
        if hasattr(self, "_told") and not sys.is_finalizing():
            self.release()

    def _open(self, stage: str) -> OpenedEngine:
        """An engine, loaded; with `staged` and `streamed`, the only one."""
        if stage not in self._opened:
            if self._plan.residency != "all":
                for other in list(self._opened):
                    self._close(other)
            before, _ = self.device.memory()
            path = self._engines.folder / self._engines.engines[stage].file
            with self.device.current():
                self._opened[stage] = self._library.open(path)
                if stage == "step" and self._plan.residency == "streamed":
                    try:
                        self._opened[stage].stream_weights(self._plan.budget)
                    except BaseException:
                        self._close(stage)
                        raise
            self._taken[stage] = max(before - self.device.memory()[0], 0)
        return self._opened[stage]

    def _close(self, stage: str) -> None:
        self.stream.settle()
        self._lane.settle()
        with self.device.current():
            self._opened[stage].save_cache()
            if stage == "step":
                for step in self._steps:
                    step.evict()
            for key in [key for key in self._calls if key[0] == stage]:
                for call in self._calls.pop(key):
                    call.close()
            self._opened.pop(stage).close()
            self._taken.pop(stage, None)

    @contextmanager
    def _recovering(self) -> Iterator[None]:
        """Free everything when the memory is used up, so that a smaller request can follow."""
        try:
            yield
        except DeviceMemoryError as error:
            message, remedy, plan = error.message, error.remedy, str(self._plan)
            error.__traceback__ = error.__context__ = error.__cause__ = None  # they hold what is freed now
            del error
            self.release()
        else:
            return
        raise DeviceMemoryError(f"{message} Planned were {plan}.", remedy, plan)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Take the turn; memory that is used up is freed when it was given back."""
        with self._recovering(), self._turn:
            yield

    def _finished(self) -> None:
        """After each run: keep compiled kernels, and compare the memory in use with the plan."""
        with self._turn:
            for opened in self._opened.values():
                opened.save_cache()
            use = self.memory()
            used, allowed = use.peak + use.engines, TOLERATED * self._plan.total + SLACK_BYTES
            if self._plan.scratch and used > allowed and not self._told:
                self._told = True
                log.warning("%s of GPU memory are in use; planned were %s", mib(used), self._plan)
