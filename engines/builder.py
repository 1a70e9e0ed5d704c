"""Bundle to engine set: what must be built, what can be kept, and the folder as a whole.

`build_engines` is the entry. How a backend builds one engine stands in its own module and happens
in a process of its own (`reelrt.engines.worker`).
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from reelrt import __version__
from reelrt.bundle.files import atomic_folder, sha256, verify
from reelrt.bundle.manifest import MANIFEST, WEIGHT_STREAMING, Bundle, Engine, EngineSet, Stage
from reelrt.bundle.report import QUALITY
from reelrt.bundle.spec import Profile
from reelrt.engines import backends, memory, profiles, recipe, remedies
from reelrt.engines.backends import Backend
from reelrt.engines.gate import Passed, check_quality
from reelrt.engines.worker import Worker
from reelrt.errors import InputError, IntegrityError
from reelrt.jetson.device import Device, detect
from reelrt.jetson.targets import Target
from reelrt.progress import Progress, silent

log = logging.getLogger("reelrt")

QUANTISED = ("int8", "int8-weights")
"""What a calibration makes; `int8-weights` multiplies in floating point."""
PRECISIONS = ("fp32", "fp16", *QUANTISED)
CPU_BATCH = 4


def build_engines(
    bundle: Path | Bundle,
    output: Path,
    *,
    backend: str = backends.AUTO,
    target: str = "host",
    precision: str | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    batch: int | None = None,
    check_memory: bool = True,
    quality_gate: bool = True,
    weight_streaming: bool = False,
    progress: Progress = silent,
) -> EngineSet:
    """Build the engines of a bundle for one device; what is built already is kept.

    Args:
        bundle: The bundle, or its folder.
        output: The engine set to write. An engine of it with the same cache key is kept.
        backend: `onnxruntime`, `tensorrt_rtx`, `tensorrt`, or `auto` for what suits the target.
        target: A name of `reelrt.jetson.targets`, or `host` for this machine.
        precision: `fp32`, `fp16`, or `int8` or `int8-weights` for a bundle with such stages, whose
            others take the default. Default: the bundle's for ONNX Runtime and for quantised stages,
            else `fp16`.
        size: (width, height) in pixels: the largest video, which engines are tuned for. Smaller
            ones are accepted too. Default: the model's own.
        frames: Most frames. Default: the model's own.
        batch: Most videos at once. Default: 4 on a CPU, where it costs nothing; on a GPU 1, from
            8 GiB on 2, from 16 GiB on 4.
        check_memory: Whether to refuse, before building, what does not fit the memory of a GPU target.
        quality_gate: Whether an INT8 bundle needs a quality report that it passes.
        weight_streaming: Whether the step engine shall be able to leave its weights with the host and take
            them from there while it runs, for a card with memory of its own that is too small for them.
        progress: Told of one stage at a time.

    Returns:
        The engine set as it is on disk.

    Raises:
        InputError: An unknown name, or a target that cannot be built for here.
        RangeError: A size, frame count or batch the model cannot make.
        PlanError: The target has too little memory; the message says what would fit.
        IntegrityError: The bundle is damaged, or its quality report cannot be read.
        QualityError: An INT8 bundle has no quality report, another bundle's, or one that it fails.
        BackendError: The backend is not installed, or fails.
    """
    device = detect()
    library, aim = backends.choose(backend, target, device)
    source = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    quality = check_quality(source, quality_gate)
    width, height, count = profiles.check_size(source.pipeline.geometry, size, frames)
    if batch is None:
        batch = CPU_BATCH if library.name == "onnxruntime" else profiles.default_batch(aim.memory_gib)
    if precision in QUANTISED:
        _check_quantised(source, precision)
    if weight_streaming:
        _check_streaming(library, aim)
    ranges = profiles.profiles(source.pipeline.geometry, width, height, count, batch)
    plan = {
        name: _planned(
            source,
            stage,
            ranges[name],
            precision,
            library,
            aim,
            device,
            weight_streaming and name == "step",
        )
        for name, stage in source.stages.items()
    }
    previous = _previous(output)
    kept = {} if previous is None else _kept(previous, plan)
    if previous is not None and len(kept) == len(plan) and _is_current(previous, source, aim, plan, quality):
        log.info("%s is up to date", output)
        return previous
    backends.check_graph_packages()
    if check_memory and library.name != "onnxruntime" and aim.memory_gib:
        video = memory.Video(width, height, count, batch, plan["step"].precision, source.pipeline.cfg)
        remedies.check_fits(memory.Planner(source, aim), video, weight_streaming)
    with atomic_folder(output, EngineSet.kind) as folder, Worker() as worker:
        engines = {}
        for name, planned in plan.items():
            if name in kept and previous is not None:
                _link(previous, kept[name], folder)
                engines[name] = kept[name]
            else:
                engines[name] = _build(source, planned, folder, worker, progress)
        _copy_shared(source, folder, quality)
        built = EngineSet(
            folder=folder,
            bundle=source.sha256,
            pipeline=source.pipeline,
            backend=library.name,
            backend_version=next(iter(plan.values())).fields["backend_version"],
            target=aim.name,
            compute_capability=aim.compute_capability,
            engines=engines,
            quality=quality.summary,
        )
        built.save(__version__)
    return EngineSet.load(output, check=False)


@dataclass(frozen=True, slots=True)
class Planned:
    """One engine that shall be in the set."""

    stage: Stage
    backend: Backend
    precision: str
    profile: Profile
    compute_capability: str
    keep_fp32: tuple[str, ...]
    inspect: bool
    weight_streaming: bool
    fields: Mapping[str, str]

    @property
    def file(self) -> str:
        """Its file in the set."""
        return f"{self.stage.spec.name}{self.backend.suffix}"


def _planned(
    bundle: Bundle,
    stage: Stage,
    profile: Profile,
    precision: str | None,
    backend: Backend,
    target: Target,
    device: Device,
    weight_streaming: bool,
) -> Planned:
    """An engine to be and its cache key.

    Raises:
        InputError: Not a precision, or one that the bundle's weights no longer have.
        BackendError: The backend is not installed.
    """
    asked = None if precision in QUANTISED else precision
    own = stage.precision if stage.precision in QUANTISED else backend.precision
    wanted = asked or own or stage.precision
    if wanted not in PRECISIONS:
        raise InputError(f"precision {wanted!r} is not known.", f"Choose one of {', '.join(PRECISIONS)}.")
    if PRECISIONS.index(wanted) < PRECISIONS.index(stage.precision):
        raise InputError(
            f"{bundle.folder} holds {stage.precision} weights, and {wanted} cannot be made of them.",
            f"Export the model again with `--precision {wanted}`."
            if stage.precision == "fp16"
            else "Build from the bundle that was calibrated, or leave --precision out.",
        )
    graph, *weights = _stage_files(bundle, stage)
    on_cpu = backend.name == "onnxruntime"
    kept = () if wanted == "fp32" or (on_cpu and wanted == stage.precision) else stage.keep_fp32
    fields = {
        "graph": bundle.files[graph],
        "weights": recipe.cache_key({name: bundle.files[name] for name in weights}) if weights else "",
        "profile": profiles.describe_profile(profile),
        "precision": wanted,
        "fp32_layers": recipe.cache_key(dict.fromkeys(kept, "")) if kept else "",
        "backend": backend.name,
        "backend_version": backends.version(backend),
        "cuda": backends.cuda_version(backend, device),
        "compute_capability": target.compute_capability,
        "cpu": f"{device.architecture} {' '.join(device.cpu_features)}" if on_cpu else "",
        "flags": f"{backend.flags}, {WEIGHT_STREAMING}" if weight_streaming else backend.flags,
    }
    gpu = device.gpu.compute_capability if device.gpu else ""
    inspect = bool(gpu) and gpu == target.compute_capability
    return Planned(
        stage, backend, wanted, profile, target.compute_capability, kept, inspect, weight_streaming, fields
    )


def _check_streaming(backend: Backend, target: Target) -> None:
    """Raise InputError where weights cannot be streamed, or where that gains nothing."""
    if backend.name == "onnxruntime":
        raise InputError("ONNX Runtime on a CPU streams no weights.", "Leave --weight-streaming out.")
    if target.on_device:
        raise InputError(
            f"on {target.name} CPU and GPU share one memory: streaming weights gains nothing there.",
            "Leave --weight-streaming out.",
        )


def _check_quantised(bundle: Bundle, precision: str) -> None:
    """Raise InputError unless there is a stage of a precision."""
    if all(stage.precision != precision for stage in bundle.stages.values()):
        raise InputError(
            f"{bundle.folder} has no {precision} stage, and building does not make one.",
            f"Calibrate it first: `reelrt calibrate {bundle.folder} -o INT8_BUNDLE --precision {precision}`.",
        )


def _stage_files(bundle: Bundle, stage: Stage) -> list[str]:
    """A stage's graph and the files of its weights, which share the graph's name."""
    prefix = stage.file.removesuffix(".onnx") + "."
    others = [name for name in bundle.files if name.startswith(prefix) and name != stage.file]
    return [stage.file, *sorted(others)]


def _build(bundle: Bundle, planned: Planned, folder: Path, worker: Worker, progress: Progress) -> Engine:
    job = recipe.Job(
        backend=planned.backend.name,
        spec=planned.stage.spec,
        graph=bundle.folder / planned.stage.file,
        graph_precision=planned.stage.precision,
        output=folder / planned.file,
        precision=planned.precision,
        profile=planned.profile,
        compute_capability=planned.compute_capability,
        keep_fp32=planned.keep_fp32,
        cfg=bundle.pipeline.cfg,
        inspect=planned.inspect,
        weight_streaming=planned.weight_streaming,
    )
    began = time.monotonic()
    built = worker.build(job, progress)
    return Engine(
        spec=planned.stage.spec,
        file=planned.file,
        precision=planned.precision,
        profile=planned.profile,
        key=recipe.cache_key(planned.fields),
        key_fields=planned.fields,
        weight_bytes=built.weight_bytes,
        activation_bytes=built.activation_bytes,
        build_seconds=round(time.monotonic() - began, 2),
        layers=built.layers,
        inspected=built.inspected,
    )


def _previous(output: Path) -> EngineSet | None:
    """The set that is already there, unverified; None when there is none to speak of."""
    if not (output / MANIFEST).is_file():
        return None
    try:
        return EngineSet.load(output, check=False)
    except IntegrityError as error:
        log.warning("%s is built anew: %s", output, error)
        return None


def _kept(previous: EngineSet, plan: Mapping[str, Planned]) -> dict[str, Engine]:
    """The engines of an existing set that need no rebuild; says why the others do."""
    kept = {}
    for name, planned in plan.items():
        engine = previous.engines.get(name)
        if engine is None:
            continue
        if engine.key != recipe.cache_key(planned.fields):
            log.info("%s is rebuilt: %s", name, "; ".join(recipe.changes(engine.key_fields, planned.fields)))
            continue
        try:
            verify(previous.folder, _files_of(previous, engine))
        except IntegrityError as error:
            log.warning("%s is rebuilt: %s", name, error.message)
            continue
        kept[name] = engine
    return kept


def _is_current(
    previous: EngineSet, bundle: Bundle, target: Target, plan: Mapping[str, Planned], quality: Passed
) -> bool:
    """Whether a set whose engines are all kept is also the same in everything else."""
    engine_files = {name for engine in previous.engines.values() for name in _files_of(previous, engine)}
    shared = {name: digest for name, digest in previous.files.items() if name not in engine_files}
    if (
        previous.bundle != bundle.sha256
        or previous.target != target.name
        or set(previous.engines) != set(plan)
        or previous.quality != quality.summary
        or previous.files.get(QUALITY) != (sha256(bundle.folder / QUALITY) if quality.attached else None)
    ):
        return False
    try:
        verify(previous.folder, shared)
    except IntegrityError as error:
        log.warning("%s is written anew: %s", previous.folder, error.message)
        return False
    return True


def _files_of(engines: EngineSet, engine: Engine) -> dict[str, str]:
    """An engine's files with their hashes: itself, and the weights beside it if there are any."""
    found = {name: digest for name, digest in engines.files.items() if name.startswith(engine.file)}
    return found or {engine.file: ""}


def _link(engines: EngineSet, engine: Engine, folder: Path) -> None:
    """Take an engine over, without copying its bytes where the file system can."""
    for name in _files_of(engines, engine):
        with suppress(OSError):
            os.link(engines.folder / name, folder / name)
        if not (folder / name).exists():
            shutil.copy2(engines.folder / name, folder / name)


def _copy_shared(bundle: Bundle, folder: Path, quality: Passed) -> None:
    """Schedules, tokenizer, card, licence, quality report: all that is no stage's graph or weights."""
    graphs = {name for stage in bundle.stages.values() for name in _stage_files(bundle, stage)}
    for name in [*bundle.files, *([QUALITY] if quality.attached else [])]:
        if name not in graphs:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.folder / name, folder / name)
