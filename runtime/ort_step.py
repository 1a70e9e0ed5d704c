"""The step engine of ONNX Runtime: bound buffers, and which pass of the network a launch runs.

A launch runs passes side by side, each on a lane: the rows of the batch, and the two passes of a
guided step. With split guidance these are two rows of the table, one without and one with the
prompt, and both start from the same sample; only a sum joins them. The second is run ahead with the
first, and its own launch is that sum. Where the engine has a first part that no prompt changes,
both passes go on from one run of it.

No kernel ever sees another request, so a request's bytes cannot depend on its company.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from reelrt.bundle.manifest import Engine
from reelrt.bundle.schedule import Cfg, accumulated_weights, first_passes
from reelrt.errors import BackendError
from reelrt.runtime.lanes import Call, Lanes, Part, run
from reelrt.runtime.session import Array, Float32


class OrtStep:
    """The step engine's buffers; see `reelrt.runtime.session.StepSession`.

    Args:
        lanes: What runs passes.
        step: The engine, opened; or, with a prefix, the rest of it.
        prefix: Its first part, opened.
        engine: Its entry in the manifest: spec, profile and precision.
        cfg: How guidance is computed.
        latents: (C, F, h, w).

    Raises:
        BackendError: The prefix fails.
    """

    def __init__(
        self,
        lanes: Lanes,
        step: Part,
        prefix: Part | None,
        engine: Engine,
        cfg: Cfg,
        latents: tuple[int, ...],
    ) -> None:
        _, frames, height, width = latents
        self.capacity = engine.profile["batch"].max
        self.table_rows = engine.profile["rows"].max
        sizes = {"batch": self.capacity, "rows": self.table_rows}
        sizes.update(frames=frames, height=height, width=width)
        buffers = {
            name: np.zeros(tensor.shape(sizes), tensor.numpy_dtype(engine.precision))
            for name, tensor in engine.spec.inputs.items()
        }
        self._lanes, self._parts = lanes, {"step": step, "prefix": prefix}
        self._pairs = cfg == "split" and (lanes.parallel or prefix is not None)
        self._table, self._text = buffers["table"], buffers["text"]
        self._state = (buffers["state"], np.zeros_like(buffers["state"]))
        self._step = (buffers["step"], np.zeros_like(buffers["step"]))
        self._side = 0
        self._first = np.zeros((self.capacity, self.table_rows), np.bool_)
        self._ready = np.zeros(self.capacity, np.bool_)
        self._ahead = np.zeros_like(buffers["state"]) if self._pairs else buffers["state"][:0]
        self._ahead_step = (np.zeros_like(buffers["step"]), np.zeros_like(buffers["step"]))
        self._common = {} if prefix is None else self._measure(prefix.shared)
        steps = (*self._step, *self._ahead_step)
        self._buffers = (self._table, self._text, *self._state, self._ahead, *steps, self._common)
        self._calls: dict[tuple[str, str, int, int], Call] = {}

    def _measure(self, prefix: Any) -> dict[str, list[Array]]:
        """Buffers for what a prefix computes, one per row, as large as a run of it says."""
        row = {"state": self._state[0], "table": self._table, "step": self._step[0]}
        names = [output.name for output in prefix.get_outputs()]
        try:
            outputs = prefix.run(names, {name: array[:1] for name, array in row.items()})
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in step: {error}") from error
        return {
            name: [np.zeros_like(output) for _ in range(self.capacity)]
            for name, output in zip(names, outputs, strict=True)
        }

    def _call(self, part: str, threads: str, row: int, ahead: bool = False) -> Call:
        """A row's pass from the current side, or that of the next row of its table."""
        engine = getattr(self._parts[part], threads)
        key = part, threads + (" ahead" if ahead else ""), row, self._side
        if key not in self._calls:
            one, here, there = slice(row, row + 1), self._side, 1 - self._side
            arrays = {
                "state": self._state[here][one],
                "table": self._table[one],
                "step": (self._ahead_step[0] if ahead else self._step[here])[one],
                "text": self._text[one],
                "state_next": (self._ahead if ahead else self._state[there])[one],
                "step_next": (self._ahead_step[1] if ahead else self._step[there])[one],
                **{name: rows[row] for name, rows in self._common.items()},
            }
            binding = engine.io_binding()
            for value in engine.get_inputs():
                binding.bind_input(value.name, *_address(arrays[value.name]))
            for value in engine.get_outputs():
                binding.bind_output(value.name, *_address(arrays[value.name]))
            self._calls[key] = Call(engine, binding, self._buffers)
        return self._calls[key]

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
        passes, lonely, started, fresh = [], [], [], []
        for row in range(active):
            at = int(self._step[self._side][row])
            if self._ready[row]:
                self._join(row, at)
                continue
            fresh.append(row)
            if self._first[row, at]:
                self._ahead_step[0][row] = at + 1
                passes += [self._call("step", "shared", row), self._call("step", "shared", row, ahead=True)]
                started.append(row)
            elif self._first[row].any() or not self._lanes.parallel:
                passes.append(self._call("step", "shared", row))
            else:
                lonely.append(self._call("step", "whole", row))
        if self._parts["prefix"] is not None:
            threads = "whole" if len(fresh) == 1 else "shared"
            self._lanes.run([self._call("prefix", threads, row) for row in fresh])
        self._lanes.run(passes)
        run(lonely)
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
