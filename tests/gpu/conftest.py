"""Everything here needs an NVIDIA GPU; where there is none it is skipped, and says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reelrt.bundle.manifest import EngineSet
from reelrt.engines.backends import RTX_CAPABILITIES, choose, installed
from reelrt.engines.builder import build_engines
from reelrt.errors import InputError
from reelrt.jetson.device import Gpu, detect
from tests.commands import reelrt
from tests.models import small_model

PROMPTS = ["a red circle moving right", "the blue square growing", "one white cross turning"]
SIZES: dict[str, Any] = {"size": (64, 64), "frames": 16, "batch": 3}


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    """The machine's GPU."""
    found = detect()
    if found.gpu is None:
        pytest.skip(f"this machine has {found.gpu_fault or 'no NVIDIA GPU, or no driver for it'}")
    return found.gpu


@pytest.fixture(scope="session")
def rtx_gpu(gpu: Gpu) -> Gpu:
    """The machine's GPU, of a kind that TensorRT-RTX supports."""
    if gpu.compute_capability not in RTX_CAPABILITIES:
        pytest.skip(f"TensorRT-RTX does not support {gpu.name} (compute capability {gpu.compute_capability})")
    return gpu


@dataclass(frozen=True)
class Sets:
    """Engine sets of one small model, built when first asked for."""

    folder: Path
    cpu: EngineSet
    gpu: Gpu

    def of(self, backend: str, precision: str, weight_streaming: bool = False) -> EngineSet:
        """An engine set of a GPU backend; skipped for a card it does not support, not when a build fails."""
        if not installed(backend):
            pytest.skip(f"{backend} is not installed")
        try:
            choose(backend, "host", detect())
        except InputError as error:  # a card that this library does not support
            pytest.skip(f"{backend} builds nothing for {self.gpu.name}: {error.message}")
        return self._build(backend, precision, weight_streaming)

    def reference(self, precision: str) -> EngineSet:
        """The ONNX Runtime engines to compare with: FP32, or of the same INT8 graph."""
        return self._build("onnxruntime", precision) if precision == "int8" else self.cpu

    def _build(self, backend: str, precision: str, weight_streaming: bool = False) -> EngineSet:
        return build_engines(
            self._int8() if precision == "int8" else self.folder / "bundle",
            self.folder / f"{backend}-{precision}{'-streamed' * weight_streaming}",
            backend=backend,
            precision=None if precision == "int8" else precision,
            weight_streaming=weight_streaming,
            quality_gate=False,  # the model is random; its quality means nothing
            **SIZES,
        )

    def _int8(self) -> Path:
        """The bundle, calibrated on a few prompts."""
        output = self.folder / "int8"
        if not output.exists():
            pytest.importorskip(
                "modelopt", reason="calibrating needs ModelOpt: pip install 'reelrt[calibration]'"
            )
            (self.folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
            command = ("calibrate", "bundle", "-o", "int8", "--precision", "int8", "--prompts", "prompts.txt")
            done = reelrt(*command, "--steps", 4, "--samples", 4, folder=self.folder)
            assert done.returncode == 0, done.stderr
        return output


@pytest.fixture(scope="session")
def sets(gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Sets:
    """A small model's bundle and its ONNX Runtime engines, and what builds the others."""
    from reelrt.export.exporter import export_bundle

    folder = tmp_path_factory.mktemp("gpu")
    export_bundle(small_model(folder / "model"), folder / "bundle")
    return Sets(folder, build_engines(folder / "bundle", folder / "cpu", backend="onnxruntime", **SIZES), gpu)
