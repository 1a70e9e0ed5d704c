"""TensorRT and TensorRT-RTX as libraries: which version has what, opening an engine, its contexts.

One code path serves TensorRT 10.3 to 11.4 and TensorRT-RTX from 1.4 on; `FEATURES` is all that
differs. Knows no stage, no buffer and no schedule.
"""

from __future__ import annotations

import importlib
import logging
import mmap
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelrt.bundle.files import atomic_files
from reelrt.bundle.manifest import EngineSet
from reelrt.errors import BackendError, CompatibilityError, DeviceMemoryError
from reelrt.runtime.cuda import REMEDY_MEMORY
from reelrt.runtime.residency import REMEDY_STREAMING

log = logging.getLogger("reelrt")

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
OLDEST = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 4)}
"""TensorRT 10.3 is JetPack 6.2's."""
EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}

FEATURES: dict[str, str] = {
    # A context's settings as an object. TensorRT 10.3 takes the allocation strategy alone.
    "runtime_config": "ICudaEngine.create_runtime_config",
    # Kernels are compiled on the device and can be kept: RTX only.
    "runtime_cache": "IRuntimeConfig.create_runtime_cache",
    # When kernels for a shape are compiled: RTX only. A captured graph keeps the kernels it was
    # captured with, so they have to be the final ones by then.
    "specialization": "DynamicShapesKernelSpecializationStrategy.EAGER",
    # RTX can capture by itself; here that is our business.
    "own_graphs": "CudaGraphStrategy.DISABLED",
    # Whether a context can be captured: RTX only. Elsewhere one tries.
    "capturable": "IExecutionContext.is_stream_capturable",
    # Weights may stay with the host and come while an engine runs, if it was built for that.
    "weight_streaming": "ICudaEngine.weight_streaming_budget_v2",
}
"""What not every version has, and the name that shows it. Everything else is alike in all of them."""

DRIVER_TOO_OLD = ("insufficient", "error: 35", "driver version")
"""What the library says when the driver is older than its CUDA: cudaErrorInsufficientDriver is 35."""
OUT_OF_MEMORY = ("outofmemory", "out of memory", "cudaerrormemoryallocation", "could not be allocated")


def features(module: Any) -> frozenset[str]:
    """Which of `FEATURES` a library has."""

    def has(path: str) -> bool:
        place = module
        for name in path.split("."):
            place = getattr(place, name, None)
        return place is not None

    return frozenset(name for name, path in FEATURES.items() if has(path))


def load_library(engines: EngineSet) -> Library:
    """Load the library that an engine set was built with.

    Raises:
        BackendError: It is not installed, or cannot be loaded, or is too old.
        CompatibilityError: Another version of it built the engines.
    """
    name, title = engines.backend, TITLES[engines.backend]
    remedy = f"Install it: pip install 'reelrt[{EXTRAS[name]}]'."
    if name == "tensorrt":
        remedy = f"On a Jetson JetPack brings it; elsewhere pip install 'reelrt[{EXTRAS[name]}]' tensorrt."
    try:
        module = importlib.import_module(name)
        version = str(module.__version__)
    except Exception as error:  # a library that does not load raises what it likes
        raise BackendError(f"{title} cannot be loaded: {error}.", remedy) from error
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST[name]:
        oldest = ".".join(map(str, OLDEST[name]))
        raise BackendError(f"{title} {version} is too old; {oldest} or newer is needed.", remedy)
    if version != engines.backend_version:
        raise CompatibilityError(
            f"{engines.folder} was built by {title} {engines.backend_version}; {version} is installed.",
            "Build the engines again.",
        )
    return Library(module, title)


class Library:
    """A loaded library, with what it has and what it said last.

    Args:
        module: `tensorrt` or `tensorrt_rtx`.
        title: What its makers call it.

    Raises:
        BackendError: It does not start; it needs a GPU and its driver.
    """

    def __init__(self, module: Any, title: str) -> None:
        self.module, self.title, self.features = module, title, features(module)
        self.said: deque[str] = deque(maxlen=4)
        self._logger = _logger(module, self.said)
        try:
            self._runtime = module.Runtime(self._logger)
        except Exception as error:  # pybind's TypeError for a factory that gives nothing
            raise self.error("does not start") from error

    def open(self, path: Path, cache: bool = True) -> OpenedEngine:
        """Load an engine into device memory; its weights come from the mapped file.

        Args:
            path: The engine file.
            cache: Whether kernels that are compiled on the device are kept beside it.

        Raises:
            BackendError: The library cannot open it.
            DeviceMemoryError: The GPU's memory is too small for it.
        """
        self.said.clear()
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                engine = self._runtime.deserialize_cuda_engine(mapped)
        except (OSError, ValueError) as error:
            raise BackendError(f"{self.title} cannot open {path}: {error}") from error
        if engine is None:
            raise self.error(f"cannot open {path}")
        return OpenedEngine(self, engine, path, cache)

    def error(self, what: str) -> BackendError:
        """The error for something that failed, with the library's own words."""
        words = " ".join(" ".join(self.said).split()) or "it does not say why"
        if any(sign in words.lower().replace("_", "") for sign in OUT_OF_MEMORY):
            return DeviceMemoryError(f"{self.title} {what}: the GPU's memory is used up.", REMEDY_MEMORY)
        old = any(sign in words.lower() for sign in DRIVER_TOO_OLD)
        remedy = "Update the NVIDIA driver; `reelrt doctor` says to which version." if old else ""
        return BackendError(f"{self.title} {what}: {words[:400]}.", remedy)


