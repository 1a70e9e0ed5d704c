"""The boards and cards that engines run on: memory, bandwidth and peak arithmetic, with sources.

Reads `boards.json`, which stands beside this module; every figure there names the document it is
from, or that it is an estimate. Knows no engine and no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Board:
    """A module or card.

    Attributes:
        name: What the user calls it: `orin-nx-16gb`, say.
        title: What its makers call it.
        compute_capability: `8.7`, say.
        memory_gib: Memory it has, GiB.
        usable_gib: What CUDA reports of it, GiB.
        system_gib: What the system takes of that, GiB; an estimate.
        shared: Whether CPU and GPU share the memory.
        bandwidth_gbs: Peak memory bandwidth, 1e9 bytes per second.
        fp16_tflops: Dense FP16 peak of the tensor cores, 1e12 operations per second.
        int8_tops: Dense INT8 peak of the tensor cores, 1e12 operations per second.
        tensorrt: JetPack to the TensorRT it brings; empty where none does.
        note: At which clock the peaks hold, and where sources disagree.
        sources: Name of a figure to where it is from.
    """

    name: str
    title: str
    compute_capability: str
    memory_gib: float
    usable_gib: float
    system_gib: float
    shared: bool
    bandwidth_gbs: float
    fp16_tflops: float
    int8_tops: float
    tensorrt: Mapping[str, str]
    note: str
    sources: Mapping[str, str]

    @property
    def free_bytes(self) -> int:
        """What is left for engines: usable memory without the system's."""
        return int((self.usable_gib - self.system_gib) * GIB)


@cache
def boards() -> Mapping[str, Board]:
    """Every board, by name."""
    text = resources.files("reelrt.jetson").joinpath("boards.json").read_text(encoding="utf-8")
    data = json.loads(text)
    found = {}
    for name, entry in data["boards"].items():
        figures = {key: value for key, value in entry.items() if key not in ("tensorrt", "source")}
        found[name] = Board(
            name=name,
            tensorrt={jetpack: data["tensorrt"][jetpack] for jetpack in entry["tensorrt"]},
            sources={figure: data["sources"][source] for figure, source in entry["source"].items()},
            **figures,
        )
    return found
