"""Exported graphs against the model they came from: names, then shapes, then values.

The model's answers are recorded first, from its untouched modules, so that it can be freed before
ONNX Runtime opens the graph. Knows no model family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from reelrt.bundle.schedule import Cfg, Schedule
from reelrt.bundle.spec import StageSpec
from reelrt.errors import ModelError, ValidationError
from reelrt.export.graph import TRACED, sample_inputs

Array = npt.NDArray[Any]

SHAPES: tuple[dict[str, int], ...] = (
    {"batch": 1, "rows": 1, "frames": 1, "height": 8, "width": 8},
    {"batch": 3, "rows": 5, "frames": 2, "height": 10, "width": 14},
    {"batch": 4, "rows": 2, "frames": 3, "height": 9, "width": 16},
    {"batch": 5, "rows": 7, "frames": 4, "height": 11, "width": 6},
)
"""None shares a size with `TRACED` along any axis."""

FP16_TOLERANCE = {"float": 1e-2, "uint8": 6.0}
"""For graphs in FP16, against the model's FP16 weights in float32 arithmetic: roundings add up to
some units of FP16's last place (5e-4). A wrong operation is off by far more."""

ADVANCE_STEPS = 3
ADVANCE_SIZES = {"batch": 1, "frames": 3, "height": 9, "width": 10}
ADVANCE_TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2}
"""Over a whole table guidance and the solver multiply the difference of a single launch."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One set of inputs and what the model makes of them.

    Attributes:
        label: Which shape, for messages.
        inputs: Input name to array.
        expected: Output name to array.
    """

    label: str
    inputs: Mapping[str, Array]
    expected: Mapping[str, Array]


