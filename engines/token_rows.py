"""A graph's transformers rewritten for ONNX Runtime's CPU kernels: the same arithmetic, less moving.

What a bundle holds suits every backend: tokens [N, T, D], and attention as MatMul, Softmax and
Transpose. On a CPU the tokens become the rows of one matrix here, ordered so that the tokens which
attend to each other come first, [T * N, D]:

- A projection with a bias is one Gemm; ONNX Runtime has none for three dimensions.
- FusedMatMul reads queries, keys and values [T, N, heads, d] as they lie, so three of an
  attention's four transposes go.
- The frames of a video become rows by one transpose instead of two.
- Sums move into products: a factor and an offset per channel before the first projection into its
  weights, and what the feed-forward layer adds to the tokens into the last projection.

Any other factor and offset per channel, after a group normalisation, are one pass instead of two.

A transformer with anything else in it (quantised, computed in pieces) stays as it is. Where several
videos would share a batch the rows of one could not be told from another's, so a graph that was
rewritten takes one video at a time. Knows no files.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from reelrt.engines.token_regions import (
    Attention,
    Node,
    Region,
    Value,
    constant,
    depth,
    is_a,
    only_user,
    rank_of,
    regions,
)

MICROSOFT = "com.microsoft"


class Affine(NamedTuple):
    """A factor and an offset per channel after a group normalisation.

    Attributes:
        normalised: What they are applied to, [N, C, ...].
        gain: Factors [C].
        offset: Offsets [C].
    """

    normalised: Value
    gain: npt.NDArray[Any]
    offset: npt.NDArray[Any]


def rewrite(graph: ir.Graph, batch: str | None = None) -> int:
    """Rewrite the transformers of a graph, and its normalisations.

    Args:
        graph: In FP32; changed in place. The nodes that nobody uses afterwards are still there, and
            the new ones stand at its end.
        batch: Name of its batch axis, which is 1 from now on; None where it has none.

    Returns:
        How many transformers were rewritten.
    """
    found = regions(graph, batch)
    for region in found:
        _Rows(graph, region).rewrite()
    for node in list(graph):
        _join_affine(graph, node)
    if batch is not None and found:
        for value in (*graph.inputs, *graph.outputs):
            if value.shape is not None:
                value.shape = ir.Shape([1 if str(size) == batch else size for size in value.shape])
    return len(found)


class _Rows:
    """Writes a region anew.

    Args:
        graph: Where to.
        region: Which one.
    """

    def __init__(self, graph: ir.Graph, region: Region) -> None:
        self._graph, self._region = graph, region
        self._rows: dict[Value, Value] = {}
        self._outer: Value = None
        self._sizes: dict[tuple[int | Value, ...], Value] = {}
        self._tape = ir.tape.Tape(graph)
        self._affine: Affine | None = None

    def rewrite(self) -> None:
        """Build the nodes and let everybody after the region use them."""
        region = self._region
        self._enter()
        waiting = list(region.attentions)
        for node in region.nodes:
            while waiting and waiting[0].out in node.inputs:
                self._attend(waiting.pop(0))
            self._by_row(node)
        for attention in waiting:
            self._attend(attention)
        for node in region.exits:
            self._leave(node)

    def _op(self, kind: str, *inputs: Value, domain: str = "", **attributes: Any) -> Value:
        return self._tape.op(kind, inputs, attributes, domain=domain)

    def _ints(self, *values: int | Value) -> Value:
        """Sizes, some of which are known only when the graph runs."""
        if not any(isinstance(value, ir.Value) for value in values):
            return self._constant(*values)
        if values not in self._sizes:
            parts = [value if isinstance(value, ir.Value) else self._constant(value) for value in values]
            self._sizes[values] = self._op("Concat", *parts, axis=0)
        return self._sizes[values]

    def _weight(self, name: str, array: npt.NDArray[Any]) -> Value:
        return self._tape.initializer(ir.tensor(np.ascontiguousarray(array, np.float32), name=name))

    def _constant(self, *values: Any) -> Value:
        name = f"reelrt.sizes.{'.'.join(map(str, values))}"
        if name not in self._graph.initializers:
            self._graph.register_initializer(
                ir.Value(name=name, const_value=ir.tensor(np.array(values, np.int64), name=name))
            )
        return self._graph.initializers[name]

    def _enter(self) -> None:
        entry = self._region.entry
        source = entry.node.inputs[0]
        reshape: Node = None if entry.frames else source.producer()
        first = only_user(entry.tokens)
        if is_a(first, "MatMul") and self._takes_bias(only_user(first.outputs[0])):
            self._affine = _affine((reshape.inputs[0] if reshape else source).producer())
        if self._affine is not None:
            normalised = self._affine.normalised
            _ask_size_of(normalised, reshape.inputs[0] if reshape else source)
            if reshape:
                normalised = self._op("Reshape", normalised, reshape.inputs[1])
                _ask_size_of(normalised, source)
            source = normalised
        if entry.frames:
            self._outer = self._op("Shape", source, start=2, end=3)
            matrix = self._op("Reshape", source, self._ints(depth(entry.tokens), -1))
            self._rows[entry.tokens] = self._op("Transpose", matrix, perm=[1, 0])
        else:
            self._outer = self._op("Shape", source, start=0, end=1)
            turned = self._op("Transpose", source, perm=[2, 0, 1])
            self._rows[entry.tokens] = self._op("Reshape", turned, self._ints(-1, depth(entry.tokens)))

    def _shape(self, *last: int) -> Value:
        """The shape of tokens whose first dimension is the one they attend in."""
        if self._region.entry.frames:
            return self._ints(self._outer, -1, *last)
        return self._ints(-1, self._outer, *last)

    def _by_row(self, node: Node) -> None:
        out = node.outputs[0]
        if node.op_type == "MatMul" and self._takes_bias(only_user(out)):
            return
        if self._takes_bias(node):
            self._rows[out] = self._project(node)
            return
        inputs = [self._rows.get(value, value) for value in node.inputs]
        self._rows[out] = self._tape.op(node.op_type, inputs, dict(node.attributes))

    def _project(self, node: Node) -> Value:
        """A product and the addition of its bias, as one node or, after a feed-forward layer, two."""
        tokens, weight = node.inputs[0].producer().inputs
        bias, name = node.inputs[1], node.outputs[0].name
        if tokens is self._region.entry.tokens and self._affine is not None:
            wide, added = _wide(weight), self._affine.offset @ _wide(weight) + _wide(bias)
            weight = self._weight(f"{name}.weight", self._affine.gain[:, None] * wide)
            return self._op("Gemm", self._rows[tokens], weight, self._weight(f"{name}.bias", added))
        total = tokens.producer()
        inner: Node = total.inputs[1].producer() if is_a(total, "Add") and only_user(tokens) else None
        grows = weight.shape[1] > weight.shape[0]
        if grows or not self._takes_bias(inner) or only_user(total.inputs[1]) is not total:
            return self._op("Gemm", self._rows[tokens], weight, bias)
        # (r + h F + f) P + b = (r P + f P + b) + h (F P)
        hidden, forward = inner.inputs[0].producer().inputs
        joined = _wide(forward) @ _wide(weight)
        added = _wide(inner.inputs[1]) @ _wide(weight) + _wide(bias)
        kept = self._op("Gemm", self._rows[total.inputs[0]], weight, self._weight(f"{name}.bias", added))
        return self._op("Gemm", self._rows[hidden], self._weight(f"{name}.weight", joined), kept)

    def _takes_bias(self, node: Node) -> bool:
        """Whether a node adds a bias to a product that nobody else uses."""
        if not is_a(node, "Add") or rank_of(node.inputs[1]) != 1:
            return False
        product = node.inputs[0].producer()
        return (
            is_a(product, "MatMul") and rank_of(product.inputs[1]) == 2 and only_user(node.inputs[0]) is node
        )

    def _attend(self, attention: Attention) -> None:
        heads = (attention.heads, attention.width)
        split = self._ints(-1, *heads) if attention.context else self._shape(*heads)
        query, key, value = (
            self._op("Reshape", self._rows.get(each, each), split)
            for each in (attention.query, attention.key, attention.value)
        )
        turned = {"transBatchA": 1, "transBatchB": 1, "transB": 1}
        scores = self._op("FusedMatMul", query, key, domain=MICROSOFT, alpha=attention.scale, **turned)
        weights = self._op("Softmax", scores, axis=-1)
        out = self._op("FusedMatMul", weights, value, domain=MICROSOFT, transBatchB=1)
        back = self._op("Transpose", out, perm=[1, 0, 2] if attention.context else [2, 0, 1, 3])
        self._rows[attention.out] = self._op(
            "Reshape", back, self._ints(-1, attention.heads * attention.width)
        )

    def _leave(self, node: Node) -> None:
        tokens = self._op("Reshape", self._rows[node.inputs[0]], self._shape(depth(node.inputs[0])))
        if self._region.entry.frames:
            volume = only_user(node.outputs[0])
            old, perm = only_user(volume.outputs[0]), [0, 2, 1]
        else:
            old, perm = node, [1, 2, 0]
        ir.convenience.replace_all_uses_with(old.outputs[0], self._op("Transpose", tokens, perm=perm))


def _ask_size_of(value: Value, instead_of: Value) -> None:
    """Let nodes that only need the size of one value have that of another, so that the one may go."""
    for node in instead_of.consumers():
        if is_a(node, "Shape"):
            node.replace_input_with(0, value)


def _affine(add: Node) -> Affine | None:
    """The factor and the offset that end in an addition; None where there are none."""
    scale: Node = add.inputs[0].producer() if is_a(add, "Add") else None
    reshape: Node = scale.inputs[0].producer() if is_a(scale, "Mul") else None
    if not is_a(reshape, "Reshape") or not is_a(reshape.inputs[0].producer(), "InstanceNormalization"):
        return None
    gain, offset = constant(scale.inputs[1]), constant(add.inputs[1])
    if gain is None or offset is None or gain.shape != (gain.size, 1, 1) or offset.shape != gain.shape:
        return None
    return Affine(reshape.outputs[0], gain.ravel(), offset.ravel())


def _wide(value: Value) -> npt.NDArray[Any]:
    """A constant, in the precision in which constants are joined."""
    array = constant(value)
    if array is None:
        raise ValueError(f"{value.name} is no constant")
    return array.astype(np.float64)


def _join_affine(graph: ir.Graph, add: Node) -> None:
    """Make one node of a factor and an offset per channel after a group normalisation."""
    found = _affine(add)
    if found is None:
        return
    tape, name = ir.tape.Tape(graph), add.outputs[0].name
    parts = {"gain": found.gain, "offset": found.offset, "zero": np.zeros_like(found.offset)}
    parts["one"] = np.ones_like(found.gain)
    values = [
        tape.initializer(ir.tensor(np.ascontiguousarray(part), name=f"{name}.{kind}"))
        for kind, part in parts.items()
    ]
    out = tape.op("BatchNormalization", [found.normalised, *values], {"epsilon": 0.0})
    ir.convenience.replace_all_uses_with(add.outputs[0], out)
