"""One engine to build and what came of it: plain values that travel to the worker process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reelrt.bundle.spec import Profile, Range, StageSpec

Layers = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Layer class to precision to `count` and `weight_bytes`; see `reelrt.engines.verified`."""


@dataclass(frozen=True, slots=True)
class Job:
    """One engine to build.

    Attributes:
        backend: `onnxruntime`, `tensorrt_rtx` or `tensorrt`.
        spec: The stage's boundary.
        graph: The bundle's ONNX file.
        graph_precision: The type of its weights.
        output: The engine file to write.
        precision: The type the engine shall have.
        profile: The sizes it shall accept.
        compute_capability: `8.6`, say; empty for a CPU.
        keep_fp32: Layers that stay FP32 when the graph is converted.
        inspect: Whether the GPU of this machine can open the engine, to be asked what is in it.
        weight_streaming: Whether its weights may stay with the host, and come while it runs.
    """

    backend: str
    spec: StageSpec
    graph: Path
    graph_precision: str
    output: Path
    precision: str
    profile: Profile
    compute_capability: str
    keep_fp32: tuple[str, ...] = ()
    inspect: bool = False
    weight_streaming: bool = False

    def to_json(self) -> dict[str, Any]:
        """A plain structure that `from_json` reads back."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        profile = {axis: asdict(extent) for axis, extent in self.profile.items()}
        paths = {"graph": str(self.graph), "output": str(self.output)}
        return {**plain, **paths, "spec": self.spec.to_json(), "profile": profile}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """The inverse of `to_json`."""
        profile = {axis: Range(**extent) for axis, extent in data["profile"].items()}
        paths = {name: Path(data[name]) for name in ("graph", "output")}
        spec, keep = StageSpec.from_json(data["spec"]), tuple(data["keep_fp32"])
        return cls(**{**data, **paths, "spec": spec, "profile": profile, "keep_fp32": keep})


@dataclass(frozen=True, slots=True)
class Built:
    """What the builder says of an engine.

    Attributes:
        weight_bytes: Its weights.
        activation_bytes: Its activations at the profile's largest sizes; 0 when the backend does
            not say before it runs.
        layers: In which precision its layers run.
        inspected: The same as the engine inspector says: layer type to precision to number; empty
            where no GPU could open it.
    """

    weight_bytes: int
    activation_bytes: int = 0
    layers: Layers = field(default_factory=dict)
    inspected: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def cache_key(fields: Mapping[str, str]) -> str:
    """Hex SHA-256 over everything an engine depends on."""
    return hashlib.sha256(json.dumps(dict(fields), sort_keys=True).encode()).hexdigest()


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The fields of a cache key that differ, readable: `precision: fp32 -> fp16`."""
    names = dict.fromkeys([*old, *new])
    return [
        f"{name}: {_short(old.get(name, ''))} -> {_short(new.get(name, ''))}"
        for name in names
        if old.get(name, "") != new.get(name, "")
    ]


def _short(value: str) -> str:
    """A hash is told apart by its first digits; anything else is shown whole."""
    is_hash = len(value) == 64 and all(letter in "0123456789abcdef" for letter in value)
    return f"{value[:12]}..." if is_hash else value or "(none)"
