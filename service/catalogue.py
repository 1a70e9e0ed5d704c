"""The models a service runs, as it describes them to others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that the service runs.

    Attributes:
        name: What a request calls it.
        family: `unet3d`, ...
        sha256: Of its weights and configuration.
        backend: Backend and its version.
        precision: Of the step engine.
        slots: Most videos in a batch.
        solvers: Those it takes.
        defaults: `width`, `height`, `frames`, `steps`, `guidance`, `solver`.
        limits: Name to smallest and largest value: `width`, `height`, `frames`, `steps`.
        size_multiple: Width and height are multiples of this.
        loaded_at: When it was loaded, in seconds since 1970.
    """

    name: str
    family: str
    sha256: str
    backend: str
    precision: str
    slots: int
    solvers: tuple[str, ...]
    defaults: Mapping[str, Any]
    limits: Mapping[str, tuple[int, int]]
    size_multiple: int
    loaded_at: float
