"""TensorRT and TensorRT-RTX as backends of the runtime: an opened engine set, and its memory.

Everything runs on one stream, in order. How the step engine is driven stands in
`reelrt.runtime.trt_step`; what differs between versions of the library in
`reelrt.runtime.trt_library`.
"""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np

from reelrt.bundle.manifest import Engine, EngineSet
from reelrt.errors import DeviceMemoryError
from reelrt.runtime.cuda import Buffer, Device, Stream, mib, stream_handle
from reelrt.runtime.execution import Execution, Scratch
from reelrt.runtime.residency import MemoryPlan, choose_memory
from reelrt.runtime.session import Array
from reelrt.runtime.trt_library import OpenedEngine, load_library
from reelrt.runtime.trt_step import Gpu, TrtStep

log = logging.getLogger("reelrt")

CALLS_KEPT = 2
"""Sizes of a stage whose buffers are kept: a decoder's full chunk and the last, smaller one."""
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
        stream: A caller's CUDA stream, of any library, that everything shall run on; it must
            outlive the sessions. None makes one.
        residency: `all` engines loaded, or `staged`, one at a time; None takes what fits.

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
    plan = choose_memory(engines, free, residency)
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
    """An opened engine set; see `reelrt.runtime.session.Sessions`.

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
        self._calls: OrderedDict[tuple[str, tuple[tuple[str, int], ...]], _Call] = OrderedDict()
        self._steps: WeakSet[TrtStep] = WeakSet()
        self._scratch = Scratch(device, stream)
        self._told = False
        if plan.residency == "all":
            with self._guarded():
                for name in engines.engines:
                    self._open(name)

    def run(self, stage: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a stage once on arrays of any size within its profile."""
        engine = self._engines.engines[stage]
        sizes = {
            str(axis): extent
            for name, spec in engine.spec.inputs.items()
            for axis, extent in zip(spec.axes, np.shape(inputs[name]), strict=True)
            if isinstance(axis, str)
        }
        with self._guarded():
            opened = self._open(stage)
            key = stage, tuple(sorted(sizes.items()))
            if key not in self._calls:
                same = [each for each in self._calls if each[0] == stage]
                for old in same[: max(len(same) - CALLS_KEPT + 1, 0)]:
                    self._calls.pop(old).close()
                self._calls[key] = _Call(self, engine, opened, sizes)
            self._calls.move_to_end(key)
            outputs = self._calls[key](inputs)
        self._finished()
        return outputs

    def open_step(self, latents: tuple[int, int, int, int]) -> TrtStep:
        """Allocate the step's buffers for latents [C, F, h, w]."""
        gpu = Gpu(
            self.device,
            self.stream,
            self._scratch,
            lambda: self._open("step"),
            self._guarded,
            self._finished,
        )
        step = TrtStep(gpu, self._engines.engines["step"], latents)
        self._steps.add(step)
        return step

    def memory(self) -> MemoryUse:
        """The device memory in use now, beside what was planned."""
        return MemoryUse(self._plan, self.device.allocated, self.device.peak, sum(self._taken.values()))

    def release(self) -> None:
        """Free everything on the device; whatever is asked for next is loaded again."""
        self.stream.settle()
        with self.device.current():
            for step in self._steps:
                step.release()
            for stage in list(self._opened):
                self._close(stage)
            self._scratch.release()

    def __del__(self) -> None:
        """Free what the library holds while the context is current, which no collector sees to."""
        if hasattr(self, "_scratch") and not sys.is_finalizing():
            self.release()

    def _open(self, stage: str) -> OpenedEngine:
        """An engine, loaded; with `staged`, the only one."""
        if stage not in self._opened:
            if self._plan.residency == "staged":
                for other in list(self._opened):
                    self._close(other)
            before, _ = self.device.memory()
            path = self._engines.folder / self._engines.engines[stage].file
            with self.device.current():
                self._opened[stage] = self._library.open(path)
            self._taken[stage] = max(before - self.device.memory()[0], 0)
        return self._opened[stage]

    def _close(self, stage: str) -> None:
        self.stream.settle()
        with self.device.current():
            self._opened[stage].save_cache()
            if stage == "step":
                for step in self._steps:
                    step.evict()
            for key in [key for key in self._calls if key[0] == stage]:
                self._calls.pop(key).close()
            self._opened.pop(stage).close()
            self._taken.pop(stage, None)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
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

    def _finished(self) -> None:
        """After each run: keep compiled kernels, and compare the memory in use with the plan."""
        for opened in self._opened.values():
            opened.save_cache()
        use = self.memory()
        used, allowed = use.peak + use.engines, TOLERATED * self._plan.total + SLACK_BYTES
        if self._plan.scratch and used > allowed and not self._told:
            self._told = True
            log.warning("%s of GPU memory are in use; planned were %s", mib(used), self._plan)


class _Call:
    """A stage other than the step, with buffers for one size of its inputs."""

    def __init__(
        self, sessions: TrtSessions, engine: Engine, opened: OpenedEngine, sizes: Mapping[str, int]
    ) -> None:
        device, self._stream = sessions.device, sessions.stream
        spec = engine.spec
        tensors = {
            name: (tensor.shape(sizes), tensor.numpy_dtype(engine.precision))
            for name, tensor in {**spec.inputs, **spec.outputs}.items()
        }
        self._inputs, self._outputs, self._device = list(spec.inputs), list(spec.outputs), device
        self._under_way = False
        self._host: dict[str, Array] = {}
        self._buffers: dict[str, Buffer] = {}
        with ExitStack() as owned:  # what fails half-way keeps nothing
            for name, (shape, dtype) in tensors.items():
                size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
                pinned = device.pin(size)
                owned.callback(pinned.close)
                self._host[name] = pinned.array(shape, dtype)
                self._buffers[name] = device.allocate(size)
                owned.callback(self._buffers[name].close)
            self._execution = Execution(
                opened,
                {name: tensors[name][0] for name in self._inputs},
                {name: buffer.pointer for name, buffer in self._buffers.items()},
                sessions._scratch,  # noqa: SLF001 # one module, one owner
            )
            owned.callback(self._execution.close)
            self._owned = owned.pop_all()

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with self._device.current():
            if self._under_way:  # the last time failed, and nothing says how far it came
                self._stream.wait()
            self._under_way = True
            for name in self._inputs:
                host = self._host[name]
                host[...] = inputs[name]
                self._stream.upload(self._buffers[name].pointer, host.ctypes.data, host.nbytes)
            self._execution.enqueue(self._stream)
            for name in self._outputs:
                host = self._host[name]
                self._stream.download(host.ctypes.data, self._buffers[name].pointer, host.nbytes)
            self._stream.wait()
            self._under_way = False
        return {name: self._host[name].copy() for name in self._outputs}

    def close(self) -> None:
        """Free the buffers, once nothing uses them any more."""
        self._stream.settle()
        with self._device.current():
            self._owned.close()
