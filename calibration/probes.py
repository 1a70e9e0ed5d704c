"""An FP32 graph with measuring nodes: how large each layer's values are, and what FP16 would cost it.

A measured layer stands in the graph twice: as it is, and once more on inputs and weights rounded to
FP16, its result rounded too; sums stay FP32, as they do in FP16 kernels. Only a few numbers per layer
leave the graph. `rounded` makes a whole graph of such layers. Knows ONNX; runs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reelrt.bundle.layers import CLASSES, FLOAT_INPUTS, layer_name, network
from reelrt.bundle.spec import StageSpec
from reelrt.errors import CalibrationError

if TYPE_CHECKING:
    import onnx

LARGEST = float(np.finfo(np.float16).max)
INFINITE = 1e30
"""From here on a number stands for infinity: a mask's -3.4e38, which FP16 has as its lowest number."""
TINY = 1e-30
_SELECTS = ("Cast", "Gather", "Where", "Max", "Min")
NORMALIZATIONS = ("InstanceNormalization", "LayerNormalization")


@dataclass(frozen=True, slots=True)
class Graph:
    """An FP32 graph and what is known of it before it runs.

    Attributes:
        model: The graph; its weights stay in their file.
        region: Indices of the network's nodes.
        floats: Names of the FP32 tensors.
        masked: Names of the tensors in which a constant may stand for minus infinity.
        constants: FP32 constant to its largest magnitude, infinities left out.
    """

    model: onnx.ModelProto
    region: frozenset[int]
    floats: frozenset[str]
    masked: frozenset[str]
    constants: Mapping[str, float]

    @property
    def layers(self) -> list[onnx.NodeProto]:
        """The network's nodes that compute: neither constants nor what only moves values."""
        return [
            node
            for index, node in enumerate(self.model.graph.node)
            if index in self.region and node.output[0] in self.floats and not moves(node)
        ]


def moves(node: onnx.NodeProto) -> bool:
    """Whether a node computes no new values."""
    return CLASSES.get(node.op_type) == "movement" or node.op_type in _SELECTS


def understand(path: Path, spec: StageSpec) -> Graph:
    """Find a graph's network, its FP32 tensors, its masks and the size of its constants.

    Raises:
        CalibrationError: The graph is not FP32, is not a flat one, or a weight is not a number.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    if model.functions or any(a.HasField("g") or a.graphs for n in model.graph.node for a in n.attribute):
        raise CalibrationError(f"{path.name} has functions or branches, which the FP16 audit does not read.")
    typed = onnx.shape_inference.infer_shapes(model).graph
    values = [*typed.input, *typed.output, *typed.value_info]
    number = onnx.TensorProto.FLOAT
    floats = {value.name for value in values if value.type.tensor_type.elem_type == number}
    constants, masked = {}, set()
    for name, tensor in _constants(model.graph):
        if tensor.data_type == number:
            sizes = np.abs(onnx.numpy_helper.to_array(tensor, str(path.parent)))
            if np.isnan(sizes).any():
                raise CalibrationError(f"weight {name} is not a number in places.", "Export the model again.")
            floats.add(name)
            constants[name] = float(np.max(sizes, initial=0, where=sizes < INFINITE))
            if (sizes >= INFINITE).any():
                masked.add(name)
    for node in model.graph.node:
        if node.op_type != "Softmax" and any(name in masked for name in node.input):
            masked.update(node.output)
    region = network(model.graph, spec)
    return Graph(model, frozenset(region), frozenset(floats), frozenset(masked), constants)


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Names and values of initializers and Constant nodes."""
    yield from ((tensor.name, tensor) for tensor in graph.initializer)
    for node in graph.node:
        if node.op_type == "Constant":
            yield from ((node.output[0], each.t) for each in node.attribute if each.HasField("t"))


