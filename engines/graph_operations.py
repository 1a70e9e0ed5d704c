"""A graph as operations on tensors that are memory of their own, and who makes and uses each of them.

Constants are left out, and so is what moves nothing. Knows no kernels and no sizes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reelrt.engines.graph_shapes import Tensor

if TYPE_CHECKING:
    import onnx

VIEWS = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"))
"""Operators that move nothing: the result is the same memory under another shape."""


@dataclass(slots=True)
class Operation:
    """One operator: its kind and the tensors that are memory of their own."""

    kind: str
    inputs: list[str]
    outputs: list[str]


def operations_of(
    model: onnx.ModelProto, tensors: Mapping[str, Tensor]
) -> tuple[list[Operation], Callable[[str], str]]:
    """What is left without constants and without what moves nothing."""
    root = _Root()
    found = []
    for node in model.graph.node:
        if all(tensors[name].constant for name in node.output if name):
            continue
        first = tensors[node.input[0]]
        between_floats = node.op_type == "Cast" and first.floating and tensors[node.output[0]].floating
        quantised = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        if node.op_type in VIEWS or between_floats or quantised:
            root.alias(node.output[0], node.input[0])
            continue
        inputs = [root(name) for name in node.input if name and not tensors[root(name)].constant]
        found.append(Operation(node.op_type, inputs, [name for name in node.output if name]))
    return found, root


class _Root:
    """The tensor whose memory a tensor is."""

    def __init__(self) -> None:
        self._aliases: dict[str, str] = {}

    def alias(self, name: str, of: str) -> None:
        self._aliases[name] = self(of)

    def __call__(self, name: str) -> str:
        return self._aliases.get(name, name)


class Links:
    """Who makes a tensor and who uses it."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.maker = {name: each for each in operations for name in each.outputs}
        self.users: defaultdict[str, list[Operation]] = defaultdict(list)
        for each in operations:
            for name in each.inputs:
                self.users[name].append(each)

    def only_user(self, name: str) -> Operation | None:
        """The one operation that uses a tensor; None when there are several, or none."""
        users = self.users[name]
        return users[0] if len(users) == 1 else None
