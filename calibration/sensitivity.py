"""How much each layer's quantisation costs: the error of the final latents with only that layer in INT8.

A sweep runs the real loop once per layer, from the recorded noise, with few steps; what is measured is
written as it goes, so that a stopped sweep goes on where it was. Knows the loop and nothing of how the
ranges were found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from reelrt.bundle.files import atomic_files
from reelrt.bundle.manifest import Bundle
from reelrt.calibration.layers import Layer
from reelrt.calibration.qdq import Quantised
from reelrt.calibration.recorder import Recorder
from reelrt.calibration.trajectories import Trajectories
from reelrt.errors import InputError, IntegrityError
from reelrt.progress import Progress, silent
from reelrt.runtime.session import Float32

STEPS, PROMPTS = 4, 1
"""Solver steps and prompts of a layer's measurement."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What a sweep measured.

    Attributes:
        errors: Layer to the error of the final latents with only that layer quantised: the root mean
            square of the difference over that of the FP32 latents.
        steps: Solver steps of each measurement.
        prompts: Number of prompts of each.
        method: How the ranges were found.
    """

    errors: Mapping[str, float]
    steps: int
    prompts: int
    method: str

    def kept(self, budget: float) -> list[str]:
        """The layers to keep in FP32 so that those left err by no more than a budget together.

        Errors of layers are taken as independent, so their squares add up. The most sensitive ones
        are kept first.

        Args:
            budget: Allowed relative error of the final latents.
        """
        left = math.fsum(error**2 for error in self.errors.values())
        kept = []
        for name, error in self.ordered:
            if left <= budget**2:
                break
            kept.append(name)
            left -= error**2
        return kept

    @property
    def ordered(self) -> list[tuple[str, float]]:
        """Layers and errors, the most sensitive layer first."""
        return sorted(self.errors.items(), key=lambda item: -item[1])

    def document(self) -> dict[str, Any]:
        """The sweep as plain JSON values, the most sensitive layer first."""
        return {
            "what": "relative error of the final latents (RMS) with only that layer in INT8",
            "method": self.method,
            "steps": self.steps,
            "prompts": self.prompts,
            "errors": dict(self.ordered),
        }


def check_budget(budget: float) -> None:
    """Refuse an impossible budget.

    Raises:
        InputError: It is no number from 0 to 1.
    """
    if not (math.isfinite(budget) and 0 <= budget <= 1):
        raise InputError(f"budget {budget} is not possible: give a relative error from 0 to 1.")


def sweep(
    bundle: Bundle,
    trajectories: Trajectories,
    quantised: Quantised,
    layers: Sequence[Layer],
    file: Path,
    *,
    method: str,
    steps: int = STEPS,
    prompts: int = PROMPTS,
    progress: Progress = silent,
) -> Sensitivity:
    """Measure every layer alone; goes on with what the file holds already.

    Args:
        bundle: The FP32 bundle.
        trajectories: Where noise and prompts come from.
        quantised: The step graph whose layers can be quantised one by one.
        layers: What to measure.
        file: The JSON to write and to go on from.
        method: How the ranges were found.
        steps: Solver steps.
        prompts: How many prompts, at most those recorded.
        progress: Told of the layers that are done, as `sensitivity`.

    Raises:
        InputError: The file holds a sweep of something else.
    """
    prompts = min(prompts, len(trajectories.settings.prompts))
    settings = {
        "bundle": bundle.sha256,
        "method": method,
        "steps": steps,
        "prompts": trajectories.settings.prompts[:prompts],
        "seed": trajectories.settings.seed,
        "samples": len(trajectories),
        **({"size": trajectories.settings.size} if trajectories.settings.size else {}),
        **({"frames": trajectories.settings.frames} if trajectories.settings.frames else {}),
    }
    errors = _begun(file, settings)
    reference: list[Float32] = []
    with TemporaryDirectory(prefix="reelrt-sweep-") as folder:
        for done, layer in enumerate(layers):
            progress("sensitivity", done, len(layers))
            if layer.name in errors:
                continue
            reference = reference or final_latents(bundle, None, trajectories, steps, prompts)
            graph = Path(folder) / "step.onnx"
            quantised.write(layer.nodes, graph)
            found = final_latents(bundle, graph, trajectories, steps, prompts)
            errors[layer.name] = relative_error(found, reference)
            with atomic_files([file]) as (path,):
                path.write_text(json.dumps({**settings, "errors": errors}, indent=1) + "\n", encoding="utf-8")
    progress("sensitivity", len(layers), len(layers))
    return Sensitivity({layer.name: errors[layer.name] for layer in layers}, steps, prompts, method)


def final_latents(
    bundle: Bundle, graph: Path | None, trajectories: Trajectories, steps: int, prompts: int
) -> list[Float32]:
    """The latents that the loop ends with, [C, F, h, w] each, from the recorded prompts and noise.

    Args:
        bundle: The bundle.
        graph: The step graph; None takes the bundle's own.
        trajectories: Prompts, guidance and seeds.
        steps: Solver steps.
        prompts: How many of the prompts.
    """
    recorder, settings = Recorder(bundle, graph), trajectories.settings
    return [
        recorder.denoise(
            prompt,
            steps=steps,
            guidance=settings.guidance,
            seed=settings.seed + number,
            size=settings.size,
            frames=settings.frames,
        )
        for number, prompt in enumerate(settings.prompts[:prompts])
    ]


def relative_error(found: Sequence[Float32], reference: Sequence[Float32]) -> float:
    """Root mean square of the difference over that of the reference."""
    apart = sum(
        float(np.square(f - r, dtype=np.float64).sum()) for f, r in zip(found, reference, strict=True)
    )
    whole = sum(float(np.square(r, dtype=np.float64).sum()) for r in reference)
    return math.sqrt(apart / whole)


def _begun(file: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """What a stopped sweep had measured already."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        errors = {str(name): float(error) for name, error in found.pop("errors").items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{file} cannot be read: {error}.", "Remove it; what it held is measured again."
        ) from error
    if found != json.loads(json.dumps(settings)):
        raise InputError(
            f"{file} holds the sensitivity of another calibration.",
            "Name another folder with --work, or remove that file.",
        )
    return errors


def plot(sensitivity: Sensitivity, kept: Sequence[str], path: Path, most: int = 60) -> None:
    """Draw the most sensitive layers as bars, those that stay in FP32 in another colour.

    Args:
        sensitivity: What was measured.
        kept: The layers that stay in FP32.
        path: The picture to write, PNG.
        most: How many layers to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = sensitivity.ordered[:most]
    figure = Figure(figsize=(9, 1.2 + 0.17 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = ["#c0392b" if name in kept else "#2c6e91" for name, _ in bars]
    axes.barh([name for name, _ in bars], [error for _, error in bars], color=colours)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.tick_params(axis="y", labelsize=6)
    axes.margins(y=0.01)
    axes.set_xlabel("relative error of the final latents (RMS), only this layer in INT8")
    axes.set_title(f"The {len(bars)} most sensitive of {len(sensitivity.errors)} layers; red stays in FP32")
    figure.savefig(path, format="png", dpi=110)
