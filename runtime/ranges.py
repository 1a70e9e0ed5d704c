"""Ranges around stages and steps that NVIDIA's profilers show, where the package `nvtx` is installed.

Knows names and nothing else; without the package a range is nothing at all.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

DOMAIN = "reelrt"
_NOTHING: AbstractContextManager[Any] = nullcontext()


def span(name: str) -> AbstractContextManager[Any]:
    """A range of this thread's time, for `with`.

    Args:
        name: `text_encoder`, `denoise`, `step`, `vae_decoder`, `encode`.
    """
    library = _nvtx()
    if library is None:
        return _NOTHING
    opened: AbstractContextManager[Any] = library.annotate(name, domain=DOMAIN)
    return opened


@cache
def _nvtx() -> Any:
    """The package, looked for once; None where it is not installed."""
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx
