"""Recording trajectories: real prompts go through the real loop, and what the graphs read is kept.

Of each prompt the inputs of the step graph are kept at solver steps spread over the whole schedule,
without and with the prompt. How much that takes is said, and refused, before it starts; a stopped
recording goes on where it was. Knows ONNX Runtime as what runs a bundle, and nothing of quantisation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from reelrt.bundle.files import atomic_files
from reelrt.bundle.manifest import TOKENIZER, Bundle, Pipeline
from reelrt.bundle.schedule import first_passes
from reelrt.calibration.recorder import Feed, Recorder
from reelrt.calibration.trajectories import (
    DOCUMENT,
    Settings,
    Trajectories,
    prompt_file,
    read_settings,
    write_prompt,
)
from reelrt.errors import InputError
from reelrt.progress import Progress, silent
from reelrt.runtime.noise import MAX_SEED, check_seed
from reelrt.runtime.request import Limits
from reelrt.runtime.session import Float32
from reelrt.runtime.text import Tokenizer
from reelrt.runtime.unbuilt import as_engines
from reelrt.wording import counted

SAMPLES_PER_PROMPT = 4
"""Solver steps that are kept of each prompt; with split guidance each gives two samples."""
_GOLDEN = 0.618033988749895


def record(
    bundle_folder: Path,
    prompts: Sequence[str],
    folder: Path,
    *,
    steps: int = 25,
    samples_per_prompt: int = SAMPLES_PER_PROMPT,
    guidance: float | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    progress: Progress = silent,
) -> Trajectories:
    """Record the trajectories of prompts; goes on where an equal recording was stopped.

    Args:
        bundle_folder: The bundle, FP32.
        prompts: What to generate, with the model's own solver.
        folder: Where to keep them; made if missing.
        steps: Solver steps of each video.
        samples_per_prompt: Solver steps to keep of each, at most `steps`.
        guidance: Guidance scale. Default: the model's own.
        seed: Of the first video's noise; the next one takes the next.
        size: Width and height in pixels. Default: the model's own. Ranges can be found at a small one.
        frames: Of each video. Default: the model's own.
        progress: Told of the prompts that are done, as `trajectories`.

    Raises:
        InputError: No prompts, an impossible number, not enough disk, or a folder that holds another
            recording.
        IntegrityError: Not a bundle, or a damaged one.
        CalibrationError: The network produced numbers that are not finite; says at which step and layer.
    """
    bundle = Bundle.load(bundle_folder)
    settings = settle(
        bundle,
        prompts,
        steps=steps,
        samples_per_prompt=samples_per_prompt,
        guidance=guidance,
        seed=seed,
        size=size,
        frames=frames,
    )
    _prepare(folder, settings, bundle)
    missing = [number for number in range(len(prompts)) if not prompt_file(folder, number).exists()]
    progress("trajectories", len(prompts) - len(missing), len(prompts))
    if missing:
        recorder = Recorder(bundle)
        tokenizer = Tokenizer(bundle_folder / TOKENIZER, bundle.pipeline)
        for done, number in enumerate(missing, len(prompts) - len(missing) + 1):
            feeds: list[tuple[int, Feed]] = []
            wanted = set(stratified(steps, samples_per_prompt, number))

            def keep(feed: Feed, feeds: list[tuple[int, Feed]] = feeds, wanted: set[int] = wanted) -> None:
                index = solver_step(feed.table, feed.row)
                if index in wanted:
                    feeds.append((index, feed.copy()))

            with recorder.listen(keep):
                latents = recorder.denoise(
                    prompts[number],
                    steps=steps,
                    guidance=settings.guidance,
                    seed=seed + number,
                    size=size,
                    frames=frames,
                )
            ids = np.stack([tokenizer(text).ids for text in ("", prompts[number])])
            write_prompt(prompt_file(folder, number), feeds, ids, recorder.started, latents)
            progress("trajectories", done, len(prompts))
    return Trajectories(folder, settings)


def stratified(steps: int, count: int, number: int) -> list[int]:
    """Solver steps spread over the whole schedule: one of each of `count` equal parts of it.

    Where in its part differs from prompt to prompt by the golden ratio, so that a few prompts already
    cover every step.

    Args:
        steps: Solver steps of the schedule.
        count: How many to choose, at most `steps`.
        number: Of the prompt.
    """
    shift = (number * _GOLDEN) % 1
    return [int((part + shift) * steps / count) for part in range(count)]


def solver_step(table: Float32, row: int) -> int:
    """The solver step that a row of a table [S, K] belongs to; split guidance has two rows for one."""
    return int((~first_passes(table[:row])).sum()) if row else 0


def estimate_bytes(
    pipeline: Pipeline,
    prompts: int,
    samples_per_prompt: int = SAMPLES_PER_PROMPT,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> int:
    """Bytes that `record` will write.

    Args:
        pipeline: Of the bundle.
        prompts: Number of prompts.
        samples_per_prompt: Solver steps kept of each.
        guidance: Guidance scale. Default: the model's own.
        size: Width and height in pixels. Default: the model's own.
        frames: Of each video. Default: the model's own.
    """
    geometry = pipeline.geometry
    width, height = size or (geometry.width, geometry.height)
    cells = (height // geometry.spatial_scale) * (width // geometry.spatial_scale)
    latents = 4 * geometry.latent_channels * (frames or geometry.frames) * cells
    sample = latents * geometry.state_rows + 4 * geometry.table_columns + 8
    text = 2 * geometry.tokens * (4 * geometry.text_width + 8)
    samples = count_samples(pipeline, prompts, samples_per_prompt, guidance)
    return samples * sample + prompts * (2 * latents + text)


def count_samples(
    pipeline: Pipeline, prompts: int, samples_per_prompt: int, guidance: float | None = None
) -> int:
    """Samples that `record` will keep; arguments as `estimate_bytes`."""
    guided = (pipeline.guidance if guidance is None else guidance) != 1
    return prompts * samples_per_prompt * (2 if pipeline.cfg == "split" and guided else 1)


def settle(
    bundle: Bundle,
    prompts: Sequence[str],
    *,
    steps: int,
    samples_per_prompt: int,
    guidance: float | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> Settings:
    """What `record` is asked for, checked; arguments as there.

    Raises:
        InputError: No prompts, or an impossible number.
    """
    settings = Settings(
        bundle=bundle.sha256,
        model=bundle.pipeline.model.name,
        prompts=tuple(prompts),
        steps=steps,
        samples_per_prompt=samples_per_prompt,
        guidance=bundle.pipeline.guidance if guidance is None else guidance,
        seed=seed,
        size=size,
        frames=frames,
    )
    check_seed(settings.seed)
    if settings.seed + len(settings.prompts) - 1 > MAX_SEED:
        raise InputError(
            f"seed {settings.seed} is too large for {counted(len(settings.prompts), 'prompt')}: each takes "
            "the next one."
        )
    limits = Limits(as_engines(bundle))
    limits.latent_shape(settings.frames, settings.size)
    if not settings.prompts:
        raise InputError("there are no prompts to record.", "Give a file with one prompt per line.")
    if settings.steps < 1:
        raise InputError(f"steps {settings.steps} is not possible: give 1 or more.")
    if not 1 <= settings.samples_per_prompt <= settings.steps:
        raise InputError(
            f"{settings.samples_per_prompt} samples per prompt are not possible with "
            f"{counted(settings.steps, 'step')}: give 1 to {settings.steps}."
        )
    limits.table(bundle.pipeline.solver, settings.steps, settings.guidance)
    return settings


def _prepare(folder: Path, settings: Settings, bundle: Bundle) -> None:
    """Make the folder, or see that it holds the beginning of this very recording."""
    found = read_settings(folder)
    if found is not None and found != settings:
        other = [name for name, value in asdict(settings).items() if getattr(found, name) != value]
        raise InputError(
            f"{folder} holds trajectories with other {', '.join(other)}.",
            "Name another folder with --work, or remove that one.",
        )
    needed = estimate_bytes(
        bundle.pipeline,
        len(settings.prompts),
        settings.samples_per_prompt,
        settings.guidance,
        settings.size,
        settings.frames,
    )
    there = next(each for each in (folder, *folder.resolve().parents) if each.exists())
    try:
        free = shutil.disk_usage(there).free
        if found is None and free < needed:
            raise InputError(
                f"the trajectories need {needed / 2**20:,.0f} MiB; "
                f"{folder} has {free / 2**20:,.0f} MiB free.",
                "Give fewer prompts or samples, or another folder with --work.",
            )
        folder.mkdir(parents=True, exist_ok=True)
        if found is None:
            with atomic_files([folder / DOCUMENT]) as (path,):
                path.write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}.") from error
