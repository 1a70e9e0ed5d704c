"""Stands for a GPU: the CUDA driver's functions on host memory, as strict as the hardware.

Device memory is host memory. A stream's work is put off until something waits for it, in order,
so that whoever reads a result too early reads nonsense. Graphs are recorded and replayed from the
raw addresses they were captured with. What CUDA answers with an error is answered with that error;
what it answers with silent damage is kept in `violations`, which must stay empty:

- an address outside every live allocation, or in freed memory;
- an output that overlaps an input;
- host memory changed while a copy from it was under way, or not pinned at all;
- memory that two streams use, one of them to write, with neither an event nor a wait between them;
- the target of a download used for another one before anybody waited for the first;
- work that one thread puts on a stream while another thread captures it;
- what the library holds freed while it is under way, or with no context current.

Memory that nobody wrote holds NaN. `faults` may let any call fail; a wait that fails has waited all the
same, for what CUDA reports there is that earlier work failed, and that work is over.
"""

from __future__ import annotations

import ctypes
import threading
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cuda.bindings.driver import CUresult, CUstreamCaptureMode

Status: Any = CUresult
OK = Status.CUDA_SUCCESS
ALIGNMENT = 256
QUARANTINE = 512
"""Freed allocations that are kept so that their addresses mean nothing."""
POISON = 0xFF
WAITS = ("cuStreamSynchronize", "cuEventSynchronize")


@dataclass(slots=True)
class Work:
    """Something a stream has to do; a graph replays it. `under_way` counts how often it waits.

    `clock` says of each stream up to which of its works this one comes later, itself included.
    """

    name: str
    run: Callable[[], None]
    under_way: list[int]
    stream: int = 0
    clock: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class Stream:
    context: int
    work: deque[Work] = field(default_factory=deque)
    recording: list[Work] | None = None
    invalid: bool = False
    thread: int = 0
    clock: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class Event:
    """A point in a stream's work; each time an event is recorded it stands for a new one."""

    stream: int = 0
    reached: bool = True
    at: float = 0.0
    clock: dict[int, int] = field(default_factory=dict)


