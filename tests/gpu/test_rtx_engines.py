"""Stages built for the GPU at hand open there and agree with ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from reelrt.runtime.session import open_sessions

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.mark.parametrize("stage", ["text_encoder", "vae_decoder"])
@pytest.mark.parametrize("backend", ["tensorrt_rtx", "tensorrt"])
def test_a_stage_gives_on_the_gpu_what_it_gives_on_the_cpu(sets, backend: str, stage: str) -> None:
    engines = sets.of(backend, "fp32")
    engine = engines.engines[stage]
    sizes = {axis: extent.opt for axis, extent in engine.profile.items()}
    rng = np.random.default_rng(0)
    feed = {}
    for name, tensor in engine.spec.inputs.items():
        dtype, shape = tensor.numpy_dtype(engine.precision), tensor.shape(sizes)
        whole = np.issubdtype(dtype, np.integer)
        feed[name] = np.zeros(shape, dtype) if whole else 0.5 * rng.standard_normal(shape).astype(dtype)
    wanted, found = open_sessions(sets.cpu).run(stage, feed), open_sessions(engines).run(stage, feed)
    for name, value in wanted.items():
        difference = np.abs(found[name].astype(np.float64) - value).max()
        allowed = 2 if value.dtype == np.uint8 else 1e-2 * max(float(np.abs(value).max()), 1.0)
        assert difference <= allowed, f"{stage}.{name} differs by {difference}"
