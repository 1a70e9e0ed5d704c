"""The devices that engines can be built for, in one table.

Knows compute capabilities, memory and which backend suits them; knows nothing of the machine it
runs on (see `reelrt.jetson.device`) nor of how an engine is built.
"""

from __future__ import annotations

from dataclasses import dataclass

from reelrt.errors import InputError


@dataclass(frozen=True, slots=True)
class Target:
    """A device that engines are built for.

    Attributes:
        name: What the user calls it.
        description: What it is.
        compute_capability: `8.6`, say; empty for a CPU.
        memory_gib: Memory the GPU has (on a Jetson: shares with the CPU) of the smallest such
            device; 0 when it is not known.
        backend: What `--backend auto` builds with.
        on_device: Whether engines must be built on the device itself.
    """

    name: str
    description: str
    compute_capability: str
    memory_gib: float
    backend: str
    on_device: bool = False


HOST = "host"

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("rtx3060", "GeForce RTX 3060, laptop or desktop", "8.6", 6, "tensorrt_rtx"),
        Target("rtx4060", "GeForce RTX 4060, laptop or desktop", "8.9", 8, "tensorrt_rtx"),
        Target("sm75", "any Turing GPU", "7.5", 0, "tensorrt_rtx"),
        Target("sm80", "any A100-class GPU", "8.0", 0, "tensorrt_rtx"),
        Target("sm86", "any RTX 30 GPU", "8.6", 0, "tensorrt_rtx"),
        Target("sm89", "any RTX 40 GPU", "8.9", 0, "tensorrt_rtx"),
        Target("sm120", "any RTX 50 GPU", "12.0", 0, "tensorrt_rtx"),
        Target("orin-agx", "Jetson AGX Orin", "8.7", 32, "tensorrt", on_device=True),
        Target("orin-nx", "Jetson Orin NX", "8.7", 8, "tensorrt", on_device=True),
        Target("orin-nano", "Jetson Orin Nano", "8.7", 4, "tensorrt", on_device=True),
    )
}
"""Target name to target; `host`, the machine at hand, comes on top of these."""


def find(name: str) -> Target:
    """A target by name.

    Raises:
        InputError: There is none; the message lists those there are.
    """
    if name not in TARGETS:
        choices = ", ".join([HOST, *TARGETS])
        raise InputError(f"target {name!r} is not known.", f"Choose one of {choices}.")
    return TARGETS[name]
