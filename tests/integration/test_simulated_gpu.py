"""A real exported model on a simulated GPU: the same videos as ONNX Runtime, to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import reelrt
from benchmarks import gpu
from reelrt.bundle.manifest import Bundle, EngineSet
from reelrt.jetson.boards import boards
from reelrt.runtime.ort import CPU, CUDA
from reelrt.runtime.pipeline import TextToVideo
from reelrt.runtime.session import open_sessions
from tests.simulated.machine import Machine

pytestmark = pytest.mark.timeout(900)  # the first test exports the model

PROMPTS = [
    "a red circle moving right on a black background",
    "a blue square growing on a gray background",
    "a green triangle moving up on a black background",
    "a white circle shrinking on a gray background",
    "a purple square moving down on a black background",
]


@pytest.fixture(scope="module")
def whole(small_engines: Path) -> EngineSet:
    """The small engine set with the bundle's own graphs; on a CPU the built step is two, rewritten for it."""
    engines, bundle = EngineSet.load(small_engines), Bundle.load(small_engines.parent / "bundle")
    graphs = {
        name: replace(engine, file=bundle.stages[name].file) for name, engine in engines.engines.items()
    }
    return replace(engines, folder=bundle.folder, files=bundle.files, engines=graphs)


@pytest.mark.parametrize("library", ["tensorrt 10.3.0", "tensorrt_rtx 1.7.1"])
def test_a_model_gives_the_bits_of_onnx_runtime(whole: EngineSet, tmp_path, monkeypatch, library) -> None:
    cpu = TextToVideo(whole, open_sessions(whole, 1))
    machine = Machine(monkeypatch, library)
    engines = machine.engines(whole, tmp_path / "engines")
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


def test_the_benchmark_finds_the_share_of_the_roofline(whole: EngineSet, tmp_path, monkeypatch) -> None:
    """The times of a simulated GPU mean nothing; operations, bytes and the board's peaks are real."""
    machine = Machine(monkeypatch)
    engines = machine.engines(whole, tmp_path / "engines")
    pipe = reelrt.load(engines.folder)
    board, bundle = boards()["rtx3060-laptop-6gb"], Bundle.load(whole.folder)
    monkeypatch.setattr(gpu, "REPEATS", 2)
    measured = gpu.measure(pipe, steps=2)
    found = gpu.roofline(pipe, bundle, board, measured)
    times = {
        "step": measured["graphs"]["launch_milliseconds"],
        "vae_decoder": measured["stage_milliseconds"]["vae_decoder"],
    }
    for name, milliseconds in times.items():
        stage = found[name]
        arithmetic = stage["flops"] / (0.5 * board.fp16_tflops * 1e9)  # FP32 engines
        memory = stage["bytes"] / (board.bandwidth_gbs * 1e6)
        assert stage["least_milliseconds"] == pytest.approx(max(arithmetic, memory))
        assert stage["share"] == pytest.approx(stage["least_milliseconds"] / milliseconds)
        assert 0 < stage["share"] < 1  # a CPU does the work
    assert machine.driver.violations == []


def test_the_benchmark_runs_a_bundle_by_a_provider_of_onnx_runtime(small_engines: Path) -> None:
    bundle = small_engines.parent / "bundle"
    found = gpu.by_onnxruntime(bundle, 2, provider=CPU)
    assert set(found["seconds"]) == {"text", "denoise", "decode"}
    if CUDA not in onnxruntime.get_available_providers():
        refused = gpu.by_onnxruntime(bundle, 2)
        assert "no CUDAExecutionProvider; it has " in refused["refused"]
