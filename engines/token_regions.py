"""The transformers in an exported graph: where tokens begin, what works on them, where they end.

Recognises what `reelrt.export` writes and nothing else. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

Node = Any
"""An `ir.Node`. The patterns here take any node and tell by its kind what inputs it must have."""
Value = Any
"""An `ir.Value`."""

_BY_ROW = ("MatMul", "LayerNormalization", "Add", "Sub", "Mul", "Div", "Erf", "Sigmoid", "Tanh")


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """Where cells or frames become tokens.

    Attributes:
        tokens: The tokens [N, T, D].
        node: The Transpose on the way there.
        frames: Whether tokens are frames, transposed first and reshaped then.
    """

    tokens: Value
    node: Node
    frames: bool


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """An attention in plain operators.

    Attributes:
        query: [N, T, heads * d], as the other two.
        key: The same or, for all of a video's frames, one context.
        value: As the key.
        out: What comes of it.
        nodes: All of it.
        heads: Number of heads.
        width: Values per head.
        scale: Factor of the query.
        context: Whether keys and values are one context.
    """

    query: Value
    key: Value
    value: Value
    out: Value
    nodes: Sequence[Node]
    heads: int
    width: int
    scale: float
    context: bool


@dataclass(slots=True, eq=False)
class Region:
    """The tokens of one transformer, and what becomes of them.

    Attributes:
        entry: Where they come from.
        nodes: What works on each token by itself, in order.
        attentions: In order.
        exits: The nodes by which they turn into cells or frames again.
    """

    entry: Entry
    nodes: list[Node] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    exits: list[Node] = field(default_factory=list)


def regions(graph: ir.Graph, batch: str | None) -> list[Region]:
    """Every transformer of a graph that consists of known parts.

    Args:
        graph: The graph.
        batch: Name of its batch axis, if it has one.
    """
    attentions = [found for node in graph if (found := _attention(node)) is not None]
    entries = [entry for node in graph if (entry := _entry(node)) is not None]
    followed = [_follow(graph, entry, attentions, batch) for entry in entries]
    return [region for region in followed if region is not None]


def is_a(node: Node, kind: str, perm: Sequence[int] = ()) -> bool:
    """Whether there is a node, of that kind, that transposes so."""
    if node is None or node.op_type != kind:
        return False
    return not perm or list(node.attributes["perm"].as_ints()) == list(perm)


def constant(value: Value) -> npt.NDArray[Any] | None:
    """A constant as an array; None when it is none."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def only_user(value: Value) -> Node:
    """The node that alone uses a value; None when there are others."""
    users = value.consumers()
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _entry(node: Node) -> Entry | None:
    if is_a(node, "Transpose", (0, 2, 1)) and is_a(made := node.inputs[0].producer(), "Reshape"):
        sizes = constant(made.inputs[1])
        if sizes is not None and sizes.tolist() == [0, 0, -1]:
            return Entry(node.outputs[0], node, frames=False)
    if is_a(node, "Transpose", (0, 3, 2, 1)) and is_a(reshape := only_user(node.outputs[0]), "Reshape"):
        shape = reshape.outputs[0].shape
        return Entry(reshape.outputs[0], node, frames=True) if shape is not None and len(shape) == 3 else None
    return None


def _attention(softmax: Node) -> Attention | None:
    """The attention around a Softmax, as `reelrt.export.operators.attend` writes it."""
    if not is_a(softmax, "Softmax"):
        return None
    scores, weighted = softmax.inputs[0].producer(), only_user(softmax.outputs[0])
    if not is_a(scores, "MatMul") or not is_a(weighted, "MatMul"):
        return None
    places = (
        (scores.inputs[0], (0, 2, 1, 3)),
        (scores.inputs[1], (0, 2, 3, 1)),
        (weighted.inputs[1], (0, 2, 1, 3)),
    )
    turns = [value.producer() for value, perm in places if is_a(value.producer(), "Transpose", perm)]
    splits = [made for turn in turns if is_a(made := turn.inputs[0].producer(), "Reshape")]
    back = only_user(weighted.outputs[0])
    if len(splits) != 3 or not is_a(back, "Transpose", (0, 2, 1, 3)):
        return None
    join, scaled = only_user(back.outputs[0]), splits[0].inputs[0].producer()
    sizes = [constant(split.inputs[1]) for split in splits]
    if (
        not is_a(join, "Reshape")
        or not is_a(scaled, "Mul")
        or sizes[1] is None
        or sizes[1][:2].tolist() != [0, -1]
    ):
        return None
    factor = constant(scaled.inputs[1])
    if factor is None or factor.size != 1:
        return None
    return Attention(
        query=scaled.inputs[0],
        key=splits[1].inputs[0],
        value=splits[2].inputs[0],
        out=join.outputs[0],
        nodes=(scaled, *splits, *turns, scores, softmax, weighted, back, join),
        heads=int(sizes[1][2]),
        width=int(sizes[1][3]),
        scale=float(factor.reshape(())),
        context=sizes[0] is None,
    )


