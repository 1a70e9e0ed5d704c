"""The step engine of ONNX Runtime: bound buffers, and which thread runs which pass of the network.

A denoiser's operators are too small to keep several cores busy, so a launch runs whole passes side
by side instead, each on a lane: the rows of the batch, and the two passes of a guided step. With
split guidance these are two rows of the table, one without and one with the prompt, and both start
from the same sample; only a sum joins them. The second is run ahead with the first, and its own
launch is that sum.

No kernel ever sees another request, so a request's bytes cannot depend on its company.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from reelrt.bundle.manifest import Engine
from reelrt.bundle.schedule import Cfg, accumulated_weights, first_passes
from reelrt.errors import BackendError
from reelrt.runtime.session import Array, Float32

PATIENCE = 0.5
"""Seconds after which a lane that hears nothing of the other hands its errand over again."""


class Errand:
    """Bound passes for the second lane, and what became of them."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = passes
        self.over = False
        self.error: BackendError | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def run(self, engine: Any) -> None:
        """Do it, once: what was handed over twice is over the second time."""
        if self.over:
            return
        try:
            _run(engine, self.passes)
        except BackendError as error:
            self.error = error
        self.over = True
        self._gate.release()

    def wait(self, seconds: float) -> None:
        """Wait until it is over, or for a while."""
        self._gate.acquire(timeout=seconds)


class Lanes:
    """The step engine, opened so that two passes at a time use the CPU's threads.

    Ctrl-C may strike between any two operations, also while one lane waits for the other. So nothing
    here holds a lock while it waits, and an errand that was lost on its way is handed over again.

    Args:
        threads: CPU threads in all.
        open_step: Opens the engine with so many threads within an operator.

    Raises:
        BackendError: The engine cannot be opened.
    """

    def __init__(self, threads: int, open_step: Callable[[int], Any]) -> None:
        self._threads, self._open_step = threads, open_step
        # Two calls bring a thread each and share the engine's other ones.
        self.shared = open_step(max(threads - 1, 1))
        self.parallel = threads > 1
        self._errands: queue.SimpleQueue[Errand | None] = queue.SimpleQueue()
        self._second: Errand | None = None
        if self.parallel:
            work = threading.Thread(
                target=_second_lane, args=(self._errands, self.shared), name="reelrt-lane", daemon=True
            )
            work.start()
            weakref.finalize(self, self._errands.put, None)

    @cached_property
    def whole(self) -> Any:
        """The engine with all threads within an operator, for a pass that has no partner."""
        return self._open_step(self._threads) if self.parallel else self.shared

    def run(self, passes: Sequence[Any]) -> None:
        """Run bound passes of `shared`, every other one on the second lane.

        Raises:
            BackendError: The engine failed.
        """
        self.wait()
        if not self.parallel or len(passes) < 2:
            _run(self.shared, passes)
            return
        self._second = Errand(passes[1::2])
        try:
            self._errands.put(self._second)
            _run(self.shared, passes[::2])
        finally:  # Ctrl-C, too, leaves no pass behind that still writes
            self.wait()

    def run_alone(self, passes: Sequence[Any]) -> None:
        """Run bound passes of `whole` one after the other.

        Raises:
            BackendError: The engine failed.
        """
        self.wait()
        _run(self.whole, passes)

    def wait(self) -> None:
        """Wait until no pass is running.

        Raises:
            BackendError: The engine failed on the second lane.
        """
        errand = self._second
        while errand is not None and not errand.over:
            errand.wait(PATIENCE)
            if not errand.over:
                self._errands.put(errand)
        self._second = None
        if errand is not None and errand.error is not None:
            raise errand.error


def _second_lane(errands: queue.SimpleQueue[Errand | None], engine: Any) -> None:
    """Run errands until None comes."""
    while (errand := errands.get()) is not None:
        errand.run(engine)


def _run(engine: Any, passes: Sequence[Any]) -> None:
    try:
        for binding in passes:
            engine.run_with_iobinding(binding)
    except Exception as error:
        raise BackendError(f"ONNX Runtime failed in step: {error}") from error


