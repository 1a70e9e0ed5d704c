"""A graph as the kernels that TensorRT's compiler makes of it: what is read, what is kept in memory.

The rules were read off the fused layers that TensorRT-RTX 1.7 lists: element-wise operators run inside
the kernel before them, attention is one kernel and its scores are never stored, a product whose
result is split becomes one product per part, reshapes and casts are free. Knows no sizes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reelrt.engines.graph_shapes import Tensor

if TYPE_CHECKING:
    import onnx

VIEWS = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"))
"""Operators that move nothing: the result is the same memory under another shape."""
MOVES = frozenset(("Transpose", "Slice", "Split", "Expand", "Gather", "GatherElements", "GatherND", "Pad"))
"""Operators that only move values. They do not run inside the kernel of a product or a norm."""
PRODUCTS = frozenset(("Conv", "ConvTranspose", "MatMul", "Gemm"))
ATTENTION = "Attention"
HEAVY = PRODUCTS | {ATTENTION, "InstanceNormalization", "GroupNormalization", "LayerNormalization", "Resize"}
"""Operators that begin a kernel."""
WHOLE = 1 << 28
"""A product of so many elements at the tuned size is stored whole, even if it is only split (bisected)."""
REDUCTIONS = frozenset(("Softmax", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"))


@dataclass(slots=True)
class Operation:
    """One operator: its kind and the tensors that are memory of their own."""

    kind: str
    inputs: list[str]
    outputs: list[str]


@dataclass(slots=True)
class Kernel:
    """Operations that run as one.

    Attributes:
        kinds: Their kinds, in order.
        reads: Tensors it reads from memory.
        writes: Tensors it writes that another kernel, or the caller, reads.
    """

    kinds: list[str] = field(default_factory=list)
    reads: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Kernels:
    """A graph's kernels in the order they run, and the tensors that are the caller's."""

    order: Sequence[Kernel]
    outside: frozenset[str]


def kernels(model: onnx.ModelProto, tensors: Mapping[str, Tensor], batch: int = 1) -> Kernels:
    """Group a graph's nodes into kernels.

    Args:
        model: A flat graph, its nodes in order.
        tensors: Its tensors, as `tensor_shapes` gives them.
        batch: Videos at once at these sizes. Engines are tuned for one, and the compiler decides by that.
    """
    operations, root = _operations(model, tensors)
    outside = frozenset(root(value.name) for value in (*model.graph.input, *model.graph.output))
    operations = _join_attention(operations, tensors)
    operations = _part_products(operations, tensors, batch)
    operations = _place_parts(operations)
    main = max(model.graph.input, key=lambda value: tensors[value.name].elements).name
    return Kernels(_side_first(_group(operations, outside), main), outside)


def _operations(
    model: onnx.ModelProto, tensors: Mapping[str, Tensor]
) -> tuple[list[Operation], Callable[[str], str]]:
    """What is left without constants and without what moves nothing."""
    root = _Root()
    operations = []
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
        operations.append(Operation(node.op_type, inputs, [name for name in node.output if name]))
    return operations, root


class _Root:
    """The tensor whose memory a tensor is."""

    def __init__(self) -> None:
        self._aliases: dict[str, str] = {}

    def alias(self, name: str, of: str) -> None:
        self._aliases[name] = self(of)

    def __call__(self, name: str) -> str:
        return self._aliases.get(name, name)


class _Links:
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


def _join_attention(operations: list[Operation], tensors: Mapping[str, Tensor]) -> list[Operation]:
    """MatMul, Softmax, MatMul as one operation, with the scaling, the mask and the transposes around it."""
    links = _Links(operations)
    gone: set[int] = set()
    for softmax in operations:
        last = links.only_user(softmax.outputs[0]) if softmax.kind == "Softmax" else None
        if last is None or last.kind != "MatMul":
            continue
        inner, masks = [softmax], []
        scores = links.maker.get(softmax.inputs[0])
        while scores is not None and scores.kind != "MatMul" and links.only_user(scores.outputs[0]):
            inner.append(scores)
            same = [n for n in scores.inputs if tensors[n].elements == tensors[scores.outputs[0]].elements]
            masks += [name for name in scores.inputs if name not in same[:1]]
            scores = links.maker.get(same[0]) if same else None
        if scores is None or scores.kind != "MatMul":
            continue
        sources = [*scores.inputs, *(name for name in last.inputs if name != softmax.outputs[0])]
        reads = []
        for name in sources:
            maker = links.maker.get(name)
            while maker and _passes(maker, links):
                gone.add(id(maker))
                maker = links.maker.get(name := maker.inputs[0])
            reads.append(name)
        after = links.only_user(last.outputs[0])
        if after is not None and after.kind == "Transpose":
            gone.add(id(after))
            last.outputs = after.outputs
        gone.update(map(id, (*inner, scores)))
        last.kind, last.inputs = ATTENTION, [*reads, *masks]
    return [each for each in operations if id(each) not in gone]


def _passes(operation: Operation, links: _Links) -> bool:
    """Whether attention reads an operation's input instead of its result: a transpose or a factor."""
    alone = len(operation.inputs) == 1 and links.only_user(operation.outputs[0]) is not None
    return alone and operation.kind in ("Transpose", "Mul")


