"""The devices that engines can be built for, by the names that the command line takes.

A target is a board of `reelrt.jetson.boards`, a family of them, which counts as its smallest one, or
a GPU generation. Knows which backend suits it; knows nothing of the machine it runs on (see
`reelrt.jetson.device`) nor of how an engine is built.
"""

from __future__ import annotations

from dataclasses import dataclass

from reelrt.errors import InputError
from reelrt.jetson.boards import Board, boards


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
        board: What is known of it; None for a GPU generation and for the machine at hand.
    """

    name: str
    description: str
    compute_capability: str
    memory_gib: float
    backend: str
    on_device: bool = False
    board: Board | None = None


HOST = "host"

FAMILIES = {
    "rtx3060": ("GeForce RTX 3060, laptop or desktop", "rtx3060-laptop-6gb"),
    "rtx4060": ("GeForce RTX 4060, laptop or desktop", "rtx4060-laptop-8gb"),
    "orin-agx": ("Jetson AGX Orin", "orin-agx-32gb"),
    "orin-nx": ("Jetson Orin NX", "orin-nx-8gb"),
    "orin-nano": ("Jetson Orin Nano", "orin-nano-4gb"),
}
"""Name of a family to its description and its smallest board."""

GENERATIONS = {
    "sm75": ("any Turing GPU", "7.5"),
    "sm80": ("any A100-class GPU", "8.0"),
    "sm86": ("any RTX 30 GPU", "8.6"),
    "sm89": ("any RTX 40 GPU", "8.9"),
    "sm120": ("any RTX 50 GPU", "12.0"),
}


def _of_board(name: str, description: str, board: Board) -> Target:
    """A target that is a board; CPU and GPU share memory on Jetsons, which build for themselves."""
    backend = "tensorrt" if board.shared else "tensorrt_rtx"
    capability, memory = board.compute_capability, board.memory_gib
    return Target(name, description, capability, memory, backend, on_device=board.shared, board=board)


TARGETS: dict[str, Target] = {
    **{name: _of_board(name, title, boards()[board]) for name, (title, board) in FAMILIES.items()},
    **{name: _of_board(name, board.title, board) for name, board in boards().items()},
    **{
        name: Target(name, title, capability, 0, "tensorrt_rtx")
        for name, (title, capability) in GENERATIONS.items()
    },
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
