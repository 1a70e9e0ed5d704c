"""Graphs with Q/DQ pairs: which nodes could be quantised, which are, and taking some of it back.

A quantised node reads each of its inputs through QuantizeLinear and DequantizeLinear. Knows neither
ModelOpt nor what a layer is for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx

QUANTISABLE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that have INT8 arithmetic and are worth it: they are nearly all of the work."""


class Quantised(Protocol):
    """A graph whose layers can be quantised one by one, since all ranges are known."""

    @property
    def nodes(self) -> frozenset[str]:
        """Names of the nodes that can be quantised."""

    def write(self, nodes: Collection[str], path: Path) -> int:
        """Write the graph with some nodes quantised, weights beside it; returns their bytes."""


@dataclass(frozen=True, slots=True)
class Master:
    """What ModelOpt made of a graph, in memory: every node quantised, weights still floats."""

    model: onnx.ModelProto

    @property
    def nodes(self) -> frozenset[str]:
        """Names of the nodes that are quantised."""
        return frozenset(quantised(self.model.graph))

    def write(self, nodes: Collection[str], path: Path) -> int:
        """Write a version in which only some nodes are quantised; returns the bytes of its weights."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        restrict(model, nodes)
        fold_weights(model)
        return save(model, path)


def quantisable(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that can be quantised, in the graph's order.

    The schedule's table, the sinusoids of the timestep and the next state are sums and products of
    other operators, so they are never among them.
    """
    return [node for node in graph.node if node.op_type in QUANTISABLE]


def quantised(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes that read their inputs through Q/DQ."""
    made = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return {node.name for node in quantisable(graph) if all(name in made for name in node.input[:2])}


def restrict(model: onnx.ModelProto, keep: Collection[str]) -> None:
    """Take the Q/DQ pairs of all nodes but some away, in place; unused nodes and weights go.

    Args:
        model: A graph with Q/DQ pairs whose weights are still floats.
        keep: Names of the nodes that stay quantised.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.name in keep:
            continue
        for position, name in enumerate(node.input):
            maker = makers.get(name)
            if maker is not None and maker.op_type == "DequantizeLinear":
                node.input[position] = makers[maker.input[0]].input[0]
    _drop_unused(graph)


def fold_weights(model: onnx.ModelProto) -> int:
    """Store quantised weights as INT8: the QuantizeLinear before a weight is computed once, in place.

    Returns:
        How many weights are INT8 now.
    """
    from onnx import numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    made: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] not in weights:
            continue
        values, scale, zero = (numpy_helper.to_array(weights[name]) for name in node.input)
        assert not np.any(zero), "ModelOpt quantises weights symmetrically"
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        name = f"{node.input[0]}.int8"
        graph.initializer.append(numpy_helper.from_array(to_int8(values, scale, axis), name))
        made[node.output[0]] = name
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = made.get(name, name)
    _drop_unused(graph)
    return len(made)


def channel_axis(node: onnx.NodeProto, rank: int) -> int:
    """The axis of a weight's output channels, the weight being a node's second input."""
    if node.op_type == "Gemm":
        return 0 if any(each.name == "transB" and each.i for each in node.attribute) else 1
    return rank - 1 if node.op_type == "MatMul" else 0


def to_int8(values: npt.NDArray[Any], scale: npt.NDArray[Any], axis: int) -> npt.NDArray[np.int8]:
    """ONNX's QuantizeLinear with zero points of 0, the scale one number or one per slice of an axis."""
    if scale.ndim:
        scale = scale.reshape([-1 if index == axis else 1 for index in range(values.ndim)])
    rounded: npt.NDArray[np.int8] = np.clip(np.rint(values / scale), -128, 127).astype(np.int8)
    return rounded


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and weights that lead to no output."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            needed.update(node.input)
            kept.append(node)
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    _replace(graph.node, reversed(kept))
    _replace(graph.initializer, weights)


def _replace(field: Any, items: Iterable[Any]) -> None:
    items = list(items)
    del field[:]
    field.extend(items)


def save(model: onnx.ModelProto, path: Path) -> int:
    """Write a graph, its weights into `<path>.data` beside it.

    Returns:
        Bytes of the weights.
    """
    import onnx

    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        location=f"{path.name}.data",
        size_threshold=1024,
    )
    data = path.with_name(f"{path.name}.data")
    if data.exists():  # not where every weight is small
        data.chmod(path.stat().st_mode)  # onnx hides it from other users
    return weight_bytes(path)


def weight_bytes(path: Path) -> int:
    """Bytes of a graph's weights."""
    import onnx
    from onnx import helper

    total = 0
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        itemsize = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
        total += int(np.prod(tensor.dims)) * itemsize
    return total
