"""The layers of a graph: nodes that are quantised together, by what they are in the network.

A layer is a convolution or a matrix product with a weight, named after the weight; the products that
read the same tensor (an attention's queries, keys and values) are one layer, because they share its
range; so are the two products of an attention without weights. Which layers of a family stay in FP32
when nothing was measured stands here as data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reelrt.bundle.spec import Geometry
from reelrt.calibration.qdq import QUANTISABLE, quantisable
from reelrt.errors import InputError

if TYPE_CHECKING:
    import onnx

THROUGH = ("Transpose", "Reshape", "Identity", "Unsqueeze", "Squeeze", "Cast")
"""What may stand between a weight and the node that multiplies by it."""

KEPT: Mapping[str, Sequence[str]] = {
    "unet3d": (
        r"\.conv_in\.weight",
        r"\.conv_out\.weight",
        r"\.transformer_in\.proj_(in|out)\.weight",
        r"\.resnet\.shortcut\.weight",
        r"\.spatial\..*\.attn2\.attention",
    ),
}
"""Family to patterns of the layers that stay in FP32 by default; benchmarks/results/int8-sensitivity.json
is the measurement that they come from."""

STANDARD: Sequence[str] = (r"conv_in\.weight", r"conv_out\.weight", r"\.time1\.", r"\.time2\.")
"""For a family that nobody has measured: the first and the last convolution, and the time embedding."""

FUSED_CELLS = 1024
"""From so many latent cells per frame on, attention's products stay out of INT8: TensorRT-RTX does not fuse
them between Q/DQ pairs, but stores the scores, which for an ms-1.7b-size model take gigabytes."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Nodes that are quantised together.

    Attributes:
        name: The first node's weight; for an attention's products, `<attention>.attention`.
        nodes: Their names.
        kind: `Conv`, `MatMul`, ... or `attention`.
    """

    name: str
    nodes: tuple[str, ...]
    kind: str


def find_layers(graph: onnx.GraphProto) -> list[Layer]:
    """The layers of a graph, in its order."""
    weights = {tensor.name: tensor.name for tensor in graph.initializer}
    makers: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type in THROUGH and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]]
        makers.update(dict.fromkeys(node.output, node))
    groups: dict[str, list[tuple[str, onnx.NodeProto]]] = {}
    for node in quantisable(graph):
        weight = next((weights[name] for name in node.input[:2] if name in weights), "")
        if weight:
            read = next(name for name in node.input[:2] if name not in weights)
            groups.setdefault(f"{node.op_type} of {read}", []).append((weight, node))
        else:
            groups.setdefault(_attention(node, makers, groups), []).append(("", node))
    layers = []
    for members in groups.values():
        weight, first = members[0]
        name = weight or f"{_query(first, makers, weights).removesuffix('.to_q.weight')}.attention"
        kind = first.op_type if weight else "attention"
        layers.append(Layer(name, tuple(node.name for _, node in members), kind))
    return layers


def _attention(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], groups: Iterable[str]) -> str:
    """The group of a product without weights: that of the scores whose softmax it reads."""
    waiting, seen = [node.input[0]], 0
    while waiting and seen < 8:
        maker, seen = makers.get(waiting.pop()), seen + 1
        if maker is None:
            continue
        if maker.op_type == "Softmax":
            scores = makers.get(maker.input[0])
            while scores is not None and scores.op_type not in ("MatMul", "Gemm"):
                scores = makers.get(scores.input[0])
            key = f"attention of {scores.name if scores is not None else ''}"
            if key in groups:
                return key
        elif maker.op_type not in ("MatMul", "Gemm", "Conv"):
            waiting.append(maker.input[0])
    return f"attention of {node.name}"


def _query(scores: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], weights: Mapping[str, str]) -> str:
    """The weight that made an attention's queries; the node's own name where none is found."""
    name = scores.input[0]
    for _ in range(16):
        maker = makers.get(name)
        if maker is None:
            break
        if maker.op_type in QUANTISABLE:
            return next((weights[each] for each in maker.input[:2] if each in weights), scores.name)
        name = maker.input[0]
    return scores.name


def kept_by_default(layers: Sequence[Layer], family: str) -> list[str]:
    """Names of the layers that stay in FP32 when no sensitivity was measured."""
    return matching(layers, KEPT.get(family, STANDARD))


def unfused(layers: Sequence[Layer], geometry: Geometry) -> list[str]:
    """Names of the attentions that INT8 would keep from being fused, at the model's own size or larger."""
    scale = geometry.spatial_scale
    cells = (geometry.height // scale) * (geometry.width // scale)
    return [layer.name for layer in layers if layer.kind == "attention" and cells >= FUSED_CELLS]


def check_patterns(patterns: Iterable[str]) -> None:
    """Refuse what is no regular expression.

    Raises:
        InputError: The message names the pattern.
    """
    pattern = ""
    try:
        for pattern in patterns:
            re.compile(pattern)
    except re.error as error:
        raise InputError(f"keep {pattern!r} is no regular expression: {error}.") from error


def matching(layers: Sequence[Layer], patterns: Iterable[str]) -> list[str]:
    """Names of the layers in which one of some regular expressions occurs."""
    found = [re.compile(pattern) for pattern in patterns]
    return [layer.name for layer in layers if any(each.search(layer.name) for each in found)]