@dataclass(slots=True)
class _Maker:
    """Nodes under construction, with names of their own, and constants shared between them."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    rounded: dict[str, str] = field(default_factory=dict)

    def add(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append a node; returns its output's name."""
        from onnx import helper

        output = f"probe.{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def number(self, value: float) -> str:
        """A constant."""
        from onnx import numpy_helper

        return self.add("Constant", [], value=numpy_helper.from_array(np.array(value, np.float32)))

    def round(self, name: str, masked: bool) -> str:
        """A tensor through FP16 and back; infinities of masks become the largest number first."""
        if name not in self.rounded:
            source = name
            if masked:
                low, high = self.number(-LARGEST), self.number(LARGEST)
                source = self.add("Where", [self.is_number(name), name, self.add("Clip", [name, low, high])])
            half = self.add("Cast", [source], to=10)
            self.rounded[name] = self.add("Cast", [half], to=1)
        return self.rounded[name]

    def is_number(self, name: str) -> str:
        """Where a tensor does not stand for infinity; NaN is told as a number, to be found later."""
        return self.add("Not", [self.add("GreaterOrEqual", [self.add("Abs", [name]), self.number(INFINITE)])])


@dataclass(frozen=True, slots=True)
class Probe:
    """What is measured of one layer: the names of the outputs that say it.

    Attributes:
        layer: The layer.
        tensor: Its output.
        largest: The largest magnitude of its output.
        length: The output's Euclidean length, over `largest`.
        lost: The length of what FP16 changes in it, over `largest`; empty where it is only looked at.
        inner: The largest statistic formed inside: a variance, a sum of exponentials; or empty.
    """

    layer: str
    tensor: str
    largest: str
    length: str
    lost: str = ""
    inner: str = ""

    @property
    def outputs(self) -> list[str]:
        """All of the names."""
        return [name for name in (self.largest, self.length, self.lost, self.inner) if name]


def seams(graph: Graph) -> list[str]:
    """The FP32 tensors that the network reads from outside: cast to FP16 where they enter."""
    nodes = graph.model.graph.node
    made = {name for index in graph.region for name in nodes[index].output}
    read = {name for index in graph.region for name in nodes[index].input}
    return sorted((read & graph.floats) - made - set(graph.constants))


def probed(
    graph: Graph, layers: Sequence[onnx.NodeProto], watched: Sequence[str] = ()
) -> tuple[bytes, list[Probe]]:
    """A graph that measures some layers and gives nothing else.

    Args:
        graph: The FP32 graph.
        layers: Nodes of it to measure.
        watched: Tensors that are only looked at.

    Returns:
        The model, to be opened beside the weights of the graph, and what its outputs are.
    """
    maker = _Maker()
    probes = [_watch(maker, name, name, name in graph.masked) for name in watched]
    probes += [
        _measure(maker, graph, node, name) for node in layers for name in node.output if name in graph.floats
    ]
    return _assemble(graph, maker.nodes, [name for probe in probes for name in probe.outputs]), probes


def _watch(maker: _Maker, layer: str, name: str, masked: bool) -> Probe:
    source = _numbers(maker, name, masked, name)
    largest = maker.add("ReduceMax", [maker.add("Abs", [source])], keepdims=0)
    scale = maker.add("Max", [largest, maker.number(TINY)])
    length = maker.add("ReduceL2", [maker.add("Div", [source, scale])], keepdims=0)
    return Probe(layer, name, largest, length)


def _numbers(maker: _Maker, name: str, masked: bool, judge: str) -> str:
    """A tensor with 0 where `judge` stands for infinity."""
    if not masked:
        return name
    return maker.add("Where", [maker.is_number(judge), name, maker.number(0)])


def _measure(maker: _Maker, graph: Graph, node: onnx.NodeProto, name: str) -> Probe:
    """Measure one layer, and what the same layer gives in FP16."""
    from onnx import NodeProto

    seen = _watch(maker, layer_name(node), name, name in graph.masked)
    half = NodeProto()
    half.CopyFrom(node)
    stays = FLOAT_INPUTS.get(node.op_type, ())
    for position, source in enumerate(node.input):
        if source in graph.floats and position not in stays:
            half.input[position] = maker.round(source, source in graph.masked)
    half.name = f"probe.{len(maker.nodes)}"
    for position, made in enumerate(node.output):
        half.output[position] = f"{half.name}.{position}" if made else ""
    maker.nodes.append(half)
    result = half.output[list(node.output).index(name)]
    result = maker.round(result, masked=False)
    scale = maker.add("Max", [seen.largest, maker.number(TINY)])
    change = maker.add("Sub", [result, name])
    change = _numbers(maker, change, name in graph.masked, name)
    lost = maker.add("ReduceL2", [maker.add("Div", [change, scale])], keepdims=0)
    return Probe(seen.layer, name, seen.largest, seen.length, lost, _inner(maker, node))


