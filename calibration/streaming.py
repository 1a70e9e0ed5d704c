"""Q/DQ pairs in a graph that is too large for ModelOpt: weights go one at a time from file to file.

ModelOpt holds a graph's weights several times; here the graph is read without them. What comes out is
what `reelrt.calibration.qdq` makes of ModelOpt's graph: activations with one range per tensor, weights
in INT8 with a scale per output channel. Knows nothing of how the ranges were found.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from reelrt.calibration import qdq
from reelrt.calibration.ranges import Feeds, Method, collect
from reelrt.errors import CalibrationError
from reelrt.progress import Progress, silent

if TYPE_CHECKING:
    import onnx

LEVELS = 127
MIN_CHANNELS = 16
"""TensorRT has INT8 convolutions of fewer channels in special cases only: ModelOpt's rule, repeated here."""
ZERO = "int8.zero"
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Measured:
    """A graph on disk and the ranges of its activations; see `qdq.Quantised`.

    Attributes:
        source: The FP32 graph, its weights beside it.
        ranges: Activation to the largest magnitude that INT8 shall hold.
        nodes: Names of the nodes that can be quantised with them.
    """

    source: Path
    ranges: Mapping[str, float]
    nodes: frozenset[str]

    def write(self, nodes: Collection[str], path: Path) -> int:
        """Write the graph with some nodes quantised; returns the bytes of its weights."""
        import onnx

        model = onnx.load(self.source, load_external_data=False)
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
        with path.with_name(f"{path.name}.data").open("wb") as data:
            _place(model.graph, self.ranges, self.nodes.intersection(nodes), _Weights(self.source, data))
        onnx.save(model, path)
        return qdq.weight_bytes(path)


def measure(
    source: Path,
    nodes: Collection[str],
    feeds: Feeds,
    count: int,
    *,
    method: Method,
    progress: Progress = silent,
    what: str = "ranges",
) -> Measured:
    """Find the ranges of what some nodes read; arguments as `reelrt.calibration.int8.quantise`.

    Raises:
        CalibrationError: None of them can be quantised, or values are not finite.
    """
    import onnx

    graph = onnx.load(source, load_external_data=False).graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    chosen = [
        node for node in qdq.quantisable(graph) if node.name in nodes and _has_int8_arithmetic(node, weights)
    ]
    if not chosen:
        raise CalibrationError(f"no node of {source.name} that was asked for has INT8 arithmetic.")
    tensors = dict.fromkeys(name for node in chosen for name in node.input[:2] if name not in weights)
    ranges = collect(source, list(tensors), feeds, count, method=method, progress=progress, what=what)
    return Measured(source, ranges, frozenset(node.name for node in chosen))


def _has_int8_arithmetic(node: onnx.NodeProto, weights: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether INT8 is worth it; a convolution by ModelOpt's rule, and a weight comes second."""
    if node.input[0] in weights:
        return False
    if node.op_type != "Conv":
        return node.op_type in ("MatMul", "Gemm")
    shape = weights.get(node.input[1])
    if shape is None:
        return False
    outputs, inputs, *kernel = shape
    grouped = any(each.name == "group" and each.i > 1 for each in node.attribute)
    if min(outputs, inputs) >= MIN_CHANNELS:
        return True
    if grouped:
        return outputs % 8 == 0 and min(kernel) >= 3
    return (
        max(outputs, inputs) >= MIN_CHANNELS and (not outputs % 8 or not inputs % 8) and len({*kernel}) == 1
    )


def _place(
    graph: onnx.GraphProto, ranges: Mapping[str, float], chosen: Collection[str], weights: _Weights
) -> None:
    """Change the graph in place."""
    from onnx import helper

    floats = {tensor.name: tensor for tensor in graph.initializer}
    placed: list[onnx.NodeProto] = []
    kept: list[onnx.TensorProto] = [weights.write(ZERO, np.zeros((), np.int8))]
    made: dict[tuple[str, int | None], str] = {}
    for node in graph.node:
        for position, name in enumerate(node.input[:2] if node.name in chosen else ()):
            axis = qdq.channel_axis(node, len(floats[name].dims)) if name in floats else None
            if (name, axis) not in made:
                made[name, axis] = output = f"{name}.dq" if axis is None else f"{name}.dq.{axis}"
                scale = f"{output}.scale"
                stored = f"{output}.int8"
                if axis is None:
                    value = np.array((ranges[name] or LEVELS) / LEVELS, np.float32)
                    both = [scale, ZERO]
                    placed.append(helper.make_node("QuantizeLinear", [name, *both], [stored], name=stored))
                    pair = helper.make_node("DequantizeLinear", [stored, *both], [output], name=output)
                else:
                    value, numbers = _int8(weights.read(floats[name]), axis)
                    kept.append(weights.write(stored, numbers))
                    pair = helper.make_node("DequantizeLinear", [stored, scale], [output], name=output)
                    pair.attribute.append(helper.make_attribute("axis", axis))
                kept.append(weights.write(scale, value))
                placed.append(pair)
            node.input[position] = made[name, axis]
        placed.append(node)
    used = {name for node in placed for name in node.input} | {value.name for value in graph.output}
    kept += [weights.write(name, weights.read(each)) for name, each in floats.items() if name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(placed)
    graph.initializer.extend(kept)


def _int8(values: npt.NDArray[Any], axis: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int8]]:
    """The scale of each channel, and the weight in INT8."""
    others = tuple(each for each in range(values.ndim) if each != axis)
    largest = np.abs(values).max(axis=others)
    scale = np.where(largest > 0, largest / LEVELS, 1).astype(np.float32)
    return scale, qdq.to_int8(values, scale, axis)


class _Weights:
    """Reads weights from beside one graph and appends them to the file beside another."""

    def __init__(self, source: Path, data: BinaryIO) -> None:
        self._folder, self._data = str(source.parent), data

    def read(self, tensor: onnx.TensorProto) -> npt.NDArray[Any]:
        from onnx import numpy_helper

        return numpy_helper.to_array(tensor, self._folder)

    def write(self, name: str, values: npt.NDArray[Any]) -> onnx.TensorProto:
        from onnx import TensorProto, helper, numpy_helper

        if values.nbytes < 1024:
            return numpy_helper.from_array(values, name)
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        tensor = TensorProto(
            name=name,
            dims=values.shape,
            data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        place = {
            "location": Path(self._data.name).name,
            "offset": self._data.tell(),
            "length": values.nbytes,
        }
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        np.ascontiguousarray(values).tofile(self._data)
        return tensor
