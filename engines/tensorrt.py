"""Builds a TensorRT or TensorRT-RTX engine from an ONNX graph, through Polygraphy.

One code path serves both libraries and TensorRT 10.3 to 11: networks are strongly typed, so the
graph decides the precision, and it is checked before the build. Runs in a worker process, because
Polygraphy settles at its import which of the two it drives. Knows nothing of engine sets.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reelrt.engines.inspector import inspect_engine
from reelrt.engines.profiles import input_shapes
from reelrt.engines.recipe import Built, Job
from reelrt.engines.verified import precisions
from reelrt.errors import BackendError
from reelrt.progress import Progress

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger("reelrt")

# What differs between TensorRT 10.3 and 11, and how this module meets it:
#   flag STRONGLY_TYPED       set where it exists; without it there is no other kind of network
#   flags FP16, INT8          gone in 11, never used: the graph decides
#   flag EXPLICIT_BATCH       gone in 10, Polygraphy's business
#   progress monitor, Total Activation and Weights Memory in the log    alike in all of them
OLDEST = (10, 3)
"""The TensorRT of JetPack 6.2. TensorRT-RTX counts on its own, from 1.0."""

HARMLESS: Mapping[str, str] = {
    r"Make sure (input|output) \S+ has Int64 binding": "the runtime binds int64, as the spec says",
    r"Converting conv (weight|activation) scales to fp32": "an INT8 convolution scales its sums in FP32",
}
"""Pattern to reason: what the builder warns of that means nothing here. Told at debug level."""

_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+)")
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+)")
_DTYPES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "int32": "INT32", "uint8": "UINT8"}
_CONVOLUTIONS = ("CONVOLUTION", "DECONVOLUTION")
_MULTIPLIES = (*_CONVOLUTIONS, "MATRIX_MULTIPLY")
_PRECISIONS = {"FLOAT": "fp32", "HALF": "fp16"}


def build(job: Job, graph: Path, progress: Progress) -> Built:
    """Build one engine.

    Args:
        job: What to build.
        graph: The ONNX file, in the job's precision.
        progress: Told of `build`, in percent.

    Returns:
        Bytes of the weights and, at the profile's largest sizes, of the activations.

    Raises:
        BackendError: Polygraphy is not installed, or the builder refuses the graph.
    """
    library: Any = importlib.import_module(job.backend)
    try:
        from polygraphy.backend import trt as polygraphy
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise BackendError(
            "TensorRT engines are built through Polygraphy, which is not installed.",
            f"Install it: pip install 'reelrt[{'rtx' if job.backend == 'tensorrt_rtx' else 'tensorrt'}]'.",
        ) from error
    _check_version(library, job)
    G_LOGGER.module_severity = G_LOGGER.ERROR  # what the builder says comes through `recorder`
    recorder = _recorder(library)
    polygraphy.util.TRT_LOGGER = recorder
    typed = hasattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    try:
        builder, network, parser = polygraphy.network_from_onnx_path(str(graph), strongly_typed=typed)
        check_network(network, job, precisions(graph))
        engine = polygraphy.engine_bytes_from_network(
            (builder, network, parser), config=_config(polygraphy, library, job, progress)
        )
    except PolygraphyException as error:
        raise BackendError(f"{job.backend} cannot build {job.spec.name}: {recorder.reason(error)}") from error
    job.output.write_bytes(engine)
    built: Built = recorder.built()
    return replace(built, inspected=inspect_engine(library, recorder, engine)) if job.inspect else built


def _check_version(library: Any, job: Job) -> None:
    version = tuple(int(part) for part in library.__version__.split(".")[:2])
    if job.backend == "tensorrt" and version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendError(
            f"TensorRT {library.__version__} is too old; {oldest} or newer is needed.",
            "On a Jetson, update to JetPack 6.2 or newer.",
        )


def _config(polygraphy: Any, library: Any, job: Job, progress: Progress) -> Any:
    """The loader of the builder's configuration: profile, monitor, and for RTX the GPU."""
    profile = polygraphy.Profile()
    for name, (smallest, tuned, largest) in input_shapes(job.spec, job.profile).items():
        profile.add(name, min=smallest, opt=tuned, max=largest)
    common = {
        "profiles": [profile],
        "progress_monitor": _monitor(library, progress),
        "profiling_verbosity": library.ProfilingVerbosity.DETAILED,  # what the inspector tells from
        "weight_streaming": job.weight_streaming,
    }
    if job.backend == "tensorrt":
        return polygraphy.CreateConfig(**common)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    major, minor = (int(part) for part in job.compute_capability.split("."))
    return CreateConfigRTX(compute_capabilities=[(major, minor)], **common)