class SimulatedDriver:
    """The part of `cuda.bindings.driver` that `reelrt.runtime.cuda` uses.

    Attributes:
        violations: What hardware would have answered with damage.
        calls: Every call that was made, by name.
        faults: Called with each call's name; an error it returns is what the call answers.

    Args:
        memory: Bytes of device memory.
        version: The newest CUDA that it runs: 13000 is 13.0.
    """

    CUresult = CUresult
    CUstreamCaptureMode = CUstreamCaptureMode

    def __init__(self, memory: int = 1 << 28, version: int = 13000) -> None:
        self.total, self.used, self.version = memory, 0, version
        self.violations: list[str] = []
        self.calls: Counter[str] = Counter()
        self.faults: Callable[[str], Any] = lambda name: None
        self._blocks: dict[int, np.ndarray] = {}
        self._sizes: dict[int, tuple[int, bool]] = {}
        self._starts: list[int] = []
        self._quarantine: deque[np.ndarray] = deque(maxlen=QUARANTINE)
        self._streams: dict[int, Stream] = {}
        self._events: dict[int, Event] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._execs: dict[int, list[Work]] = {}
        self._contexts: Counter[int] = Counter()
        self._current: dict[int, list[int]] = {}
        self._lock = threading.RLock()
        self._host: dict[int, int] = {}
        self._running: Work | None = None
        self._touched: dict[int, dict[tuple[int, int, bool, int], tuple[int, str]]] = {}
        self._landing: dict[tuple[int, int], tuple[int, int]] = {}
        self._next = 0x1000

    # What a test asks of it

    def leaks(self) -> dict[str, int]:
        """What is still there, by kind."""
        kinds = {
            "device bytes": self.used,
            "pinned blocks": sum(not on_device for _, on_device in self._sizes.values()),
            "streams": len(self._streams),
            "events": len(self._events),
            "graphs": len(self._graphs) + len(self._execs),
            "contexts": sum(self._contexts.values()),
        }
        return {kind: count for kind, count in kinds.items() if count}

    def violate(self, what: str) -> None:
        self.violations.append(what)

    def bytes_at(
        self, pointer: int, size: int, what: str, device: bool = True, write: bool = False
    ) -> np.ndarray | None:
        """A range as bytes, if it lies in one live allocation of the right kind."""
        index = bisect_right(self._starts, pointer) - 1
        start = self._starts[index] if index >= 0 else -1
        length, on_device = self._sizes.get(start, (0, device))
        if index < 0 or pointer + size > start + length or on_device != device:
            kind = "device" if device else "pinned"
            self.violate(f"{what}: {size} bytes at {pointer:#x} are not {kind} memory that is in use")
            return None
        if self._running is not None:
            self._touch(self._running, start, (pointer, pointer + size), write, what)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))

    def _touch(self, work: Work, start: int, span: tuple[int, int], write: bool, what: str) -> None:
        """Note that work uses memory; whoever used it on another stream has to come earlier."""
        touched = self._touched.setdefault(start, {})
        for (low, high, wrote, stream), (tick, before) in touched.items():
            apart = high <= span[0] or span[1] <= low
            ordered = stream == work.stream or work.clock.get(stream, 0) >= tick
            if (write or wrote) and not (apart or ordered):
                self.violate(f"{what} and {before} of another stream use the same memory in no order")
        touched[(*span, write, work.stream)] = work.clock[work.stream], what

    def enqueue(
        self, stream: int, name: str, run: Callable[[], None], under_way: list[int] | None = None
    ) -> Any:
        """Put work on a stream, or into the graph that it records."""
        with self._lock:
            work = Work(name, run, [0] if under_way is None else under_way, stream)
            found = self._streams.get(stream)
            if found is None:
                return Status.CUDA_ERROR_INVALID_HANDLE
            if found.recording is not None:
                if found.thread != threading.get_ident():
                    self.violate(f"{name} is put on a stream that another thread captures")
                if found.invalid:
                    return Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
                found.recording.append(work)
            else:
                _merge(found.clock, self._host)
                found.clock[stream] = found.clock.get(stream, 0) + 1
                work.clock = dict(found.clock)
                found.work.append(work)
                work.under_way[0] += 1
            return OK

    def has_context(self) -> bool:
        """Whether this thread has a context."""
        return self._no_context() is None

    def calls_enqueue(self) -> bool:
        """Count a call of TensorRT's enqueueV3; whether it shall fail."""
        self.calls["enqueueV3"] += 1
        return bool(self.faults("enqueueV3"))

    def settle(self, stream: int) -> None:
        """Do what is on a stream, as a library does that runs synchronously."""
        with self._lock:
            self._wait_for(stream)

    def is_capturing(self, stream: int) -> bool:
        return self._streams[stream].recording is not None

    def invalidate(self, stream: int) -> None:
        self._streams[stream].invalid = True

    def allocate(self, size: int, device: bool = True) -> int:
        """Memory that holds NaN; 0 when there is not so much."""
        with self._lock:
            return self._allocate(size, device)

    def _allocate(self, size: int, device: bool) -> int:
        if device and self.used + size > self.total:
            return 0
        raw = np.full(size + 2 * ALIGNMENT, POISON, np.uint8)
        pointer = -(-raw.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._blocks[pointer], self._sizes[pointer] = raw, (size, device)
        self._starts.insert(bisect_right(self._starts, pointer), pointer)
        self.used += size if device else 0
        return pointer

    def release(self, pointer: int, device: bool = True) -> Any:
        with self._lock:
            return self._release(pointer, device)

    def _release(self, pointer: int, device: bool) -> Any:
        size, on_device = self._sizes.get(pointer, (0, not device))
        if on_device != device:
            self.violate(f"{pointer:#x} is freed and is no {'device' if device else 'pinned'} memory in use")
            return Status.CUDA_ERROR_INVALID_VALUE
        for stream in list(self._streams):
            self._drain(stream)
        raw = self._blocks.pop(pointer)
        del self._sizes[pointer]
        self._touched.pop(pointer, None)
        self._landing = {
            span: each for span, each in self._landing.items() if not pointer <= span[0] < pointer + size
        }
        self._starts.remove(pointer)
        raw[:] = POISON
        self._quarantine.append(raw)
        self.used -= size if device else 0
        return OK

    # The machinery

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("cu") or not callable(value):
            return value

        def call(*arguments: Any) -> tuple[Any, ...]:
            with self._lock:
                self.calls[name] += 1
                fault = self.faults(name)
                if not fault or name in WAITS:
                    answer = value(*(_plain(each) for each in arguments))
                if fault:
                    answer = (fault,)
            return answer if isinstance(answer, tuple) else (answer,)

        return call

    def _handle(self) -> int:
        self._next += 0x10
        return self._next

    def _stack(self) -> list[int]:
        return self._current.setdefault(threading.get_ident(), [])

    def _no_context(self) -> Any:
        stack = self._stack()
        return None if stack and stack[-1] else Status.CUDA_ERROR_INVALID_CONTEXT

    def _forbidden(self) -> Any:
        """What may not be called while this thread captures: it ruins the capture."""
        if missing := self._no_context():
            return missing
        me = threading.get_ident()
        capturing = [
            each for each in self._streams.values() if each.recording is not None and each.thread == me
        ]
        for stream in capturing:
            stream.invalid = True
        return Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED if capturing else None

    def _drain(self, stream: int, until: Event | None = None) -> None:
        found = self._streams[stream]
        while found.work and not (until is not None and until.reached):
            work = found.work.popleft()
            work.under_way[0] -= 1
            before, self._running = self._running, work
            try:
                work.run()
            finally:
                self._running = before

    def _wait_for(self, stream: int) -> Any:
        """Let the host wait for a stream; nobody may while it is captured."""
        found = self._streams[stream]
        if found.recording is not None:
            found.invalid = True
            return Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        self._drain(stream)
        _merge(self._host, found.clock)
        return OK

    # The driver's functions

    def cuInit(self, Flags):
        return OK

    def cuDriverGetVersion(self):
        return OK, self.version

    def cuDeviceGet(self, ordinal):
        return (OK, ordinal) if ordinal == 0 else (Status.CUDA_ERROR_INVALID_DEVICE, None)

    def cuDevicePrimaryCtxRetain(self, dev):
        self._contexts[dev + 1] += 1
        return OK, dev + 1

    def cuDevicePrimaryCtxRelease(self, dev):
        self._contexts[dev + 1] -= 1
        return OK

    def cuCtxGetCurrent(self):
        stack = self._stack()
        return OK, stack[-1] if stack else 0

    def cuCtxPushCurrent(self, ctx):
        self._stack().append(ctx)
        return OK

    def cuCtxPopCurrent(self):
        stack = self._stack()
        return (OK, stack.pop()) if stack else (Status.CUDA_ERROR_INVALID_CONTEXT, None)

    def cuStreamGetCtx(self, hStream):
        if hStream not in self._streams:
            return Status.CUDA_ERROR_INVALID_HANDLE, None
        return OK, self._streams[hStream].context

    def cuMemGetInfo(self):
        missing = self._no_context()
        return (missing, None, None) if missing else (OK, self.total - self.used, self.total)

    def cuMemAlloc(self, bytesize):
        if forbidden := self._forbidden():
            return forbidden, None
        pointer = self.allocate(bytesize)
        return (OK, pointer) if pointer else (Status.CUDA_ERROR_OUT_OF_MEMORY, None)

    def cuMemFree(self, dptr):
        return self._forbidden() or self.release(dptr)

    def cuMemHostAlloc(self, bytesize, Flags):
        if forbidden := self._forbidden():
            return forbidden, None
        return OK, self.allocate(bytesize, device=False)

    def cuMemFreeHost(self, p):
        return self._forbidden() or self.release(p, device=False)

    def cuMemcpyHtoDAsync(self, dstDevice, srcHost, ByteCount, hStream):
        source = self.bytes_at(srcHost, ByteCount, "upload", device=False)
        if source is None:
            return OK
        before = source.tobytes()

        def run():
            now = self.bytes_at(srcHost, ByteCount, "upload", device=False)
            target = self.bytes_at(dstDevice, ByteCount, "upload", write=True)
            if now is None or target is None:
                return
            if now.tobytes() != before:
                self.violate("host memory was changed while a copy from it was under way")
            target[:] = now

        return self._no_context() or self.enqueue(hStream, "upload", run)

    def cuMemcpyDtoHAsync(self, dstHost, srcDevice, ByteCount, hStream):
        target = self.bytes_at(dstHost, ByteCount, "download", device=False)
        if target is None:
            return OK
        for (low, high), (stream, tick) in self._landing.items():
            if low < dstHost + ByteCount and dstHost < high and self._host.get(stream, 0) < tick:
                self.violate("a download's target is used again before anybody waited for it")
        target[:] = POISON  # whoever reads before the copy is done reads this

        def run():
            source = self.bytes_at(srcDevice, ByteCount, "download")
            now = self.bytes_at(dstHost, ByteCount, "download", device=False, write=True)
            if source is not None and now is not None:
                now[:] = source

        status = self._no_context() or self.enqueue(hStream, "download", run)
        if status == OK and self._streams[hStream].recording is None:
            self._landing[dstHost, dstHost + ByteCount] = hStream, self._streams[hStream].clock[hStream]
        return status

    def cuMemcpyDtoDAsync(self, dstDevice, srcDevice, ByteCount, hStream):
        def run():
            source = self.bytes_at(srcDevice, ByteCount, "copy")
            target = self.bytes_at(dstDevice, ByteCount, "copy", write=True)
            if abs(dstDevice - srcDevice) < ByteCount:
                self.violate("a copy overlaps itself")
            elif source is not None and target is not None:
                target[:] = source

        return self._no_context() or self.enqueue(hStream, "copy", run)

    def cuMemsetD8Async(self, dstDevice, uc, N, hStream):
        def run():
            target = self.bytes_at(dstDevice, N, "memset", write=True)
            if target is not None:
                target[:] = uc

        if not N:
            return Status.CUDA_ERROR_INVALID_VALUE
        return self._no_context() or self.enqueue(hStream, "memset", run)

    def cuStreamCreate(self, Flags):
        if missing := self._no_context():
            return missing, None
        handle = self._handle()
        self._streams[handle] = Stream(self._stack()[-1])
        return OK, handle

    def cuStreamDestroy(self, hStream):
        if hStream not in self._streams:
            return Status.CUDA_ERROR_INVALID_HANDLE
        self._drain(hStream)
        del self._streams[hStream]
        return OK

    def cuStreamSynchronize(self, hStream):
        if hStream not in self._streams:
            return Status.CUDA_ERROR_INVALID_HANDLE
        return self._forbidden() or self._wait_for(hStream)

    def cuStreamWaitEvent(self, hStream, hEvent, Flags):
        event, stream = self._events.get(hEvent), self._streams.get(hStream)
        if event is None or stream is None:
            return Status.CUDA_ERROR_INVALID_HANDLE
        if stream.recording is None:
            _merge(stream.clock, event.clock)
        return self.enqueue(hStream, "wait", lambda: event.reached or self._drain(event.stream, event))

    def cuStreamBeginCapture(self, hStream, mode):
        stream = self._streams.get(hStream)
        if stream is None:
            return Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        if stream.recording is not None:
            return Status.CUDA_ERROR_ILLEGAL_STATE
        stream.recording, stream.invalid, stream.thread = [], False, threading.get_ident()
        return OK

    def cuStreamEndCapture(self, hStream):
        stream = self._streams[hStream]
        recorded, stream.recording = stream.recording, None
        if recorded is None:
            return Status.CUDA_ERROR_ILLEGAL_STATE, None
        if stream.invalid:
            return Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        handle = self._handle()
        self._graphs[handle] = recorded
        return OK, handle

    def cuGraphInstantiate(self, hGraph, flags):
        handle = self._handle()
        self._execs[handle] = list(self._graphs[hGraph])
        return OK, handle

    def cuGraphDestroy(self, hGraph):
        del self._graphs[hGraph]
        return OK

    def cuGraphExecDestroy(self, hGraphExec):
        del self._execs[hGraphExec]
        return OK

    def cuGraphLaunch(self, hGraphExec, hStream):
        if missing := self._no_context():
            return missing
        if hGraphExec not in self._execs:
            return Status.CUDA_ERROR_INVALID_HANDLE
        for work in self._execs[hGraphExec]:
            self.enqueue(hStream, work.name, work.run, work.under_way)
        return OK

    def cuEventCreate(self, Flags):
        if missing := self._no_context():
            return missing, None
        handle = self._handle()
        self._events[handle] = Event()
        return OK, handle

    def cuEventDestroy(self, hEvent):
        del self._events[hEvent]
        return OK

    def cuEventRecord(self, hEvent, hStream):
        event = Event(hStream, False)

        def reach():
            event.reached, event.at = True, time.perf_counter()

        status = self._no_context() or self.enqueue(hStream, "event", reach)
        if status == OK:
            event.clock = dict(self._streams[hStream].clock)
            self._events[hEvent] = event
        return status

    def cuEventSynchronize(self, hEvent):
        event = self._events.get(hEvent)
        if event is None:
            return Status.CUDA_ERROR_INVALID_HANDLE
        if forbidden := self._forbidden():
            return forbidden
        if not event.reached:
            self._drain(event.stream, event)
        _merge(self._host, event.clock)
        return OK

    def cuEventElapsedTime(self, hStart, hEnd):
        start, end = self._events[hStart], self._events[hEnd]
        if not (start.reached and end.reached):
            return Status.CUDA_ERROR_NOT_READY, None
        return OK, 1000 * (end.at - start.at)


def _merge(clock: dict[int, int], other: Mapping[int, int]) -> None:
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


def _plain(argument: Any) -> Any:
    """Handles come as numbers or as the bindings' own objects."""
    return argument if isinstance(argument, int) else int(argument)
