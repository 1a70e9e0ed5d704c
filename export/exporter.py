"""A diffusers folder to an ONNX bundle: the order of things, and nothing else.

One component is in memory at a time: its answers are recorded, it is exported and freed, and only
then is the graph opened and compared. torch is imported after the folder was checked.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from reelrt import __version__
from reelrt.bundle.files import atomic_folder
from reelrt.bundle.manifest import SCHEDULES, TOKENIZER, Bundle, Model, Pipeline, Stage
from reelrt.bundle.schedule import MAX_GUIDANCE, Cfg, Schedules
from reelrt.bundle.spec import Geometry, StageSpec, step_spec, text_encoder_spec, vae_decoder_spec
from reelrt.errors import BackendError, InputError, ModelError
from reelrt.export.folder import CARD, ModelFolder, open_folder
from reelrt.progress import Progress, silent

Precision = Literal["fp32", "fp16"]

GUIDANCE, FRAMES, SAMPLE_SIZE = 7.5, 16, 32
"""What a model whose card and configuration say nothing is taken to want."""

SPECS = {"text_encoder": text_encoder_spec, "step": step_spec, "vae_decoder": vae_decoder_spec}
NEEDED = ("torch", "diffusers", "transformers", "onnx", "onnxscript")


def export_bundle(
    model: Path,
    output: Path,
    *,
    precision: Precision = "fp32",
    cfg: Cfg = "split",
    validate: bool = True,
    progress: Progress = silent,
) -> Bundle:
    """Export a diffusers text-to-video folder to an ONNX bundle.

    Args:
        model: The diffusers folder.
        output: The bundle to write; an older bundle there is replaced when the new one is whole.
        precision: Type of the weights and of the arithmetic between them.
        cfg: How guidance is computed in the step graph.
        validate: Whether to compare each stage with the model before anything is written.
        progress: Told of `schedules`, then of each stage by name.

    Returns:
        The bundle on disk.

    Raises:
        ModelError: The folder is not one we can export, or is damaged.
        ValidationError: A stage disagrees with the model.
        InputError: The output cannot be written.
        BackendError: A library that exporting needs is not installed.
    """
    folder = open_folder(model)
    _require_libraries()
    try:
        with atomic_folder(output, Bundle.kind) as partial:
            _write_bundle(folder, partial, precision, cfg, validate, progress)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}.") from error
    return Bundle.load(output, check=False)


def _require_libraries() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(
            f"exporting needs {', '.join(missing)}, not installed here.",
            'Run `pip install "reelrt[export]"`.',
        )


def _write_bundle(
    folder: ModelFolder, target: Path, precision: Precision, cfg: Cfg, validate: bool, progress: Progress
) -> None:
    from reelrt.export.components import load_scheduler, write_tokenizer
    from reelrt.export.schedules import compile_schedules, own_solver

    scheduler = load_scheduler(folder)
    solver = own_solver(folder.classes["scheduler"])
    tokenizer, tokens = write_tokenizer(folder, target / TOKENIZER)
    geometry, guidance = _geometry(folder, tokens), _guidance(folder)
    schedules = compile_schedules(scheduler.config, progress=progress)
    schedules.save(target / SCHEDULES)
    for paper in folder.papers():
        shutil.copyfile(paper, target / paper.name)
    geometry = replace(geometry, state_rows=schedules.history_rows + (cfg == "split"))
    job = _StageJob(folder, target, precision, cfg, validate, progress)
    stages = {
        name: job.run(SPECS[name](geometry), schedules, scheduler.config, guidance)
        for name in folder.family.stages
    }
    weight_bytes = sum(stage.weight_bytes for stage in stages.values())
    pipeline = Pipeline(
        Model(folder.path.resolve().name, folder.family.name, folder.sha256(), folder.licence, weight_bytes),
        geometry,
        cfg,
        solver,
        guidance,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    Bundle(target, pipeline, stages).save(__version__)


def _guidance(folder: ModelFolder) -> float:
    scale = float(folder.parameter("guidance_scale", GUIDANCE))
    if not 0 <= scale <= MAX_GUIDANCE:
        raise ModelError(f"{folder.path / CARD} gives {scale:g} as guidance_scale, which is not possible.")
    return scale


def _geometry(folder: ModelFolder, tokens: int) -> Geometry:
    """The model's sizes, with one row of state: how many there are the schedules say."""
    unet, vae, text = (folder.config(name) for name in ("unet", "vae", "text_encoder"))
    if text.get("use_attention_mask"):
        raise ModelError(f"{folder.path}: a text encoder with an attention mask cannot be exported.")
    size = unet.get("sample_size") or SAMPLE_SIZE
    height, width = size if isinstance(size, list) else (size, size)
    try:
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        return Geometry(
            latent_channels=unet["in_channels"],
            spatial_scale=scale,
            size_multiple=scale,
            tokens=tokens,
            text_width=unet["cross_attention_dim"],
            state_rows=1,
            frames=int(folder.parameter("num_frames", FRAMES)),
            height=height * scale,
            width=width * scale,
        )
    except KeyError as error:
        raise ModelError(f"{folder.path}: the config.json of unet or vae has no {error}.") from error
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder.path}: a config.json or the model card is wrong: {error}.") from error


