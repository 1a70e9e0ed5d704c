"""An FP32 bundle and its trajectories become an INT8 bundle, with what was decided and why.

The step is quantised but for the layers that stay in FP32: those that a sweep of their sensitivity
names, or the default of the model's family. Text encoder and VAE decoder are INT8 only if they hold.
What is not quantised stays FP32. Knows nothing of a bundle's files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from reelrt.bundle.files import atomic_folder
from reelrt.bundle.manifest import Bundle, Pipeline, Stage
from reelrt.bundle.spec import StageSpec
from reelrt.calibration import qdq
from reelrt.calibration.audit import ERROR
from reelrt.calibration.calibrated import (
    Calibrated,
    audited,
    check_source,
    copy_files,
    final_error,
    finish,
    made_from,
)
from reelrt.calibration.fp16 import check_error
from reelrt.calibration.int8 import MODELOPT_BYTES, check_installed, prepare
from reelrt.calibration.layers import (
    Layer,
    check_patterns,
    find_layers,
    kept_by_default,
    matching,
    unfused,
)
from reelrt.calibration.other_stages import HOLDS, try_int8
from reelrt.calibration.ranges import Method
from reelrt.calibration.sensitivity import Sensitivity, check_budget, plot, sweep
from reelrt.calibration.smoothing import Smoothing, candidates, channel_peaks, check_alpha, write_smoothed
from reelrt.calibration.trajectories import Trajectories
from reelrt.errors import InputError
from reelrt.progress import Progress, silent

PLOT, SWEEP = "sensitivity.png", "sensitivity.json"

MIN_SAMPLES = 16
"""Fewer samples than this are no ground for ranges."""

WeightQuantiser = Callable[[Path, Path, StageSpec], Any]
"""Writes a graph whose weights alone are INT8: source, target, the stage's boundary."""


