"""A calibrated bundle as it is written: the FP32 bundle's files, the new stages, and what was measured.

Whichever way its stages were made, the same is asked of its source, compared at its end and told in its
`calibration.json`. Knows nothing of how a stage is calibrated.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reelrt import __version__
from reelrt.bundle.manifest import Bundle, Stage
from reelrt.calibration.fp16 import audit, heeding
from reelrt.calibration.sensitivity import final_latents, relative_error
from reelrt.calibration.trajectories import Trajectories, fingerprint
from reelrt.errors import InputError
from reelrt.progress import Progress

REPORT = "calibration.json"

CHECKED_PROMPTS = 2
"""Prompts whose final latents are compared with the recorded ones."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibrated bundle and what was decided.

    Attributes:
        bundle: The bundle on disk.
        report: What its `calibration.json` holds.
    """

    bundle: Bundle
    report: Mapping[str, Any]


def check_source(bundle: Bundle, output: Path) -> None:
    """Refuse, before anything is recorded, a bundle that cannot be calibrated to a place.

    Raises:
        InputError: Not FP32, or the output is the bundle itself.
    """
    for name, stage in bundle.stages.items():
        if stage.precision != "fp32":
            raise InputError(
                f"{name} of {bundle.folder} is {stage.precision}; calibrating starts from FP32 weights.",
                "Export the model with `--precision fp32`.",
            )
    if output.resolve() == bundle.folder.resolve():
        raise InputError(f"{output} is the bundle itself.", "Name another folder to write to.")


def copy_files(bundle: Bundle, folder: Path, without: Stage) -> None:
    """Copy a bundle's files to a folder, but for one stage's graph and weights."""
    for name in bundle.files:
        if name == without.file or name.startswith(f"{without.file}."):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.folder / name, folder / name)


def final_error(
    bundle: Bundle, graph: Path, trajectories: Trajectories, progress: Progress
) -> dict[str, Any]:
    """Relative error of a step graph's final latents against the recorded ones, with the recording's steps.

    Args:
        bundle: The FP32 bundle.
        graph: The new step graph.
        trajectories: Recorded with the bundle.
        progress: Told of `check`.
    """
    count = min(CHECKED_PROMPTS, len(trajectories.settings.prompts))
    progress("check", 0, 1)
    found = final_latents(bundle, graph, trajectories, trajectories.settings.steps, count)
    progress("check", 1, 1)
    error = relative_error(found, [trajectories.latents(number) for number in range(count)])
    return {"relative_error": error, "prompts": count}


def audited(
    bundle: Bundle,
    folder: Path,
    stages: Mapping[str, Stage],
    trajectories: Trajectories,
    error: float | None,
    report: Mapping[str, Any],
    progress: Progress,
) -> tuple[Mapping[str, Stage], dict[str, Any]]:
    """The stages with the layers that FP16 would harm, and the report with their number.

    Args:
        bundle: The FP32 bundle.
        folder: Of the new one.
        stages: As they are there.
        trajectories: Recorded with the bundle.
        error: Most that FP16 may change in a layer's output; None audits nothing.
        report: What is told so far.
        progress: Told of `audit <stage>`.
    """
    if error is None:
        return stages, {**report, "fp16_audit": None}
    audits = audit(folder, stages, trajectories, error=error, progress=progress)
    kept = {name: len(found.keep) for name, found in audits.items()}
    return heeding(bundle, stages, audits, error, folder), {
        **report,
        "fp16_audit": {"error": error, "kept_fp32": kept},
    }


def made_from(bundle: Bundle, trajectories: Trajectories) -> dict[str, Any]:
    """What a report says of the bundle and the recording that it was made from."""
    settings = trajectories.settings
    return {
        "reelrt": __version__,
        "model": bundle.pipeline.model.name,
        "bundle": bundle.sha256,
        "prompts": len(settings.prompts),
        "prompts_sha256": fingerprint(settings.prompts),
        "samples": len(trajectories),
        "steps": settings.steps,
        "guidance": settings.guidance,
        "seed": settings.seed,
        "size": settings.size,
        "frames": settings.frames,
    }


def finish(bundle: Bundle, folder: Path, stages: Mapping[str, Stage], report: Mapping[str, Any]) -> None:
    """Write the report and, as the last thing, the manifest.

    Args:
        bundle: The FP32 bundle.
        folder: Of the new one, with all of its graphs.
        stages: Of the new one.
        report: What its `calibration.json` shall hold.
    """
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    weight_bytes = sum(stage.weight_bytes for stage in stages.values())
    pipeline = replace(bundle.pipeline, model=replace(bundle.pipeline.model, weight_bytes=weight_bytes))
    Bundle(folder, pipeline, stages).save(__version__)
