"""How a command is stopped: Ctrl-C, SIGTERM, a closed terminal; and that it then ends at once.

Imports nothing heavy, so that it holds from the first moment on.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

SECOND_THOUGHTS = 5.0
"""Seconds after a first Ctrl-C in which another one is ignored: what is half-written is being removed."""


class _Stop:
    """The signal that stopped this process, if one did, and when; one process, one of these."""

    number = 0
    since = 0.0


def end_on_signals() -> None:
    """Let Ctrl-C, SIGTERM and a closed terminal unwind the stack: half-written folders are removed."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        untouched = (signal.SIG_DFL, signal.default_int_handler)
        if number is not None and signal.getsignal(number) in untouched:  # nohup ignores SIGHUP
            signal.signal(number, _stop)


def _stop(number: int, _frame: object) -> None:
    if _Stop.number and time.monotonic() - _Stop.since < SECOND_THOUGHTS:
        return
    _Stop.number, _Stop.since = number, time.monotonic()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def stopped_code() -> int:
    """The exit code that belongs to the signal which stopped this process; 0 when none did.

    Asked wherever an error ends a command: a library may turn the interruption into one of its own.
    """
    return 128 + _Stop.number if _Stop.number else 0


@contextmanager
def at_once() -> Iterator[None]:
    """End the process right after the stack has unwound, if a signal is why it did.

    Python's own way out takes libraries apart whose threads are in the middle of something, and some
    of them crash then: the exit code would be theirs.
    """
    try:
        yield
    except KeyboardInterrupt:
        _end(128 + signal.SIGINT)
    except SystemExit:
        if code := stopped_code():
            _end(code)
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is _stop:  # all is done; this is no time to interrupt
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
