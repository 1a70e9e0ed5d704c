"""What the engines of a set need of a GPU's memory, before anything is loaded.

Knows manifests and sizes; asks no device and loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from reelrt.bundle.manifest import Engine, EngineSet
from reelrt.errors import DeviceMemoryError, InputError

RESIDENCIES = ("all", "staged", "streamed")
"""`all` keeps every engine loaded; `staged` loads one at a time, runs it and frees it; `streamed` does so
too, and leaves with the host what does not fit of the step's weights: they come while it runs."""
STREAMED_SHARE = 0.9
"""How much of the free memory `streamed` fills with weights; what TensorRT takes by itself is not known."""
RESERVE = 8
"""A part of the step's weights, one in so many, is for those that are on their way; an estimate."""
REMEDY_STREAMING = "Build it again: `reelrt build BUNDLE -o ENGINES --weight-streaming`."


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of device memory.

    Attributes:
        residency: One of `RESIDENCIES`.
        weights: Stage to the size of its weights.
        scratch: One block for the activations of every stage in turn; 0 for a backend that did
            not say when it built.
        buffers: Stage to the size of its inputs and outputs.
        overlap: Whether other stages run beside the step.
        aside: What that takes: their own block for activations, and the decoder's buffers twice.
        budget: With `streamed`, how much of the step's weights is loaded.
    """

    residency: str
    weights: Mapping[str, int]
    scratch: int
    buffers: Mapping[str, int]
    overlap: bool = False
    aside: int = 0
    budget: int = 0

    @property
    def streams(self) -> int:
        """How much of the step's weights stays with the host."""
        return max(self.weights["step"] - self.budget, 0) if self.residency == "streamed" else 0

    @property
    def total(self) -> int:
        """The most there is at a time."""
        weights = dict(self.weights)
        if self.streams:
            weights["step"] = self.budget + weights["step"] // RESERVE
        loaded = sum(weights.values()) if self.residency == "all" else max(weights.values())
        return loaded + self.scratch + self.aside + sum(self.buffers.values())

    def __str__(self) -> str:
        parts = [
            *(f"{stage} {_mib(size)}" for stage, size in self.weights.items()),
            f"activations {_mib(self.scratch)}",
            f"buffers {_mib(sum(self.buffers.values()))}",
            *([f"other stages beside the step {_mib(self.aside)}"] if self.overlap else []),
        ]
        how = "all engines loaded" if self.residency == "all" else "engines loaded one at a time"
        if self.residency == "streamed":
            how += f", {_mib(self.streams)} of the step's weights streamed"
        return f"{_mib(self.total)} ({', '.join(parts)}; {how})"


def plan_memory(
    engines: EngineSet,
    residency: str,
    latents: tuple[int, int, int, int] | None = None,
    overlap: bool = False,
) -> MemoryPlan:
    """Plan the memory of an engine set.

    Args:
        engines: The engine set.
        residency: One of `RESIDENCIES`.
        latents: (C, F, h, w) of the videos. Default: the largest of the profile.
        overlap: Whether other stages shall run beside the step.
    """
    weights = {name: engine.weight_bytes for name, engine in engines.engines.items()}
    activations = {name: _activations(engine, latents) for name, engine in engines.engines.items()}
    buffers = {name: _buffers(engine, latents) for name, engine in engines.engines.items()}
    if not overlap:
        return MemoryPlan(residency, weights, max(activations.values()), buffers)
    step = activations.pop("step")
    aside = max(activations.values()) + buffers["vae_decoder"]
    return MemoryPlan(residency, weights, step, buffers, True, aside)


def choose_memory(
    engines: EngineSet,
    free: int,
    residency: str | None,
    latents: tuple[int, int, int, int] | None = None,
    overlap: bool = True,
) -> MemoryPlan:
    """The first plan that fits into the free memory.

    Args:
        engines: The engine set.
        free: Free device memory in bytes.
        residency: One of `RESIDENCIES`; None takes the first that fits.
        latents: As in `plan_memory`.
        overlap: Whether other stages may run beside the step, where that fits as well.

    Raises:
        InputError: No such residency.
        DeviceMemoryError: None fits; the message has the smallest plan.
    """
    if residency is not None and residency not in RESIDENCIES:
        raise InputError(f"residency {residency!r} is not known.", f"Choose one of {', '.join(RESIDENCIES)}.")
    streams = engines.engines["step"].weight_streaming
    if residency == "streamed" and not streams:
        raise InputError(
            f"the step engine of {engines.folder} was not built for weight streaming.", REMEDY_STREAMING
        )
    asked = [residency] if residency else [each for each in RESIDENCIES if each != "streamed" or streams]
    plans = [plan_memory(engines, each, latents) for each in asked]
    if asked[-1] == "streamed":
        plans[-1] = _fill(plans[-1], free)
    if overlap and "all" in asked:
        plans.insert(0, plan_memory(engines, "all", latents, overlap=True))
    for plan in plans:
        if plan.total <= free:
            return plan
    smallest = plans[-1]
    smaller = "Load engines one at a time (residency='staged'), " if residency == "all" else ""
    raise DeviceMemoryError(
        f"{engines.folder} needs {smallest} and {_mib(free)} are free.",
        f"{smaller or 'Build '}{'or build ' if smaller else ''}engines for a smaller --size, "
        f"fewer --frames{'' if streams else ', --weight-streaming'} or --precision fp16.",
        str(smallest),
    )


def _fill(plan: MemoryPlan, free: int) -> MemoryPlan:
    """A streamed plan with as much of the step's weights loaded as fits."""
    weights = plan.weights["step"]
    rest = plan.scratch + sum(plan.buffers.values())
    room = int(STREAMED_SHARE * free) - rest
    budget = weights if weights <= room else max(room - weights // RESERVE, 0)
    return replace(plan, budget=budget)


def _sizes(engine: Engine, latents: tuple[int, ...] | None) -> dict[str, int]:
    """The size of every axis: the largest of the profile, or the latents' where it has one."""
    sizes = {axis: extent.max for axis, extent in engine.profile.items()}
    if latents is not None and "height" in sizes:
        _, frames, height, width = latents
        sizes.update(height=height, width=width, frames=min(frames, sizes["frames"]))
    return sizes


def _activations(engine: Engine, latents: tuple[int, ...] | None) -> int:
    """Scaled with the number of latent cells, as activations are."""
    cells = ("frames", "height", "width")
    largest, asked = (prod(_sizes(engine, each).get(axis, 1) for axis in cells) for each in (None, latents))
    return -(-engine.activation_bytes * asked // largest)


def _buffers(engine: Engine, latents: tuple[int, ...] | None) -> int:
    sizes = _sizes(engine, latents)
    specs = [*engine.spec.inputs.values(), *engine.spec.outputs.values()]
    return sum(prod(spec.shape(sizes)) * spec.numpy_dtype(engine.precision).itemsize for spec in specs)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
