"""What FP16 would do to a stage, layer by layer, measured in FP32 on recorded inputs.

Every layer's largest values are held against FP16's 65504, and what FP16 alone changes in its result
against an allowed error; what fails either must stay FP32. The whole stage is then run as FP16 would
compute it with these layers in FP32. Knows ONNX Runtime, no bundle and no backend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reelrt.bundle.layers import layer_class, layer_name, weight_tensors
from reelrt.bundle.manifest import Stage
from reelrt.calibration import probes
from reelrt.calibration.probes import LARGEST, Graph
from reelrt.errors import BackendError, CalibrationError
from reelrt.progress import Progress, silent
from reelrt.runtime.session import Array
from reelrt.wording import counted

ERROR = 0.01
"""Most that FP16 alone may change in a layer's output, relative to the output's length."""
HEADROOM = 4.0
"""Values stay this factor below FP16's largest: other prompts give others than those recorded."""
LAYERS_AT_ONCE = 128
"""Layers measured in one run; bounds the memory, since what is measured has to be kept until then."""


@dataclass(frozen=True, slots=True, eq=False)
class Feed:
    """What a stage reads once, and where on a trajectory.

    Attributes:
        inputs: Input name to array.
        prompt: What was asked for.
        timestep: The step graph's timestep; None for another stage.
    """

    inputs: Mapping[str, Array]
    prompt: str
    timestep: float | None = None

    @property
    def place(self) -> dict[str, Any]:
        """Prompt and timestep, for the report."""
        return {"prompt": self.prompt, "timestep": self.timestep}


