"""The models a service runs, as it describes them to others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reelrt.runtime.pipeline import TextToVideo
from reelrt.service.requests import STEPS


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


def describe(name: str, pipe: TextToVideo, slots: int, loaded_at: float) -> ModelInfo:
    """A loaded model.

    Args:
        name: What a request calls it.
        pipe: The model.
        slots: Most videos in a batch.
        loaded_at: When it was loaded, in seconds since 1970.
    """
    engines = pipe.engines
    geometry, pipeline = engines.pipeline.geometry, engines.pipeline
    step, decoder = engines.engines["step"].profile, engines.engines["vae_decoder"].profile
    scale = geometry.spatial_scale

    def cells(axis: str) -> tuple[int, int]:
        least, most = max(step[axis].min, decoder[axis].min), min(step[axis].max, decoder[axis].max)
        multiple = geometry.size_multiple
        return -(-least * scale // multiple) * multiple, most * scale // multiple * multiple

    steps = sorted(pipe.limits.schedules.counts(pipeline.solver))
    rows = step["rows"].max // (2 if pipeline.cfg == "split" else 1)
    return ModelInfo(
        name=name,
        family=pipeline.model.family,
        sha256=pipeline.model.sha256,
        backend=f"{engines.backend} {engines.backend_version}",
        precision=engines.engines["step"].precision,
        slots=slots,
        solvers=pipe.solvers,
        defaults={
            "width": geometry.width,
            "height": geometry.height,
            "frames": geometry.frames,
            "steps": STEPS,
            "guidance": pipeline.guidance,
            "solver": pipeline.solver,
        },
        limits={
            "width": cells("width"),
            "height": cells("height"),
            "frames": (step["frames"].min, step["frames"].max),
            "steps": (steps[0], min(steps[-1], rows)),
        },
        size_multiple=geometry.size_multiple,
        loaded_at=loaded_at,
    )
