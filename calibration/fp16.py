"""FP16 that can be trusted: which layers of a bundle must stay FP32, found by running it.

What `reelrt.calibration.audit` finds on recorded trajectories is listed in the bundle, which keeps its
FP32 graphs: the build converts them, with these exceptions. The report stands beside them in
`fp16-audit.json`. Knows no backend.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reelrt import __version__
from reelrt.bundle.files import atomic_folder
from reelrt.bundle.manifest import Bundle, Stage
from reelrt.bundle.spec import DECODER_FRAMES
from reelrt.calibration.audit import ERROR, HEADROOM, Audit, Feed, Layer, audit_stage
from reelrt.calibration.probes import LARGEST
from reelrt.errors import InputError
from reelrt.progress import Progress, silent
from reelrt.runtime.session import Array

if TYPE_CHECKING:
    from reelrt.calibration.trajectories import Trajectories

REPORT = "fp16-audit.json"
SAMPLES = 32
"""Feeds of a stage that are run, spread evenly over what was recorded."""
_GOLDEN = 0.618033988749895


def calibrate_fp16(
    bundle: Bundle,
    trajectories: Trajectories,
    output: Path,
    *,
    error: float = ERROR,
    progress: Progress = silent,
) -> Bundle:
    """Write a bundle that says which layers must stay FP32 in an FP16 engine.

    The graphs are the bundle's own, FP32 or INT8 with an FP32 remainder: an engine of any precision
    can be built of the result, and only an FP16 or INT8 one heeds the list.

    Args:
        bundle: The bundle; verified.
        trajectories: Recorded with it or, for INT8, with the one it was made of.
        output: The bundle to write.
        error: Most that FP16 alone may change in a layer's output, relative to the output's length.
        progress: Told of `audit <stage>`.

    Returns:
        The bundle as it is on disk.

    Raises:
        InputError: An impossible error, an output that is the bundle itself, or FP16 graphs.
        CalibrationError: A layer is not finite in FP32 already, or the stage is not in FP16 even with
            the listed layers FP32.
        BackendError: ONNX Runtime cannot run a graph.
    """
    check_error(error)
    check_auditable(bundle, output)
    audits = audit(bundle.folder, bundle.stages, trajectories, error=error, progress=progress)
    with atomic_folder(output, Bundle.kind) as folder:
        for name in bundle.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.folder / name, folder / name)
        stages = heeding(bundle, bundle.stages, audits, error, folder)
        Bundle(folder, bundle.pipeline, stages).save(__version__)
    return Bundle.load(output, check=False)


def check_auditable(bundle: Bundle, output: Path) -> None:
    """Refuse, before anything is recorded, a bundle that cannot be audited to a place.

    Raises:
        InputError: FP16 graphs, or the output is the bundle itself.
    """
    if output.resolve() == bundle.folder.resolve():
        raise InputError(f"{output} is the bundle itself.", "Name another folder to write to.")
    for name, stage in bundle.stages.items():
        if stage.precision == "fp16":
            raise InputError(
                f"{name} of {bundle.folder} has FP16 weights, and what they lost cannot be measured.",
                "Export the model with `--precision fp32`.",
            )


def check_error(error: float) -> None:
    """Refuse an impossible error.

    Raises:
        InputError: It is no number between 0 and 1.
    """
    if not 0 < error < 1:
        raise InputError(f"error {error:g} is not possible.", "Give a number between 0 and 1: 0.01 is 1 %.")


def audit(
    folder: Path,
    stages: Mapping[str, Stage],
    trajectories: Trajectories,
    *,
    error: float,
    progress: Progress = silent,
) -> dict[str, Audit]:
    """Measure what FP16 would do to the FP32 layers of each stage whose graph lies in a folder.

    Raises:
        CalibrationError: As `calibrate_fp16`.
        BackendError: ONNX Runtime cannot run a graph.
    """
    feeds = _feeds(trajectories)
    return {
        name: audit_stage(folder / stage.file, stage, feeds[name], error=error, progress=progress)
        for name, stage in stages.items()
    }


def heeding(
    source: Bundle, stages: Mapping[str, Stage], audits: Mapping[str, Audit], error: float, folder: Path
) -> dict[str, Stage]:
    """The stages with the layers that have to stay FP32; the report is written into the folder.

    Args:
        source: The bundle that was calibrated.
        stages: As they are in the folder.
        audits: What was found in them.
        error: What was allowed.
        folder: Of the new bundle.
    """
    report = _report(source, audits, error)
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return {name: replace(stage, keep_fp32=audits[name].keep) for name, stage in stages.items()}


def _feeds(trajectories: Trajectories) -> dict[str, list[Feed]]:
    """What each stage is run on."""
    step = _spread(len(trajectories), SAMPLES)
    prompts = trajectories.settings.prompts
    some = _spread(len(prompts), SAMPLES)
    return {
        "step": [
            Feed(sample.inputs, sample.prompt, sample.timestep)
            for number, sample in enumerate(trajectories)
            if number in step
        ],
        "text_encoder": [
            Feed({"tokens": ids[None]}, text)
            for number in sorted(some)
            for ids, text in zip(trajectories.tokens(number), ("", prompts[number]), strict=True)
        ],
        "vae_decoder": [
            Feed({"latents": part}, prompts[number])
            for number in sorted(some)
            for part in _chunks(trajectories.latents(number))
        ],
    }


def _spread(count: int, wanted: int) -> set[int]:
    """Numbers below `count`, spread without a period that a schedule's could fall in with."""
    if count <= wanted:
        return set(range(count))
    return {int(number * _GOLDEN % 1 * count) for number in range(wanted)}


def _chunks(latents: Array) -> Iterator[Array]:
    """The first frames of a video, as many as a decoder takes at once."""
    yield np.ascontiguousarray(latents[None, :, :DECODER_FRAMES])


def _report(bundle: Bundle, audits: Mapping[str, Audit], error: float) -> dict[str, Any]:
    """The report, plain."""
    return {
        "bundle": bundle.sha256,
        "settings": {"largest_fp16": LARGEST, "headroom": HEADROOM, "error": error},
        "stages": {
            name: {
                "samples": audit.samples,
                "layers": sum(1 for layer in audit.layers if layer.largest_at),
                "outputs": dict(audit.outputs),
                "keep_fp32": [_plain(layer) for layer in audit.layers if layer.reasons],
                "measured": [_plain(layer) for layer in audit.layers if not layer.reasons],
            }
            for name, audit in audits.items()
        },
    }


def _plain(layer: Layer) -> dict[str, Any]:
    """A layer as JSON can hold it: an overflow has no error but null."""
    return {**asdict(layer), "error": layer.error if math.isfinite(layer.error) else None}
