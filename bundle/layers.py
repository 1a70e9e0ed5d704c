"""The nodes of an ONNX graph: which are the network, what each is called, what class it belongs to.

The network is found by what it does, not by names: it is every node between the first and the last
one that multiplies by weights. What comes before (reading the schedule's table, the timestep's
sinusoids, scaling the input) and after (the next state, the counter, uint8 frames) is not. Reads
whatever has the attributes of an ONNX GraphProto and imports no onnx; knows no types and no backend.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from reelrt.bundle.spec import StageSpec

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")
"""Operators that make a node part of the network when a weight is one of their inputs."""
MIN_WEIGHT = 16
"""A constant of fewer elements is a factor or an index, not a weight."""
THROUGH = (
    "Transpose",
    "Reshape",
    "Identity",
    "Cast",
    "QuantizeLinear",
    "DequantizeLinear",
    "Unsqueeze",
    "Squeeze",
)
"""What may stand between a weight and the node that multiplies by it."""
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
FLOAT_INPUTS: Mapping[str, tuple[int, ...]] = {"Resize": (1, 2)}
"""Inputs that stay FP32 whatever the others are: a resize's region and scales."""

_BY_CLASS: Mapping[str, str] = {
    "convolution": "Conv ConvTranspose ConvInteger FusedConv NhwcFusedConv QLinearConv",
    "linear": "MatMul Gemm FusedMatMul FusedGemm MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul "
    "QLinearMatMul QGemm MatMulNBits",
    "attention": "Softmax QLinearSoftmax Attention MultiHeadAttention QAttention",
    "normalization": "InstanceNormalization LayerNormalization GroupNormalization BatchNormalization "
    "RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization "
    "GroupNorm SkipGroupNorm",
    "embedding": "Gather",
    "conversion": "Cast QuantizeLinear DequantizeLinear DynamicQuantizeLinear",
    "movement": "Reshape Transpose Flatten Squeeze Unsqueeze Identity Concat Split Slice Expand Tile Pad "
    "Resize Upsample GatherND GatherElements ReorderInput ReorderOutput Constant ConstantOfShape",
}
CLASSES: Mapping[str, str] = {name: kind for kind, names in _BY_CLASS.items() for name in names.split()}
"""Operator to layer class; any other is `elementwise`. `layer_class` tells attention's products apart."""


def layer_name(node: Any) -> str:
    """What a node is called: its name, or that of its first output where it has none."""
    return str(node.name or node.output[0])


def layer_class(node: Any, weights: Collection[str]) -> str:
    """The class of a node.

    Args:
        node: The node.
        weights: Names of the tensors that are weights, see `weight_tensors`. A product without one
            belongs to attention, a Gather without one moves values.
    """
    kind = CLASSES.get(node.op_type, "elementwise")
    if kind in ("linear", "embedding") and not any(name in weights for name in node.input):
        return {"linear": "attention", "embedding": "movement"}[kind]
    return kind


def weight_tensors(graph: Any) -> set[str]:
    """Names of a graph's weights, and of what `THROUGH` nodes make of them."""
    weights = {tensor.name for tensor in graph.initializer if _elements(tensor) >= MIN_WEIGHT}
    for node in graph.node:
        if node.op_type in THROUGH and node.input[0] in weights:
            weights.update(node.output)
    return weights


def network(graph: Any, spec: StageSpec, keep: Collection[str] = ()) -> set[int]:
    """Indices of the nodes that are the network.

    Args:
        graph: The graph; its nodes are in an order in which they can run.
        spec: The stage's boundary.
        keep: Names of layers to leave out, with what only makes their weights.
    """
    weights = weight_tensors(graph)
    makers: dict[str, int] = {}
    users: dict[str, list[int]] = {}
    weighted = set()
    for index, node in enumerate(graph.node):
        if node.op_type in WEIGHTED and any(name in weights for name in node.input):
            weighted.add(index)
        makers.update(dict.fromkeys(node.output, index))
        for name in node.input:
            users.setdefault(name, []).append(index)

    def before(tensors: Iterable[str]) -> set[int]:
        return _reach(tensors, lambda name: [makers[name]] if name in makers else [], graph, forward=False)

    def after(tensors: Iterable[str]) -> set[int]:
        return _reach(tensors, lambda name: users.get(name, []), graph, forward=True)

    upstream = before(name for index in weighted for name in graph.node[index].input) | weighted
    downstream = after(name for index in weighted for name in graph.node[index].output) | weighted
    found = upstream & downstream
    found |= after(name for name, tensor in spec.inputs.items() if tensor.dtype == "model") & upstream
    found |= before(name for name, tensor in spec.outputs.items() if tensor.dtype == "model") & downstream
    # A weight's own transpose belongs to it.
    makes_weights = {i for i, n in enumerate(graph.node) if n.op_type in THROUGH and n.input[0] in weights}
    found |= makes_weights
    found -= {index for index in found if layer_name(graph.node[index]) in keep}
    for index in sorted(makes_weights, reverse=True):  # users come later in the order than makers
        if any(user not in found for name in graph.node[index].output for user in users.get(name, [])):
            found.discard(index)
    # What quantises a product's input belongs to the product, also where the network begins.
    for index in range(len(graph.node) - 1, -1, -1):
        node = graph.node[index]
        if node.op_type in QUANTIZERS and index not in makes_weights:
            inside = all(user in found for name in node.output for user in users.get(name, []))
            (found.add if inside and layer_name(node) not in keep else found.discard)(index)
    return found


def _reach(
    tensors: Iterable[str], step: Callable[[str], list[int]], graph: Any, *, forward: bool
) -> set[int]:
    """Nodes reached from tensors, following makers (backwards) or users (forwards)."""
    found: set[int] = set()
    waiting = list(tensors)
    while waiting:
        for index in step(waiting.pop()):
            if index not in found:
                found.add(index)
                node = graph.node[index]
                waiting.extend(node.output if forward else node.input)
    return found


def _elements(tensor: Any) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count
