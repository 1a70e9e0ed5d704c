"""A graph with INT8 weights computes nearly the same, and is a fraction of the size."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser

from reelrt.bundle.manifest import Bundle
from reelrt.bundle.spec import StageSpec, TensorSpec
from reelrt.engines.precision import convert
from reelrt.engines.weight_only import MIN_WEIGHT, quantize_weights, quantized
from reelrt.errors import BackendError
from tests.graphs import tiny_bundle
from tests.unit.test_engines_precision import run

GRAPH = """
net (float[batch, 64, h, w] x, float[batch, 8, 64] y) => (float[batch, 96, h, w] z, float[batch, 8, 64] v)
{
  z = Conv <pads = [1, 1, 1, 1]> (x, kernel)
  projected = MatMul (y, matrix)
  flat = Reshape (projected, rows)
  general = Gemm <transB = 1> (flat, transposed)
  back = Reshape (general, shape)
  table = Gather (embedding, index)
  small = MatMul (table, little)
  summed = Add (back, small)
  v = Identity (summed)
}
"""


SPEC = StageSpec(
    "net",
    inputs={
        "x": TensorSpec("float32", ("batch", 64, "h", "w")),
        "y": TensorSpec("float32", ("batch", 8, 64)),
    },
    outputs={
        "z": TensorSpec("float32", ("batch", 96, "h", "w")),
        "v": TensorSpec("float32", ("batch", 8, 64)),
    },
    tolerance=1e-4,
)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """Every kind of weight; channels of a weight differ in size by a factor of a hundred."""
    rng = np.random.default_rng(0)
    model = onnx.helper.make_model(
        parser.parse_graph(GRAPH), opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9
    )
    sizes = np.logspace(-1, 1, 96, dtype=np.float32)
    weights = {
        "kernel": rng.standard_normal((96, 64, 3, 3), np.float32) * sizes[:, None, None, None],
        "matrix": rng.standard_normal((64, 96), np.float32) * sizes,
        "transposed": rng.standard_normal((64, 96), np.float32),
        "embedding": rng.standard_normal((128, 64), np.float32),
        "little": rng.standard_normal((64, 64), np.float32)[:, :1],
    }
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    for name, values in {"rows": [-1, 96], "shape": [-1, 8, 64], "index": [3]}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    path = tmp_path_factory.mktemp("graph") / "net.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="net.onnx.data", size_threshold=64)
    return path


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 64, 5, 7)), rng.standard_normal((2, 8, 64))
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def types(path):
    return {t.name: t.data_type for t in onnx.load(str(path), load_external_data=False).graph.initializer}


def test_the_result_is_close_in_every_channel(graph, inputs, tmp_path):
    small = quantize_weights(graph, tmp_path / "int8.onnx", SPEC)
    onnx.checker.check_model(str(small), full_check=True)
    (conv, rest), (wanted, wanted_rest) = run(small, inputs), run(graph, inputs)
    for channel in range(96):  # one scale for all would lose the small channels
        found, want = conv[:, channel], wanted[:, channel]
        assert np.abs(found - want).max() < 0.02 * np.abs(want).max()
    assert 0 < np.abs(rest - wanted_rest).max() < 0.02 * np.abs(wanted_rest).max()


def test_only_large_weights_of_multiplications_are_int8(graph, tmp_path):
    small = quantize_weights(graph, tmp_path / "int8.onnx", SPEC)
    found = types(small)
    for name in ("kernel", "matrix", "transposed"):
        assert found[f"{name}.int8"] == TensorProto.INT8
        assert name not in found
    assert found["embedding"] == found["little"] == TensorProto.FLOAT
    was, now = (path.with_name(f"{path.name}.data").stat().st_size for path in (graph, small))
    assert now < 0.45 * was  # the embedding keeps its size


def test_fp16_keeps_its_type_and_may_come_after(graph, inputs, tmp_path):
    """From FP32 to INT8 and then FP16, or the other way round: a network in FP16 with INT8 weights."""
    (wanted, _) = run(graph, inputs)
    one = quantize_weights(convert(graph, tmp_path / "half.onnx", SPEC), tmp_path / "half-int8.onnx", SPEC)
    other = convert(quantize_weights(graph, tmp_path / "int8.onnx", SPEC), tmp_path / "int8-half.onnx", SPEC)
    for path in (one, other):
        kinds = types(path)
        assert kinds["kernel.int8"] == TensorProto.INT8
        assert kinds["kernel.scale"] == TensorProto.FLOAT16
        (found, _) = run(path, inputs)
        assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_no_value_is_off_by_more_than_half_a_unit(dtype):
    values = np.random.default_rng(0).standard_normal((7, 3, 5)).astype(dtype)
    values[2] = 0
    values[3] *= 1e-4
    for axis in range(3):
        counts, scales = quantized(values, axis, "w")
        assert counts.shape == values.shape
        assert scales.dtype == dtype
        shape = [1, 1, 1]
        shape[axis] = -1
        units = scales.astype(np.float32).reshape(shape)
        error = np.abs(counts * units - values.astype(np.float32)) / units
        assert error.max() <= 0.501
    counts, _ = quantized(values, 0, "w")
    largest = np.abs(counts).max(axis=(1, 2))
    assert (np.delete(largest, 2) >= 120).all()  # all levels are used, also below FP16's normal numbers
    assert largest[2] == 0


def test_a_weight_that_is_not_finite_is_refused():
    values = np.ones((4, 4), np.float32)
    values[1, 1] = np.inf
    with pytest.raises(BackendError, match="weight proj is not finite"):
        quantized(values, 0, "proj")


def test_a_graph_without_large_weights_computes_the_same(tmp_path):
    bundle = Bundle.load(tiny_bundle(tmp_path / "bundle"))
    stage = bundle.stages["text_encoder"]
    assert MIN_WEIGHT > 32 * 32
    full = bundle.folder / stage.file
    small = quantize_weights(full, tmp_path / "int8.onnx", stage.spec)
    tokens = {"tokens": np.random.default_rng(0).integers(0, 64, (2, 8))}
    np.testing.assert_array_equal(run(small, tokens)[0], run(full, tokens)[0])
