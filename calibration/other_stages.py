"""A text encoder or VAE decoder tried in INT8: quantised, measured, and used only if it holds.

Ranges come from every other prompt, and the error is measured on the rest. Knows nothing of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from reelrt.bundle.manifest import Bundle, Stage
from reelrt.calibration import qdq
from reelrt.calibration.int8 import prepare
from reelrt.calibration.ranges import Method
from reelrt.calibration.recorder import open_graph
from reelrt.calibration.sensitivity import relative_error
from reelrt.calibration.trajectories import Trajectories
from reelrt.errors import CalibrationError
from reelrt.progress import Progress
from reelrt.runtime.session import Array

CHUNK = 4
"""Latent frames per call of the VAE decoder."""

HOLDS: Mapping[str, tuple[str, float]] = {
    "text_encoder": ("relative error of the embeddings (RMS)", 0.01),
    "vae_decoder": ("relative error of the frames (RMS)", 0.01),
}
"""Stage to what is measured of its INT8 version and the most that is allowed for it to be used."""


def try_int8(
    bundle: Bundle,
    trajectories: Trajectories,
    name: str,
    folder: Path,
    method: Method,
    progress: Progress,
) -> tuple[dict[str, Any], Stage | None]:
    """What quantising a stage costs, and the stage if it holds; its graph is in the folder then.

    Args:
        bundle: The FP32 bundle.
        trajectories: Recorded with it.
        name: One of `HOLDS`.
        folder: Of the new bundle, with the FP32 graph in it.
        method: How a range is found.
        progress: Told of the samples that have been run, under the stage's name.

    Returns:
        What a report says of it, and None where it does not hold or cannot be quantised.
    """
    import onnx

    stage = bundle.stages[name]
    source = bundle.folder / stage.file
    count = len(trajectories.settings.prompts)
    fitted = range(0, count, 2)
    held_out = range(1, count, 2)
    what, allowed = HOLDS[name]
    nodes = [node.name for node in qdq.quantisable(onnx.load(source, load_external_data=False).graph)]
    try:
        quantised = prepare(
            source,
            nodes,
            lambda: _feeds(trajectories, name, fitted),
            sum(1 for _ in _feeds(trajectories, name, fitted)),
            method=method,
            progress=progress,
            what=name,
        )
    except CalibrationError as failure:
        return {"used": False, "measured": what, "error": None, "allowed": allowed, "why": str(failure)}, None
    with TemporaryDirectory(prefix="reelrt-int8-") as scratch:
        target = Path(scratch) / stage.file
        quantised.write(quantised.nodes, target)
        error = _error(source, target, stage, _feeds(trajectories, name, held_out))
    used = error <= allowed
    found = {"measured": what, "error": error, "allowed": allowed, "prompts": len(held_out), "used": used}
    if not used:
        return found, None
    weight_bytes = quantised.write(quantised.nodes, folder / stage.file)
    return found, replace(stage, precision="int8", weight_bytes=weight_bytes)


def _feeds(trajectories: Trajectories, name: str, prompts: Sequence[int]) -> Iterator[Mapping[str, Array]]:
    """What a stage read for some of the prompts."""
    for number in prompts:
        if name == "text_encoder":
            for ids in trajectories.tokens(number):
                yield {"tokens": ids[None]}
        else:
            latents = trajectories.latents(number)
            for begin in range(0, latents.shape[1], CHUNK):
                yield {"latents": np.ascontiguousarray(latents[None, :, begin : begin + CHUNK])}


def _error(source: Path, target: Path, stage: Stage, feeds: Iterator[Mapping[str, Array]]) -> float:
    """Relative error (RMS) of a stage's outputs against another graph's."""
    first, second = open_graph(source), open_graph(target)
    names = list(stage.spec.outputs)
    expected, found = [], []
    for feed in feeds:
        expected += [each.astype(np.float32) for each in first.run(names, dict(feed))]
        found += [each.astype(np.float32) for each in second.run(names, dict(feed))]
    return relative_error(found, expected)
