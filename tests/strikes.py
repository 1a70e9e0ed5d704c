"""Ctrl-C at odd moments: signals that strike one piece of work and nothing around it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np

COLLECTED = ("__del__", "_remove")
"""What the collector calls. No exception leaves it: Python drops an interrupt there, and pytest complains."""


def strike(work: Callable[[], Any], seconds: float, pause: float, at_once: int = 1) -> int:
    """Call something again and again while SIGINT strikes.

    A KeyboardInterrupt is raised in `work` and in what it calls only: a signal that comes a moment later,
    between two calls or while one interrupt is being caught, would end the test run.

    Args:
        work: What to call; a Python function.
        seconds: How long.
        pause: The longest time between strikes, in seconds.
        at_once: How many signals a strike has at most.

    Returns:
        How many calls were interrupted.
    """
    struck = 0

    def interrupt(signum: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name in COLLECTED:
                return
            if frame.f_code is work.__code__:
                raise KeyboardInterrupt
            frame = frame.f_back

    def send() -> None:
        rng = np.random.default_rng(0)
        while not stop.wait(rng.uniform(0, pause)):
            for _ in range(rng.integers(1, at_once + 1)):
                signal.pthread_kill(main, signal.SIGINT)

    main, stop = threading.get_ident(), threading.Event()  # only the main thread may set a handler
    before = signal.signal(signal.SIGINT, interrupt)
    thread = threading.Thread(target=send)
    try:
        thread.start()
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            struck += _interrupted(work)
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    return struck


def _interrupted(work: Callable[[], Any]) -> bool:
    try:
        work()
    except KeyboardInterrupt:
        return True
    return False
