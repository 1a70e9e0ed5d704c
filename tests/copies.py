"""Copies of a bundle that differ from it in one way, for tests of what compares two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from reelrt.bundle.manifest import MANIFEST, Bundle

Change = Callable[[np.ndarray], np.ndarray]


def copied(bundle: Path, folder: Path, name: str) -> Path:
    """A copy of a bundle, in a folder under another name."""
    return Path(shutil.copytree(bundle, folder / name))


def with_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change a bundle's manifest in place; its files stay as they are."""
    path = bundle / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")
    return bundle


def with_precision(bundle: Path, precisions: Mapping[str, str]) -> Path:
    """Say of a bundle's stages that they are of other precisions."""

    def change(data: dict[str, Any]) -> None:
        for stage, precision in precisions.items():
            data["stages"][stage]["precision"] = precision

    return with_manifest(bundle, change)


def with_weights(bundle: Path, change: Change, stage: str = "step") -> Path:
    """Change the large weights of a stage's graph in place, and hash the files anew."""
    loaded = Bundle.load(bundle)
    path = bundle / loaded.stages[stage].file
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim > 1:
            tensor.CopyFrom(numpy_helper.from_array(change(values).astype(np.float32), tensor.name))
    weights = f"{path.name}.data"
    (bundle / weights).unlink()
    onnx.save(model, path, save_as_external_data=True, location=weights)
    loaded.save(loaded.version)
    return bundle


def noise(size: float) -> Change:
    """Add normal noise, relative to the weights' own deviation."""

    def change(values: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(0)
        noisy: np.ndarray = values + size * values.std() * rng.standard_normal(values.shape)
        return noisy

    return change
