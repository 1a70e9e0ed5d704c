"""ONNX Runtime as a backend of the runtime, on the CPU: whether a set runs here, and its engines.

How the step engine is driven stands in `reelrt.runtime.ort_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort

from reelrt.bundle.manifest import PREFIX, EngineSet
from reelrt.errors import BackendError, CompatibilityError
from reelrt.jetson.device import detect, physical_cores
from reelrt.runtime.lanes import Lanes, Part
from reelrt.runtime.ort_step import OrtStep
from reelrt.runtime.session import Array

Open = Callable[..., Any]
"""Opens an engine file, as `open_engine` does."""


def open_sessions(engines: EngineSet, threads: int | None = None) -> OrtSessions:
    """Open every engine of a set.

    Args:
        engines: An `onnxruntime` engine set.
        threads: CPU threads; None takes one per physical core.

    Raises:
        CompatibilityError: It was optimised by another version of ONNX Runtime or for another CPU.
        BackendError: ONNX Runtime cannot open an engine.
    """
    _check(engines)
    return OrtSessions(engines, threads or physical_cores())


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


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def open_engine(path: Path, threads: int, provider: str = CPU) -> ort.InferenceSession:
    """Open one engine file; its weights lie beside it.

    Args:
        path: The file.
        threads: CPU threads within an operator.
        provider: What of ONNX Runtime runs it. Inputs and outputs lie in the host's memory for any.

    Raises:
        BackendError: ONNX Runtime cannot open it, or has no such provider that works here.
    """
    if provider not in ort.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime has no {provider}; it has {', '.join(ort.get_available_providers())}.",
            "Install onnxruntime-gpu in the place of onnxruntime, in an environment of its own."
            if provider == CUDA
            else "",
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Threads wait awake between two operators, but not after the last: others need the cores then.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = ort.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # its exceptions share no base class
        raise BackendError(f"ONNX Runtime cannot open {path}: {error}") from error
    if provider not in session.get_providers():  # it falls back to the CPU without a word
        raise BackendError(f"ONNX Runtime's {provider} does not start here.", "`reelrt doctor` says more.")
    return session


class OrtSessions:
    """An opened `onnxruntime` engine set; see `reelrt.runtime.session.Sessions`.

    Args:
        engines: The engine set.
        threads: CPU threads.
        open_file: What opens an engine file.
    """

    def __init__(self, engines: EngineSet, threads: int, open_file: Open = open_engine) -> None:
        self._engines = engines
        files = {name: engines.folder / engine.file for name, engine in engines.engines.items()}
        self._opened = {name: open_file(path, threads) for name, path in files.items() if name != "step"}
        prefix = files["step"].with_name(files["step"].name + PREFIX)
        self._step = Part(threads, partial(open_file, files["step"]))
        self._prefix = Part(threads, partial(open_file, prefix)) if prefix.name in engines.files else None
        self._lanes = Lanes(threads)

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
        engine, cfg = self._engines.engines["step"], self._engines.pipeline.cfg
        return OrtStep(self._lanes, self._step, self._prefix, engine, cfg, latents)