def calibrate_int8(
    bundle: Bundle,
    trajectories: Trajectories,
    output: Path,
    *,
    method: Method = "percentile",
    budget: float | None = None,
    keep: Sequence[str] = (),
    smooth: float | None = None,
    fp16_error: float | None = ERROR,
    work: Path | None = None,
    progress: Progress = silent,
) -> Calibrated:
    """Write the INT8 version of an FP32 bundle.

    Args:
        bundle: The FP32 bundle; verified.
        trajectories: Recorded with it.
        output: The bundle to write.
        method: How an activation's range is found.
        budget: Relative error of the final latents that is allowed. With it every layer's sensitivity
            is measured and the most sensitive ones stay FP32; without, those of the family's default.
        keep: Regular expressions of further layers that stay FP32.
        smooth: SmoothQuant's alpha: each product with a weight is measured alone with and without it, and
            smoothed where that lowers its error. None does not measure it.
        fp16_error: Most that FP16 may change in the output of a layer that is not INT8, as
            `reelrt.calibration.fp16.calibrate_fp16`; layers that would lose more, or overflow, stay FP32
            in engines. None leaves this audit out.
        work: Where a sweep keeps what it measured, so that it can go on; None for nowhere.
        progress: Told of `ranges`, `sensitivity`, `text_encoder`, `vae_decoder`, `check` and
            `audit <stage>`.

    Raises:
        InputError: Not an FP32 bundle, too few samples, an impossible budget, a pattern that fits no
            layer, or trajectories of another bundle.
        CalibrationError: ModelOpt cannot quantise the graph.
        BackendError: ModelOpt is not installed.
    """
    import onnx

    check_source(bundle, output)
    trajectories.check(bundle)
    check_ranges(bundle, len(trajectories), keep)
    if budget is not None:
        check_budget(budget)
    if smooth is not None:
        check_alpha(smooth)
    if fp16_error is not None:
        check_error(fp16_error)
    stage = bundle.stages["step"]
    source = bundle.folder / stage.file
    layers = find_layers(onnx.load(source, load_external_data=False).graph)
    with TemporaryDirectory(prefix="reelrt-smooth-") as scratch:
        smoothing = None
        if smooth is not None:
            place = work or Path(scratch)
            smoothing, source = _smoothed(
                bundle, trajectories, layers, smooth, method, place, Path(scratch), progress
            )
        quantised = _ranges(source, layers, trajectories, method, progress)
    declined = [layer.name for layer in layers if not quantised.nodes.issuperset(layer.nodes)]
    able = [layer for layer in layers if layer.name not in declined]
    sensitivity = None
    if budget is not None:
        with TemporaryDirectory(prefix="reelrt-sweep-") as scratch:
            file = (work or Path(scratch)) / (f"smoothed-{smooth:g}-{SWEEP}" if smoothing else SWEEP)
            sensitivity = sweep(bundle, trajectories, quantised, able, file, method=method, progress=progress)
    reasons = dict.fromkeys(declined, "it has no INT8 arithmetic")
    reasons |= _reasons(able, bundle.pipeline, sensitivity, budget, keep)
    with atomic_folder(output, Bundle.kind) as folder:
        copy_files(bundle, folder, without=stage)
        nodes = {node for layer in layers if layer.name not in reasons for node in layer.nodes}
        weight_bytes = quantised.write(nodes, folder / stage.file)
        step = replace(stage, precision="int8", weight_bytes=weight_bytes)
        stages: Mapping[str, Stage] = {**bundle.stages, "step": step}
        others = {}
        for name in HOLDS:
            others[name], other = try_int8(bundle, trajectories, name, folder, method, progress)
            stages = {**stages, name: other or bundle.stages[name]}
        report = {
            **made_from(bundle, trajectories),
            "precision": "int8",
            "method": method,
            "budget": budget,
            "layers": {"quantised": len(layers) - len(reasons), "kept_fp32": reasons},
            "nodes": {"quantised": len(nodes), "all": sum(len(layer.nodes) for layer in layers)},
            "final_latents": final_error(bundle, folder / stage.file, trajectories, progress),
            "other_stages": others,
            "smoothing": smoothing.document() if smoothing else None,
            "sensitivity": sensitivity.document() if sensitivity else None,
        }
        if sensitivity:
            plot(sensitivity, list(reasons), folder / PLOT)
        stages, report = audited(bundle, folder, stages, trajectories, fp16_error, report, progress)
        finish(bundle, folder, stages, report)
    return Calibrated(Bundle.load(output, check=False), report)


def _ranges(
    source: Path, layers: Sequence[Layer], trajectories: Trajectories, method: Method, progress: Progress
) -> qdq.Quantised:
    """A step graph whose layers can be quantised."""
    return prepare(
        source,
        [node for layer in layers for node in layer.nodes],
        lambda: (sample.inputs for sample in trajectories),
        len(trajectories),
        method=method,
        progress=progress,
    )


def _smoothed(
    bundle: Bundle,
    trajectories: Trajectories,
    layers: Sequence[Layer],
    alpha: float,
    method: Method,
    work: Path,
    scratch: Path,
    progress: Progress,
) -> tuple[Smoothing, Path]:
    """What smoothing does to each layer, and the graph with those smoothed that gain by it.

    Raises:
        InputError: The graph is too large.
    """
    import onnx

    source = bundle.folder / bundle.stages["step"].file
    size = qdq.weight_bytes(source)
    if size > MODELOPT_BYTES:
        raise InputError(
            f"the weights of {source} are too large to be smoothed: {size / 2**30:.1f} GiB, at most "
            f"{MODELOPT_BYTES / 2**30:g} GiB.",
            "Leave --smooth out.",
        )
    graph = onnx.load(source, load_external_data=False).graph
    plain = _ranges(source, layers, trajectories, method, progress)
    able = [layer for layer in candidates(graph, layers) if plain.nodes.issuperset(layer.nodes)]
    peaks = channel_peaks(source, able, lambda: (sample.inputs for sample in trajectories))
    even = write_smoothed(source, scratch / "even.onnx", able, peaks, alpha)
    options: dict[str, Any] = {"method": method, "progress": progress}
    before = sweep(bundle, trajectories, plain, able, work / SWEEP, **options)
    after = sweep(
        bundle,
        trajectories,
        _ranges(even, layers, trajectories, method, progress),
        able,
        work / f"smoothing-{alpha:g}.json",
        **options,
    )
    found = Smoothing(alpha, before.errors, after.errors)
    used = [layer for layer in able if layer.name in found.used]
    return found, write_smoothed(source, scratch / source.name, used, peaks, alpha)


