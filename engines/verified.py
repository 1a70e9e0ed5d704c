"""What precision an engine really runs in: read off the graph that was built, not off its name.

For TensorRT that is the converted graph, since strongly typed networks run as their types say; for
ONNX Runtime the optimised graph, which holds the operators that will really run. `check` compares
both the types and the builder's weight bytes with the engine's name. Opens no engine.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reelrt.bundle.layers import MIN_WEIGHT, THROUGH, layer_class, layer_name, weight_tensors
from reelrt.engines.recipe import Job, Layers
from reelrt.errors import BackendError

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("reelrt")

TOLERANCE = 0.02
"""How far the builder's weight bytes may lie from those of the graph, as a share of the latter."""
SLACK = 16 << 10
"""And in bytes besides: padding, and constants that the builder folds or makes."""
FP32_SHARE = 0.1
"""How much of an FP16 or INT8 engine's weights may be FP32 beyond the layers that shall be."""

WEIGHT_CLASSES = ("convolution", "linear", "embedding", "normalization")
_INTEGER = ("QLinear", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul", "QGemm", "QAttention")
_MULTIPLIES = ("convolution", "linear", "attention")
_BOOLEAN = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "IsNaN", "IsInf", "And", "Or", "Not")
_NAMES: Mapping[int, str] = {1: "fp32", 10: "fp16", 16: "bf16", 11: "fp64"}  # TensorProto's numbers
_FLOAT, _UINT8, _INT8, _INT32, _INT64, _BOOL = 1, 2, 3, 6, 7, 9
_BITS: Mapping[int, int] = {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16}


@dataclass(frozen=True, slots=True)
class Precision:
    """What a graph's types say.

    Attributes:
        layers: Layer class to precision to `count` and `weight_bytes`. A layer's precision is the one
            it multiplies in: `int8` needs both sides quantised, `int8_weights` multiplies in floating
            point by weights that are stored as INT8.
        elements: Type of the weights to their number; `kept` of those that shall be FP32.
    """

    layers: Layers
    elements: Mapping[str, int]
    kept: int

    @property
    def weight_bytes(self) -> int:
        """Of all layers."""
        return sum(entry["weight_bytes"] for kinds in self.layers.values() for entry in kinds.values())


def read(*paths: Path, fused: bool, keep: Collection[str] = ()) -> Precision:
    """Read a graph's precision off its types.

    Args:
        paths: The ONNX file, or several that are one engine; their weights are not read.
        fused: Whether this graph is what runs. If not, the builder makes one INT8 operation of a
            product and the DequantizeLinear before it, and stores quantised weights as INT8.
        keep: Names of layers that shall be FP32.
    """
    import onnx

    layers: dict[str, dict[str, dict[str, int]]] = {}
    elements: dict[str, int] = {}
    kept = 0
    for path in paths:
        graph = onnx.load(str(path), load_external_data=False).graph
        types, weights, named = _types(graph), _Weights(graph, fused), weight_tensors(graph)
        for node in graph.node:
            if node.op_type == "Constant" or node.output[0] in weights.sources:
                continue  # no layer, or part of a weight's storage
            precision = _precision(node, types, weights, fused)
            size = 0
            for kind, count, stored in weights.take(node):
                size += stored
                if count >= MIN_WEIGHT:
                    elements[kind] = elements.get(kind, 0) + count
                    kept += count if kind == "fp32" and layer_name(node) in keep else 0
            if not precision:
                continue
            entry = layers.setdefault(layer_class(node, named), {}).setdefault(
                precision, {"count": 0, "weight_bytes": 0}
            )
            entry["count"] += 1
            entry["weight_bytes"] += size
    return Precision({name: layers[name] for name in sorted(layers)}, elements, kept)


