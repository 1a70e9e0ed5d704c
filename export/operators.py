"""The operations a denoiser is made of: each one torch operator, and its ONNX by hand.

They keep tracing short (a dozen operators per layer with obvious shapes, instead of a hundred with
symbolic ones) and the graph lean: what ONNX Runtime and TensorRT see is exactly what stands here.
Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset19 as op
from torch import Tensor
from torch.nn import functional

Arguments = ParamSpec("Arguments")

TRANSLATIONS: dict[Any, Callable[..., Any]] = {}
"""Operator to the function that writes its ONNX, for `torch.onnx.export`."""


def _operator(
    shape: Callable[..., Sequence[Any]], onnx: Callable[..., Any]
) -> Callable[[Callable[Arguments, Tensor]], Callable[Arguments, Tensor]]:
    """Make a function a torch operator that tracing does not look into.

    Args:
        shape: Takes what the function takes and gives the result's shape.
        onnx: Takes the same as ONNX values and gives the result as one.
    """

    def register(function: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
        name = function.__name__
        operator = torch.library.custom_op(f"reelrt::{name}", function, mutates_args=())
        operator.register_fake(lambda x, *others: x.new_empty(shape(x, *others)))
        TRANSLATIONS[getattr(torch.ops.reelrt, name).default] = onnx
        return operator

    return register


def _like_first(x: Tensor, *_: Any) -> Sequence[Any]:
    return x.shape


def _ints(*values: int) -> Any:
    """A constant shape; for Reshape a 0 in it keeps that dimension."""
    return op.Constant(value_ints=list(values))


def _filled(like: Any, value: float, *shape: int) -> Any:
    """A constant of the type of an argument."""
    return op.Constant(value=ir.tensor(np.full(shape, value, like.dtype.numpy())))


def _group_norm_onnx(x: Any, weight: Any, bias: Any, groups: int, eps: float, silu: bool) -> Any:
    rows = op.Reshape(x, _ints(0, groups, -1))
    one, zero = _filled(x, 1, groups), _filled(x, 0, groups)
    normal = op.Reshape(op.InstanceNormalization(rows, one, zero, epsilon=eps), op.Shape(x))
    out = op.Add(op.Mul(normal, weight), bias)
    return op.Mul(out, op.Sigmoid(out)) if silu else out


@_operator(shape=_like_first, onnx=_group_norm_onnx)
def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """Normalise [N, C, h, w] over groups of channels, and SiLU if asked; weight and bias [C, 1, 1]."""
    out = functional.group_norm(x, groups, weight.flatten(), bias.flatten(), eps)
    return functional.silu(out) if silu else out


def _layer_norm_onnx(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return op.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps)[0]


@_operator(shape=_like_first, onnx=_layer_norm_onnx)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension."""
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _project_onnx(x: Any, weight: Any, bias: Any = None) -> Any:
    out = op.MatMul(x, weight)
    return out if bias is None else op.Add(out, bias)