@dataclass(frozen=True, slots=True)
class Layer:
    """What was measured of a layer.

    Attributes:
        name: Its name in the graph.
        operator: ONNX's name of what it does.
        kind: Its class.
        largest: Largest magnitude of its outputs; `largest_at` says where.
        inner: Largest statistic it forms inside (a variance, a sum of exponentials); 0 for none.
        error: What FP16 changes in its output, relative to the output's length, at worst; infinite
            where FP16 overflows. `error_at` says where.
        reasons: Why it must stay FP32; empty when it need not.
    """

    name: str
    operator: str
    kind: str
    largest: float
    largest_at: Mapping[str, Any]
    inner: float
    error: float
    error_at: Mapping[str, Any]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found in a stage.

    Attributes:
        layers: Those that compute, and those that must stay FP32 though they only move values.
        samples: Feeds that were run.
        outputs: Output name to the error of the whole stage in FP16 with the listed layers FP32:
            relative to the output's length, in units of the last place for integers; and where.
    """

    layers: Sequence[Layer]
    samples: int
    outputs: Mapping[str, Mapping[str, Any]]

    @property
    def keep(self) -> tuple[str, ...]:
        """Names of the layers that must stay FP32."""
        return tuple(layer.name for layer in self.layers if layer.reasons)


def audit_stage(
    path: Path,
    stage: Stage,
    feeds: Sequence[Feed],
    *,
    error: float = ERROR,
    headroom: float = HEADROOM,
    progress: Progress = silent,
) -> Audit:
    """Measure every layer of a stage and decide which must stay FP32.

    Args:
        path: The stage's graph.
        stage: The stage.
        feeds: What to run it on.
        error: Most that FP16 alone may change in a layer's output, relative to the output's length.
        headroom: Factor by which values must stay below FP16's largest.
        progress: Told of `audit <stage>`.

    Raises:
        CalibrationError: A layer is not finite in FP32 already, or the whole is not in FP16.
        BackendError: ONNX Runtime cannot run the graph.
    """
    graph = probes.understand(path, stage.spec)
    layers = graph.layers
    parts = [layers[at : at + LAYERS_AT_ONCE] for at in range(0, len(layers), LAYERS_AT_ONCE)]
    what, total = f"audit {stage.spec.name}", len(parts) + 1
    progress(what, 0, total)
    found: dict[str, _Measured] = {}
    for number, part in enumerate(parts):
        model, probed = probes.probed(graph, part, probes.seams(graph) if number == 0 else ())
        names = [name for probe in probed for name in probe.outputs]
        session = _open(model, path)
        for feed in feeds:
            values = dict(zip(names, map(float, _run(session, names, feed, path)), strict=True))
            for probe in probed:
                found.setdefault(probe.tensor, _Measured()).add(probe, values, feed, path)
        progress(what, number + 1, total)
    decided = _decide(graph, found, error, headroom)
    audit = Audit(decided, len(feeds), {})
    outputs = _whole(graph, path, stage, audit.keep, feeds)
    progress(what, total, total)
    return replace(audit, outputs=outputs)


@dataclass(slots=True)
class _Measured:
    """The largest values of one tensor so far, and where they were."""

    largest: float = 0.0
    largest_at: Mapping[str, Any] | None = None
    inner: float = 0.0
    error: float = 0.0
    error_at: Mapping[str, Any] | None = None

    def add(self, probe: probes.Probe, values: Mapping[str, float], feed: Feed, path: Path) -> None:
        """Take one run in; raises CalibrationError where FP32 is not finite."""
        largest, length = values[probe.largest], values[probe.length]
        if not (math.isfinite(largest) and math.isfinite(length)):
            at = "" if feed.timestep is None else f" at timestep {feed.timestep:g}"
            raise CalibrationError(
                f"layer {probe.layer} of {path.name} is not finite in FP32 already, for {feed.prompt!r}{at}.",
                "Export the model again with `--precision fp32`, and check its weights.",
            )
        if self.largest_at is None or largest > self.largest:
            self.largest, self.largest_at = largest, feed.place
        self.inner = max(self.inner, values[probe.inner] if probe.inner else 0.0)
        if probe.lost:
            lost = values[probe.lost]
            error = math.inf if not math.isfinite(lost) else lost / length if length else 0.0
            if self.error_at is None or error > self.error:
                self.error, self.error_at = error, feed.place


def _decide(graph: Graph, found: Mapping[str, _Measured], error: float, headroom: float) -> list[Layer]:
    """The layers with the reasons to keep them, following large values along what moves them."""
    nodes, limit = graph.model.graph.node, LARGEST / headroom
    weights = weight_tensors(graph.model.graph)
    wide = {name for name, measured in found.items() if measured.largest > limit}
    heavy = {name for name, size in graph.constants.items() if size > LARGEST}
    layers = []
    for index in sorted(graph.region):
        node = nodes[index]
        if node.op_type == "Constant":
            continue
        measured = [found[name] for name in node.output if name in found]
        if not measured and any(name in wide for name in node.input):
            wide.update(name for name in node.output if name in graph.floats)
        if not measured and any(name in heavy for name in node.input):
            heavy.update(name for name in node.output if name in graph.floats)
        peak = max(measured, key=lambda each: each.largest, default=_Measured())
        worst = max(measured, key=lambda each: each.error, default=_Measured())
        reasons = {
            "a weight is beyond FP16": any(name in heavy for name in node.input),
            "its output is too large": any(name in wide for name in node.output),
            "its input is too large": any(name in wide for name in node.input),
            "a sum inside is too large": max((each.inner for each in measured), default=0) > limit,
            "it loses too much": worst.error > error,
        }
        layer = Layer(
            layer_name(node),
            node.op_type,
            layer_class(node, weights),
            peak.largest,
            peak.largest_at or {},
            max((each.inner for each in measured), default=0.0),
            worst.error,
            worst.error_at or {},
            tuple(reason for reason, holds in reasons.items() if holds),
        )
        if measured or layer.reasons:
            layers.append(layer)
    return layers


def _whole(
    graph: Graph, path: Path, stage: Stage, keep: Sequence[str], feeds: Sequence[Feed]
) -> dict[str, dict[str, Any]]:
    """Run the stage as FP16 would compute it and as it is; the largest error of each output."""
    plain = _open(graph.model.SerializeToString(), path)
    half = _open(probes.rounded(graph, stage.spec, keep), path)
    names = list(stage.spec.outputs)
    found: dict[str, dict[str, Any]] = {name: {"error": 0.0} for name in names}
    for feed in feeds:
        for name, want, have in zip(
            names, _run(plain, None, feed, path), _run(half, None, feed, path), strict=True
        ):
            error = _difference(np.asarray(want), np.asarray(have))
            if not math.isfinite(error):
                raise CalibrationError(
                    f"{name} of {path.name} is not finite in FP16, with "
                    f"{counted(len(keep), 'layer')} kept in FP32, for {feed.prompt!r}.",
                    "Run `reelrt calibrate --precision fp16` on more prompts.",
                )
            if error >= found[name]["error"]:
                found[name] = {"error": error, **feed.place}
    return found


def _difference(want: Array, have: Array) -> float:
    """Relative to the length of what is wanted; the largest difference of whole numbers."""
    apart = have.astype(np.float64) - want.astype(np.float64)
    if want.dtype.kind in "iu":
        return float(np.abs(apart).max(initial=0))
    length = float(np.linalg.norm(want.astype(np.float64)))
    return float(np.linalg.norm(apart)) / (length or 1.0)


def _open(model: bytes, path: Path) -> Any:
    """A session of a model whose weights lie beside a graph; unoptimised, so that what stands there runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
    )
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        raise BackendError(f"ONNX Runtime cannot open {path} for the FP16 audit: {error}") from error


def _run(session: Any, names: Sequence[str] | None, feed: Feed, path: Path) -> list[Array]:
    wanted = {each.name for each in session.get_inputs()}
    try:
        outputs: list[Array] = session.run(names, {k: v for k, v in feed.inputs.items() if k in wanted})
    except Exception as error:
        raise BackendError(f"ONNX Runtime failed in {path}: {error}") from error
    return outputs
