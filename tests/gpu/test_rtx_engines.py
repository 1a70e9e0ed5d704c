"""Engines built for the GPU at hand open there and agree with ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reelrt.bundle.manifest import EngineSet
from reelrt.engines.builder import build_engines
from reelrt.runtime.session import open_sessions
from tests.models import small_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def sets(rtx_gpu, tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineSet, EngineSet]:
    from reelrt.export.exporter import export_bundle

    folder = tmp_path_factory.mktemp("gpu")
    bundle = export_bundle(small_model(folder / "model"), folder / "bundle")
    cpu = build_engines(bundle, folder / "cpu", backend="onnxruntime")
    return cpu, build_engines(bundle, folder / "rtx", backend="tensorrt_rtx", precision="fp32")


def run_on_gpu(file: Path, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import polygraphy.config

    polygraphy.config.USE_TENSORRT_RTX = True
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    with TrtRunner(EngineFromBytes(BytesFromPath(str(file)))) as runner:
        return {name: np.array(value) for name, value in runner.infer(feed).items()}


@pytest.mark.parametrize("stage", ["text_encoder", "step", "vae_decoder"])
def test_a_stage_gives_on_the_gpu_what_it_gives_on_the_cpu(sets, stage: str) -> None:
    cpu, rtx = sets
    engine = rtx.engines[stage]
    sizes = {axis: extent.opt for axis, extent in engine.profile.items()}
    rng = np.random.default_rng(0)
    feed = {}
    for name, tensor in engine.spec.inputs.items():
        dtype, shape = tensor.numpy_dtype(engine.precision), tensor.shape(sizes)
        whole = np.issubdtype(dtype, np.integer)
        feed[name] = np.zeros(shape, dtype) if whole else 0.5 * rng.standard_normal(shape).astype(dtype)
    wanted = open_sessions(cpu).run(stage, feed)
    found = run_on_gpu(rtx.folder / engine.file, feed)
    for name, value in wanted.items():
        difference = np.abs(found[name].astype(np.float64) - value).max()
        allowed = 2 if value.dtype == np.uint8 else 1e-2 * max(float(np.abs(value).max()), 1.0)
        assert difference <= allowed, f"{stage}.{name} differs by {difference}"