def _part_products(operations: list[Operation], tensors: Mapping[str, Tensor], batch: int) -> list[Operation]:
    """A product whose result, with a bias added, is only split: one product per part, the last part first.

    The parts' order is the compiler's for a gated layer, which stores its gate and forms the product
    with it while it multiplies. It does not do that from `WHOLE` elements on.
    """
    links = _Links(operations)
    gone: set[int] = set()
    parts: dict[int, list[str]] = {}
    for split in operations:
        if split.kind != "Split" or tensors[split.inputs[0]].elements >= WHOLE * batch:
            continue
        between, maker = [split], links.maker.get(split.inputs[0])
        while maker and links.only_user(maker.outputs[0]) and maker.kind == "Add" and len(maker.inputs) == 1:
            between.append(maker)
            maker = links.maker.get(maker.inputs[0])
        if maker and maker.kind in ("MatMul", "Gemm") and links.only_user(maker.outputs[0]):
            gone.update(map(id, between))
            parts[id(maker)] = split.outputs
    made: list[Operation] = []
    for each in operations:
        if id(each) in parts:
            made += [Operation(each.kind, each.inputs, [name]) for name in reversed(parts[id(each)])]
        elif id(each) not in gone:
            made.append(each)
    return made


def _place_parts(operations: list[Operation]) -> list[Operation]:
    """A Concat of a convolution's result is no operation: its parts are written into the whole at once.

    So the whole is there from the first part on, which for a skip connection is long before the second.
    """
    links = _Links(operations)
    whole: dict[str, str] = {}
    gone: set[int] = set()
    for each in operations:
        made = [links.maker.get(name) for name in each.inputs]
        direct = any(m is not None and m.kind == "Conv" and links.only_user(m.outputs[0]) for m in made)
        if each.kind == "Concat" and direct and all(m is not None for m in made):
            gone.add(id(each))
            whole.update(dict.fromkeys(each.inputs, each.outputs[0]))
    return [
        Operation(
            each.kind,
            [whole.get(name, name) for name in each.inputs],
            [whole.get(name, name) for name in each.outputs],
        )
        for each in operations
        if id(each) not in gone
    ]


def _group(operations: Sequence[Operation], outside: frozenset[str]) -> list[Kernel]:
    """Let every element-wise operation join the kernel that made the last of its inputs."""
    made: list[Kernel] = []
    home: dict[str, int] = {}
    makers_of: defaultdict[str, list[int]] = defaultdict(list)
    for each in operations:
        makers = [home[name] for name in each.inputs if name in home]
        latest = max(makers) if makers else None
        if latest is None or not _joins(each, made[latest]):
            made.append(Kernel())
            latest = len(made) - 1
        kernel = made[latest]
        kernel.kinds.append(each.kind)
        kernel.reads.update(name for name in each.inputs if home.get(name) != latest)
        for name in each.outputs:
            home[name] = latest
            makers_of[name].append(latest)
    read = {name for kernel in made for name in kernel.reads}
    for name in (read | outside) & home.keys():
        for index in makers_of[name]:
            made[index].writes.add(name)
    return made


def _side_first(order: Sequence[Kernel], main: str) -> list[Kernel]:
    """Run first what does not depend on the main input: time embeddings, keys and values of the text."""
    fed = {main}
    for kernel in order:
        if not fed.isdisjoint(kernel.reads):
            fed |= kernel.writes
    return sorted(order, key=lambda kernel: not fed.isdisjoint(kernel.reads))


def _joins(operation: Operation, kernel: Kernel) -> bool:
    if operation.kind in HEAVY or operation.kind in REDUCTIONS:
        return False
    light = not HEAVY.intersection(kernel.kinds)
    return light if operation.kind in MOVES or operation.kind == "Concat" else True
