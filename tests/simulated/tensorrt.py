"""Stands for TensorRT and TensorRT-RTX on a GPU: engines that ONNX Runtime runs from raw addresses.

An engine file of the simulation names an ONNX engine; running it reads its inputs from the device
addresses that were set and writes its outputs to them, one row of the batch at a time where the
ONNX Runtime session does the same, so that results are the same to the bit. As the real library
does, it refuses shapes outside the profile, contexts without memory, addresses that are not
aligned, and capturing what was not run once with its shapes.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakSet

import numpy as np
import onnxruntime as ort

from reelrt.bundle.manifest import WEIGHT_STREAMING, Engine, EngineSet
from reelrt.runtime.ort import open_engine
from tests.simulated.driver import POISON, SimulatedDriver, Status

THREADS = 1
CONTEXT_BYTES = 512
ACTIVATION_BYTES = 64
STREAMING_BYTES = 2048
"""Device memory of a context, activations per element of its inputs, and what streamed weights come in;
made up."""

MISSING: Mapping[str, frozenset[str]] = {
    "tensorrt 10.3.0": frozenset({"runtime_config", "rtx"}),
    "tensorrt 11.4.1": frozenset({"rtx"}),
    "tensorrt_rtx 1.4.0": frozenset({"capturable"}),
    "tensorrt_rtx 1.7.1": frozenset(),
}
"""Version to what it has not."""


def simulate(
    engines: EngineSet,
    folder: Path,
    backend: str,
    version: str,
    capability: str = "8.6",
    streamable: int = 0,
) -> EngineSet:
    """An ONNX Runtime engine set as one that the simulation opens.

    Args:
        engines: The `onnxruntime` engine set; it stays where it is and is what runs.
        folder: Where to write; it does not exist.
        backend: `tensorrt` or `tensorrt_rtx`.
        version: Of that library.
        capability: The compute capability it is said to be built for.
        streamable: Bytes of weights of a step that is built for weight streaming; 0 for none such.
    """
    folder.mkdir(parents=True)
    made = {}
    flags = {"flags": f"strongly typed, {WEIGHT_STREAMING}"}
    for name, given in engines.engines.items():
        streams = streamable and name == "step"
        engine = replace(given, weight_bytes=streamable, key_fields=flags) if streams else given
        profile = {axis: (extent.min, extent.max) for axis, extent in engine.profile.items()}
        plan = {
            "onnx": str(engines.folder / engine.file),
            "spec": engine.spec.to_json(),
            "precision": engine.precision,
            "profile": profile,
            "weights": engine.weight_bytes,
            "streaming": engine.weight_streaming,
        }
        (folder / f"{name}.engine").write_text(json.dumps(plan), encoding="utf-8")
        plain = {key: getattr(engine, key) for key in Engine.__slots__}
        sizes = {axis: extent.max for axis, extent in engine.profile.items()}
        activations = ACTIVATION_BYTES * max(math.prod(t.shape(sizes)) for t in engine.spec.inputs.values())
        made[name] = Engine(**{**plain, "file": f"{name}.engine", "activation_bytes": activations})
    for name in engines.files:
        if not any(name.startswith(engine.file) for engine in engines.engines.values()):
            (folder / name).write_bytes((engines.folder / name).read_bytes())
    EngineSet(
        folder, engines.bundle, engines.pipeline, backend, version, "rtx3060", capability, engines=made
    ).save(engines.version)
    return EngineSet.load(folder)


@lru_cache(maxsize=32)
def _session(path: str) -> ort.InferenceSession:
    return open_engine(Path(path), THREADS)


def simulated_library(driver: SimulatedDriver, name: str = "tensorrt_rtx 1.7.1") -> Any:
    """A module with the classes that `reelrt.runtime` uses.

    Args:
        driver: The simulated GPU.
        name: One of `MISSING`: library and version.
    """
    lacks = MISSING[name]
    backend, version = name.split()
    rtx = "rtx" not in lacks

    class Severity(Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ILogger:
        def log(self, severity, msg):
            raise NotImplementedError

    class ExecutionContextAllocationStrategy(Enum):
        STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)

    class DynamicShapesKernelSpecializationStrategy(Enum):
        LAZY, EAGER, NONE = range(3)

    class CudaGraphStrategy(Enum):
        DISABLED, WHOLE_GRAPH_CAPTURE = range(2)

    class IRuntimeCache:
        def __init__(self):
            self.kernels: set[str] = set()

        def deserialize(self, blob):
            if not bytes(blob).startswith(b"kernels "):
                return False
            self.kernels |= set(json.loads(bytes(blob)[8:]))
            return True

        def serialize(self):
            return memoryview(b"kernels " + json.dumps(sorted(self.kernels)).encode())

    class IRuntimeConfig:
        def __init__(self):
            self.strategy = ExecutionContextAllocationStrategy.STATIC
            self.cache = None

        def set_execution_context_allocation_strategy(self, strategy=None):
            self.strategy = strategy

        if rtx:

            def create_runtime_cache(self):
                return IRuntimeCache()

            def set_runtime_cache(self, cache=None):
                self.cache = cache
                return True

    class Owned:
        """Device memory that the library takes for itself."""

        def __init__(self, size):
            fault = driver.faults("TensorRT")
            self.pointer = 0 if fault else driver.allocate(size)

        def __del__(self):
            if self.pointer:
                if not driver.has_context():
                    driver.violate("TensorRT frees memory and no context is current")
                driver.release(self.pointer)

    class IExecutionContext:
        def __init__(self, engine, config):
            self.engine, self._cache = engine, getattr(config, "cache", None)
            self._memory = Owned(CONTEXT_BYTES)
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._scratch, self._warm, self._under_way = (0, 0), False, [0]

        def __del__(self):
            if self._under_way[0]:
                driver.violate("an execution context is destroyed while it is under way")

        def set_input_shape(self, name, shape):
            spec = self.engine.spec.inputs[name]
            for axis, extent in zip(spec.axes, shape, strict=True):
                low, high = (axis, axis) if isinstance(axis, int) else self.engine.profile[axis]
                if not low <= extent <= high:
                    return self.engine.logger.complain(f"{name} {shape} is outside the profile")
            self._shapes[name], self._warm, self._scratch = tuple(shape), False, (0, 0)
            return True

        def _needed(self):
            activations = ACTIVATION_BYTES * max(math.prod(shape) for shape in self._shapes.values())
            return activations + STREAMING_BYTES * self.engine.streams

        def update_device_memory_size_for_shapes(self):
            if set(self._shapes) != set(self.engine.spec.inputs):
                driver.violate("the size of a context's memory was asked before its shapes were set")
            return self._needed()

        def set_device_memory(self, memory, size):
            if memory % 256 or size < self._needed():
                driver.violate(
                    f"{size} bytes of activations at {memory:#x} where {self._needed()} are needed"
                )
            self._scratch = memory, self._needed()

        def set_tensor_address(self, name, memory):
            if name not in {**self.engine.spec.inputs, **self.engine.spec.outputs}:
                return False
            if memory % 256:
                return self.engine.logger.complain(f"the address of {name} is not aligned")
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle):
            if driver.calls_enqueue():
                return self.engine.logger.complain("enqueueV3 failed: a simulated fault")
            capturing = driver.is_capturing(stream_handle)
            if (
                not self._scratch[0]
                or set(self._addresses) != {**self.engine.spec.inputs, **self.engine.spec.outputs}.keys()
            ):
                return self.engine.logger.complain("not every address was set")
            if self.engine.streams:
                if capturing:
                    driver.invalidate(stream_handle)
                    return self.engine.logger.complain("captured while weights are streamed")
                driver.settle(stream_handle)
            if capturing and not self._warm:
                driver.invalidate(stream_handle)
                return self.engine.logger.complain("captured before it was run with these shapes")
            self._warm = True
            if self._cache is not None:
                self._cache.kernels.add(json.dumps(sorted(self._shapes.items())))
            run = self.engine.kernel(dict(self._shapes), dict(self._addresses), self._scratch)
            name = self.engine.spec.name
            return driver.enqueue(stream_handle, name, run, self._under_way) == Status.CUDA_SUCCESS

        if rtx and "capturable" not in lacks:

            def is_stream_capturable(self, stream):
                return self.engine.capturable

    class ICudaEngine:
        capturable = True

        def __init__(self, plan, logger):
            from reelrt.bundle.spec import StageSpec

            self.logger, self.spec = logger, StageSpec.from_json(plan["spec"])
            self.profile, self.precision, self.onnx = plan["profile"], plan["precision"], plan["onnx"]
            self._streaming, self._weights = plan["streaming"], plan["weights"]
            self._budget, self._contexts = self._weights, WeakSet()
            # Streamable weights stay with the host until the first context says how many come.
            self._memory = Owned(0 if self._streaming else self._weights)

        @property
        def streams(self):
            return self._streaming and self._budget < self._weights

        @property
        def streamable_weights_size(self):
            return self._weights if self._streaming else 0

        @property
        def weight_streaming_budget_v2(self):
            return self._budget

        @weight_streaming_budget_v2.setter
        def weight_streaming_budget_v2(self, budget):
            if self._contexts or not self._streaming:
                self.logger.complain("the budget cannot be set while a context lives")
            else:
                self._budget = budget

        def create_execution_context(self, settings=None):
            strategy = getattr(settings, "strategy", settings)
            if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
                driver.violate("a context brings memory of its own")
            if self._streaming and not self._contexts:
                self._memory = None
                self._memory = Owned(self._budget)
            context = IExecutionContext(self, settings)
            self._contexts.add(context)
            if not (context._memory.pointer and self._memory.pointer):
                self.logger.complain("Error Code 2: OutOfMemory (Requested size was 512 bytes.)")
                return None
            return context

        def kernel(self, shapes, addresses, scratch) -> Callable[[], None]:
            spec = self.spec
            sizes = {
                axis: extent
                for name, tensor in spec.inputs.items()
                for axis, extent in zip(tensor.axes, shapes[name], strict=True)
            }
            outputs = {name: tensor.shape(sizes) for name, tensor in spec.outputs.items()}
            dtypes = {n: t.numpy_dtype(self.precision) for n, t in {**spec.inputs, **spec.outputs}.items()}
            session = _session(self.onnx)

            def run():
                ranges, arrays = {}, {}
                for name, shape in {**shapes, **outputs}.items():
                    size = math.prod(shape) * dtypes[name].itemsize
                    written = name in outputs
                    if driver.bytes_at(addresses[name], size, f"{spec.name}.{name}", write=written) is None:
                        return
                    ranges[name] = addresses[name], addresses[name] + size
                    raw = (ctypes.c_uint8 * size).from_address(addresses[name])
                    arrays[name] = np.ndarray(shape, dtypes[name], buffer=raw)
                block = driver.bytes_at(*scratch, f"{spec.name}'s activations", write=True)
                if block is None:
                    return
                block[:] = POISON
                for output in outputs:
                    for other, (begin, end) in ranges.items():
                        if other != output and begin < ranges[output][1] and ranges[output][0] < end:
                            driver.violate(f"{output} overlaps {other}")
                            return
                rows = range(shapes["state"][0]) if spec.name == "step" else [slice(None)]
                for row in rows:
                    part = slice(row, row + 1) if isinstance(row, int) else row
                    feed = {name: np.ascontiguousarray(arrays[name][part]) for name in spec.inputs}
                    results = session.run(list(outputs), feed)
                    for name, value in zip(outputs, results, strict=True):
                        arrays[name][part] = value

            return run

        if "runtime_config" not in lacks:

            def create_runtime_config(self):
                return IRuntimeConfig()

    class Runtime:
        def __init__(self, logger):
            self._logger = logger

            def complain(message):
                logger.log(Severity.ERROR, message)
                return False

            logger.complain = complain

        def deserialize_cuda_engine(self, serialized_engine):
            try:
                plan = json.loads(bytes(serialized_engine))
            except ValueError:
                self._logger.complain("Serialization assertion magicTagRead == magicTag failed.")
                return None
            engine = ICudaEngine(plan, self._logger)
            if not engine._memory.pointer:
                self._logger.complain(
                    f"Error Code 2: OutOfMemory (Requested size was {plan['weights']} bytes.)"
                )
                return None
            return engine

    module: Any = ModuleType(backend)
    public: list[type] = [
        Severity,
        ILogger,
        Runtime,
        ICudaEngine,
        IExecutionContext,
        ExecutionContextAllocationStrategy,
    ]
    if "runtime_config" not in lacks:
        public.append(IRuntimeConfig)
    if rtx:
        public += [IRuntimeCache, DynamicShapesKernelSpecializationStrategy, CudaGraphStrategy]
    for each in public:
        setattr(module, each.__name__, each)
    module.__version__ = version
    return module
