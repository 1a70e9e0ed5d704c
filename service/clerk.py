"""One thread that does small work for others, in order: what waits for the disk must not stall a launch."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from reelrt.errors import StorageError

log = logging.getLogger("reelrt")


class Clerk:
    """A thread and its list of things to do."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="reelrt-clerk", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], object]) -> None:
        """Have something done after all that was asked for before; returns at once."""
        self._work.put(work)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except (StorageError, OSError) as error:  # noqa: PERF203 (a loop of waiting)
                log.warning("not written: %s", error)
            except Exception:  # the next one's work has nothing to do with it
                log.exception("the clerk failed")

    def close(self) -> None:
        """Do what there is to do, then stop."""
        self._work.put(None)
        self._thread.join()