@_operator(shape=lambda x, weight, *_: (*x.shape[:-1], weight.shape[1]), onnx=_project_onnx)
def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply the last dimension by weight [in, out]."""
    out = x @ weight
    return out if bias is None else out + bias


def _gelu_onnx(x: Any, like: Any) -> Any:
    erf = op.Erf(op.Div(x, _filled(like, math.sqrt(2))))
    return op.Mul(op.Mul(x, op.Add(erf, _filled(like, 1))), _filled(like, 0.5))


def _feed_forward_onnx(
    x: Any,
    value: Any,
    value_bias: Any,
    gate: Any,
    gate_bias: Any,
    out: Any,
    out_bias: Any,
    pieces: int,
) -> Any:
    def whole(rows: Any) -> Any:
        gelu = _gelu_onnx(_project_onnx(rows, gate, gate_bias), gate)
        gated = op.Mul(_project_onnx(rows, value, value_bias), gelu)
        return _project_onnx(gated, out, out_bias)

    if pieces == 1:
        return whole(x)
    rows = op.Reshape(x, _ints(-1, value.shape[0]))
    count = op.Shape(rows, start=0, end=1)
    size = op.Div(op.Add(count, _ints(pieces - 1)), _ints(pieces))
    left = op.Sub(count, op.Mul(size, _ints(*range(pieces))))
    sizes = op.Min(op.Max(left, _ints(0)), size)  # with fewer rows than pieces the last ones are empty
    done: list[Any] = []
    for part in _split(rows, sizes, pieces):
        done.append(whole(_after(done[-1], part, value) if done else part))
    return op.Reshape(op.Concat(*done, axis=0), op.Shape(x))


def _split(x: Any, sizes: Any, count: int) -> Sequence[Any]:
    """Parts of the first dimension; the exporter wants their number as an attribute, ONNX does not."""
    parts: Sequence[Any] = op.Split(x, sizes, axis=0, num_outputs=count)
    del parts[0].producer().attributes["num_outputs"]
    return parts


def _after(first: Any, then: Any, like: Any) -> Any:
    """The second value as it is, but not before the first is known.

    TensorRT would compute all independent values at once, and hold them all; so a zero that only
    the first can tell is added to the second.
    """
    row = op.ReduceSum(op.Slice(first, _ints(0), _ints(1), _ints(0)), keepdims=1)
    return op.Add(then, op.Clip(row, _filled(like, 0), _filled(like, 0)))


@_operator(shape=_like_first, onnx=_feed_forward_onnx)
def feed_forward(
    x: Tensor,
    value: Tensor,
    value_bias: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    out: Tensor,
    out_bias: Tensor,
    pieces: int,
) -> Tensor:
    """Project the last dimension to values times GELU of gates, and back to its size.

    Each row by itself; the graph takes them in so many pieces, so that the wide values in the
    middle exist for a part of the rows at a time.
    """
    del pieces  # the result is the same
    gated = (x @ value + value_bias) * functional.gelu(x @ gate + gate_bias)
    return gated @ out + out_bias


def _attend_onnx(query: Any, key: Any, value: Any, heads: int, scale: float, grouped: bool) -> Any:
    width = query.shape[2] // heads
    split = _ints(0, -1, heads, width)
    by_sample = (
        op.Concat(op.Shape(key, start=0, end=1), _ints(-1, heads, width), axis=0) if grouped else split
    )
    rows = op.Reshape(op.Mul(query, _filled(query, scale)), by_sample)
    rows = op.Transpose(rows, perm=[0, 2, 1, 3])
    columns = op.Transpose(op.Reshape(key, split), perm=[0, 2, 3, 1])
    values = op.Transpose(op.Reshape(value, split), perm=[0, 2, 1, 3])
    out = op.MatMul(op.Softmax(op.MatMul(rows, columns), axis=-1), values)
    out = op.Transpose(out, perm=[0, 2, 1, 3])
    return op.Reshape(out, op.Shape(query) if grouped else _ints(0, 0, heads * width))


@_operator(shape=_like_first, onnx=_attend_onnx)
def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float, grouped: bool) -> Tensor:
    """Attention in plain MatMul and Softmax over [N, T, heads * d].

    When grouped, the rows of the query share out the rows of the keys evenly: all frames of a
    sample attend to its one text.
    """
    by_sample = query.reshape(key.shape[0], -1, query.shape[2]) if grouped else query
    rows, columns, values = (
        x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (by_sample * scale, key, value)
    )
    out = (rows @ columns.transpose(-1, -2)).softmax(-1) @ values
    return out.transpose(1, 2).reshape(query.shape)


def _convolve_onnx(x: Any, weight: Any, bias: Any = None) -> Any:
    padding = [size // 2 for size in weight.shape[2:]]
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return op.Conv(*inputs, pads=[*padding, *padding])


@_operator(shape=lambda x, weight, *_: (x.shape[0], weight.shape[0], *x.shape[2:]), onnx=_convolve_onnx)
def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve [N, C, h, w], stride 1, padded to the same size; kernel sizes are odd."""
    return functional.conv2d(x, weight, bias, padding=[size // 2 for size in weight.shape[2:]])


def _cells_to_tokens_onnx(x: Any) -> Any:
    return op.Transpose(op.Reshape(x, _ints(0, 0, -1)), perm=[0, 2, 1])


@_operator(shape=lambda x: (x.shape[0], x.shape[2] * x.shape[3], x.shape[1]), onnx=_cells_to_tokens_onnx)
def cells_to_tokens(x: Tensor) -> Tensor:
    """[N, C, h, w] to [N, h * w, C]."""
    return x.flatten(2).transpose(1, 2).clone()


def _add_cells_onnx(x: Any, tokens: Any) -> Any:
    return op.Add(x, op.Reshape(op.Transpose(tokens, perm=[0, 2, 1]), op.Shape(x)))


@_operator(shape=_like_first, onnx=_add_cells_onnx)
def add_cells(x: Tensor, tokens: Tensor) -> Tensor:
    """Add tokens [N, h * w, C] to [N, C, h, w]."""
    return x + tokens.transpose(1, 2).reshape(x.shape)


# The sample [B, _, F, _, _] is what the network was called with; it says how many frames belong
# together, which x [B * F, C, h, w] does not.


def _to_volume_onnx(x: Any, sample: Any) -> Any:
    batch, frames = op.Shape(sample, start=0, end=1), op.Shape(sample, start=2, end=3)
    shape = op.Concat(batch, frames, _ints(x.shape[1], -1), axis=0)
    return op.Transpose(op.Reshape(x, shape), perm=[0, 2, 1, 3])


@_operator(
    shape=lambda x, sample: (sample.shape[0], x.shape[1], sample.shape[2], x.shape[2] * x.shape[3]),
    onnx=_to_volume_onnx,
)
def to_volume(x: Tensor, sample: Tensor) -> Tensor:
    """[B * F, C, h, w] to [B, C, F, h * w]."""
    volume = x.reshape(sample.shape[0], sample.shape[2], x.shape[1], -1)
    return volume.transpose(1, 2).clone()


def _add_volume_onnx(x: Any, volume: Any) -> Any:
    return op.Add(x, op.Reshape(op.Transpose(volume, perm=[0, 2, 1, 3]), op.Shape(x)))


@_operator(shape=_like_first, onnx=_add_volume_onnx)
def add_volume(x: Tensor, volume: Tensor) -> Tensor:
    """Add [B, C, F, h * w] to [B * F, C, h, w]."""
    return x + volume.transpose(1, 2).reshape(x.shape)


def _volume_to_tokens_onnx(volume: Any) -> Any:
    frames = op.Shape(volume, start=2, end=3)
    shape = op.Concat(_ints(-1), frames, _ints(volume.shape[1]), axis=0)
    return op.Reshape(op.Transpose(volume, perm=[0, 3, 2, 1]), shape)


@_operator(shape=lambda v: (v.shape[0] * v.shape[3], v.shape[2], v.shape[1]), onnx=_volume_to_tokens_onnx)
def volume_to_tokens(volume: Tensor) -> Tensor:
    """[B, C, F, S] to [B * S, F, C]."""
    return volume.permute(0, 3, 2, 1).flatten(0, 1).clone()


def _tokens_to_volume_onnx(tokens: Any, volume: Any) -> Any:
    batch, frames = op.Shape(volume, start=0, end=1), op.Shape(volume, start=2, end=3)
    shape = op.Concat(batch, _ints(-1), frames, _ints(volume.shape[1]), axis=0)
    return op.Transpose(op.Reshape(tokens, shape), perm=[0, 3, 2, 1])


@_operator(shape=lambda _, volume: volume.shape, onnx=_tokens_to_volume_onnx)
def tokens_to_volume(tokens: Tensor, volume: Tensor) -> Tensor:
    """[B * S, F, C] to the shape of the volume [B, C, F, S]."""
    batch, channels, frames, cells = volume.shape
    return tokens.reshape(batch, cells, frames, channels).permute(0, 3, 2, 1).clone()


def _add_per_sample_onnx(x: Any, shift: Any, sample: Any) -> Any:
    frames = op.Concat(_ints(1), op.Shape(sample, start=2, end=3), _ints(1), axis=0)
    rows = op.Expand(op.Unsqueeze(shift, _ints(1)), frames)
    return op.Add(x, op.Reshape(rows, _ints(-1, shift.shape[1], 1, 1)))


@_operator(shape=_like_first, onnx=_add_per_sample_onnx)
def add_per_sample(x: Tensor, shift: Tensor, sample: Tensor) -> Tensor:
    """Add [B, C] to every frame and cell of [B * F, C, h, w]."""
    rows = shift[:, None].expand(-1, sample.shape[2], -1).flatten(0, 1)
    return x + rows[:, :, None, None]
