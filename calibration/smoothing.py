"""SmoothQuant: large activation channels made smaller, the weights they meet larger by as much.

Each input channel j of a product gets s[j] = max|x[j]|^alpha / max|w[j]|^(1 - alpha) (Xiao et al. 2023,
arXiv:2211.10438, equation 4); the activation is divided by s and the weight multiplied by it, so the graph
computes what it did. The division goes into the scale and shift of the layer normalization before it, or is
a product of its own. ModelOpt has this for torch modules only (as of 0.47). Knows nothing of ranges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reelrt.calibration import qdq
from reelrt.calibration.layers import Layer
from reelrt.calibration.ranges import Feeds, open_with_outputs, run
from reelrt.errors import InputError

if TYPE_CHECKING:
    import onnx

LIMIT = 1e4
"""No channel is scaled by more than this, or its inverse."""
GAIN = 0.95
"""Smoothing is used where it brings a layer's error to this share of what it was, or less."""

Peaks = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Smoothing:
    """What smoothing did to each layer's error, and where it is used.

    Attributes:
        alpha: How much of the difficulty moves into the weights.
        before: Layer to the error of the final latents with only it in INT8.
        after: The same, smoothed.
    """

    alpha: float
    before: Mapping[str, float]
    after: Mapping[str, float]

    @property
    def used(self) -> list[str]:
        """The layers where it pays."""
        return [name for name, error in self.after.items() if error <= GAIN * self.before[name]]

    def document(self) -> dict[str, Any]:
        """As plain JSON values."""
        used = set(self.used)
        layers = {
            name: {"without": self.before[name], "with": error, "used": name in used}
            for name, error in self.after.items()
        }
        return {"alpha": self.alpha, "used": len(used), "layers": layers}


def check_alpha(alpha: float) -> None:
    """Refuse an impossible alpha.

    Raises:
        InputError: It is no number from 0 to 1.
    """
    if not (math.isfinite(alpha) and 0 <= alpha <= 1):
        raise InputError(f"smooth {alpha} is not possible: give a number from 0 to 1; 0.5 is usual.")


def candidates(graph: onnx.GraphProto, layers: Sequence[Layer]) -> list[Layer]:
    """The layers that can be smoothed: products with a weight that nothing else reads."""
    nodes = {node.name: node for node in graph.node}
    weights = {tensor.name for tensor in graph.initializer}
    uses: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    return [
        layer
        for layer in layers
        if layer.kind in ("MatMul", "Gemm")
        and all(nodes[name].input[1] in weights and uses[nodes[name].input[1]] == 1 for name in layer.nodes)
    ]


def channel_peaks(source: Path, layers: Sequence[Layer], feeds: Feeds) -> Peaks:
    """The largest magnitude of each channel of what some layers read.

    Args:
        source: The FP32 graph, its weights beside it.
        layers: See `candidates`.
        feeds: The samples.

    Returns:
        Layer name to float32 [channels].
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(source, load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    added, names = [], []
    for number, layer in enumerate(layers):
        name, shape, rows = nodes[layer.nodes[0]].input[0], f"peak.{number}.shape", f"peak.{number}.rows"
        channels = _channels(model.graph, nodes[layer.nodes[0]])
        model.graph.initializer.append(numpy_helper.from_array(np.array([-1, channels], np.int64), shape))
        added += [
            helper.make_node("Reshape", [name, shape], [rows]),
            helper.make_node("Abs", [rows], [f"{rows}.abs"]),
            helper.make_node("ReduceMax", [f"{rows}.abs", "peak.axis"], [f"peak.{number}"], keepdims=0),
        ]
        names.append(f"peak.{number}")
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "peak.axis"))
    session = open_with_outputs(source, model, names, added)
    found: dict[str, npt.NDArray[np.float32]] = {}
    for feed in feeds():
        for layer, values in zip(layers, run(session, names, feed, source), strict=True):
            found[layer.name] = np.maximum(found.get(layer.name, np.float32(0)), values)
    return found


def _channels(graph: onnx.GraphProto, node: onnx.NodeProto) -> int:
    """Input channels of a product."""
    shape = next(tuple(tensor.dims) for tensor in graph.initializer if tensor.name == node.input[1])
    return int(shape[_input_axis(node, len(shape))])


def _input_axis(node: onnx.NodeProto, rank: int) -> int:
    """The axis of a weight's input channels."""
    return 2 * rank - 3 - qdq.channel_axis(node, rank)


def write_smoothed(source: Path, target: Path, layers: Sequence[Layer], peaks: Peaks, alpha: float) -> Path:
    """Write a graph that computes the same, some of its layers smoothed.

    Args:
        source: The FP32 graph, its weights beside it.
        target: The graph to write.
        layers: Which; see `candidates`.
        peaks: See `channel_peaks`.
        alpha: From 0 (weights as even as can be) to 1 (activations as even as can be).

    Returns:
        The target.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(source)
    graph = model.graph
    nodes = {node.name: node for node in graph.node}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node.name)
    products: dict[str, onnx.NodeProto] = {}

    def change(name: str, factor: npt.NDArray[Any]) -> None:
        values = numpy_helper.to_array(weights[name]) * factor
        weights[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))

    for layer in layers:
        members = [nodes[name] for name in layer.nodes]
        read = members[0].input[0]
        scale = _scale(members, weights, peaks[layer.name], alpha)
        for node in members:
            axis = _input_axis(node, len(weights[node.input[1]].dims))
            change(node.input[1], np.expand_dims(scale, [a for a in range(2) if a != axis]))
        before = makers.get(read)
        affine = (
            list(before.input[1:]) if before is not None and before.op_type == "LayerNormalization" else []
        )
        alone = set(users[read]) <= set(layer.nodes)
        if affine and alone and all(name in weights and len(users[name]) == 1 for name in affine):
            for name in affine:
                change(name, 1 / scale)
            continue
        inverse, divided = f"{layer.name}.smooth", f"{layer.name}.smoothed"
        graph.initializer.append(numpy_helper.from_array((1 / scale).astype(np.float32), inverse))
        products[layer.nodes[0]] = helper.make_node("Mul", [read, inverse], [divided], name=divided)
        for node in members:
            node.input[0] = divided
    placed = []
    for node in graph.node:
        placed += [products[node.name]] if node.name in products else []
        placed.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in placed]
    del graph.node[:]
    graph.node.extend(copies)
    qdq.save(model, target)
    return target


def _scale(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, onnx.TensorProto],
    peaks: npt.NDArray[np.float32],
    alpha: float,
) -> npt.NDArray[np.float32]:
    """What each channel is divided by."""
    from onnx import numpy_helper

    largest = np.zeros_like(peaks)
    for node in nodes:
        values = numpy_helper.to_array(weights[node.input[1]])
        others = 1 - _input_axis(node, values.ndim)
        largest = np.maximum(largest, np.abs(values).max(axis=others))
    usable = (peaks > 0) & (largest > 0)
    ratio = np.where(usable, peaks, 1) ** alpha / np.where(usable, largest, 1) ** (1 - alpha)
    clipped: npt.NDArray[np.float32] = np.clip(ratio, 1 / LIMIT, LIMIT).astype(np.float32)
    return clipped
