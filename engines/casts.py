"""Moves the cast to uint8 to a graph's very end, where TensorRT takes it.

TensorRT knows uint8 at its outputs only, while an exported graph may still transpose or reshape its
frames after the cast. The order makes no difference to the values.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from reelrt.bundle.spec import StageSpec

if TYPE_CHECKING:
    import onnx

MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
"""Operators that move values and change none."""


def cast_last(source: Path, scratch: Path, spec: StageSpec) -> Path:
    """A graph whose uint8 outputs are cast last.

    Args:
        source: The graph.
        scratch: Folder for the changed graph; the weights are copied into it.
        spec: The stage's boundary, which says what outputs are uint8.

    Returns:
        The changed graph, or the source when there is nothing to change.
    """
    names = [name for name, tensor in spec.outputs.items() if tensor.dtype == "uint8"]
    if not names:
        return source
    import onnx

    model = onnx.load(str(source), load_external_data=False)
    moved = [_sink(model.graph, name) for name in names]
    if not any(moved):
        return source
    target = scratch / f"cast-last-{source.name}"
    onnx.save(model, str(target))
    for weights in _weight_files(model.graph):
        if not (scratch / weights).exists():  # a converted graph stands in the scratch folder itself
            # No link: onnx refuses weights that are one. Only decoders come here, which are small.
            shutil.copyfile(source.parent / weights, scratch / weights)
    return target


def _sink(graph: onnx.GraphProto, output: str) -> bool:
    """Swap an output's cast with the moves after it; whether there were any."""
    from onnx import TensorProto, helper

    makers = {name: node for node in graph.node for name in node.output}
    uses = [name for node in graph.node for name in node.input]
    moves: list[onnx.NodeProto] = []
    node = makers[output]
    while node.op_type in MOVES and node.input[0] in makers and uses.count(node.input[0]) == 1:
        moves.append(node)
        node = makers[node.input[0]]
    to = {attribute.name: attribute.i for attribute in node.attribute}.get("to")
    if not moves or node.op_type != "Cast" or to != TensorProto.UINT8:
        return False
    moves[-1].input[0] = node.input[0]
    moves[0].output[0] = f"{output}.uncast"
    graph.node.remove(node)
    graph.node.append(helper.make_node("Cast", [f"{output}.uncast"], [output], to=TensorProto.UINT8))
    moved = {name for move in moves for name in move.output}
    kept = [value for value in graph.value_info if value.name not in moved]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    return True


def _weight_files(graph: onnx.GraphProto) -> set[str]:
    entries = (entry for tensor in graph.initializer for entry in tensor.external_data)
    return {entry.value for entry in entries if entry.key == "location"}
