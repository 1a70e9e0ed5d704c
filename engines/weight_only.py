"""A graph whose large weights are INT8: a quarter of FP32's size, half of FP16's.

Each output channel of a weight gets a scale of its own, symmetric around zero; a DequantizeLinear
makes the weight what it was before it is multiplied by. Activations keep their type, so nothing
needs calibrating. Small weights stay as they are. Weights are converted one at a time from file to
file. Knows no backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reelrt.bundle.spec import StageSpec
from reelrt.engines.precision import Weights
from reelrt.errors import BackendError

if TYPE_CHECKING:
    import onnx

MIN_WEIGHT = 4096
"""A weight of fewer elements stays as it is: there is nothing to save."""
LEVELS = 127
"""INT8 without -128, so that zero is zero and both signs reach equally far."""


def quantize_weights(source: Path, target: Path, spec: StageSpec) -> Path:
    """Write a version of a graph with INT8 weights.

    Args:
        source: The FP32 or FP16 graph, its weights inside or beside it.
        target: The graph to write; its weights go beside it, into `<target>.data`.
        spec: The stage's boundary, which stays as it is.

    Returns:
        The target.

    Raises:
        BackendError: onnx is not installed, the graph is not a flat one, or a weight is not finite.
    """
    try:
        import onnx
    except ImportError as error:
        raise BackendError("INT8 weights need the package onnx.", "Install it: pip install onnx.") from error
    model = onnx.load(str(source), load_external_data=False)
    if model.functions or any(a.HasField("g") or a.graphs for n in model.graph.node for a in n.attribute):
        raise BackendError(
            f"{spec.name} has functions or branches, which the conversion to INT8 does not read.",
            "Export the model again.",
        )
    axes = _channel_axes(model.graph)
    with target.with_name(f"{target.name}.data").open("wb") as data:
        _rewrite(model.graph, axes, Weights(source.parent, data))
    onnx.save(model, str(target))
    return target


def _channel_axes(graph: onnx.GraphProto) -> dict[str, int]:
    """Name of each weight to quantize to the axis of its output channels.

    A weight that anything else reads too, or along another axis, is left alone.
    """
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    ranks = {
        tensor.name: len(tensor.dims)
        for tensor in graph.initializer
        if tensor.data_type in floats and len(tensor.dims) >= 2 and np.prod(tensor.dims) >= MIN_WEIGHT
    }
    uses: dict[str, set[int | None]] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in ranks:
                axis = _channel_axis(node, position, ranks[name])
                uses.setdefault(name, set()).add(axis)
    found = ((name, next(iter(axes))) for name, axes in uses.items() if len(axes) == 1)
    return {name: axis for name, axis in found if axis is not None}


def _channel_axis(node: onnx.NodeProto, position: int, rank: int) -> int | None:
    """The axis of a weight's output channels in the eyes of one node; None when it is no weight to it."""
    if position != 1:
        return None
    if node.op_type == "Conv":
        return 0
    if node.op_type == "MatMul":
        return rank - 1
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        return 0 if transposed else 1
    return None


def _rewrite(graph: onnx.GraphProto, axes: Mapping[str, int], weights: Weights) -> None:
    """Change the graph in place."""
    from onnx import helper

    kept: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    for tensor in graph.initializer:
        name = tensor.name
        if name not in axes:
            kept.append(weights.copy(tensor, half=False))
            continue
        numbers, scales = quantized(weights.read(tensor), axes[name], name)
        kept += [weights.write(f"{name}.int8", numbers), weights.write(f"{name}.scale", scales)]
        inputs = [f"{name}.int8", f"{name}.scale"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [name], axis=axes[name]))
    nodes += graph.node
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)


def quantized(
    values: npt.NDArray[Any], axis: int, name: str
) -> tuple[npt.NDArray[np.int8], npt.NDArray[Any]]:
    """A weight in INT8 and the scale of each of its channels, in the weight's own type.

    Args:
        values: The weight, FP32 or FP16.
        axis: Of the channels.
        name: What to call it in an error.

    Raises:
        BackendError: It is not finite.
    """
    numbers = np.moveaxis(np.asarray(values, np.float32), axis, 0)
    largest = np.abs(numbers).reshape(len(numbers), -1).max(axis=1)
    if not np.isfinite(largest).all():
        raise BackendError(f"weight {name} is not finite in places.", "Export the model again.")
    exact = np.where(largest > 0, largest / LEVELS, np.float32(1))
    # Rounded first, because numbers are counted in what multiplies them back; and up, so that none is cut.
    scales = exact.astype(values.dtype)
    scales = np.where(scales < exact, np.nextafter(scales, values.dtype.type(np.inf)), scales)
    units = scales.astype(np.float32).reshape(-1, *[1] * (numbers.ndim - 1))
    counts = np.rint(numbers / units).astype(np.int8)
    return np.ascontiguousarray(np.moveaxis(counts, 0, axis)), scales