def _inner(maker: _Maker, node: onnx.NodeProto) -> str:
    """The largest number that a layer forms inside and rounds to FP16 on its way."""
    from onnx import numpy_helper

    if node.op_type not in (*NORMALIZATIONS, "Softmax"):
        return ""
    first = 2 if node.op_type == "InstanceNormalization" else -1
    axis = next((each.i for each in node.attribute if each.name == "axis"), first)
    if node.op_type == "InstanceNormalization":  # over all but samples and channels
        rows = maker.add("Flatten", [node.input[0]], axis=axis)
        axis = 1
    else:
        rows = node.input[0]
    axes = maker.add("Constant", [], value=numpy_helper.from_array(np.array([axis], np.int64)))
    if node.op_type == "Softmax":
        peak = maker.add("ReduceMax", [rows, axes])
        powers = maker.add("Exp", [maker.add("Sub", [rows, peak])])
        return maker.add("ReduceMax", [maker.add("ReduceSum", [powers, axes])], keepdims=0)
    apart = maker.add("Sub", [rows, maker.add("ReduceMean", [rows, axes])])
    squares = maker.add("Mul", [apart, apart])
    return maker.add("ReduceMax", [maker.add("ReduceMean", [squares, axes])], keepdims=0)


def rounded(graph: Graph, spec: StageSpec, keep: Collection[str]) -> bytes:
    """The whole graph as FP16 would compute it, in FP32 with roundings.

    Args:
        graph: The FP32 graph.
        spec: The stage's boundary.
        keep: Names of layers that stay FP32.

    Returns:
        The model, to be opened beside the weights of the graph; same inputs and outputs.
    """
    from onnx import NodeProto

    source = graph.model.graph
    region = network(source, spec, keep)
    maker = _Maker()
    halves: set[str] = set()
    for index, original in enumerate(source.node):
        node = NodeProto()
        node.CopyFrom(original)
        stays = FLOAT_INPUTS.get(node.op_type, ())
        for position, name in enumerate(node.input):
            enters = index in region and name in graph.floats and position not in stays
            if enters or name in halves:
                node.input[position] = maker.round(name, name in graph.masked)
        maker.nodes.append(node)
        if index in region:
            halves.update(name for name in node.output if name in graph.floats)
    outputs = [output.name for output in source.output]
    for name in halves.intersection(outputs):
        result = maker.round(name, name in graph.masked)
        exact = f"{name}.exact"
        for node in maker.nodes:
            for names in (node.input, node.output):
                for position, each in enumerate(names):
                    names[position] = exact if each == name else each
        maker.nodes.append(_named("Identity", result, name))
    return _assemble(graph, maker.nodes, outputs, whole=True)


def _named(operator: str, source: str, output: str) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node(operator, [source], [output], name=output)


def _assemble(
    graph: Graph, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str], *, whole: bool = False
) -> bytes:
    """A model of the graph's nodes and more, reduced to what its outputs need."""
    from onnx import ModelProto, ValueInfoProto

    model = ModelProto()
    model.CopyFrom(graph.model)
    if not whole:
        nodes = [*graph.model.graph.node, *nodes]
    needed, wanted = [], set(outputs)
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            needed.append(node)
            wanted.update(node.input)
    body = model.graph
    weights = [tensor for tensor in body.initializer if tensor.name in wanted]
    del body.node[:], body.output[:], body.initializer[:], body.value_info[:]
    body.node.extend(reversed(needed))
    body.initializer.extend(weights)
    for name in outputs:
        body.output.append(ValueInfoProto(name=name))  # ONNX Runtime knows the types
    return bytes(model.SerializeToString())
