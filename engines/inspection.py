"""What a bundle or an engine set holds, as a plain structure for people and programs.

Reads manifests and schedules, checks hashes; opens no engine and no graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reelrt.bundle.files import verify
from reelrt.bundle.manifest import SCHEDULES, Bundle, EngineSet, Pipeline, check_either, kind_of
from reelrt.bundle.report import QUALITY, Report
from reelrt.bundle.schedule import Schedules
from reelrt.bundle.spec import Profile, StageSpec, TensorSpec
from reelrt.errors import IntegrityError, RangeError


def describe(folder: Path) -> dict[str, Any]:
    """Describe a bundle or an engine set.

    Args:
        folder: Either of the two. A damaged one is described as far as its manifest goes, and
            `intact` and `damage` say what is wrong.

    Returns:
        A structure of mappings, sequences and scalars that JSON can hold; names that end in
        `_bytes` or `_seconds` say their unit.

    Raises:
        IntegrityError: There is no manifest, or it cannot be read.
    """
    check_either(folder)
    return _engine_set(folder) if kind_of(folder) == EngineSet.kind else _bundle(folder)


def _bundle(folder: Path) -> dict[str, Any]:
    bundle = Bundle.load(folder, check=False)
    stages = {
        name: {
            "file": stage.file,
            "precision": stage.precision,
            "weight_bytes": stage.weight_bytes,
            "keep_fp32": list(stage.keep_fp32),
            **_boundary(stage.spec, stage.precision),
        }
        for name, stage in bundle.stages.items()
    }
    return {
        "kind": bundle.kind,
        "folder": str(folder),
        "sha256": bundle.sha256,
        **_common(folder, bundle.pipeline, bundle.files, bundle.version),
        "quality": _quality(bundle),
        "stages": stages,
    }


def _engine_set(folder: Path) -> dict[str, Any]:
    engines = EngineSet.load(folder, check=False)
    stages = {
        name: {
            "file": engine.file,
            "precision": engine.precision,
            "weight_bytes": engine.weight_bytes,
            "activation_bytes": engine.activation_bytes,
            "build_seconds": engine.build_seconds,
            "layers": {name: dict(kinds) for name, kinds in engine.layers.items()},
            "inspected": {name: dict(kinds) for name, kinds in engine.inspected.items()},
            **_boundary(engine.spec, engine.precision),
            "profile": {axis: asdict(extent) for axis, extent in engine.profile.items()},
            "key": engine.key,
            "key_fields": dict(engine.key_fields),
        }
        for name, engine in engines.engines.items()
    }
    return {
        "kind": engines.kind,
        "folder": str(folder),
        "bundle": engines.bundle,
        "backend": engines.backend,
        "backend_version": engines.backend_version,
        "target": engines.target,
        "compute_capability": engines.compute_capability,
        **_common(folder, engines.pipeline, engines.files, engines.version),
        "largest": _largest(engines),
        "quality": dict(engines.quality),
        "stages": stages,
    }


def _quality(bundle: Bundle) -> dict[str, Any]:
    """What the report beside a bundle says; empty when there is none that is about this bundle."""
    try:
        report = Report.load(bundle.folder / QUALITY)
    except IntegrityError:
        return {}
    return report.summary() if report.belongs_to(bundle) else {}


def _common(folder: Path, pipeline: Pipeline, files: Mapping[str, str], version: str) -> dict[str, Any]:
    """What bundles and engine sets both say."""
    damage = _damage(folder, files)
    present = [folder / name for name in files if (folder / name).is_file()]
    return {
        "reelrt": version,
        "intact": not damage,
        **({"damage": damage} if damage else {}),
        "total_bytes": sum(path.stat().st_size for path in present),
        "model": asdict(pipeline.model),
        "geometry": asdict(pipeline.geometry),
        "cfg": pipeline.cfg,
        "solver": pipeline.solver,
        "guidance": pipeline.guidance,
        "schedules": _schedules(folder),
    }


def _damage(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Every file that is missing or another, one sentence each."""
    found = (_fault(folder, name, digest) for name, digest in files.items())
    return [fault for fault in found if fault]


def _fault(folder: Path, name: str, digest: str) -> str:
    try:
        verify(folder, {name: digest})
    except IntegrityError as error:
        return error.message
    return ""


def _schedules(folder: Path) -> dict[str, Any]:
    """Solver to its step counts; empty when the file cannot be read, which `damage` tells of."""
    try:
        schedules = Schedules.load(folder / SCHEDULES)
    except Exception:  # noqa: BLE001 (safetensors raises its own kind)
        return {}
    counts = {solver: _counts(schedules, solver) for solver in schedules.solvers}
    return {name: {"min": min(n), "max": max(n), "counts": len(n)} for name, n in counts.items()}


def _counts(schedules: Schedules, solver: str) -> list[int]:
    """The step counts that a solver was compiled for."""
    counts = []
    for steps in range(1, schedules.max_steps + 1):
        with suppress(RangeError):
            counts.append(schedules.get(solver, steps).steps)
    return counts


def _boundary(spec: StageSpec, precision: str) -> dict[str, Any]:
    """A stage's inputs and outputs, readable: `float32[batch, 77, 1024]`."""
    sides = {"inputs": spec.inputs, "outputs": spec.outputs}
    return {
        side: {name: _tensor(tensor, precision) for name, tensor in specs.items()}
        for side, specs in sides.items()
    }


def _tensor(tensor: TensorSpec, precision: str) -> str:
    return f"{tensor.numpy_dtype(precision).name}[{', '.join(map(str, tensor.axes))}]"


def _largest(engines: EngineSet) -> dict[str, Any]:
    """The largest video these engines make, in the user's units."""
    profile: Profile = engines.engines["step"].profile
    scale = engines.pipeline.geometry.spatial_scale
    return {
        "width": profile["width"].max * scale,
        "height": profile["height"].max * scale,
        "frames": profile["frames"].max,
        "batch": profile["batch"].max,
    }