def record(reference: nn.Module, spec: StageSpec, precision: str, tokens: int) -> list[Case]:
    """Run the model at every shape of `SHAPES`.

    Args:
        reference: The stage as diffusers computes it.
        spec: Its boundary.
        precision: Of the stage.
        tokens: Size of the vocabulary.
    """
    cases = []
    for seed, sizes in enumerate(SHAPES, 1):
        assert all(sizes[axis] != TRACED[axis] for axis in sizes)
        inputs = sample_inputs(spec, sizes, precision, tokens, seed)
        with torch.no_grad(), _in_float32(reference):
            outputs = reference(*inputs.values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        arrays = {
            name: out.numpy().astype(tensor.numpy_dtype(precision))
            for (name, tensor), out in zip(spec.outputs.items(), outputs, strict=True)
        }
        label = " x ".join(f"{axis} {sizes[axis]}" for axis in spec.axes)
        cases.append(Case(label, {name: x.numpy() for name, x in inputs.items()}, arrays))
    return cases


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """Let a module in half precision compute in float32: its weights are widened a layer at a time.

    Most CPUs multiply float16 twenty times slower, and the better reference rounds nothing but weights.
    """
    kept: dict[nn.Module, list[Tensor]] = {}

    def before(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        kept[layer] = [parameter.data for parameter in layer.parameters(recurse=False)]
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.float()
        return tuple(x.float() if isinstance(x, Tensor) and x.dtype == torch.float16 else x for x in inputs)

    def after(layer: nn.Module, *_: Any) -> None:
        for parameter, data in zip(layer.parameters(recurse=False), kept.pop(layer), strict=True):
            parameter.data = data

    halves = [
        layer
        for layer in module.modules()
        if any(parameter.dtype == torch.float16 for parameter in layer.parameters(recurse=False))
    ]
    hooks = [layer.register_forward_pre_hook(before) for layer in halves]
    hooks += [layer.register_forward_hook(after) for layer in halves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def open_session(path: Path) -> Any:
    """A graph in ONNX Runtime as it is, with no second copy of its weights.

    Raises:
        ModelError: ONNX Runtime refuses the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own have no common base
        raise ModelError(f"{path.name} does not load in ONNX Runtime: {_sentence(error)}.") from error


def _run(session: Any, spec: StageSpec, feed: Mapping[str, Array], when: str) -> list[Array]:
    try:
        outputs: list[Array] = session.run(list(spec.outputs), dict(feed))
    except Exception as error:  # ONNX Runtime's own have no common base
        raise ModelError(f"{spec.name} does not run {when}: {_sentence(error)}.") from error
    return outputs


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def check(session: Any, spec: StageSpec, precision: str, cases: Sequence[Case]) -> None:
    """Compare a graph with what the model said.

    Raises:
        ModelError: Names or shapes are not the spec's, or the graph does not run at a shape.
        ValidationError: Values differ by more than the tolerance.
    """
    _check_names(session, spec)
    for case in cases:
        outputs = _run(session, spec, case.inputs, f"at {case.label}")
        for (name, expected), found in zip(case.expected.items(), outputs, strict=True):
            what = f"{spec.name}: {name} at {case.label}"
            if found.shape != expected.shape or found.dtype != expected.dtype:
                wanted = f"{expected.dtype} {list(expected.shape)}"
                raise ModelError(f"{what} is {found.dtype} {list(found.shape)}, not {wanted}.")
            _compare(what, found, expected, _tolerance(spec, precision, expected.dtype))


def _check_names(session: Any, spec: StageSpec) -> None:
    for side, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        found, wanted = [value.name for value in values], list(getattr(spec, side))
        if found != wanted:
            raise ModelError(f"{spec.name} has the {side} {', '.join(found)}, not {', '.join(wanted)}.")


def _tolerance(spec: StageSpec, precision: str, dtype: np.dtype[Any]) -> float:
    if dtype == np.int64:
        return 0.0
    if precision == "fp32":
        return spec.tolerance
    return FP16_TOLERANCE["uint8" if dtype == np.uint8 else "float"]


def _compare(what: str, found: Array, expected: Array, tolerance: float) -> None:
    difference = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())
    if np.issubdtype(expected.dtype, np.floating):
        difference /= float(np.abs(expected).max()) or 1.0
    if not difference <= tolerance:  # NaN is no agreement
        raise ValidationError(what, difference, tolerance)


@dataclass(frozen=True, slots=True, eq=False)
class Advance:
    """A whole sampling run: starting latents, text, and the final latents diffusers gives."""

    schedule: Schedule
    guidance: float
    latents: Array
    text: Array
    expected: Array


def record_advance(
    unet: nn.Module, scheduler: Any, schedule: Schedule, guidance: float, spec: StageSpec, precision: str
) -> Advance:
    """Sample with diffusers' own scheduler and network, guided as its pipeline does it.

    Args:
        unet: `(sample, timestep, text) -> output`, untouched.
        scheduler: The diffusers scheduler that `schedule` was compiled from, freshly made.
        schedule: The compiled schedule.
        guidance: Classifier-free guidance scale.
        spec: Of the step.
        precision: Of the step.
    """
    inputs = sample_inputs(spec, {**ADVANCE_SIZES, "rows": 1}, precision, 1, seed=9)
    text = inputs["text"]
    start = inputs["state"][:, 0] * schedule.init_noise_sigma
    scheduler.set_timesteps(schedule.steps)
    latents = start
    with torch.no_grad(), _in_float32(unet):
        for timestep in scheduler.timesteps:
            sample = scheduler.scale_model_input(torch.cat([latents] * 2), timestep).to(text.dtype)
            both = unet(sample, timestep.float().expand(2), text[0]).float()
            output = both[:1] + guidance * (both[1:] - both[:1])
            latents = scheduler.step(output.flatten(0, 1), timestep, latents.flatten(0, 1)).prev_sample[None]
    return Advance(schedule, guidance, start.numpy(), text.numpy(), latents.numpy())


def check_advance(session: Any, spec: StageSpec, precision: str, cfg: Cfg, run: Advance) -> None:
    """Drive the step graph through a whole table and compare where it ends.

    Raises:
        ModelError: The graph does not run.
        ValidationError: It ends elsewhere than diffusers, or its counter does.
    """
    state_rows = spec.inputs["state"].axes[1]
    assert isinstance(state_rows, int)
    table = run.schedule.table(run.guidance, cfg, state_rows)[None]
    state = np.zeros((1, state_rows, *run.latents.shape[1:]), np.float32)
    state[:, 0] = run.latents
    step = np.zeros(1, np.int64)
    for _ in range(table.shape[1]):
        feed = {"state": state, "table": table, "step": step, "text": run.text}
        state, step = _run(session, spec, feed, "through a whole table")
    what = f"step: latents after {run.schedule.steps} steps of {run.schedule.solver}"
    _compare(what, state[:, 0], run.expected, ADVANCE_TOLERANCE[precision])
    _compare("step: step_next after a whole table", step, np.array([table.shape[1]]), 0)
