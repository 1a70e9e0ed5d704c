"""The shape of every tensor of an ONNX graph at given sizes of its named axes.

onnx infers each node's outputs; what a graph computes about shapes (Shape, Concat, Reshape) is
calculated on the way, because inference alone stops where one dimension is a product of two others.
Knows nothing of costs. Weights are never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reelrt.bundle.spec import StageSpec
from reelrt.errors import BackendError

if TYPE_CHECKING:
    import onnx

SMALL = 64
"""A tensor of at most so many integers may be a shape; its values are calculated."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """What is known of a tensor.

    Attributes:
        shape: Its dimensions.
        item_bytes: Bytes per element as the graph stores it.
        floating: Whether its elements are floating-point numbers.
        constant: Whether it is a weight, or calculated from weights and shapes alone.
    """

    shape: tuple[int, ...]
    item_bytes: int
    floating: bool
    constant: bool

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


def load_graph(path: Path) -> onnx.ModelProto:
    """Read a graph without its weights.

    Raises:
        BackendError: onnx is not installed, or the file is no graph.
    """
    try:
        import onnx
    except ImportError as error:
        raise BackendError(
            "A plan is made from the ONNX graphs, and the package onnx is not installed.",
            "Install it: pip install onnx.",
        ) from error
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own kinds
        raise BackendError(f"{path} is no ONNX graph.", "Export the model again.") from error


def tensor_shapes(model: onnx.ModelProto, spec: StageSpec, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Every tensor of a flat graph, by name.

    Args:
        model: The graph; weights may be missing.
        spec: Its boundary.
        sizes: Size of each named axis of the inputs.

    Raises:
        BackendError: A node's shape cannot be inferred.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    opsets = list(model.opset_import)
    types: dict[str, onnx.TypeProto] = {}
    values: dict[str, onnx.TensorProto] = {}
    constant: set[str] = set()
    for tensor in graph.initializer:
        types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        constant.add(tensor.name)
        if int(np.prod(tensor.dims)) <= SMALL and not tensor.external_data:
            values[tensor.name] = tensor
    for value in graph.input:
        if value.name not in types:
            shape = spec.inputs[value.name].shape(sizes)
            types[value.name] = helper.make_tensor_type_proto(value.type.tensor_type.elem_type, shape)
    for node in graph.node:
        inferred = _infer(node, types, values, opsets, model.ir_version)
        types.update(inferred)
        folded = _fold(node, types, values, opsets)
        values.update({name: numpy_helper.from_array(array, name) for name, array in folded.items()})
        if node.op_type in ("Shape", "Size") or all(name in constant for name in node.input if name):
            constant.update(node.output)
    return {name: _tensor(proto, name in constant) for name, proto in types.items()}


def _infer(
    node: onnx.NodeProto,
    types: Mapping[str, onnx.TypeProto],
    values: Mapping[str, onnx.TensorProto],
    opsets: list[Any],
    ir_version: int,
) -> Mapping[str, onnx.TypeProto]:
    from onnx import defs, shape_inference

    version = next(each.version for each in opsets if each.domain == node.domain)
    schema = defs.get_schema(node.op_type, version, node.domain)
    names = [name for name in node.input if name]
    try:
        found: Mapping[str, onnx.TypeProto] = shape_inference.infer_node_outputs(
            schema,
            node,
            {name: types[name] for name in names},
            {name: values[name] for name in names if name in values},
            opset_imports=opsets,
            ir_version=ir_version,
        )
    except Exception as error:  # onnx raises its own kinds
        reason = " ".join(str(error).split())
        raise BackendError(f"the shape of {node.name} ({node.op_type}) is not known: {reason}") from error
    for name, proto in found.items():
        if any(not dim.HasField("dim_value") for dim in proto.tensor_type.shape.dim):
            raise BackendError(f"the shape of {name} ({node.op_type}) is not known at these sizes.")
    return found


def _fold(
    node: onnx.NodeProto,
    types: Mapping[str, onnx.TypeProto],
    values: Mapping[str, onnx.TensorProto],
    opsets: list[Any],
) -> dict[str, np.ndarray[Any, Any]]:
    """Calculate a node of few elements whose inputs are all known."""
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    names = [name for name in node.input if name]
    if node.op_type == "Shape":
        shape = [dim.dim_value for dim in types[node.input[0]].tensor_type.shape.dim]
        bounds = {attribute.name: attribute.i for attribute in node.attribute}
        part = shape[bounds.get("start", 0) : bounds.get("end", len(shape))]
        return {node.output[0]: np.asarray(part, np.int64)}
    if not all(name in values for name in names) or _elements(types[node.output[0]]) > SMALL:
        return {}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_value_info(name, types[name]) for name in dict.fromkeys(names)],
        [helper.make_value_info(name, types[name]) for name in node.output],
    )
    runner = ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets))
    feed = {name: numpy_helper.to_array(values[name]) for name in names}
    return dict(zip(node.output, map(np.asarray, runner.run(None, feed)), strict=True))


def _elements(proto: onnx.TypeProto) -> int:
    return int(np.prod([dim.dim_value for dim in proto.tensor_type.shape.dim], dtype=np.int64))


def _tensor(proto: onnx.TypeProto, constant: bool) -> Tensor:
    from onnx import helper

    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(proto.tensor_type.elem_type))
    shape = tuple(dim.dim_value for dim in proto.tensor_type.shape.dim)
    return Tensor(shape, dtype.itemsize, dtype.kind == "f", constant)
