"""A step graph in two: what the prompt cannot change, and the rest.

With split guidance two launches start from the same sample at the same timestep, one without and
one with the prompt. Until the first attention to the text both compute the same; as a graph of its
own it is computed once for both. Knows no files and no backend.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

TEXT = "text"
PRODUCTS = ("Conv", "FusedMatMul", "Gemm", "MatMul")
_STORED = ("QuantizeLinear", "DequantizeLinear")


def split(graph: ir.Graph) -> tuple[ir.Graph, ir.Graph] | None:
    """Cut a step graph.

    Args:
        graph: Its nodes in an order in which they can run. Changed only in that values at the cut
            are told to be FP32 where the graph does not say.

    Returns:
        The part that does not read `text`, and the rest, which takes the outputs of the first as
        further inputs; None where they have nothing in common. What takes no product to compute
        (sizes, the table's row) is in both.
    """
    inputs = {value.name: value for value in graph.inputs}
    if TEXT not in inputs:
        return None
    told = _reached(graph, [inputs[TEXT]])
    costly = _reached(graph, [node.outputs[0] for node in graph if node.op_type in PRODUCTS], sizes=False)
    cut: dict[ir.Value, None] = {}
    waiting = [value for node in graph if node.outputs[0] in told for value in node.inputs]
    seen = set(told)
    while waiting:
        value = waiting.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        if value in costly:
            cut[_unstored(value)] = None
        elif (maker := value.producer()) is not None:  # the size of something costly, say
            waiting.extend(maker.inputs)
    if not cut:
        return None
    for value in cut:
        value.dtype = value.dtype or ir.DataType.FLOAT
    own = [value for value in graph.inputs if value.name != TEXT]
    return (
        _part(graph, own, list(cut)),
        _part(graph, [*graph.inputs, *cut], list(graph.outputs)),
    )


def _part(graph: ir.Graph, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Graph:
    """A part of a graph, its weights in the graph's order: onnx-ir gives them in a set's."""
    part = ir.convenience.extract(graph, inputs, outputs)
    for name in graph.initializers:
        if name in part.initializers:
            part.initializers.add(part.initializers.pop(name))
    return part


def _reached(graph: ir.Graph, start: Collection[ir.Value], sizes: bool = True) -> set[ir.Value]:
    """Values that cannot be computed without some others, with or without what only asks their size."""
    found = set(start)
    for node in graph:
        if (sizes or node.op_type != "Shape") and any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def _unstored(value: ir.Value) -> ir.Value:
    """What a value was before it was quantised."""
    while (node := value.producer()) is not None and node.op_type in _STORED and node.inputs[0] is not None:
        value = node.inputs[0]
    return value
