"""A graph as the kernels that TensorRT's compiler makes of it: what is read, what is kept in memory.

The rules were read off the fused layers that TensorRT-RTX 1.7 lists: element-wise operators run inside
the kernel before them, attention is one kernel and its scores are never stored, a product whose
result is split becomes one product per part, reshapes and casts are free. A LayerNormalization whose
result is moved keeps it in FP32 for the kernel that moves it. Knows no sizes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reelrt.engines.graph_operations import Links, Operation, operations_of
from reelrt.engines.graph_shapes import Tensor

if TYPE_CHECKING:
    import onnx

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
class Copy:
    """A tensor that the graph does not have and the compiler adds.

    Attributes:
        of: The graph's tensor that has as many elements.
        fp32: Whether it is FP32 in every precision.
    """

    of: str
    fp32: bool


@dataclass(frozen=True, slots=True)
class Kernels:
    """A graph's kernels in the order they run, the tensors that are the caller's, and those added."""

    order: Sequence[Kernel]
    outside: frozenset[str]
    copies: Mapping[str, Copy]


def kernels(model: onnx.ModelProto, tensors: Mapping[str, Tensor], batch: int = 1) -> Kernels:
    """Group a graph's nodes into kernels.

    Args:
        model: A flat graph, its nodes in order.
        tensors: Its tensors, as `tensor_shapes` gives them.
        batch: Videos at once at these sizes. Engines are tuned for one, and the compiler decides by that.
    """
    found, root = operations_of(model, tensors)
    outside = frozenset(root(value.name) for value in (*model.graph.input, *model.graph.output))
    found = _join_attention(found, tensors)
    found = _part_products(found, tensors, batch)
    found = _place_parts(found)
    found, copies = _move_norms(found)
    main = max(model.graph.input, key=lambda value: tensors[value.name].elements).name
    return Kernels(_side_first(_group(found, outside), main), outside, copies)


def _join_attention(operations: list[Operation], tensors: Mapping[str, Tensor]) -> list[Operation]:
    """MatMul, Softmax, MatMul as one operation, with the scaling, the mask and the transposes around it."""
    links = Links(operations)
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


def _passes(operation: Operation, links: Links) -> bool:
    """Whether attention reads an operation's input instead of its result: a transpose or a factor."""
    alone = len(operation.inputs) == 1 and links.only_user(operation.outputs[0]) is not None
    return alone and operation.kind in ("Transpose", "Mul")


def _part_products(operations: list[Operation], tensors: Mapping[str, Tensor], batch: int) -> list[Operation]:
    """A product whose result, with a bias added, is only split: one product per part, the last part first.

    The parts' order is the compiler's for a gated layer, which stores its gate and forms the product
    with it while it multiplies. It does not do that from `WHOLE` elements on.
    """
    links = Links(operations)
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
    links = Links(operations)
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


def _move_norms(operations: list[Operation]) -> tuple[list[Operation], dict[str, Copy]]:
    """A LayerNormalization whose result is moved is two kernels, and FP32 between them.

    It is moved where it is split, and where tokens that a transpose made enter attention: the compiler
    puts off the tokens' reordering until after the norm, and then reorders for the residual a second time.
    """
    links = Links(operations)
    place = {id(each): index for index, each in enumerate(operations)}
    copies: dict[str, Copy] = {}
    made: list[Operation] = []
    renamed: dict[tuple[int, str], str] = {}
    late: dict[int, Operation] = {}
    for each in operations:
        names = [renamed.get((id(each), name), name) for name in each.inputs]
        made.append(Operation(each.kind, names, each.outputs))
        if id(each) in late:
            made.append(late[id(each)])
        if each.kind != "LayerNormalization":
            continue
        source, result = each.inputs[0], each.outputs[0]
        wide, again = f"{result} in FP32", f"{source} reordered"
        attention = _attention_after(result, links) if _reordered(source, links) else None
        split = links.only_user(result)
        if split is not None and split.kind == "Split":
            made[-1].outputs = [wide]
            renamed[id(split), result] = wide
            copies[wide] = Copy(result, fp32=True)
        elif attention is not None:
            made[-1].outputs = [wide]
            made.append(Operation("Transpose", [wide], [result]))
            copies[wide] = Copy(result, fp32=True)
            residuals = [user for user in links.users[source] if place[id(user)] > place[id(attention)]]
            if residuals:
                late[id(attention)] = Operation("Transpose", [source], [again])
                renamed |= {(id(user), source): again for user in residuals}
                copies[again] = Copy(source, fp32=False)
    return made, copies


def _reordered(name: str, links: Links) -> bool:
    """Whether a tensor is a product, with a bias added, of what a transpose gives."""
    maker = links.maker.get(name)
    while maker is not None and maker.kind == "Add" and len(maker.inputs) == 1:
        maker = links.maker.get(maker.inputs[0])
    before = links.maker.get(maker.inputs[0]) if maker is not None and maker.kind in PRODUCTS else None
    return before is not None and before.kind == "Transpose"


def _attention_after(name: str, links: Links) -> Operation | None:
    """The fused attention among whose queries, keys or values are products of a tensor."""
    for product in links.users[name]:
        user = links.only_user(product.outputs[0]) if product.kind in PRODUCTS else None
        while user is not None and user.kind == "Add" and len(user.inputs) == 1:
            user = links.only_user(user.outputs[0])
        if user is not None and user.kind == ATTENTION:
            return user
    return None


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