def precisions(path: Path) -> dict[str, str]:
    """Layer name to the floating-point type that a graph gives it, `fp32` or `fp16`."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    types = _types(graph)
    kinds = {layer_name(node): _NAMES.get(types.get(node.output[0], 0), "") for node in graph.node}
    return {name: kind for name, kind in kinds.items() if kind}


def check(
    job: Job, found: Precision, reported: int, inspected: Mapping[str, Mapping[str, int]] | None = None
) -> None:
    """Compare an engine with its name.

    Args:
        job: What was built.
        found: What the graph's types say.
        reported: Bytes of weights as the builder reports them; 0 when it does not.
        inspected: Layer type to precision to number, as the engine inspector says; empty without a GPU.

    Raises:
        BackendError: The builder's bytes are not those of the graph's types, or an FP16 or INT8 engine
            is not what it is called.
    """
    name, expected = job.spec.name, found.weight_bytes
    if reported and abs(reported - expected) > TOLERANCE * expected + SLACK:
        raise BackendError(
            f"{name} has {expected:,} bytes of weights by the types of its graph, "
            f"but {job.backend} reports {reported:,}: it does not run in {job.precision} as it should."
        )
    if job.precision == "fp32":
        return
    seen = {precision for kinds in (inspected or {}).values() for precision in kinds}
    if job.precision == "fp16" and "fp32" in seen and "fp16" not in seen:
        raise BackendError(
            f"{name} is called FP16, but the inspector finds only {sorted(seen)} in the engine."
        )
    total = sum(found.elements.values())
    full = found.elements.get("fp32", 0) - found.kept
    if job.precision.startswith("int8") and not _runs_in_int8(found, job):
        raise BackendError(
            f"{name} is called INT8, but {job.backend} runs none of its layers in INT8: {_shares(found)}.",
            "Build with --precision fp32 from the uncalibrated bundle, which is faster here.",
        )
    if job.precision == "fp16" and job.backend == "onnxruntime" and not found.elements.get("fp16"):
        log.warning("%s: ONNX Runtime has no FP16 arithmetic on this CPU and runs it in FP32", name)
        return
    if job.backend != "onnxruntime" and full > FP32_SHARE * total:
        raise BackendError(
            f"{name} is called {job.precision.upper()}, but {4 * full:,} of its {expected:,} bytes of "
            "weights are FP32 in layers that need not be."
        )


def _runs_in_int8(found: Precision, job: Job) -> bool:
    """Whether a quantised engine has INT8 layers; where INT8 weights are all that was asked for, those."""
    # TensorRT-RTX's support matrix has INT8 for weights alone; it stores them so, whatever it multiplies in.
    weights_will_do = job.precision == "int8-weights" or job.backend == "tensorrt_rtx"
    wanted = ("int8", "int8_weights") if weights_will_do else ("int8",)
    return any(precision in wanted for kind in WEIGHT_CLASSES for precision in found.layers.get(kind, {}))


def _shares(found: Precision) -> str:
    """`linear 24 fp32, convolution 3 int8_weights`."""
    return ", ".join(
        f"{kind} {entry['count']} {precision}"
        for kind in _MULTIPLIES
        for precision, entry in found.layers.get(kind, {}).items()
    )


def _precision(node: onnx.NodeProto, types: Mapping[str, int], weights: _Weights, fused: bool) -> str:
    """The precision a node runs in; empty for one of integers and booleans."""
    if node.op_type.startswith(_INTEGER):
        return "int8"
    kind = types.get(node.output[0], 0)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
        return "int8"
    if kind not in _NAMES:
        return ""
    if layer_class(node, weights.named) in _MULTIPLIES and node.op_type != "Softmax":
        quantised = [weights.is_quantised(name) for name in node.input[:2]]
        if all(quantised) and not fused:
            return "int8"
        if any(quantised) and any(weights.is_stored_int8(name) for name in node.input[:2]):
            return "int8_weights"
    return _NAMES[kind]


class _Weights:
    """A graph's weights: who uses each, and in which type it is stored.

    Attributes:
        named: Names of the weights and of what moves, casts and quantisers make of them.
        sources: Names of the tensors that stand between a weight and its user.
    """

    def __init__(self, graph: onnx.GraphProto, fused: bool) -> None:
        self._fused = fused
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output}
        self._taken: set[str] = set()
        self.named = weight_tensors(graph)
        self.sources = {name for name in self.named if name in self._makers}

    def take(self, node: onnx.NodeProto) -> Iterator[tuple[str, int, int]]:
        """Type, elements and bytes of each weight that a node uses and none before it did."""
        for name in node.input:
            chain = list(self._chain(name))
            quantised = any(maker.op_type == "QuantizeLinear" for maker in chain)
            for maker_input in (name, *(each for maker in chain for each in maker.input)):
                tensor = self._tensors.get(maker_input)
                if tensor is None or maker_input in self._taken:
                    continue
                self._taken.add(maker_input)
                count = 1
                for size in tensor.dims:
                    count *= size
                kind = tensor.data_type
                if quantised and not self._fused and kind == _FLOAT and count >= MIN_WEIGHT:
                    kind = _INT8  # the builder quantises it once
                if kind in (_INT8, _UINT8) or kind in _NAMES:
                    yield _NAMES.get(kind, "int8"), count, count * _BITS[kind] // 8

    def is_quantised(self, name: str) -> bool:
        """Whether a tensor comes from a DequantizeLinear."""
        maker = self._makers.get(name)
        while maker is not None and maker.op_type in THROUGH:
            if maker.op_type == "DequantizeLinear":
                return True
            maker = self._makers.get(maker.input[0])
        return False

    def is_stored_int8(self, name: str) -> bool:
        """Whether a tensor is a weight that is stored as INT8."""
        for maker in self._chain(name):
            tensor = self._tensors.get(maker.input[0])
            if tensor is not None:
                return tensor.data_type in (_INT8, _UINT8) or maker.op_type == "QuantizeLinear"
        return False

    def _chain(self, name: str) -> Iterator[onnx.NodeProto]:
        """The nodes between a weight and its user, nearest first."""
        while name in self.sources:
            yield self._makers[name]
            name = self._makers[name].input[0]


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    """Tensor name to TensorProto type, also after operators that only ONNX Runtime knows."""
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
    for node in graph.node:
        made = _made(node, types)
        types.update((name, kind) for name, kind in zip(node.output, made, strict=False))
    return types


def _made(node: onnx.NodeProto, types: Mapping[str, int]) -> list[int]:
    """The types of a node's outputs."""
    inputs = [types.get(name, 0) for name in node.input] + [0] * 3
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    tensors = {attribute.name: attribute.t for attribute in node.attribute if attribute.HasField("t")}
    if node.op_type == "DynamicQuantizeLinear":
        return [_UINT8, _FLOAT, _UINT8]
    if node.op_type in ("Constant", "ConstantOfShape"):
        value = tensors.get("value")
        floats = node.op_type == "ConstantOfShape" or any("float" in a.name for a in node.attribute)
        kind = value.data_type if value is not None else _FLOAT if floats else _INT64
    elif node.op_type == "Cast":
        kind = int(numbers["to"])
    elif node.op_type == "QuantizeLinear":
        kind = inputs[2] or _UINT8
    elif node.op_type in ("DequantizeLinear", "Where"):
        kind = inputs[1]
    elif node.op_type in ("Shape", "Size", "NonZero", "ArgMax", "ArgMin"):
        kind = _INT64
    elif node.op_type in ("MatMulInteger", "ConvInteger"):
        kind = _INT32
    elif node.op_type.endswith("ToFloat"):
        kind = inputs[2]
    elif node.op_type in _BOOLEAN:
        kind = _BOOL
    else:
        kind = inputs[0]
    return [kind] * len(node.output)