class OrtStep:
    """The step engine's buffers; see `reelrt.runtime.session.StepSession`.

    Args:
        lanes: The engine, opened.
        engine: Its entry in the manifest: spec, profile and precision.
        cfg: How guidance is computed.
        latents: (C, F, h, w).
    """

    def __init__(self, lanes: Lanes, engine: Engine, cfg: Cfg, latents: tuple[int, ...]) -> None:
        _, frames, height, width = latents
        self.capacity = engine.profile["batch"].max
        self.table_rows = engine.profile["rows"].max
        sizes = {"batch": self.capacity, "rows": self.table_rows}
        sizes.update(frames=frames, height=height, width=width)
        buffers = {
            name: np.zeros(tensor.shape(sizes), tensor.numpy_dtype(engine.precision))
            for name, tensor in engine.spec.inputs.items()
        }
        self._lanes, self._pairs = lanes, lanes.parallel and cfg == "split"
        self._table, self._text = buffers["table"], buffers["text"]
        self._state = (buffers["state"], np.zeros_like(buffers["state"]))
        self._step = (buffers["step"], np.zeros_like(buffers["step"]))
        self._side = 0
        self._first = np.zeros((self.capacity, self.table_rows), np.bool_)
        self._ready = np.zeros(self.capacity, np.bool_)
        self._ahead = np.zeros_like(buffers["state"]) if self._pairs else buffers["state"][:0]
        self._ahead_step = (np.zeros_like(buffers["step"]), np.zeros_like(buffers["step"]))
        self._bindings: dict[tuple[str, int, int], Any] = {}

    def _bind(self, kind: str, row: int) -> Any:
        """A row's pass from the current side: `shared`, `whole` or, of the next row of its table, `ahead`."""
        key = kind, row, self._side
        if key not in self._bindings:
            one, here, there = slice(row, row + 1), self._side, 1 - self._side
            ahead = kind == "ahead"
            arrays = {
                "state": self._state[here],
                "table": self._table,
                "step": self._ahead_step[0] if ahead else self._step[here],
                "text": self._text,
                "state_next": self._ahead if ahead else self._state[there],
                "step_next": self._ahead_step[1] if ahead else self._step[there],
            }
            binding = (self._lanes.whole if kind == "whole" else self._lanes.shared).io_binding()
            for name, array in arrays.items():
                bind = binding.bind_output if name.endswith("_next") else binding.bind_input
                bind(name, *_address(array[one]))
            self._bindings[key] = binding
        return self._bindings[key]

    def write(self, row: int, table: Float32, text: Array, latents: Float32) -> None:
        """Put a request into a row; its history is empty, or comes with its state."""
        self._lanes.wait()
        self._table[row, : len(table)] = table
        self._first[row] = False
        if self._pairs:
            self._first[row, : len(table)] = first_passes(table)
        self._ready[row] = False
        self._text[row] = text
        self._step[self._side][row] = 0
        state = self._state[self._side][row]
        if latents.ndim == state.ndim:
            state[...] = latents
        else:
            state[0], state[1:] = latents, 0

    def move(self, source: int, target: int) -> None:
        """Copy a row to another row."""
        buffers = (self._table, self._text, self._state[self._side], self._step[self._side])
        for buffer in (*buffers, self._first, self._ready):
            buffer[target] = buffer[source]
        if self._ready[source]:
            self._ahead[target] = self._ahead[source]

    def launch(self, active: int) -> None:
        """Run the passes of the active rows that were not run ahead, then swap the sides."""
        passes, lonely, started = [], [], []
        for row in range(active):
            at = int(self._step[self._side][row])
            if self._ready[row]:
                self._join(row, at)
            elif self._first[row, at]:
                self._ahead_step[0][row] = at + 1
                passes += [self._bind("shared", row), self._bind("ahead", row)]
                started.append(row)
            elif self._first[row].any() or not self._lanes.parallel:
                passes.append(self._bind("shared", row))
            else:
                lonely.append(self._bind("whole", row))
        self._lanes.run(passes)
        if lonely:
            self._lanes.run_alone(lonely)
        self._ready[:active] = False
        self._ready[started] = True
        self._side = 1 - self._side

    def _join(self, row: int, at: int) -> None:
        """The second pass of a guided step, which was run ahead when the last state row was still 0."""
        state, following = self._state[self._side][row], self._state[1 - self._side][row]
        following[...] = self._ahead[row]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found at the end
            for index, weight in enumerate(accumulated_weights(self._table[row, at], len(state))):
                if weight:
                    np.multiply(state[-1], weight, out=self._ahead[row, 0])
                    following[index] += self._ahead[row, 0]
        self._step[1 - self._side][row] = at + 1

    def read(self, row: int) -> Float32:
        """A copy of the latents in a row."""
        self._lanes.wait()
        latents: Float32 = self._state[self._side][row, 0].copy()
        return latents

    def read_state(self, row: int) -> Float32:
        """A copy of the latents and the history in a row."""
        self._lanes.wait()
        state: Float32 = self._state[self._side][row].copy()
        return state


def _address(array: npt.NDArray[Any]) -> tuple[str, int, Any, tuple[int, ...], int]:
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
