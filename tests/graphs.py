"""A small bundle of hand-written ONNX graphs: every boundary of a real one, and nothing to train.

Tests of what reads bundles need no exporter and no torch this way. The networks are a convolution,
an activation and another convolution; the step, its table and the uint8 frames are the real thing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper, parser

from reelrt.bundle.manifest import PREFIX, SCHEDULES, TOKENIZER, Bundle, Model, Pipeline, Stage
from reelrt.bundle.schedule import Schedule, Schedules
from reelrt.bundle.spec import Geometry, StageSpec, step_spec, text_encoder_spec, vae_decoder_spec

GEOMETRY = Geometry(
    latent_channels=4,
    spatial_scale=8,
    size_multiple=16,
    tokens=8,
    text_width=32,
    state_rows=3,
    frames=4,
    height=32,
    width=48,
)

STEP = """
step (float[batch, 3, 4, frames, height, width] state, float[batch, rows, 15] table, int64[batch] step,
      float[batch, 2, 8, 32] text)
  => (float[batch, 3, 4, frames, height, width] state_next, int64[batch] step_next)
<int64[1] zero = {0}, int64[1] one = {1}, int64[1] three = {3}, int64[1] fifteen = {15},
 int64 first = {0}, int64[5] scalar = {0, 1, 1, 1, 1}, int64[5] channels = {0, 16, 1, 1, 1},
 int64[3] square = {0, 3, 4}, int64[3] flat = {0, 4, -1}, float tenth = {0.1}>
{
  at = Unsqueeze (step, one)
  row = GatherND <batch_dims = 1> (table, at)
  head = Slice (row, zero, three, one)
  time, scale, which = Split <axis = 1, num_outputs = 3> (head)
  weights = Slice (row, three, fifteen, one)
  matrix = Reshape (weights, square)
  newest = Gather <axis = 1> (state, first)
  factor = Reshape (scale, scalar)
  scaled = Mul (newest, factor)
  which_int = Cast <to = 7> (which)
  prompt = GatherND <batch_dims = 1> (text, which_int)
  pooled = ReduceMean <keepdims = 0> (prompt, one)
  projected = MatMul (pooled, text_weight)
  angle = Mul (time, tenth)
  wave = Sin (angle)
  moved = Add (projected, wave)
  shift = Reshape (moved, channels)
  inner = Conv <pads = [0, 1, 1, 0, 1, 1]> (scaled, in_weight, in_bias)
  warm = Add (inner, shift)
  gate = Sigmoid (warm)
  active = Mul (warm, gate)
  output = Conv <pads = [0, 1, 1, 0, 1, 1]> (active, out_weight, out_bias)
  output_row = Unsqueeze (output, one)
  all_rows = Concat <axis = 1> (state, output_row)
  full = Shape (state)
  columns = Reshape (all_rows, flat)
  mixed = MatMul (matrix, columns)
  state_next = Reshape (mixed, full)
  step_next = Add (step, one)
}
"""

TEXT_ENCODER = """
text_encoder (int64[batch, 8] tokens) => (float[batch, 8, 32] text)
{
  embedded = Gather (embedding, tokens)
  positioned = Add (embedded, position)
  projected = MatMul (positioned, projection)
  text = LayerNormalization <axis = -1> (projected, norm_scale, norm_bias)
}
"""

VAE_DECODER = """
vae_decoder (float[batch, 4, count, height, width] latents)
  => (uint8[batch, count, rows, columns, 3] frames)
