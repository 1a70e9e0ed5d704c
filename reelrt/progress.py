"""How long work reports where it is; who draws the bar is the caller's business."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`; `done == total` ends `what`."""


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""