def _follow(
    graph: ir.Graph, entry: Entry, attentions: Sequence[Attention], batch: str | None
) -> Region | None:
    """Follow tokens until they are tokens no more; None where they meet anything unknown."""
    into, members, inside = Region(entry), {entry.tokens}, set[Node]()
    waiting = [entry.tokens]
    of_node = {node: found for found in attentions for node in found.nodes}
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return None
        for node in value.consumers():
            if node in inside:
                continue
            inside.add(node)
            if (attention := of_node.get(node)) is not None:
                if attention not in into.attentions:
                    into.attentions.append(attention)
                    inside.update(attention.nodes)
                    out = attention.out
                    waiting.append(out)
                    members.add(out)
            elif _is_by_row(node):
                into.nodes.append(node)
                waiting.append(node.outputs[0])
                members.add(node.outputs[0])
            elif _exit(node, entry.frames):
                into.exits.append(node)
            elif not (is_a(node, "Shape") and all(user in of_node for user in node.outputs[0].consumers())):
                return None
    whole = all(
        value in members
        or ((rank := rank_of(value)) is not None and rank <= (2 if node.op_type == "MatMul" else 1))
        for node in into.nodes
        for value in node.inputs
        if value is not None
    )
    joined = all(
        found.query in members
        and all((value in members) != found.context for value in (found.key, found.value))
        for found in into.attentions
    )
    # Frames of several videos, or several contexts, are not told apart: it has to be one.
    single = [found.key for found in into.attentions if found.context]
    single += [entry.node.inputs[0]] if entry.frames else []
    alone = all(value.shape is not None and str(value.shape[0]) == batch for value in single)
    deep = all(depth(value) for value in (entry.tokens, *(node.inputs[0] for node in into.exits)))
    order = {node: index for index, node in enumerate(graph)}
    into.nodes.sort(key=order.__getitem__)
    into.attentions.sort(key=lambda found: order[found.nodes[-1]])
    return into if whole and joined and alone and deep and into.exits else None


def depth(tokens: Value) -> int:
    """Values per token; 0 where the graph does not say."""
    last = None if tokens.shape is None else tokens.shape[-1]
    return last if isinstance(last, int) else 0


def rank_of(value: Value) -> int | None:
    """Of a constant."""
    array = constant(value)
    return None if array is None else array.ndim


def _is_by_row(node: Node) -> bool:
    """Whether an operator works on the last dimension of its first input alone."""
    if node.op_type == "LayerNormalization":
        return "axis" not in node.attributes or node.attributes["axis"].as_int() == -1
    if node.op_type == "MatMul":
        return rank_of(node.inputs[1]) == 2
    return node.op_type in _BY_ROW


def _exit(node: Node, frames: bool) -> bool:
    """Whether tokens become cells [N, D, S] or frames again here."""
    if not frames:
        return is_a(node, "Transpose", (0, 2, 1))
    volume = only_user(node.outputs[0])
    if not is_a(node, "Reshape") or not is_a(volume, "Transpose", (0, 3, 2, 1)):
        return False
    turned = only_user(volume.outputs[0])
    reshaped: Node = only_user(turned.outputs[0]) if is_a(turned, "Transpose", (0, 2, 1, 3)) else None
    return is_a(reshaped, "Reshape") and constant(reshaped.inputs[1]) is None
