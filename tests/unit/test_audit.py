"""What the FP16 audit sees in small graphs: large sums, lost weights, masks, numbers that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from reelrt.bundle.manifest import Bundle
from reelrt.calibration.audit import Audit, Feed, audit_stage
from reelrt.errors import CalibrationError
from tests.graphs import quantised, tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return Bundle.load(tiny_bundle(tmp_path_factory.mktemp("audit") / "bundle"))


def audited(bundle: Bundle, folder: Path, **changes) -> Audit:
    """The audit of a text encoder with other weights: name to a function of the old ones."""
    model = onnx.load(str(bundle.folder / "text_encoder.onnx"))
    for tensor in model.graph.initializer:
        if tensor.name in changes:
            values = changes[tensor.name](numpy_helper.to_array(tensor)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path = folder / "text_encoder.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="weights.data", size_threshold=64)
    feeds = [Feed({"tokens": np.arange(8)[None] + start}, f"prompt {start}") for start in (0, 8)]
    return audit_stage(path, bundle.stages["text_encoder"], feeds)


def reasons(audit: Audit) -> dict[str, tuple[str, ...]]:
    return {layer.name: layer.reasons for layer in audit.layers if layer.reasons}


def test_a_healthy_graph_keeps_nothing(bundle, tmp_path):
    audit = audited(bundle, tmp_path)
    assert audit.keep == ()
    assert {layer.operator for layer in audit.layers} == {"Add", "MatMul", "LayerNormalization"}
    assert {layer.kind for layer in audit.layers} == {"elementwise", "linear", "normalization"}
    for layer in audit.layers:
        assert 1e-5 < layer.error < 1e-3
        assert layer.largest_at["prompt"] in ("prompt 0", "prompt 8")
    assert 1e-5 < audit.outputs["text"]["error"] < 2e-3
    assert audit.samples == 2


def test_the_largest_value_is_the_real_one(bundle, tmp_path):
    (layer,) = (each for each in audited(bundle, tmp_path).layers if each.operator == "MatMul")
    model = onnx.load(str(bundle.folder / "text_encoder.onnx"))
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    values = [
        np.abs((weights["embedding"][start : start + 8] + weights["position"]) @ weights["projection"]).max()
        for start in (0, 8)
    ]
    assert layer.largest == pytest.approx(max(values), rel=1e-5)
    assert layer.largest_at["prompt"] == f"prompt {8 * int(np.argmax(values))}"


def test_a_variance_beyond_fp16_inside_a_norm_is_found(bundle, tmp_path):
    audit = audited(bundle, tmp_path, projection=lambda values: values * 1500)
    assert reasons(audit) == {"text": ("a sum inside is too large",)}
    (norm,) = (layer for layer in audit.layers if layer.reasons)
    assert norm.inner > 65504 / 4
    assert norm.largest < 100


def test_weights_that_vanish_in_fp16_are_found(bundle, tmp_path):
    audit = audited(bundle, tmp_path, projection=lambda values: values * 1e-7)
    assert "it loses too much" in reasons(audit)["projected"]


def test_values_near_the_limit_keep_a_factor_of_four(bundle, tmp_path):
    audit = audited(bundle, tmp_path, embedding=lambda values: values / np.abs(values).max() * 30000)
    kept = reasons(audit)
    assert "its output is too large" in kept["positioned"]
    assert "its input is too large" in kept["projected"]
    assert "embedded" not in {layer.name for layer in audit.layers if not layer.reasons}


def test_a_weight_beyond_fp16_is_found(bundle, tmp_path):
    audit = audited(bundle, tmp_path, norm_bias=lambda values: values + 1e5)
    assert "a weight is beyond FP16" in reasons(audit)["text"]


def test_a_mask_is_no_overflow(bundle, tmp_path):
    def mask(values: np.ndarray) -> np.ndarray:
        values = np.zeros_like(values)
        values[0, 0] = -3.4e38
        return values

    audit = audited(bundle, tmp_path, norm_bias=lambda values: mask(values[None])[0])
    assert audit.keep == ()


def test_a_weight_that_is_no_number_is_an_error(bundle, tmp_path):
    with pytest.raises(CalibrationError, match="weight projection is not a number"):
        audited(bundle, tmp_path, projection=lambda values: values * np.nan)


def test_what_overflows_in_fp32_is_an_error_with_layer_and_prompt(bundle, tmp_path):
    with pytest.raises(CalibrationError, match=r"layer projected of .* not finite in FP32 .* 'prompt 0'"):
        audited(bundle, tmp_path, projection=lambda v: v * 1e29, embedding=lambda v: v * 1e15)


def test_a_quantised_graph_is_audited_with_its_scales(bundle, tmp_path):
    whole = quantised(bundle, tmp_path / "bundle", ["projection"], stage="text_encoder")
    feeds = [Feed({"tokens": np.arange(8)[None]}, "a prompt")]
    path, stage = whole.folder / "text_encoder.onnx", whole.stages["text_encoder"]
    audit = audit_stage(path, stage, feeds, error=0.05)
    assert audit.keep == ()
    assert {"projection_dq", "positioned_dq"} <= {layer.name for layer in audit.layers}
