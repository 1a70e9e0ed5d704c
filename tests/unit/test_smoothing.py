"""Smoothing moves large channels into the weights, out of a normalization before them if there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from reelrt.calibration.layers import find_layers
from reelrt.calibration.smoothing import Smoothing, candidates, channel_peaks, check_alpha, write_smoothed
from reelrt.errors import InputError

GRAPH = """
<ir_version: 9, opset_import: ["" : 19]>
attention (float[batch, 8] x) => (float[batch, 4] first, float[batch, 4] second, float[batch, 4] third)
{
  even = LayerNormalization (x, gamma, beta)
  first = MatMul (even, one)
  second = MatMul (even, two)
  warm = Relu (x)
  third = MatMul (warm, three)
}
"""
RANDOM = np.random.default_rng(0)
FEED = {"x": RANDOM.standard_normal((16, 8)).astype(np.float32)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = parser.parse_model(GRAPH)
    shapes = {"gamma": (8,), "beta": (8,), "one": (8, 4), "two": (8, 4), "three": (8, 4)}
    for name, shape in shapes.items():
        values = RANDOM.standard_normal(shape).astype(np.float32)
        values *= 50 if name == "gamma" else 1
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    for node in model.graph.node:
        node.name = f"make.{node.output[0]}"
    onnx.save(model, tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


def test_the_graph_computes_the_same_and_a_normalization_takes_the_scale(source, tmp_path):
    layers = find_layers(onnx.load(source).graph)
    able = candidates(onnx.load(source).graph, layers)
    assert [layer.nodes for layer in able] == [("make.first", "make.second"), ("make.third",)]
    peaks = channel_peaks(source, able, lambda: iter([FEED]))
    target = write_smoothed(source, tmp_path / "smooth.onnx", able, peaks, 0.5)
    before, after = (ReferenceEvaluator(onnx.load(path)).run(None, FEED) for path in (source, target))
    for want, have in zip(before, after, strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)
    added = [node.op_type for node in onnx.load(target).graph.node if node.op_type == "Mul"]
    assert len(added) == 1, "the one that no normalization feeds"
    even = channel_peaks(target, able, lambda: iter([FEED]))
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(target).graph.initializer}
    largest = np.abs(np.concatenate([weights["one"], weights["two"]], axis=1)).max(1)
    np.testing.assert_allclose(even["one"], largest, rtol=1e-4)  # at 0.5 both are sqrt(x * w)


def test_it_is_used_where_it_pays():
    found = Smoothing(0.5, {"a": 0.1, "b": 0.1, "c": 0.1}, {"a": 0.09, "b": 0.099, "c": 0.2})
    assert found.used == ["a"]
    assert found.document()["layers"]["c"] == {"without": 0.1, "with": 0.2, "used": False}


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_impossible_alpha_is_refused(alpha):
    with pytest.raises(InputError, match="smooth .* is not possible"):
        check_alpha(alpha)
