"""ONNX Runtime as a backend of the runtime, on the CPU.

Buffers are numpy arrays, bound once. A launch runs the engine on one row of the batch after the
other: on a CPU a batch gains nothing over that, and it makes a request's bytes independent of its
company by construction, because no kernel ever sees another request.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from reelrt.bundle.manifest import Engine, EngineSet
from reelrt.errors import BackendError, CompatibilityError
from reelrt.jetson.device import detect
from reelrt.runtime.session import Array, Float32


def open_sessions(engines: EngineSet, threads: int | None = None) -> OrtSessions:
    """Open every engine of a set.

    Args:
        engines: An `onnxruntime` engine set.
        threads: CPU threads within an operator; None takes one per physical core.

    Raises:
        CompatibilityError: It was optimised by another version of ONNX Runtime or for another CPU.
        BackendError: ONNX Runtime cannot open an engine.
    """
    _check(engines)
    opened = {
        name: open_engine(engines.folder / engine.file, threads) for name, engine in engines.engines.items()
    }
    return OrtSessions(engines, opened)


def _check(engines: EngineSet) -> None:
    if engines.backend_version != ort.__version__:
        raise CompatibilityError(
            f"{engines.folder} was built by ONNX Runtime {engines.backend_version}; "
            f"{ort.__version__} is installed.",
            "Build the engines again.",
        )
    device = detect()
    here = f"{device.architecture} {' '.join(device.cpu_features)}"
    for engine in engines.engines.values():
        cpu = engine.key_fields.get("cpu", here)
        if cpu != here:
            raise CompatibilityError(
                f"{engines.folder} was optimised for a CPU with {cpu}; this one has {here}.",
                "Build the engines again.",
            )


def open_engine(path: Path, threads: int | None) -> ort.InferenceSession:
    """Open one engine file.

    Args:
        path: The file; its weights lie beside it.
        threads: CPU threads within an operator; None takes one per physical core.

    Raises:
        BackendError: ONNX Runtime cannot open it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        raise BackendError(f"ONNX Runtime cannot open {path}: {error}") from error


class OrtSessions:
    """An opened `onnxruntime` engine set; see `reelrt.runtime.session.Sessions`."""

    def __init__(self, engines: EngineSet, opened: Mapping[str, ort.InferenceSession]) -> None:
        self._engines, self._opened = engines, opened

    def run(self, stage: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a stage once on arrays of any size within its profile."""
        names = list(self._engines.engines[stage].spec.outputs)
        try:
            outputs = self._opened[stage].run(names, dict(inputs))
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in {stage}: {error}") from error
        return dict(zip(names, outputs, strict=True))

    def open_step(self, latents: tuple[int, int, int, int]) -> OrtStep:
        """Allocate and bind the step's buffers for latents [C, F, h, w]."""
        return OrtStep(self._opened["step"], self._engines.engines["step"], latents)


class OrtStep:
    """The step engine's bound buffers; see `reelrt.runtime.session.StepSession`.

    Args:
        session: The step engine.
        engine: Its entry in the manifest: spec, profile and precision.
        latents: (C, F, h, w).
    """

    def __init__(self, session: ort.InferenceSession, engine: Engine, latents: tuple[int, ...]) -> None:
        _, frames, height, width = latents
        self.capacity = engine.profile["batch"].max
        self.table_rows = engine.profile["rows"].max
        sizes = {"batch": self.capacity, "rows": self.table_rows}
        sizes.update(frames=frames, height=height, width=width)
        buffers = {
            name: np.zeros(tensor.shape(sizes), tensor.numpy_dtype(engine.precision))
            for name, tensor in engine.spec.inputs.items()
        }
        self._session = session
        self._table, self._text = buffers["table"], buffers["text"]
        self._state = (buffers["state"], np.zeros_like(buffers["state"]))
        self._step = (buffers["step"], np.zeros_like(buffers["step"]))
        self._side = 0
        self._bindings = [[self._bind(row, side) for row in range(self.capacity)] for side in (0, 1)]

    def _bind(self, row: int, side: int) -> ort.IOBinding:
        binding = self._session.io_binding()
        one = slice(row, row + 1)
        inputs = {
            "state": self._state[side][one],
            "table": self._table[one],
            "step": self._step[side][one],
            "text": self._text[one],
        }
        outputs = {"state_next": self._state[1 - side][one], "step_next": self._step[1 - side][one]}
        for name, array in inputs.items():
            binding.bind_input(name, *_address(array))
        for name, array in outputs.items():
            binding.bind_output(name, *_address(array))
        return binding

    def write(self, row: int, table: Float32, text: Array, latents: Float32) -> None:
        """Put a request into a row, its history empty."""
        self._table[row, : len(table)] = table
        self._text[row] = text
        self._step[self._side][row] = 0
        state = self._state[self._side][row]
        state[0], state[1:] = latents, 0

    def move(self, source: int, target: int) -> None:
        """Copy a row to another row."""
        for buffer in (self._table, self._text, self._state[self._side], self._step[self._side]):
            buffer[target] = buffer[source]

    def launch(self, active: int) -> None:
        """Run the engine once per active row, then swap the sides."""
        try:
            for binding in self._bindings[self._side][:active]:
                self._session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in step: {error}") from error
        self._side = 1 - self._side

    def read(self, row: int) -> Float32:
        """A copy of the latents in a row."""
        latents: Float32 = self._state[self._side][row, 0].copy()
        return latents


def _address(array: Array) -> tuple[str, int, Any, tuple[int, ...], int]:
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