<float[5] scales = {1, 1, 1, 8, 8}, float half = {127.5}, float low = {0}, float high = {255}>
{
  inner = Conv (latents, in_weight, in_bias)
  active = Relu (inner)
  colours = Conv (active, out_weight, out_bias)
  large = Resize <mode = "nearest"> (colours, , scales)
  scaled = Mul (large, half)
  raised = Add (scaled, half)
  clamped = Clip (raised, low, high)
  rounded = Round (clamped)
  last = Transpose <perm = [0, 2, 3, 4, 1]> (rounded)
  frames = Cast <to = 2> (last)
}
"""


WEIGHTS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "step": {
        "text_weight": (32, 16),
        "in_weight": (16, 4, 1, 3, 3),
        "in_bias": (16,),
        "out_weight": (4, 16, 1, 3, 3),
        "out_bias": (4,),
    },
    "text_encoder": {
        "embedding": (64, 32),
        "position": (8, 32),
        "projection": (32, 32),
        "norm_scale": (32,),
        "norm_bias": (32,),
    },
    "vae_decoder": {
        "in_weight": (8, 4, 1, 1, 1),
        "in_bias": (8,),
        "out_weight": (3, 8, 1, 1, 1),
        "out_bias": (3,),
    },
}


def tiny_bundle(folder: Path, seed: int = 0) -> Path:
    """Write a bundle: three FP32 graphs with external weights, schedules and a tokenizer file.

    Args:
        folder: Where to write it; made if missing.
        seed: Of the weights.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    stages = {}
    graphs = ((text_encoder_spec, TEXT_ENCODER), (step_spec, STEP), (vae_decoder_spec, VAE_DECODER))
    for make, text in graphs:
        spec: StageSpec = make(GEOMETRY)
        graph = parser.parse_graph(text)
        for name, shape in WEIGHTS[spec.name].items():
            fan_in = int(np.prod(shape[1:])) or 1
            values = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(fan_in))
            graph.initializer.append(numpy_helper.from_array(values, name))
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        file, weights = f"{spec.name}.onnx", f"{spec.name}.onnx.data"
        onnx.save(model, str(folder / file), save_as_external_data=True, location=weights, size_threshold=64)
        stages[spec.name] = Stage(spec, file, "fp32", (folder / weights).stat().st_size)
    ones = np.ones((2, 1))
    Schedules([Schedule("ddim", ones[:, 0], ones[:, 0], ones, ones, 1.0)]).save(folder / SCHEDULES)
    (folder / TOKENIZER).write_text("{}", encoding="utf-8")
    (folder / "LICENSE").write_text("Apache-2.0", encoding="utf-8")
    model_entry = Model(
        "tiny", "unet3d", "ab" * 32, "Apache-2.0", sum(s.weight_bytes for s in stages.values())
    )
    pipeline = Pipeline(model_entry, GEOMETRY, "split", "ddim", 7.5, start_token=0, end_token=1, pad_token=1)
    Bundle(folder, pipeline, stages).save("0.1.0")
    return folder


def run_step(engines: Path, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run the step engine of an ONNX Runtime engine set, in one part or two."""

    def run(path: Path, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        taken = {value.name: feed[value.name] for value in session.get_inputs()}
        return dict(
            zip([value.name for value in session.get_outputs()], session.run(None, taken), strict=True)
        )

    engine = engines / "step.onnx"
    prefix = engine.with_name(engine.name + PREFIX)
    found = run(engine, {**inputs, **(run(prefix, inputs) if prefix.exists() else {})})
    return [found["state_next"], found["step_next"]]


def quantised(
    bundle: Bundle, folder: Path, names: Sequence[str], *, activations: bool = True, stage: str = "step"
) -> Bundle:
    """A tiny bundle of which one stage multiplies by INT8 weights behind Q/DQ, as ModelOpt writes them.

    Args:
        bundle: The FP32 one.
        folder: Where to write it; does not exist yet.
        names: Weights to quantise, per channel.
        activations: Whether the other side is quantised as well.
        stage: The stage that has these weights.
    """
    shutil.copytree(bundle.folder, folder)
    model = onnx.load(str(folder / f"{stage}.onnx"))
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        name = next((each for each in node.input if each in names), "")
        if name:
            axis = 0 if node.op_type == "Conv" else 1
            values = numpy_helper.to_array(weights[name])
            others = tuple(number for number in range(values.ndim) if number != axis)
            scale = np.abs(values).max(others, keepdims=True) / 127
            whole = np.round(values / scale).astype(np.int8)
            weights[name].CopyFrom(numpy_helper.from_array(whole, name))
            zeros = numpy_helper.from_array(np.zeros(scale.size, np.int8), f"{name}.zero")
            graph.initializer.extend([numpy_helper.from_array(scale.ravel(), f"{name}.scale"), zeros])
            inputs = [name, f"{name}.scale", f"{name}.zero"]
            nodes.append(
                helper.make_node("DequantizeLinear", inputs, [f"{name}.dq"], f"{name}_dq", axis=axis)
            )
            node.input[list(node.input).index(name)] = f"{name}.dq"
        if name and activations:
            data = node.input[0]
            graph.initializer.append(numpy_helper.from_array(np.array(0.05, np.float32), f"{data}.scale"))
            graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), f"{data}.zero"))
            with_scale = [f"{data}.scale", f"{data}.zero"]
            nodes.append(helper.make_node("QuantizeLinear", [data, *with_scale], [f"{data}.q"], f"{data}_q"))
            nodes.append(
                helper.make_node("DequantizeLinear", [f"{data}.q", *with_scale], [f"{data}.dq"], f"{data}_dq")
            )
            node.input[0] = f"{data}.dq"
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)
    weight_file = f"{stage}.onnx.data"
    (folder / weight_file).unlink()
    onnx.save(
        model,
        str(folder / f"{stage}.onnx"),
        save_as_external_data=True,
        location=weight_file,
        size_threshold=64,
    )
    stages = {**bundle.stages, stage: replace(bundle.stages[stage], precision="int8")}
    Bundle(folder, bundle.pipeline, stages).save("0.1.0")
    return Bundle.load(folder)
