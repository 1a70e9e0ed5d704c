"""What a stage costs to run at given sizes: arithmetic, bytes moved, memory held by activations.

An estimate made from the ONNX file alone, with no builder and no GPU: the graph's kernels are walked in
order and what is alive is added up. How far it is from the builder's own figures is measured by
`benchmarks/plan_accuracy.py`. Knows no board and no policy.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reelrt.bundle.spec import StageSpec
from reelrt.engines.graph_kernels import PRODUCTS, Kernel, Kernels, kernels
from reelrt.engines.graph_shapes import Tensor, tensor_shapes

if TYPE_CHECKING:
    import onnx

PRECISIONS = ("fp32", "fp16", "int8-weights", "int8")
WORKSPACE_BYTES = 8 << 20
"""Scratch that TensorRT-RTX 1.7 adds to a stage for each of its streams; the smallest graph shows it."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run of a stage costs.

    Attributes:
        flops: Multiplications and additions of Conv, MatMul and Gemm: two for each pair.
        weight_bytes: Its weights, in the precision they run in.
        largest_weight_bytes: The largest single weight.
        boundary_bytes: Its inputs and outputs.
        kernel_bytes: What its kernels read and write, weights included, if nothing stays in a cache.
        activation_bytes: Most that is alive at once, workspace included, inputs and outputs not.
    """

    flops: int
    weight_bytes: int
    largest_weight_bytes: int
    boundary_bytes: int
    kernel_bytes: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class SizedGraph:
    """A stage's graph at given sizes; costs in any precision are made from it.

    Attributes:
        model: The graph.
        spec: Its boundary.
        sizes: Size of each named axis.
        tensors: Every tensor, by name.
        kernels: What runs as one.
    """

    model: onnx.ModelProto
    spec: StageSpec
    sizes: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    kernels: Kernels


def sized_graph(model: onnx.ModelProto, spec: StageSpec, sizes: Mapping[str, int]) -> SizedGraph:
    """Infer a graph's shapes and group its nodes.

    Args:
        model: The graph; weights may be missing.
        spec: Its boundary.
        sizes: Size of each named axis.

    Raises:
        BackendError: A shape cannot be inferred.
    """
    tensors = tensor_shapes(model, spec, sizes)
    return SizedGraph(model, spec, sizes, tensors, kernels(model, tensors, sizes.get("batch", 1)))


def graph_cost(sized: SizedGraph, precision: str, stored: str) -> Cost:
    """Estimate one run of a stage.

    Args:
        sized: Its graph at the sizes it runs at.
        precision: What it shall run in, one of `PRECISIONS`. With `int8` and `int8-weights` the weights of
            products take a byte per element; activations are counted as FP16.
        stored: The precision of the graph's own weights.
    """
    model, spec, sizes, tensors = sized.model, sized.spec, sized.sizes, sized.tensors
    item = 4 if precision == "fp32" else 2
    halved = stored != "fp16" and item == 2  # what an INT8 bundle has beside INT8 is stored as FP32

    def size(name: str) -> int:
        copy = sized.kernels.copies.get(name)
        if copy is not None:
            return tensors[copy.of].elements * 4 if copy.fp32 else size(copy.of)
        tensor = tensors[name]
        if name in boundary or not (halved and tensor.floating):
            return tensor.elements * tensor.item_bytes
        return tensor.elements * item

    boundary = {value.name for value in (*model.graph.input, *model.graph.output)}
    edges = sum(
        math.prod(tensor.shape(sizes)) * tensor.numpy_dtype("fp32" if item == 4 else "fp16").itemsize
        for tensor in (*spec.inputs.values(), *spec.outputs.values())
    )
    weights = _weights(model, tensors, size, precision)
    made = sized.kernels
    moved = sum(size(name) for kernel in made.order for name in (*kernel.reads, *kernel.writes))
    streams = 2 if len([v for v in spec.inputs.values() if v.dtype in ("model", "float32")]) > 1 else 1
    return Cost(
        flops=sum(_flops(node, tensors) for node in model.graph.node),
        weight_bytes=sum(weights),
        largest_weight_bytes=max(weights, default=0),
        boundary_bytes=edges,
        kernel_bytes=sum(weights) + moved,
        activation_bytes=_peak(made.order, made.outside, size) + streams * WORKSPACE_BYTES,
    )


def _weights(
    model: onnx.ModelProto, tensors: Mapping[str, Tensor], size: Callable[[str], int], precision: str
) -> list[int]:
    """Bytes of each weight as it is stored; a byte per element for a quantised product's."""
    products = _product_weights(model) if precision.startswith("int8") else set()
    return [
        tensors[each.name].elements if each.name in products else size(each.name)
        for each in model.graph.initializer
    ]


def _product_weights(model: onnx.ModelProto) -> set[str]:
    """Names of the weights of two or more dimensions that a product multiplies by."""
    matrices = {each.name for each in model.graph.initializer if len(each.dims) > 1}
    return {
        name
        for node in model.graph.node
        if node.op_type in PRODUCTS
        for name in node.input
        if name in matrices
    }


def _flops(node: onnx.NodeProto, tensors: Mapping[str, Tensor]) -> int:
    """Two operations for each multiplication and addition of a product; 0 for any other node."""
    if node.op_type not in PRODUCTS or tensors[node.output[0]].constant:
        return 0
    output = tensors[node.output[0]]
    if node.op_type == "Conv":
        return 2 * output.elements * math.prod(tensors[node.input[1]].shape[1:])
    if node.op_type == "ConvTranspose":
        return 2 * tensors[node.input[0]].elements * math.prod(tensors[node.input[1]].shape[1:])
    first = tensors[node.input[0]].shape
    across = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return 2 * output.elements * (first[0] if across else first[-1])


def _peak(order: Sequence[Kernel], outside: frozenset[str], size: Callable[[str], int]) -> int:
    """Most bytes held at once.

    The compiler reuses a tensor's memory in a kernel that comes at least two steps of dependence after
    every kernel that reads it: what could run beside a reader must not overwrite what it reads.
    """
    makers: dict[str, int] = {}
    readers: dict[str, int] = {}
    for index, kernel in enumerate(order):
        for name in kernel.reads:
            readers[name] = readers.get(name, 0) | 1 << index
    before: list[int] = []  # bit i of entry k: kernel k depends on kernel i
    held: dict[str, int] = {}
    peak = 0
    for index, kernel in enumerate(order):
        parents = {makers[name] for name in kernel.reads if name in makers}
        distant = functools.reduce(operator.or_, (before[parent] for parent in parents), 0)
        before.append(functools.reduce(operator.or_, (1 << parent for parent in parents), distant))
        held.update({name: size(name) for name in kernel.writes - outside})
        makers.update(dict.fromkeys(kernel.writes, index))
        peak = max(peak, sum(each for name, each in held.items() if readers[name] & ~distant))
    return peak