class _StageJob:
    """What the export of every stage has in common."""

    def __init__(
        self,
        folder: ModelFolder,
        target: Path,
        precision: Precision,
        cfg: Cfg,
        validate: bool,
        progress: Progress,
    ) -> None:
        self.folder, self.target, self.precision, self.cfg = folder, target, precision, cfg
        self.validate, self.progress = validate, progress

    def run(self, spec: StageSpec, schedules: Schedules, config: Mapping[str, Any], guidance: float) -> Stage:
        """Export one stage: record, write, free, compare."""
        from reelrt.export import unet3d, validation
        from reelrt.export.components import loaded
        from reelrt.export.graph import TRACED, sample_inputs, write_graph
        from reelrt.export.schedules import make_scheduler

        path = self.target / f"{spec.name}.onnx"
        notes = {
            "reelrt": __version__,
            "stage": spec.name,
            "family": self.folder.family.name,
            "cfg": self.cfg,
        }
        tokens = int(self.folder.config("text_encoder").get("vocab_size", 49408))
        cases, advance = [], None
        self.progress(spec.name, 0, 3)
        with loaded(self.folder, self.folder.family.stages[spec.name], self.precision) as component:
            if self.validate:
                with self._named(spec):
                    cases = validation.record(
                        unet3d.reference(spec.name, component, self.cfg), spec, self.precision, tokens
                    )
                if spec.name == "step":
                    schedule = _longest(schedules, validation.ADVANCE_STEPS)
                    scheduler = make_scheduler(schedule.solver, config)
                    advance = validation.record_advance(
                        unet3d.UNetReference(component), scheduler, schedule, guidance, spec, self.precision
                    )
            self.progress(spec.name, 1, 3)
            inputs = sample_inputs(spec, TRACED, self.precision, tokens)
            module = unet3d.exported(spec.name, component, self.cfg)
            weight_bytes = write_graph(module, inputs, spec, path, notes)
            del component, module
        self.progress(spec.name, 2, 3)
        if self.validate:
            session = validation.open_session(path)
            validation.check(session, spec, self.precision, cases)
            if advance is not None:
                validation.check_advance(session, spec, self.precision, self.cfg, advance)
        self.progress(spec.name, 3, 3)
        return Stage(spec, path.name, self.precision, weight_bytes)

    @contextmanager
    def _named(self, spec: StageSpec) -> Iterator[None]:
        """Name the component that torch cannot run."""
        try:
            yield
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            component = self.folder.family.stages[spec.name]
            name, reason = self.folder.classes[component], " ".join(str(error).split()).rstrip(".")
            raise ModelError(
                f"{self.folder.path / component} does not run as a {name}: {type(error).__name__}: {reason}.",
                "Its config.json may be another model's: download the model again.",
            ) from error


def _longest(schedules: Schedules, steps: int) -> Any:
    """The schedule with the longest history at a step count."""
    return max((schedules.get(name, steps) for name in schedules.solvers), key=lambda s: s.history_rows)
