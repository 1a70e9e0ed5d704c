"""An FP16 graph computes what the FP32 one does, and keeps FP32 where precision matters."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

from reelrt.bundle.manifest import Bundle
from reelrt.engines.casts import cast_last
from reelrt.engines.precision import convert
from reelrt.errors import BackendError
from tests.graphs import GEOMETRY, tiny_bundle

SIZES = {"batch": 2, "rows": 3, "frames": 3, "height": 4, "width": 2}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return Bundle.load(tiny_bundle(tmp_path_factory.mktemp("precision") / "bundle"))


@pytest.fixture(scope="module")
def halves(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    return {
        name: convert(bundle.folder / stage.file, folder / stage.file, stage.spec)
        for name, stage in bundle.stages.items()
    }


def feed(spec, precision):
    rng = np.random.default_rng(0)
    inputs = {}
    for name, tensor in spec.inputs.items():
        shape, dtype = tensor.shape(SIZES), tensor.numpy_dtype(precision)
        inputs[name] = rng.standard_normal(shape).astype(np.float16).astype(dtype)
    if "tokens" in inputs:
        inputs["tokens"] = rng.integers(0, 64, inputs["tokens"].shape)
    if "table" in inputs:
        inputs["table"][..., :3] = 999, 0.9, 1
        inputs["step"] = np.array([0, 2])
    return inputs


def run(path, inputs):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, inputs)


@pytest.mark.parametrize("name", ["text_encoder", "step", "vae_decoder"])
def test_fp16_agrees_with_fp32(bundle, halves, name):
    stage = bundle.stages[name]
    wanted = run(bundle.folder / stage.file, feed(stage.spec, "fp32"))
    found = run(halves[name], feed(stage.spec, "fp16"))
    for (output, tensor), want, have in zip(stage.spec.outputs.items(), wanted, found, strict=True):
        assert have.dtype == tensor.numpy_dtype("fp16"), output
        if output == "step_next":
            np.testing.assert_array_equal(have, want)
            continue
        atol = 2 if have.dtype == np.uint8 else 3e-3 * np.abs(want).max()
        np.testing.assert_allclose(have.astype(np.float64), want.astype(np.float64), rtol=0, atol=atol)
        assert np.abs(want.astype(np.float64)).max() > 0.1


def test_only_the_network_is_fp16(halves):
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(halves["step"]))).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    for name in ("inner", "warm", "active", "output", "projected"):
        assert types[name] == TensorProto.FLOAT16, name
    for name in ("row", "matrix", "mixed", "time", "angle", "wave", "scaled"):
        assert types[name] == TensorProto.FLOAT, name


def test_what_a_row_only_copies_stays_exact(bundle, halves):
    stage = bundle.stages["step"]
    inputs = feed(stage.spec, "fp32")
    inputs["table"][..., 3:] = 0
    inputs["table"][..., 3] = 1  # the newest row is kept as it is
    half = {**inputs, "text": inputs["text"].astype(np.float16)}
    (state, _) = run(halves["step"], half)
    np.testing.assert_array_equal(state[:, 0], inputs["state"][:, 0])


def test_weights_are_halved_and_external(bundle, halves):
    for name, stage in bundle.stages.items():
        data = halves[name].with_name(f"{halves[name].name}.data")
        inside = onnx.load(str(halves[name]), load_external_data=False)
        floats = [t for t in inside.graph.initializer if t.data_type == TensorProto.FLOAT]
        assert sum(int(np.prod(t.dims)) for t in floats) < 20, f"{name} keeps FP32 weights"
        assert data.stat().st_size <= stage.weight_bytes


def test_a_mask_of_minus_infinity_becomes_the_lowest_number(tmp_path, bundle):
    spec = bundle.stages["text_encoder"].spec
    model = onnx.load(str(bundle.folder / "text_encoder.onnx"))
    low = np.full((8, 32), -3.4e38, np.float32)
    low[:, 16:] = 0
    for tensor in model.graph.initializer:
        if tensor.name == "position":
            tensor.CopyFrom(numpy_helper.from_array(low, "position"))
    onnx.save(model, str(tmp_path / "masked.onnx"))
    half = onnx.load(str(convert(tmp_path / "masked.onnx", tmp_path / "half.onnx", spec)))
    values = {t.name: numpy_helper.to_array(t) for t in half.graph.initializer}
    assert values["position"].min() == -65504


def test_a_weight_that_is_no_number_is_refused(tmp_path, bundle):
    model = onnx.load(str(bundle.folder / "text_encoder.onnx"))
    for tensor in model.graph.initializer:
        if tensor.name == "projection":
            tensor.CopyFrom(numpy_helper.from_array(np.full((32, 32), np.nan, np.float32), "projection"))
    onnx.save(model, str(tmp_path / "nan.onnx"))
    with pytest.raises(BackendError, match="projection is not a number"):
        convert(tmp_path / "nan.onnx", tmp_path / "half.onnx", bundle.stages["text_encoder"].spec)


def test_the_uint8_cast_moves_to_the_end(tmp_path, bundle):
    spec = bundle.stages["vae_decoder"].spec
    model = onnx.load(str(bundle.folder / "vae_decoder.onnx"))
    transpose, cast = model.graph.node[-2:]
    cast.input[0], cast.output[0] = transpose.input[0], "early"
    transpose.input[0], transpose.output[0] = "early", "frames"
    del model.graph.node[-2:]
    model.graph.node.extend([cast, transpose])
    early, scratch = tmp_path / "early.onnx", tmp_path / "scratch"
    scratch.mkdir()
    onnx.save(model, str(early), save_as_external_data=True, location="early.data", size_threshold=64)
    moved = cast_last(early, scratch, spec)
    assert onnx.load(str(moved)).graph.node[-1].op_type == "Cast"
    inputs = feed(spec, "fp32")
    np.testing.assert_array_equal(run(moved, inputs)[0], run(early, inputs)[0])
    assert GEOMETRY.spatial_scale * SIZES["height"] == run(moved, inputs)[0].shape[2]
    assert cast_last(bundle.folder / "vae_decoder.onnx", scratch, spec) == bundle.folder / "vae_decoder.onnx"