def check_network(network: trt.INetworkDefinition, job: Job, typed: Mapping[str, str]) -> None:
    """Compare a parsed network with the stage's spec, the job's precision and the graph's types.

    Args:
        network: What the parser made of the graph.
        job: What is built.
        typed: Layer name to `fp32` or `fp16`, as the graph says.

    Raises:
        BackendError: An input or output is missing or of another type, a convolution or matrix
            multiplication has another type than in the graph, or a convolution of an FP16 or INT8
            engine is FP32 that shall not be.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for side, tensors, specs in (("input", inputs, job.spec.inputs), ("output", outputs, job.spec.outputs)):
        found = {tensor.name: tensor.dtype.name for tensor in tensors}
        wanted = {name: _DTYPES[spec.numpy_dtype(job.precision).name] for name, spec in specs.items()}
        if found != wanted:
            raise BackendError(f"{job.spec.name} has the {side}s {found}, where {wanted} are needed.")
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name not in _MULTIPLIES:
            continue
        runs = _PRECISIONS.get(layer.get_output(0).dtype.name, "")
        if typed.get(layer.name, runs) != runs:
            raise BackendError(
                f"{layer.name} of {job.spec.name} is {typed[layer.name]}, but {job.backend} makes it {runs}."
            )
        in_full = runs == "fp32" and layer.type.name in _CONVOLUTIONS and job.precision != "fp32"
        if in_full and layer.name not in job.keep_fp32:
            raise BackendError(
                f"{job.spec.name} is {job.precision.upper()}, but its layer {layer.name} runs in FP32."
            )


def _recorder(library: Any) -> Any:
    """A logger for the builder; its class derives from one of the library in use."""

    class Recorder(library.ILogger):  # type: ignore[misc] # only known when it is loaded
        """Keeps what the builder reports, passes warnings and errors on."""

        def __init__(self) -> None:
            super().__init__()
            self._activations = self._weights = 0
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if found := _ACTIVATIONS.search(message):
                self._activations = max(self._activations, int(found[1]))
            if found := _WEIGHTS.search(message):
                self._weights = max(self._weights, int(found[1]))
            name = getattr(severity, "name", "INFO")
            if name in ("INTERNAL_ERROR", "ERROR"):
                self._errors.append(message)
                log.error(message)
            elif name == "WARNING":
                harmless = any(re.search(pattern, message) for pattern in HARMLESS)
                log.log(logging.DEBUG if harmless else logging.WARNING, message)
            else:
                log.debug(message)

        def reason(self, error: Exception) -> str:
            return " ".join((self._errors or [str(error)])[0].split())

        def built(self) -> Built:
            return Built(self._weights, self._activations)

    return Recorder()


def _monitor(library: Any, progress: Progress) -> Any:
    """A progress monitor that reports percent, a phase being one step of the phase around it."""

    class Monitor(library.IProgressMonitor):  # type: ignore[misc] # only known when it is loaded
        """The open phases, outermost first, each with its steps done and in all."""

        def __init__(self) -> None:
            super().__init__()
            self._open: dict[str, tuple[int, int]] = {}
            self._told = 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            del parent_phase  # phases open and close in order
            self._open[phase_name] = 0, num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._open:
                self._open[phase_name] = step + 1, self._open[phase_name][1]
            fraction = 0.0
            for done, total in reversed(self._open.values()):
                fraction = min((done + fraction) / max(total, 1), 1)
            if (percent := int(100 * fraction)) > self._told:
                self._told = percent
                progress("build", percent, 100)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._open.pop(phase_name, None)

    return Monitor()
