"""A real exported model on a simulated GPU: the same videos as ONNX Runtime, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import reelrt
from reelrt.bundle.manifest import EngineSet
from tests.simulated.machine import Machine

pytestmark = pytest.mark.timeout(900)  # the first test exports the model

PROMPTS = [
    "a red circle moving right on a black background",
    "a blue square growing on a gray background",
    "a green triangle moving up on a black background",
    "a white circle shrinking on a gray background",
    "a purple square moving down on a black background",
]


@pytest.mark.parametrize("library", ["tensorrt 10.3.0", "tensorrt_rtx 1.7.1"])
def test_a_model_gives_the_bits_of_onnx_runtime(small_engines: Path, tmp_path, monkeypatch, library) -> None:
    cpu = reelrt.load(small_engines, threads=1)
    machine = Machine(monkeypatch, library)
    engines = machine.engines(EngineSet.load(small_engines), tmp_path / "engines")
    gpu = reelrt.load(engines.folder)
    options: dict[str, Any] = {"frames": 4, "size": (48, 32), "seed": 5, "negative_prompt": "noise"}
    for solver, steps in (("ddim", 4), ("unipc", 3)):
        ours = gpu.generate(PROMPTS, steps=steps, solver=solver, **options)
        theirs = cpu.generate(PROMPTS, steps=steps, solver=solver, **options)
        for a, b in zip(ours, theirs, strict=True):
            assert a.latents.tobytes() == b.latents.tobytes()
            assert a.frames.tobytes() == b.frames.tobytes()
    assert machine.driver.violations == []
    assert machine.driver.calls["cuGraphLaunch"] > 10