@dataclass(slots=True)
class OpenedEngine:
    """An engine in device memory.

    Attributes:
        library: What opened it.
        engine: The library's own object.
        path: Its file.
        keep: Whether to read and write the cache of compiled kernels.
    """

    library: Library
    engine: Any
    path: Path
    keep: bool
    _config: Any = None
    _cache: Any = None
    _new: bool = False

    def context(self) -> Any:
        """A new execution context, without memory for activations: its user sets that.

        Raises:
            BackendError: The library makes none.
        """
        module, has = self.library.module, self.library.features
        strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
        self.library.said.clear()
        if "runtime_config" not in has:
            context = self.engine.create_execution_context(strategy)
        else:
            if self._config is None:
                self._config = self._configure(strategy)
            context = self.engine.create_execution_context(self._config)
        if context is None:
            raise self.library.error(f"makes no execution context for {self.path.name}")
        self._new = True
        return context

    def stream_weights(self, budget: int) -> None:
        """Leave weights with the host; before any context is made.

        Args:
            budget: Bytes of them that may lie in the device's memory.

        Raises:
            BackendError: The library cannot, or the engine was not built for it.
        """
        title = self.library.title
        if "weight_streaming" not in self.library.features:
            raise BackendError(
                f"this version of {title} streams no weights.", "Load with residency='staged', or update it."
            )
        streamable = int(self.engine.streamable_weights_size)
        if not streamable:
            raise BackendError(f"{title} cannot stream the weights of {self.path}.", REMEDY_STREAMING)
        wanted = min(budget, streamable)
        self.library.said.clear()
        self.engine.weight_streaming_budget_v2 = wanted
        if int(self.engine.weight_streaming_budget_v2) != wanted:
            raise self.library.error(f"does not take {wanted} bytes as budget for the weights")

    def close(self) -> None:
        """Free the device memory; its contexts are gone before."""
        self.engine = self._config = self._cache = None

    def _configure(self, strategy: Any) -> Any:
        module, has = self.library.module, self.library.features
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if "specialization" in has:
            eager = module.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        if "own_graphs" in has:
            config.cuda_graph_strategy = module.CudaGraphStrategy.DISABLED
        if "runtime_cache" in has and self.keep:
            self._cache = config.create_runtime_cache()
            try:
                if not self._cache.deserialize(self.cache_file.read_bytes()):
                    log.info("%s is of another driver or GPU and made anew", self.cache_file)
            except OSError:
                log.info("%s: kernels are compiled for this GPU the first time", self.path.name)
            config.set_runtime_cache(self._cache)
        return config

    @property
    def cache_file(self) -> Path:
        """Where compiled kernels are kept."""
        return self.path.with_name(f"{self.path.name}.cache")

    def save_cache(self) -> None:
        """Keep the kernels that were compiled so far, where the folder can be written to."""
        if self._cache is None or not self._new:
            return
        self._new = False
        try:
            kernels = bytes(self._cache.serialize())
            with atomic_files([self.cache_file]) as (partial,):
                partial.write_bytes(kernels)
        except OSError as error:
            log.debug("%s is not kept: %s", self.cache_file, error)


def _logger(module: Any, said: deque[str]) -> Any:
    """A logger for the library; its class derives from one of the library in use."""

    class Logger(module.ILogger):  # type: ignore[misc] # only known when it is loaded
        """Keeps the last errors, passes warnings and errors on."""

        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            name = getattr(severity, "name", "INFO")
            if name in ("INTERNAL_ERROR", "ERROR"):
                said.append(message)
            log.log(logging.WARNING if name == "WARNING" else logging.DEBUG, message)

    return Logger()
