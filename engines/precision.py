"""An FP32 graph as an FP16 one: the network's nodes change, everything around it stays.

What the network is says `reelrt.bundle.layers`; what comes before and after it stays FP32, with casts
at the seam, and so do the layers that the calibration lists. Of a quantised graph the INT8 weights and
zero points stay INT8, and the scales take the type of what they scale. Weights are converted one at a
time from file to file, so a graph of any size fits in memory. Knows no backend.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from reelrt.bundle.layers import FLOAT_INPUTS, QUANTIZERS, layer_name, network
from reelrt.bundle.spec import StageSpec
from reelrt.errors import BackendError

if TYPE_CHECKING:
    import onnx

LARGEST = float(np.finfo(np.float16).max)
INFINITE = 1e30
"""From here on a constant stands for infinity (a mask's -3.4e38): its FP16 counterpart is the largest."""
_ALIGNMENT = 64


def convert(
    source: Path, target: Path, spec: StageSpec, *, keep: Collection[str] = (), boundary: str = "fp16"
) -> Path:
    """Write an FP16 version of a stage's FP32 graph.

    Args:
        source: The FP32 graph, its weights inside or beside it.
        target: The graph to write; its weights go beside it, into `<target>.data`.
        spec: The stage's boundary.
        keep: Names of layers that stay FP32.
        boundary: Precision of the engine: with `fp16` inputs and outputs of dtype `model` become
            float16, else they stay as they are.

    Returns:
        The target.

    Raises:
        BackendError: onnx is not installed, the graph is not a flat one or lacks a layer to keep, or
            a weight has no FP16 counterpart.
    """
    try:
        import onnx
    except ImportError as error:
        raise BackendError(
            "FP16 engines of an FP32 bundle need the package onnx.", "Install it: pip install onnx."
        ) from error
    model = onnx.load(str(source), load_external_data=False)
    if model.functions or any(a.HasField("g") or a.graphs for n in model.graph.node for a in n.attribute):
        raise BackendError(
            f"{source.name} has functions or branches, which the conversion to FP16 does not read.",
            "Export the model with --precision fp16.",
        )
    inferred = onnx.shape_inference.infer_shapes(model)
    floats = _float_tensors(inferred.graph)
    if missing := set(keep) - {layer_name(node) for node in model.graph.node}:
        raise BackendError(
            f"{source.name} has no layer {min(missing)}, which shall stay FP32.",
            "Calibrate this bundle again: the list belongs to another graph.",
        )
    region = network(model.graph, spec, keep)
    halves = {
        name
        for name, tensor in {**spec.inputs, **spec.outputs}.items()
        if tensor.dtype == "model" and boundary == "fp16"
    }
    with target.with_name(f"{target.name}.data").open("wb") as data:
        _rewrite(model.graph, region, floats, halves, Weights(source.parent, data))
    onnx.save(model, str(target))
    return target


def _float_tensors(graph: onnx.GraphProto) -> set[str]:
    """Names of the FP32 tensors."""
    from onnx import TensorProto

    typed = [*graph.input, *graph.output, *graph.value_info]
    names = {value.name for value in typed if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return names | {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}


class Weights:
    """Reads weights wherever they are and appends what becomes of them to one file.

    Args:
        folder: Where the source graph's external data lies.
        data: The file beside the new graph; the caller closes it.
    """

    def __init__(self, folder: Path, data: BinaryIO) -> None:
        self._folder, self._data = folder, data

    def copy(self, tensor: onnx.TensorProto, half: bool, is_scale: bool = False) -> onnx.TensorProto:
        """A tensor, halved or as it is, that lies in the new file."""
        values = self.read(tensor)
        if half:
            values = _halved(values, tensor.name)
        if half and is_scale:  # a channel of zeros may have a scale that FP16 would make 0
            values = np.maximum(values, np.finfo(np.float16).smallest_subnormal)
        return self.write(tensor.name, values)

    def write(self, name: str, values: npt.NDArray[Any]) -> onnx.TensorProto:
        """A tensor of these values that lies in the new file."""
        from onnx import TensorProto, helper

        new = TensorProto()
        new.name, new.data_type = name, helper.np_dtype_to_tensor_dtype(values.dtype)
        new.dims.extend(values.shape)
        if values.nbytes < 1024:
            new.raw_data = values.tobytes()
            return new
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        location = {
            "location": Path(self._data.name).name,
            "offset": self._data.tell(),
            "length": values.nbytes,
        }
        new.data_location = TensorProto.EXTERNAL
        for key, value in location.items():
            new.external_data.add(key=key, value=str(value))
        np.ascontiguousarray(values).tofile(self._data)
        return new

    def read(self, tensor: onnx.TensorProto) -> npt.NDArray[Any]:
        """A tensor's values, mapped when they lie in a file."""
        from onnx import TensorProto, helper, numpy_helper

        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        entry = {item.key: item.value for item in tensor.external_data}
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        shape, path = tuple(tensor.dims), self._folder / entry["location"]
        return np.memmap(path, dtype, "r", int(entry.get("offset", 0)), shape or (1,)).reshape(shape)


def _halved(values: npt.NDArray[np.generic], name: str) -> npt.NDArray[np.float16]:
    """Values in FP16; what stands for infinity becomes the largest number."""
    numbers = np.asarray(values, np.float32)
    if np.isnan(numbers).any():
        raise BackendError(f"weight {name} is not a number in places.", "Export the model again.")
    sizes = np.abs(numbers)
    if ((sizes > LARGEST) & (sizes < INFINITE)).any():
        raise BackendError(
            f"weight {name} reaches {sizes[sizes < INFINITE].max():.4g}, and FP16 ends at {LARGEST:.0f}.",
            "Run `reelrt calibrate --precision fp16`: it finds the layers that must stay FP32.",
        )
    return np.clip(numbers, -LARGEST, LARGEST).astype(np.float16)


def _rewrite(
    graph: onnx.GraphProto, region: set[int], floats: set[str], halves: set[str], weights: Weights
) -> None:
    """Change the graph in place: the region's nodes become FP16, and the inputs and outputs `halves`."""
    from onnx import TensorProto, helper

    initializers = {tensor.name: tensor for tensor in graph.initializer}
    half = {name for index in region for name in graph.node[index].output if name in floats}
    half |= {value.name for value in graph.input if value.name in halves}
    scales = {node.input[1] for node in graph.node if node.op_type in QUANTIZERS}
    nodes: list[onnx.NodeProto] = []
    made: dict[tuple[str, bool], str] = {}
    kept: list[onnx.TensorProto] = []

    def as_type(name: str, wanted_half: bool) -> str:
        """The name under which a float tensor has the wanted type; makes it where needed."""
        if name in initializers:
            if (name, wanted_half) not in made:
                tensor = weights.copy(initializers[name], wanted_half, name in scales)
                if (name, not wanted_half) in made:
                    tensor.name = f"{name}.{'fp16' if wanted_half else 'fp32'}"
                kept.append(tensor)
                made[name, wanted_half] = tensor.name
            return made[name, wanted_half]
        if (name in half) == wanted_half:
            return name
        if (name, wanted_half) not in made:
            made[name, wanted_half] = f"{name}.{'fp16' if wanted_half else 'fp32'}"
            to = TensorProto.FLOAT16 if wanted_half else TensorProto.FLOAT
            nodes.append(helper.make_node("Cast", [name], [made[name, wanted_half]], to=to))
        return made[name, wanted_half]

    for index, node in enumerate(graph.node):
        for position, name in enumerate(node.input):
            if name in floats:
                stays = position in FLOAT_INPUTS.get(node.op_type, ())
                node.input[position] = as_type(name, index in region and not stays)
            elif name in initializers and (name, False) not in made:
                kept.append(weights.copy(initializers[name], half=False))
                made[name, False] = name
        if index in region:
            _retype(node)
        nodes.append(node)
    _restore_outputs(graph, nodes, half, halves)
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    for value in graph.input:
        if value.name in halves:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16


def _retype(node: onnx.NodeProto) -> None:
    """Turn what a network's node itself says of FP32 into FP16."""
    from onnx import TensorProto, helper, numpy_helper

    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        elif attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
            values = _halved(numpy_helper.to_array(attribute.t), node.name)
            attribute.t.CopyFrom(numpy_helper.from_array(values))
        elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            numbers = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            values = _halved(np.asarray(numbers, np.float32), node.name)
            attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(values)))


def _restore_outputs(
    graph: onnx.GraphProto, nodes: list[onnx.NodeProto], half: set[str], halves: set[str]
) -> None:
    """Give the outputs their types, under their own names: `halves` are FP16."""
    from onnx import TensorProto, helper

    for output in graph.output:
        wanted_half = output.name in halves
        if wanted_half:
            output.type.tensor_type.elem_type = TensorProto.FLOAT16
        if output.name in half and not wanted_half:
            to, inner = TensorProto.FLOAT, f"{output.name}.fp16"
        elif wanted_half and output.name not in half:
            to, inner = TensorProto.FLOAT16, f"{output.name}.fp32"
        else:
            continue
        for node in nodes:
            for names in (node.input, node.output):
                for position, name in enumerate(names):
                    if name == output.name:
                        names[position] = inner
        nodes.append(helper.make_node("Cast", [inner], [output.name], to=to))
