"""CUDA, through the driver's own functions: the only module that calls them.

Every resource has an owner, a Python object: when nothing refers to it any more, or it is closed,
the resource goes. Every call is counted by its name. Several threads may use a device at once; who puts
work on a stream, and in which order, is their business. Knows nothing of engines, tensors or videos.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from reelrt.errors import BackendError, CudaError, DeviceMemoryError, InputError

log = logging.getLogger("reelrt")

RESTART = "What this process has on the GPU is lost; start it again."
REMEDIES = {
    "CUDA_ERROR_NO_DEVICE": "Check that nvidia-smi lists it and CUDA_VISIBLE_DEVICES names it.",
    "CUDA_ERROR_INVALID_DEVICE": "Check that the GPU is there (nvidia-smi).",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "Restart the machine: its driver was updated and not loaded again.",
    "CUDA_ERROR_SYSTEM_NOT_READY": "Restart the driver's services, or the machine.",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "Install a newer NVIDIA driver.",
    "CUDA_ERROR_STUB_LIBRARY": "Install the NVIDIA driver; a stub library stands in its place.",
    "CUDA_ERROR_DEVICES_UNAVAILABLE": "Another process has the GPU for itself; end it.",
    "CUDA_ERROR_ILLEGAL_ADDRESS": RESTART,
    "CUDA_ERROR_LAUNCH_FAILED": RESTART,
    "CUDA_ERROR_LAUNCH_TIMEOUT": f"A display's watchdog stopped it. {RESTART}",
    "CUDA_ERROR_ECC_UNCORRECTABLE": f"The GPU's memory is damaged (nvidia-smi -q -d ECC). {RESTART}",
}
"""CUDA's name of an error to what a user can do about it."""

_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
LEGACY_STREAMS = (0, 1, 2)
"""CUDA's default streams: the legacy one, twice, and the thread's own. None can be captured."""


def load_driver() -> Any:
    """The driver's functions as `cuda.bindings` offers them.

    Raises:
        BackendError: The package is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(
            "CUDA's functions for Python (cuda-bindings) are not installed.",
            "Install them: pip install 'reelrt[rtx]', on a Jetson 'reelrt[tensorrt]'.",
        ) from error
    return driver


class Device:
    """The GPU, and the context in which everything of ours lives.

    The context is the one that `stream` belongs to, else the one that is current on this thread,
    else the GPU's primary one. So what a service made with pycuda, CuPy or torch is in reach.

    Attributes:
        calls: How often each of the driver's functions was called.
        peak: The most there were; may be set.

    Args:
        stream: A caller's stream handle; 0 is none.
        ordinal: Which GPU, where no context is given.

    Raises:
        CudaError: There is no GPU, or its driver does not work.
        BackendError: `cuda-bindings` or the driver is not installed.
    """

    def __init__(self, stream: int = 0, ordinal: int = 0) -> None:
        self._driver = load_driver()
        self.calls: Counter[str] = Counter()
        self._counting = threading.RLock()  # a collector may free something within a call of its thread
        self._held: dict[int, int] = {}
        self.peak = 0
        try:
            self.call("cuInit", 0)
        except CudaError:
            raise
        except Exception as error:  # the bindings raise what they like when libcuda is not there
            raise BackendError(
                "this machine has no NVIDIA driver.", "Install the driver of its NVIDIA GPU."
            ) from error
        self._context = int(self.call("cuStreamGetCtx", stream)) if stream not in LEGACY_STREAMS else 0
        self._context = self._context or int(self.call("cuCtxGetCurrent"))
        if not self._context:
            gpu = int(self.call("cuDeviceGet", ordinal))
            self._context = int(self.call("cuDevicePrimaryCtxRetain", gpu))
            release = self._driver.cuDevicePrimaryCtxRelease
            weakref.finalize(self, release, gpu).atexit = False

    @property
    def allocated(self) -> int:
        """Bytes of device memory that are ours now."""
        return sum(list(self._held.values()))

    def count(self, name: str) -> None:
        """Count a call of one of the driver's functions."""
        with self._counting:
            self.calls[name] += 1

    def call(self, name: str, *arguments: Any) -> Any:
        """Call one of the driver's functions.

        Returns:
            What it returns beside its status, if anything.

        Raises:
            CudaError: It failed; a DeviceMemoryError for want of memory.
        """
        self.count(name)
        status, *values = getattr(self._driver, name)(*arguments)
        if int(status):
            raise _error(name, status.name)
        return values[0] if values else None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context this thread's own for a while, and leave the thread as it was."""
        self.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent")

    def memory(self) -> tuple[int, int]:
        """Free and total device memory in bytes, whoever has taken the rest."""
        self.count("cuMemGetInfo")
        with self.current():
            status, free, total = self._driver.cuMemGetInfo()
        if int(status):
            raise _error("cuMemGetInfo", status.name)
        return int(free), int(total)

    def allocate(self, size: int) -> Buffer:
        """Device memory, not initialised, aligned to 256 bytes.

        Raises:
            DeviceMemoryError: There is not so much left; the message says how much there is.
        """
        with self.current():
            try:
                pointer = int(self.call("cuMemAlloc", max(size, 1)))
            except DeviceMemoryError as error:
                free, total = self.memory()
                message = f"{mib(size)} of GPU memory were wanted and {mib(free)} of {mib(total)} are free."
                raise DeviceMemoryError(message, REMEDY_MEMORY) from error
        self._held[pointer] = size
        self.peak = max(self.peak, self.allocated)
        return Buffer(self, pointer, size)

    def pin(self, size: int) -> Pinned:
        """Host memory that the GPU copies from and to without a detour.

        Raises:
            DeviceMemoryError: There is not so much left.
        """
        with self.current():
            return Pinned(self, int(self.call("cuMemHostAlloc", max(size, 1), 0)), size)

    def free(self, name: str, resource: int) -> None:
        """Give a resource back, whatever state the context is in; for owners only."""
        if name == "cuMemFree":
            self._held.pop(resource, None)
        try:
            with self.current():
                self.call(name, resource)
        except CudaError as error:  # a lost context has freed everything already
            log.debug("%s: %s", name, error)


