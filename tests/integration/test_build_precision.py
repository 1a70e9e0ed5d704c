"""FP16 engines of an exported model agree with its FP32 graphs, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from reelrt.bundle.manifest import Bundle, EngineSet
from reelrt.engines.builder import build_engines

pytestmark = pytest.mark.timeout(600)
SIZES = {"batch": 1, "frames": 3, "height": 6, "width": 4}


@pytest.fixture(scope="module")
def pair(small_engines: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, EngineSet]:
    bundle = Bundle.load(small_engines.parent / "bundle")
    output = tmp_path_factory.mktemp("fp16") / "engines"
    return bundle, build_engines(bundle, output, backend="onnxruntime", precision="fp16")


def run(path: Path, inputs):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, inputs)


@pytest.mark.parametrize("name", ["text_encoder", "step", "vae_decoder"])
def test_fp16_agrees_with_fp32(pair, name):
    bundle, engines = pair
    stage, engine = bundle.stages[name], engines.engines[name]
    geometry, rng = bundle.pipeline.geometry, np.random.default_rng(0)
    table = bundle.schedules.get("ddim", 10).table(7.5, bundle.pipeline.cfg, geometry.state_rows)
    inputs = {}
    for key, tensor in stage.spec.inputs.items():
        shape = tensor.shape({**SIZES, "rows": len(table)})
        inputs[key] = rng.standard_normal(shape).astype(tensor.numpy_dtype("fp32"))
    fixed = {"table": table[None], "step": np.array([5]), "tokens": rng.integers(1, 99, (1, geometry.tokens))}
    inputs.update({key: value for key, value in fixed.items() if key in inputs})
    half = {k: v.astype(engine.spec.inputs[k].numpy_dtype("fp16")) for k, v in inputs.items()}
    wanted, found = run(bundle.folder / stage.file, inputs), run(engines.folder / engine.file, half)
    for (output, tensor), want, have in zip(stage.spec.outputs.items(), wanted, found, strict=True):
        assert have.dtype == tensor.numpy_dtype("fp16"), output
        allowed = 6 if want.dtype == np.uint8 else 1e-2 * np.abs(want).max()
        assert np.abs(have.astype(np.float64) - want.astype(np.float64)).max() <= allowed, output
