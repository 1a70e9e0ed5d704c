"""Which thread of the CPU runs which pass of the network.

A denoiser's operators are too small to keep several cores busy, so whole passes run side by side
instead, each on a lane. Knows no graphs: a call is an opened engine and what was bound to it.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from reelrt.errors import BackendError


class Call(NamedTuple):
    """A run of an engine.

    Attributes:
        engine: The engine, opened.
        binding: Its inputs and outputs as bound to it, which are bare addresses.
        buffers: What lies there. A second Ctrl-C ends the wait for a pass that still writes, and whoever
            owned the buffers may be gone before it.
    """

    engine: Any
    binding: Any
    buffers: Any


PATIENCE = 0.5
"""Seconds after which a lane that hears nothing of the other hands its errand over again."""


class Errand:
    """Calls for the second lane, and what became of them."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.over = False
        self.error: BackendError | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def run(self) -> None:
        """Do it, once: what was handed over twice is over the second time."""
        if self.over:
            return
        try:
            run(self.calls)
        except BackendError as error:
            self.error = error
        self.calls = ()  # and their buffers
        self.over = True
        self._gate.release()

    def wait(self, seconds: float) -> None:
        """Wait until it is over, or for a while."""
        self._gate.acquire(timeout=seconds)


class Part:
    """An engine file, opened for a pass on a lane and for one that has all threads to itself.

    Args:
        threads: CPU threads in all.
        open_file: Opens it with so many threads within an operator.

    Raises:
        BackendError: It cannot be opened.
    """

    def __init__(self, threads: int, open_file: Callable[[int], Any]) -> None:
        self._threads, self._open_file = threads, open_file
        # Two calls bring a thread each and share the engine's other ones.
        self.shared = open_file(max(threads - 1, 1))

    @cached_property
    def whole(self) -> Any:
        """With all threads within an operator."""
        return self._open_file(self._threads) if self._threads > 1 else self.shared


class Lanes:
    """Two threads that call engines side by side.

    Ctrl-C may strike between any two operations, also while one lane waits for the other. So nothing
    here holds a lock while it waits, and an errand that was lost on its way is handed over again.

    Args:
        threads: CPU threads in all; with one there is one lane.
    """

    def __init__(self, threads: int) -> None:
        self.parallel = threads > 1
        self._errands: queue.SimpleQueue[Errand | None] = queue.SimpleQueue()
        self._second: Errand | None = None
        if self.parallel:
            work = threading.Thread(
                target=_second_lane, args=(self._errands,), name="reelrt-lane", daemon=True
            )
            work.start()
            weakref.finalize(self, self._errands.put, None)

    def run(self, calls: Sequence[Call]) -> None:
        """Make some calls, every other one on the second lane.

        Raises:
            BackendError: An engine failed.
        """
        self.wait()
        if not self.parallel or len(calls) < 2:
            run(calls)
            return
        self._second = Errand(calls[1::2])
        try:
            self._errands.put(self._second)
            run(calls[::2])
        finally:  # Ctrl-C, too, leaves no pass behind that still writes
            self.wait()

    def wait(self) -> None:
        """Wait until no call is running.

        Raises:
            BackendError: An engine failed on the second lane.
        """
        errand = self._second
        while errand is not None and not errand.over:
            errand.wait(PATIENCE)
            if not errand.over:
                self._errands.put(errand)
        self._second = None
        if errand is not None and errand.error is not None:
            raise errand.error


def _second_lane(errands: queue.SimpleQueue[Errand | None]) -> None:
    """Run errands until None comes."""
    while (errand := errands.get()) is not None:
        errand.run()


def run(calls: Sequence[Call]) -> None:
    """Make some calls one after the other.

    Raises:
        BackendError: An engine failed.
    """
    try:
        for call in calls:
            call.engine.run_with_iobinding(call.binding)
    except Exception as error:
        raise BackendError(f"ONNX Runtime failed in step: {error}") from error
