"""A graph's cost against sums done by hand: arithmetic, shapes, and what is alive at once."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from reelrt.bundle.spec import StageSpec, TensorSpec
from reelrt.engines.graph_cost import WORKSPACE_BYTES, Cost, graph_cost, sized_graph
from reelrt.engines.graph_shapes import tensor_shapes
from reelrt.errors import BackendError

SIZES = {"n": 2, "h": 6}


def model_of(text: str, **weights: tuple[int, ...]) -> onnx.ModelProto:
    graph = parser.parse_graph(text)
    for name, shape in weights.items():
        graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def spec_of(*shape: str | int) -> StageSpec:
    tensor = TensorSpec("float32", shape)
    return StageSpec("stage", {"x": tensor}, {"y": tensor}, 1e-4)


def cost_of(model: onnx.ModelProto, spec: StageSpec, precision: str = "fp32") -> Cost:
    return graph_cost(sized_graph(model, spec, SIZES), precision, "fp32")


def alive(cost: Cost) -> int:
    return cost.activation_bytes - WORKSPACE_BYTES


CONVOLUTIONS = """
g (float[n, 4, h, h] x) => (float[n, 4, h, h] y) {
  a = Conv <pads = [1, 1, 1, 1]> (x, w1)
  s = Sigmoid (a)
  b = Mul (a, s)
  c = Conv <pads = [1, 1, 1, 1]> (b, w2)
  d = Conv <pads = [1, 1, 1, 1]> (c, w3)
  y = Add (d, x)
}
"""
WEIGHTS = {"w1": (8, 4, 3, 3), "w2": (16, 8, 3, 3), "w3": (4, 16, 3, 3)}


def test_a_convolution_counts_two_operations_for_each_weight_and_output() -> None:
    cost = cost_of(model_of(CONVOLUTIONS, **WEIGHTS), spec_of("n", 4, "h", "h"))
    cells, pairs = 2 * 6 * 6, 8 * 4 * 9 + 16 * 8 * 9 + 4 * 16 * 9
    assert cost.flops == 2 * cells * pairs
    assert cost.weight_bytes == 4 * pairs
    assert cost.largest_weight_bytes == 4 * 16 * 8 * 9
    assert cost.boundary_bytes == 4 * 2 * (4 * cells)


def test_elementwise_operators_store_nothing_and_inputs_are_not_counted() -> None:
    cost = cost_of(model_of(CONVOLUTIONS, **WEIGHTS), spec_of("n", 4, "h", "h"))
    # b [8 channels] and c [16]; a and s are never stored, x and y are the caller's. While d is added to x,
    # c is read and b, freed one kernel late, is still there.
    assert alive(cost) == 4 * 2 * 6 * 6 * (8 + 16)


def test_half_precision_halves_weights_and_activations() -> None:
    model, spec = model_of(CONVOLUTIONS, **WEIGHTS), spec_of("n", 4, "h", "h")
    full, half = cost_of(model, spec), cost_of(model, spec, "fp16")
    assert (half.weight_bytes, alive(half)) == (full.weight_bytes / 2, alive(full) / 2)
    assert half.flops == full.flops
    assert half.boundary_bytes == full.boundary_bytes  # the state stays float32


@pytest.mark.parametrize("precision", ["int8", "int8-weights"])
def test_int8_weights_of_products_take_a_byte(precision: str) -> None:
    text = """g (float[n, h] x) => (float[n, 4] y) { a = MatMul (x, w) y = Add (a, b) }"""
    model = model_of(text, w=(6, 4), b=(4,))
    spec = StageSpec("s", {"x": TensorSpec("float32", ("n", "h"))}, {"y": TensorSpec("float32", ("n", 4))}, 1)
    assert cost_of(model, spec, precision).weight_bytes == 6 * 4 + 2 * 4


ATTENTION = """
g (float[n, h, 8] x) => (float[n, h, 8] y) <int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}> {
  q = MatMul (x, wq)
  k = MatMul (x, wk)
  v = MatMul (x, wv)
  q1 = Reshape (q, split)
  k1 = Reshape (k, split)
  v1 = Reshape (v, split)
  q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
  k2 = Transpose <perm = [0, 2, 3, 1]> (k1)
  v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
  scores = MatMul (q2, k2)
  shares = Softmax <axis = -1> (scores)
  mixed = MatMul (shares, v2)
  back = Transpose <perm = [0, 2, 1, 3]> (mixed)
  flat = Reshape (back, join)
  y = MatMul (flat, wo)
}
"""


def test_attention_stores_no_scores_and_counts_their_arithmetic() -> None:
    weights = dict.fromkeys(("wq", "wk", "wv", "wo"), (8, 8))
    sized = sized_graph(model_of(ATTENTION, **weights), spec_of("n", "h", 8), SIZES)
    kinds = [kernel.kinds for kernel in sized.kernels.order]
    assert kinds == [["MatMul"], ["MatMul"], ["MatMul"], ["Attention"], ["MatMul"]]
    cost, tokens = graph_cost(sized, "fp32", "fp32"), 2 * 6
    assert cost.flops == 2 * tokens * 8 * 8 * 4 + 2 * (2 * 6 * 6) * 8 * 2
    assert alive(cost) == 4 * tokens * 8 * 4  # q, k, v and the result; scores would be [2, 2, 6, 6] more


GATED = """
    g (float[n, h, 8] x) => (float[n, h, 8] y) {
      wide = MatMul (x, w1)
      biased = Add (wide, b1)
      value, gate = Split <axis = -1, num_outputs = 2> (biased)
      e = Sigmoid (gate)
      g1 = Mul (gate, e)
      product = Mul (value, g1)
      y = MatMul (product, w2)
    }
    """


def test_a_gated_layer_stores_each_half_once() -> None:
    cost = cost_of(model_of(GATED, w1=(8, 64), b1=(64,), w2=(32, 8)), spec_of("n", "h", 8))
    assert alive(cost) == 4 * (2 * 6) * (32 + 32)  # the gate, and the product made while multiplying


def test_a_gated_layer_of_a_huge_size_is_stored_whole() -> None:
    model = model_of(GATED, w1=(8, 64), b1=(64,), w2=(32, 8))
    for tokens, halves in ((2**22 - 1, 2), (2**22, 3)):  # 2**28 elements and one row less
        sized = sized_graph(model, spec_of("n", "h", 8), {"n": 1, "h": tokens})
        assert alive(graph_cost(sized, "fp16", "fp32")) == 2 * tokens * 32 * halves


def test_a_skip_connection_takes_its_place_in_the_whole_at_once() -> None:
    text = """
    g (float[n, 4, h, h] x) => (float[n, 4, h, h] y) {
      skip = Conv <pads = [1, 1, 1, 1]> (x, w1)
      small = Conv <strides = [2, 2]> (skip, w2)
      large = Conv <pads = [3, 3, 3, 3]> (small, w2)
      both = Concat <axis = 1> (large, skip)
      y = Conv <pads = [1, 1, 1, 1]> (both, w3)
    }
    """
    model = model_of(text, w1=(8, 4, 3, 3), w2=(8, 8, 3, 3), w3=(4, 16, 3, 3))
    sized = sized_graph(model, spec_of("n", 4, "h", "h"), {"n": 1, "h": 6})
    assert [kernel.kinds for kernel in sized.kernels.order] == [["Conv"]] * 4
    assert sized.kernels.order[0].writes == {"both"}
    kept = 16 * 36 + 8 * 4  # the whole [16, 6, 6] is there beside the small one [8, 2, 2]
    assert alive(graph_cost(sized, "fp32", "fp32")) >= 4 * kept


def test_shapes_that_a_graph_computes_are_followed() -> None:
    text = """
    g (float[n, 4, h, h] x) => (float[n, 4, h, h] y)
    <int64[1] zero = {0}, int64[1] two = {2}, int64[1] minus = {-1}, int64[1] heads = {2}> {
      all = Shape (x)
      batch = Slice (all, zero, heads)
      flat = Concat <axis = 0> (batch, minus)
      a = Reshape (x, flat)
      product = ReduceProd <keepdims = 1> (all)
      halves = Div (product, two)
      rest = Concat <axis = 0> (two, halves)
      c = Reshape (a, rest)
      y = Reshape (c, all)
    }
    """
    found = tensor_shapes(model_of(text), spec_of("n", 4, "h", "h"), SIZES)
    assert (found["a"].shape, found["c"].shape) == ((2, 4, 36), (2, 144))
    assert found["flat"].constant


def test_a_shape_that_values_decide_is_refused_by_name() -> None:
    text = """g (float[n, h] x) => (int64[2, m] y) { y = NonZero (x) }"""
    with pytest.raises(BackendError, match=r"shape of y \(NonZero\) is not known"):
        tensor_shapes(model_of(text), spec_of("n", "h"), SIZES)
