"""The step engine on a GPU: its buffers, and two captured graphs per number of active slots.

State and counter exist twice. A launch reads one side and writes the other, so there are two
graphs, A→B and B→A, and between launches there is nothing to do: no address, no number and no byte
moves on the host. A graph is captured when its side was run once, which is also the first time a
number of slots occurs; what cannot be captured is enqueued every time, and says why.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from reelrt.bundle.manifest import Engine
from reelrt.errors import BackendError, CudaError, InputError
from reelrt.runtime.cuda import Buffer, Device, Event, Graph, Stream
from reelrt.runtime.device_array import DeviceArray, as_device_array, is_on_device
from reelrt.runtime.execution import Execution, Scratch
from reelrt.runtime.session import Array, Float32
from reelrt.runtime.trt_library import OpenedEngine

log = logging.getLogger("reelrt")

SIDES = ("a", "b")
PATIENCE = 2.0
"""Seconds that a collected session waits for its turn: its thread may hold what the other one waits for."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a step session shares with the rest of an opened engine set.

    Attributes:
        device: The GPU.
        stream: Where everything runs, in order.
        scratch: The activations' block.
        step: Gives the step engine, loaded if it was not.
        turn: Held while something is freed.
        guarded: Around work that allocates or is put on the stream: takes the turn, and frees everything
            when memory is used up.
        finished: Told when results were read.
        graphs_off: Why nothing may be captured, or "".
    """

    device: Device
    stream: Stream
    scratch: Scratch
    step: Callable[[], OpenedEngine]
    turn: threading.RLock
    guarded: Callable[[], AbstractContextManager[None]]
    finished: Callable[[], None]
    graphs_off: str = ""


class _Memory:
    """Everything that is allocated for one latent shape, once.

    Device memory is freed by `close`. Host memory and events go when nobody refers to them any more, for
    a thread may be waiting for one just then.
    """

    def __init__(self, device: Device, engine: Engine, sizes: dict[str, int]) -> None:
        specs = engine.spec.inputs
        self.shapes = {name: spec.shape(sizes) for name, spec in specs.items()}
        self.dtypes = {name: spec.numpy_dtype(engine.precision) for name, spec in specs.items()}
        self.rows = {
            name: int(np.prod(shape[1:], dtype=np.int64)) * self.dtypes[name].itemsize
            for name, shape in self.shapes.items()
        }
        self.latents = (self.shapes["state"][2:], self.dtypes["state"])
        self.latent_bytes = int(np.prod(self.latents[0], dtype=np.int64)) * self.latents[1].itemsize
        self._owned = ExitStack()
        self.device: dict[str, Buffer] = {}
        self.unsettled: set[int] = set()
        self.written: set[int] = set()
        self.fetching = False
        try:
            self._allocate(device, sizes["batch"])
        except BaseException:
            self.close()
            raise

    def _allocate(self, device: Device, capacity: int) -> None:
        twice = [f"{name}.{side}" for name in ("state", "step") for side in SIDES]
        for name in (*twice, "table", "text"):
            self.device[name] = device.allocate(capacity * self.rows[name.partition(".")[0]])
            self._owned.callback(self.device[name].close)
        single = {name: (self.shapes[name][1:], self.dtypes[name]) for name in ("table", "text", "state")}
        self.host: list[dict[str, Array]] = [
            {name: self._pin(device, *each) for name, each in single.items()} for _ in range(capacity)
        ]
        self.result = self._pin(device, *single["state"])
        self.uploaded = [Event(device) for _ in range(capacity)]
        self.reached = [Event(device) for _ in SIDES]
        self.fetched = Event(device)

    def _pin(self, device: Device, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return device.pin(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize).array(shape, dtype)

    def close(self) -> None:
        """Free the device memory; nothing may be under way."""
        self._owned.close()

    def address(self, name: str, row: int) -> int:
        """Where a row of a buffer begins."""
        return self.device[name].pointer + row * self.rows[name.partition(".")[0]]


class TrtStep:
    """The step engine's buffers; see `reelrt.runtime.session.StepSession`.

    At most two launches are under way at a time, so that progress is what the GPU did and
    cancelling acts at once; the GPU always has the next one waiting.

    Attributes:
        graphs_off: Why launches are enqueued instead of replayed, or "".

    Args:
        gpu: What is shared.
        engine: The step's entry in the manifest.
        latents: (C, F, h, w).

    Raises:
        DeviceMemoryError: The buffers do not fit.
    """

    def __init__(self, gpu: Gpu, engine: Engine, latents: tuple[int, int, int, int]) -> None:
        _, frames, height, width = latents
        self.capacity = engine.profile["batch"].max
        self.table_rows = engine.profile["rows"].max
        self._sizes = {"batch": self.capacity, "rows": self.table_rows}
        self._sizes.update(frames=frames, height=height, width=width)
        self._gpu, self._engine, self._side = gpu, engine, 0
        self._executions: dict[tuple[int, int], Execution] = {}
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._captured = -1
        self.graphs_off = gpu.graphs_off
        self._memory: _Memory | None = None
        with gpu.guarded():
            self._allocated()

    def _allocated(self) -> _Memory:
        if self._memory is None:
            self._memory = _Memory(self._gpu.device, self._engine, self._sizes)
        return self._memory

    def write(self, row: int, table: Float32, text: Array, latents: Any) -> None:
        """Put a request into a row, its history empty.

        Args:
            row: 0 to capacity - 1.
            table: float32 [S, K].
            text: Prompt embeddings [2, L, D].
            latents: float32 [C, F, h, w]: a NumPy array, or any in device memory. Or what
                `read_state` gave.

        Raises:
            InputError: Device latents of another shape, dtype or order.
            DeviceMemoryError: A new number of slots needs more than there is.
            CudaError: CUDA failed.
        """
        stream = self._gpu.stream
        with self._gpu.guarded(), self._gpu.device.current():
            memory = self._allocated()
            if row in memory.unsettled:  # a write failed, and nothing says how far it came
                stream.wait()
            memory.uploaded[row].wait()  # what was written before may still be on its way
            memory.unsettled.add(row)
            memory.written.discard(row)
            host, side = memory.host[row], SIDES[self._side]
            host["table"][: len(table)] = table
            host["text"][...] = text
            upload = stream.upload
            upload(
                memory.address("table", row), host["table"].ctypes.data, host["table"][: len(table)].nbytes
            )
            upload(memory.address("text", row), host["text"].ctypes.data, memory.rows["text"])
            state = memory.address(f"state.{side}", row)
            stream.clear(memory.address(f"step.{side}", row), memory.rows["step"])
            rows = 1 if is_on_device(latents) or latents.ndim < host["state"].ndim else len(latents)
            size = rows * memory.latent_bytes
            if history := memory.rows["state"] - size:
                stream.clear(state + size, history)
            if is_on_device(latents):
                self._share(latents, state, memory)
            else:
                host["state"][:rows] = latents
                upload(state, host["state"].ctypes.data, size)
            stream.record(memory.uploaded[row])
            if is_on_device(latents):  # they are the caller's again when this returns
                memory.uploaded[row].wait()
            memory.unsettled.discard(row)
            memory.written.add(row)
            for each in (0, 1):  # contexts are made now, so that a launch makes none
                self._execution(row + 1, each).prepare()

    def _share(self, latents: Any, target: int, memory: _Memory) -> None:
        """Take starting latents from another library's array, after its own stream's work."""
        found = as_device_array(latents, self._gpu.stream.handle)
        if (found.shape, found.dtype) != memory.latents:
            wanted, dtype = memory.latents
            raise InputError(f"latents are {found.dtype} {found.shape}, where {dtype} {wanted} is needed.")
        if found.stream:
            event = Event(self._gpu.device)
            Stream(self._gpu.device, found.stream).record(event)
            self._gpu.stream.follow(event)
        self._gpu.stream.copy(target, found.pointer, memory.latent_bytes)

    def move(self, source: int, target: int) -> None:
        """Copy a row to another row."""
        with self._gpu.guarded(), self._gpu.device.current():
            memory, side = self._ready(source), SIDES[self._side]
            for name in ("table", "text", f"state.{side}", f"step.{side}"):
                size = memory.rows[name.partition(".")[0]]
                self._gpu.stream.copy(memory.address(name, target), memory.address(name, source), size)
            memory.written.add(target)

    def launch(self, active: int) -> None:
        """Let the GPU advance the first rows by one row of their tables, then swap the sides."""
        gpu = self._gpu
        with gpu.device.current():
            self._ready().reached[self._side].wait()  # not holding the turn: other stages start meanwhile
            with gpu.guarded():
                memory, side = self._ready(*range(active)), self._side
                graph = self._graphs.get((active, side))
                if graph is not None and self._captured == gpu.scratch.version:
                    graph.launch(gpu.stream)
                else:
                    self._enqueue(active, side)
                gpu.stream.record(memory.reached[side])
                self._side = 1 - side

    def _enqueue(self, active: int, side: int) -> None:
        """Launch without a graph, then capture one for the next time."""
        stream, scratch = self._gpu.stream, self._gpu.scratch
        execution = self._execution(active, side)
        execution.enqueue(stream)
        if self.graphs_off:
            return
        if self._captured != scratch.version:
            self._graphs.clear()  # they hold the address of a block that is gone
            self._captured = scratch.version
        try:
            if obstacle := execution.obstacle(stream):
                raise BackendError(obstacle)
            self._graphs[active, side] = stream.capture(lambda: execution.enqueue(stream))
        except BackendError as error:
            self.graphs_off = error.name if isinstance(error, CudaError) else error.message
            log.warning("the step runs without CUDA graphs: %s", error.message)

    def _execution(self, active: int, side: int) -> Execution:
        if (active, side) not in self._executions:
            memory, here, there = self._ready(), SIDES[side], SIDES[1 - side]
            inputs = {"state": f"state.{here}", "step": f"step.{here}", "table": "table", "text": "text"}
            outputs = {"state_next": f"state.{there}", "step_next": f"step.{there}"}
            shapes = {name: (active, *memory.shapes[name][1:]) for name in inputs}
            addresses = {
                name: memory.device[buffer].pointer for name, buffer in {**inputs, **outputs}.items()
            }
            self._executions[active, side] = Execution(self._gpu.step(), shapes, addresses, self._gpu.scratch)
        return self._executions[active, side]

    def read(self, row: int) -> Float32:
        """A copy of the latents in a row, when all launches are done."""
        latents: Float32 = self._read(row, 1)[0]
        return latents

    def read_state(self, row: int) -> Float32:
        """A copy of the latents and the history in a row, when all launches are done."""
        return self._read(row, self._engine.spec.inputs["state"].shape(self._sizes)[1])

    def _read(self, row: int, rows: int) -> Float32:
        stream = self._gpu.stream
        with self._gpu.device.current():
            with self._gpu.guarded():
                memory = self._ready(row)
                if memory.fetching:  # the last time failed, and nothing says how far it came
                    stream.wait()
                memory.fetching = True
                source = memory.address(f"state.{SIDES[self._side]}", row)
                stream.download(memory.result.ctypes.data, source, rows * memory.latent_bytes)
                stream.record(memory.fetched)
            memory.fetched.wait()
        state: Float32 = memory.result[:rows].copy()
        memory.fetching = False
        self._gpu.finished()
        return state

    def view(self, row: int) -> DeviceArray:
        """The latents in a row where they lie, valid until the next launch, write or move."""
        memory = self._ready(row)
        buffer: Buffer = memory.device[f"state.{SIDES[self._side]}"]
        shape, dtype = memory.latents
        address = memory.address(f"state.{SIDES[self._side]}", row)
        return DeviceArray(address, shape, dtype, buffer, self._gpu.stream.handle)

    def _ready(self, *rows: int) -> _Memory:
        """The buffers, if rows hold what was written: another thread's call may have freed all of it."""
        if self._memory is None or not self._memory.written.issuperset(rows):
            raise BackendError("the step's memory was freed; write its requests again.")
        return self._memory

    def evict(self) -> None:
        """Let go of the engine; the requests stay, and it is loaded again when it is needed."""
        for graph in self._graphs.values():
            graph.close()
        for execution in self._executions.values():
            execution.close()
        self._graphs.clear()
        self._executions.clear()

    def release(self) -> None:
        """Let go of everything, once nothing uses it any more; the next request allocates again."""
        self._gpu.stream.settle()
        with self._gpu.device.current():
            self.evict()
            if self._memory is not None:
                self._memory.close()
        self._memory = None

    def __del__(self) -> None:
        """Launches may be under way when the last one who knew of them is gone."""
        if not hasattr(self, "_memory") or sys.is_finalizing():
            return
        taken = self._gpu.turn.acquire(timeout=PATIENCE)
        try:
            self.release()
        finally:
            if taken:
                self._gpu.turn.release()