REMEDY_MEMORY = "Close what else uses the GPU, or ask for a smaller or shorter video."


def mib(size: int) -> str:
    """A size for a message."""
    return f"{size / 2**20:.1f} MiB"


def _error(call: str, name: str) -> CudaError:
    if name == _OUT_OF_MEMORY:
        return DeviceMemoryError(f"the GPU's memory is used up ({call}).", REMEDY_MEMORY)
    return CudaError(name, f"CUDA failed in {call}: {name}.", REMEDIES.get(name, ""))


class _Owner:
    """Frees a resource when it is closed or no longer referred to."""

    def __init__(self, device: Device, free: str, resource: int) -> None:
        self.device = device
        self.close = weakref.finalize(self, device.free, free, resource)
        self.close.atexit = False  # the driver frees what a process leaves behind


class Buffer(_Owner):
    """Device memory.

    Attributes:
        pointer: Its address, a multiple of 256.
        size: Bytes.
    """

    def __init__(self, device: Device, pointer: int, size: int) -> None:
        super().__init__(device, "cuMemFree", pointer)
        self.pointer, self.size = pointer, size


class Pinned(_Owner):
    """Host memory that the GPU can reach by itself.

    Attributes:
        pointer: Its address.
        size: Bytes.
    """

    def __init__(self, device: Device, pointer: int, size: int) -> None:
        super().__init__(device, "cuMemFreeHost", pointer)
        self.pointer, self.size = pointer, size

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The memory as an array, which keeps it alive."""
        raw: Any = (ctypes.c_byte * self.size).from_address(self.pointer)
        raw.owner = self
        return np.ndarray(shape, dtype, buffer=raw)


class Event(_Owner):
    """A point in a stream's work.

    Args:
        device: The GPU.
        timed: Whether `elapsed` shall work; waiting then costs a little more.
    """

    def __init__(self, device: Device, timed: bool = False) -> None:
        # A thread that waits sleeps: it may wait for most of a video.
        blocking, untimed = 1, 2
        with device.current():
            self.handle = int(device.call("cuEventCreate", blocking | (0 if timed else untimed)))
        super().__init__(device, "cuEventDestroy", self.handle)

    def wait(self) -> None:
        """Wait until the GPU has come to it; at once if it was never recorded."""
        self.device.call("cuEventSynchronize", self.handle)

    def elapsed(self, earlier: Event) -> float:
        """Milliseconds between two timed events."""
        return float(self.device.call("cuEventElapsedTime", earlier.handle, self.handle))


class Stream:
    """Work that the GPU does in order: our own stream, or a caller's.

    Its methods need the device's context to be current.

    Args:
        device: The GPU.
        caller: A stream that the caller made, and keeps; None makes one.
    """

    def __init__(self, device: Device, caller: object = None) -> None:
        self.device, self._caller = device, caller
        if caller is None:
            non_blocking = 1  # it does not wait for the default stream
            with device.current():
                self.handle = int(device.call("cuStreamCreate", non_blocking))
            weakref.finalize(self, device.free, "cuStreamDestroy", self.handle).atexit = False
        else:
            self.handle = stream_handle(caller)

    def wait(self) -> None:
        """Wait until all its work is done."""
        self.device.call("cuStreamSynchronize", self.handle)

    def settle(self) -> None:
        """Wait before something is freed; what failed meanwhile was or will be told elsewhere."""
        try:
            with self.device.current():
                self.wait()
        except CudaError as error:
            log.debug("%s", error)

    def record(self, event: Event) -> None:
        """Let an event stand for all the work up to here."""
        self.device.call("cuEventRecord", event.handle, self.handle)

    def follow(self, event: Event) -> None:
        """Let the work from here on wait for an event of another stream."""
        self.device.call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def upload(self, target: int, source: int, size: int) -> None:
        """Copy pinned memory to the device; it must not change until that is done."""
        self.device.call("cuMemcpyHtoDAsync", target, source, size, self.handle)

    def download(self, target: int, source: int, size: int) -> None:
        """Copy device memory to pinned memory; it may be read when that is done."""
        self.device.call("cuMemcpyDtoHAsync", target, source, size, self.handle)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy device memory to device memory."""
        self.device.call("cuMemcpyDtoDAsync", target, source, size, self.handle)

    def clear(self, target: int, size: int) -> None:
        """Set device memory to zero."""
        self.device.call("cuMemsetD8Async", target, 0, size, self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` asks of this stream instead of doing it.

        Raises:
            CudaError: The work, or this stream, cannot be captured. Nothing is left behind.
            Exception: What `work` raises.
        """
        if self.handle in LEGACY_STREAMS:
            name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
            raise CudaError(name, f"CUDA captures no default stream: {name}.", "Give a stream of your own.")
        call = self.device.call
        mode = self.device._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL  # noqa: SLF001
        call("cuStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:
            try:
                if graph := int(call("cuStreamEndCapture", self.handle)):
                    call("cuGraphDestroy", graph)
            except CudaError as error:  # it was invalidated, which is why the work failed
                log.debug("%s", error)
            raise
        graph = int(call("cuStreamEndCapture", self.handle))
        try:
            return Graph(self.device, int(call("cuGraphInstantiate", graph, 0)))
        finally:
            call("cuGraphDestroy", graph)


class Graph(_Owner):
    """Captured work, ready to be done again by one call."""

    def __init__(self, device: Device, handle: int) -> None:
        super().__init__(device, "cuGraphExecDestroy", handle)
        self._handle = handle

    def launch(self, stream: Stream) -> None:
        """Do it again, after all that the stream has to do already."""
        self.device.call("cuGraphLaunch", self._handle, stream.handle)


def stream_handle(stream: object) -> int:
    """The address of a stream that any library made.

    Args:
        stream: An object with `__cuda_stream__` (cuda-core, numba, torch), or with the handle as
            `handle` (pycuda), `cuda_stream` (torch) or `ptr` (CuPy), or the handle itself.

    Raises:
        InputError: It is none of these.
    """
    if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        _, handle = protocol() if callable(protocol) else protocol
        return int(handle)
    for name in ("handle", "cuda_stream", "ptr"):
        handle = getattr(stream, name, None)
        if isinstance(handle, int):
            return handle
    raise InputError(
        f"{stream!r} is no CUDA stream.", "Give an object with __cuda_stream__, or the stream's handle."
    )