def calibrate_weights(
    bundle: Bundle,
    trajectories: Trajectories | None,
    output: Path,
    quantiser: WeightQuantiser,
    *,
    fp16_error: float | None = ERROR,
    progress: Progress = silent,
) -> Calibrated:
    """Write a bundle whose step has INT8 weights and floating-point arithmetic.

    Args:
        bundle: The FP32 bundle; verified.
        trajectories: For measuring what it costs; None does not measure.
        output: The bundle to write.
        quantiser: What makes the graph.
        fp16_error: As `calibrate_int8`; nothing is audited without trajectories.
        progress: Told of `weights`, `check` and `audit <stage>`.

    Raises:
        InputError: Not an FP32 bundle, or trajectories of another one.
    """
    check_source(bundle, output)
    if trajectories is not None:
        trajectories.check(bundle)
    stage = bundle.stages["step"]
    with atomic_folder(output, Bundle.kind) as folder:
        copy_files(bundle, folder, without=stage)
        progress("weights", 0, 1)
        quantiser(bundle.folder / stage.file, folder / stage.file, stage.spec)
        progress("weights", 1, 1)
        weight_bytes = qdq.weight_bytes(folder / stage.file)
        stages: Mapping[str, Stage] = {
            **bundle.stages,
            "step": replace(stage, precision="int8-weights", weight_bytes=weight_bytes),
        }
        report: dict[str, Any] = {"precision": "int8-weights"}
        if trajectories is not None:
            report = {**made_from(bundle, trajectories), **report}
            report["final_latents"] = final_error(bundle, folder / stage.file, trajectories, progress)
            stages, report = audited(bundle, folder, stages, trajectories, fp16_error, report, progress)
        finish(bundle, folder, stages, report)
    return Calibrated(Bundle.load(output, check=False), report)


def check_ranges(bundle: Bundle, samples: int, keep: Sequence[str]) -> None:
    """Refuse, before anything is recorded, what INT8 ranges cannot be found for.

    Args:
        bundle: The FP32 bundle.
        samples: How many there are, or will be.
        keep: Regular expressions of layers that stay FP32.

    Raises:
        InputError: Too few samples, or a pattern that fits no layer.
        BackendError: ModelOpt is not installed.
    """
    import onnx

    if samples < MIN_SAMPLES:
        raise InputError(
            f"{samples} samples are too few to find ranges with; {MIN_SAMPLES} are the least.",
            "Give more prompts, or a larger --samples.",
        )
    check_installed()
    check_patterns(keep)
    if not keep:
        return
    graph = onnx.load(bundle.folder / bundle.stages["step"].file, load_external_data=False).graph
    layers = find_layers(graph)
    for pattern in keep:
        if not matching(layers, [pattern]):
            raise InputError(
                f"keep {pattern!r} fits none of the {len(layers)} layers of {bundle.folder}.",
                f"They are called {layers[0].name} and {layers[-1].name}, say.",
            )


def _reasons(
    layers: Sequence[Layer],
    pipeline: Pipeline,
    sensitivity: Sensitivity | None,
    budget: float | None,
    keep: Sequence[str],
) -> dict[str, str]:
    """Layer that stays FP32 to why."""
    reasons = dict.fromkeys(unfused(layers, pipeline.geometry), "INT8 attention is not fused")
    if sensitivity is None or budget is None:
        family = pipeline.model.family
        reasons |= dict.fromkeys(kept_by_default(layers, family), f"default of the family {family}")
    else:
        reasons |= {
            name: f"error {sensitivity.errors[name]:.4f} alone; the budget of all is {budget:g}"
            for name in sensitivity.kept(budget)
        }
    return {**reasons, **dict.fromkeys(matching(layers, keep), "asked for")}
