"""A graph's transformers rewritten for ONNX Runtime's CPU kernels: the same arithmetic, less moving.

What a bundle holds suits every backend: tokens [N, T, D], and attention as MatMul, Softmax and
Transpose. On a CPU the tokens become the rows of one matrix here, ordered so that the tokens which
attend to each other come first, [T * N, D]:

- A projection with a bias is one Gemm; ONNX Runtime has none for three dimensions.
- FusedMatMul reads queries, keys and values [T, N, heads, d] as they lie, so three of an
  attention's four transposes go.
- The frames of a video become rows by one transpose instead of two.

And a factor and an offset per channel, after a group normalisation, are one pass instead of two.

A transformer with anything else in it (quantised, computed in pieces) stays as it is. Where several
videos would share a batch the rows of one could not be told from another's, so a graph that was
rewritten takes one video at a time. Knows no files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
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

    def _constant(self, *values: Any) -> Value:
        name = f"reelrt.sizes.{'.'.join(map(str, values))}"
        if name not in self._graph.initializers:
            self._graph.register_initializer(
                ir.Value(name=name, const_value=ir.tensor(np.array(values, np.int64), name=name))
            )
        return self._graph.initializers[name]

    def _enter(self) -> None:
        entry = self._region.entry
        if entry.frames:
            volume = entry.node.inputs[0]
            self._outer = self._op("Shape", volume, start=2, end=3)
            matrix = self._op("Reshape", volume, self._ints(depth(entry.tokens), -1))
            self._rows[entry.tokens] = self._op("Transpose", matrix, perm=[1, 0])
        else:
            cells = entry.node.inputs[0]
            self._outer = self._op("Shape", cells, start=0, end=1)
            turned = self._op("Transpose", cells, perm=[2, 0, 1])
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
            product = node.inputs[0].producer()
            rows, weight = self._rows[product.inputs[0]], product.inputs[1]
            self._rows[out] = self._op("Gemm", rows, weight, node.inputs[1])
            return
        inputs = [self._rows.get(value, value) for value in node.inputs]
        self._rows[out] = self._tape.op(node.op_type, inputs, dict(node.attributes))

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


def _join_affine(graph: ir.Graph, add: Node) -> None:
    """Make one node of a factor and an offset per channel after a group normalisation."""
    scale: Node = add.inputs[0].producer() if is_a(add, "Add") else None
    reshape: Node = scale.inputs[0].producer() if is_a(scale, "Mul") else None
    if not is_a(reshape, "Reshape") or not is_a(reshape.inputs[0].producer(), "InstanceNormalization"):
        return
    gain, offset = constant(scale.inputs[1]), constant(add.inputs[1])
    if gain is None or offset is None or gain.shape != (gain.size, 1, 1) or offset.shape != gain.shape:
        return
    tape, name = ir.tape.Tape(graph), add.outputs[0].name
    parts = {"gain": gain.ravel(), "offset": offset.ravel(), "zero": np.zeros_like(offset).ravel()}
    parts["one"] = np.ones_like(parts["zero"])
    values = [
        tape.initializer(ir.tensor(np.ascontiguousarray(part), name=f"{name}.{kind}"))
        for kind, part in parts.items()
    ]
    inputs = [reshape.outputs[0], values[0], values[1], values[2], values[3]]
    out = tape.op("BatchNormalization", inputs, {"epsilon": 0.0})
    ir.convenience.replace_all_uses_with(add.outputs[0], out)
