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


PIECES = """
g (float[n, h, 8] x) => (float[n, h, 8] y)
<int64[2] flat = {-1, 8}, int64[1] one = {1}, int64[1] none = {0}> {
  t = MatMul (x, w)
  norm = LayerNormalization <axis = -1> (t, scale, shift)
  rows = Reshape (norm, flat)
  p0, p1 = Split <axis = 0, num_outputs = 2> (rows)
  g0 = MatMul (p0, w1)
  o0 = MatMul (g0, w2)
  row = Slice (o0, none, one, none)
  sum = ReduceSum <keepdims = 1> (row)
  zero = Clip (sum, nought, nought)
  p2 = Add (p1, zero)
  g1 = MatMul (p2, w1)
  o1 = MatMul (g1, w2)
  both = Concat <axis = 0> (o0, o1)
  shape = Shape (t)
  back = Reshape (both, shape)
  out = Add (t, back)
  y = MatMul (out, w)
}
"""
NORM = {"w": (8, 8), "scale": (8,), "shift": (8,)}


@pytest.mark.parametrize(("precision", "item"), [("fp32", 4), ("fp16", 2)])
def test_a_norm_whose_rows_are_split_is_kept_in_fp32_until_then(precision: str, item: int) -> None:
    weights = {**NORM, "w1": (8, 32), "w2": (32, 8), "nought": ()}
    cost = cost_of(model_of(PIECES, **weights), spec_of("n", "h", 8), precision)
    rows = 2 * 6 * 8
    # While the first piece's 32 values per row are made: t, the pieces, half of the rows four times as wide,
    # and the norm, which its reader has only just left. Nothing of the second piece.
    assert alive(cost) == rows * (item * (1 + 1 + 4 / 2) + 4)


@pytest.mark.parametrize("chained", [True, False])
def test_pieces_that_wait_for_each_other_share_the_memory_of_their_hidden_values(chained: bool) -> None:
    text = PIECES if chained else PIECES.replace("g1 = MatMul (p2, w1)", "g1 = MatMul (p1, w1)")
    weights = {**NORM, "w1": (8, 128), "w2": (128, 8), "nought": ()}
    cost, rows = cost_of(model_of(text, **weights), spec_of("n", "h", 8)), 2 * 6 * 8
    hidden = 4 * rows * 16 / 2
    assert (alive(cost) > 2 * hidden) is not chained


TOKENS = """
g (float[n, 8, h] x) => (float[n, h, 8] y) <int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}> {
  cells = Transpose <perm = [0, 2, 1]> (x)
  t0 = MatMul (cells, w)
  t = Add (t0, shift)
  norm = LayerNormalization <axis = -1> (t, scale, shift)
  q = MatMul (norm, w)
  k = MatMul (norm, w)
  v = MatMul (norm, w)
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
  out = MatMul (flat, w)
  y = Add (out, t)
}
"""


@pytest.mark.parametrize(("precision", "item"), [("fp32", 4), ("fp16", 2)])
def test_tokens_are_reordered_after_the_norm_and_again_for_the_residual(precision: str, item: int) -> None:
    spec = StageSpec(
        "s", {"x": TensorSpec("float32", ("n", 8, "h"))}, {"y": TensorSpec("float32", ("n", "h", 8))}, 1
    )
    sized = sized_graph(model_of(TOKENS, **NORM), spec, SIZES)
    assert [kernel.kinds for kernel in sized.kernels.order] == [
        ["Transpose"],
        ["MatMul", "Add"],
        ["LayerNormalization"],
        ["Transpose"],
        *[["MatMul"]] * 3,
        ["Attention"],
        ["Transpose"],
        ["MatMul", "Add"],
    ]
    # The residual's copy waits for t alone, so it shares memory with nothing in between: cells, t, the norm
    # reordered, q, k, v and what attention gives, beside the norm in FP32.
    assert alive(graph_cost(sized, precision, "fp32")) == 2 * 6 * 8 * (item * (1 + 1 + 1 + 3 + 1 + 1) + 4)


def test_a_norm_that_is_not_moved_stays_one_kernel() -> None:
    sized = sized_graph(
        model_of(
            TOKENS.replace("MatMul (cells, w)", "Conv (x, taps)").replace(
                "Add (t0, shift)", "Transpose <perm = [0, 2, 1]> (t0)"
            ),
            **NORM,
            taps=(8, 8, 1),
        ),
        StageSpec(
            "s", {"x": TensorSpec("float32", ("n", 8, "h"))}, {"y": TensorSpec("float32", ("n", "h", 8))}, 1
        ),
        SIZES,
    )
    assert not sized.kernels.copies


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
