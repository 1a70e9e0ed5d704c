"""A quality report on disk: what is compared, the figures, and the files that show them.

`evaluate_quality` is the entry. How a pair is measured stands in `reelrt.calibration.pairs`, what the
figures have to reach in `reelrt.bundle.report`. Files appear whole or not at all, when all is measured;
the measured pairs are kept beside them, so that an interrupted or a larger evaluation measures only the rest.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from reelrt.bundle.files import atomic_files, sha256
from reelrt.bundle.manifest import MANIFEST, Bundle, EngineSet, kind_of
from reelrt.bundle.report import PROMPTS, QUALITY, REFERENCE, REFUSED, STEPS, Report
from reelrt.calibration import page, pairs, plots, sides
from reelrt.calibration.adherence import MOST_PROMPTS, check_prompts
from reelrt.calibration.comparison import Run, compare, summed_up
from reelrt.calibration.fidelity import LEAST_SIDE
from reelrt.calibration.pairs import KEPT, Asked, Kept
from reelrt.calibration.sheet import PAPER, Row, contact_sheet
from reelrt.calibration.sides import Side
from reelrt.errors import BackendError, InputError, IntegrityError
from reelrt.progress import Progress, silent
from reelrt.runtime.noise import check_seed
from reelrt.runtime.video import check_writable
from reelrt.wording import counted

log = logging.getLogger("reelrt")

SHAPES_MODEL = "moving-shapes"
"""A model whose name begins so is taken to show moving shapes, which the judge can read."""
SHEET_PAIRS = 24
SHEET_GAP = 2
PACKAGES = {"matplotlib": "matplotlib", "skimage": "scikit-image", "jinja2": "jinja2"}


@dataclass(frozen=True, slots=True)
class Quality:
    """What was measured, and where it was written.

    Attributes:
        document: The whole report, as `quality.json` holds it.
        report: The figures that have targets.
        files: Every file that was written, `quality.json` first.
        kept_bytes: What the measured pairs take that are still in the output folder.
    """

    document: Mapping[str, Any]
    report: Report
    files: Sequence[Path]
    kept_bytes: int


def evaluate_quality(
    reference: Path,
    candidate: Path,
    output: Path,
    *,
    prompts: int | Path = PROMPTS,
    steps: Sequence[int] = STEPS,
    guidance: float | None = None,
    solver: str | None = None,
    seed: int = 0,
    adherence: bool | None = None,
    emulate_fp16: bool = False,
    attach: bool = True,
    forget: bool = False,
    machine: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Quality:
    """Measure how close a candidate's videos are to a reference's, and write the report.

    Args:
        reference: Bundle or engine set, FP32 as a rule.
        candidate: Bundle or engine set of the same model.
        output: Folder for `quality.json`, `quality.html`, plots and contact sheets.
        prompts: Number of moving-shapes prompts, or a text file with a prompt in each line.
        steps: Denoising steps, each measured on the same prompts and noise.
        guidance: Guidance scale. Default: the reference's own.
        solver: Sampler. Default: the reference's own.
        seed: Of the prompts' choice; the noise takes seed, seed + 1 and so on.
        adherence: Whether to judge the videos as moving shapes. Default: when the model's name begins
            with `moving-shapes` and every prompt is one of its sentences.
        emulate_fp16: Whether what the candidate, a bundle, has in FP32 shall compute as its FP16 engines
            would; see `reelrt.calibration.emulated`.
        attach: Whether to put `quality.json` into the candidate's folder, if it is a bundle and the
            reference is FP32.
        forget: Whether to remove every measured pair from the output folder when the report is written;
            else another number of steps, or of prompts, needs only what is new.
        machine: What it is measured on, for the report.
        progress: Told of the videos that are done, for each number of steps.

    Raises:
        InputError: An impossible option, an output that cannot be written, or two sides that are not
            of the same model, sizes and schedules.
        RangeError: Steps, a solver or a size that one side does not have.
        IntegrityError: A folder is neither a bundle nor an engine set, or is damaged.
        CompatibilityError: An engine set of another machine or backend version.
        BackendError: A package is missing, or an engine failed or produced numbers that are none.
    """
    _check_packages()
    counts = list(dict.fromkeys(steps))
    if not counts:
        raise InputError("no number of steps was given.")
    asked = _requests(prompts, seed)
    _check_output(output, reference, candidate)
    check_writable(output / "quality.png")
    ours, theirs = sides.read(reference), sides.read(candidate)
    attachable = kind_of(candidate) == Bundle.kind and sides.precision(ours) == REFERENCE
    attached = candidate / QUALITY if attach and attachable else None
    if attached and _is_better(attached, len(asked)):
        log.warning("%s is over more prompts and stays; remove it to put this report there", attached)
        attached = None
    if attached:
        check_writable(attached.with_suffix(".png"))
    pipeline = ours.pipeline
    scale = float(pipeline.guidance if guidance is None else guidance)
    sampler = solver or pipeline.solver
    sides.check_alike(ours, theirs, sampler, counts, scale)
    _check_picture(ours)
    judged, why = _judged(pipeline.model.name, asked, isinstance(prompts, int), adherence)
    settings: dict[str, Any] = {"guidance": scale, "solver": sampler, "adherence": judged}
    with TemporaryDirectory(prefix="reelrt-quality-") as scratch:
        one = Side.open(reference)
        other = Side.open(candidate, Path(scratch) if emulate_fp16 else None)
        kept = Kept(output / KEPT, one, other, settings)
        runs = _compared(one, other, asked, counts, settings, kept, progress)
    geometry = pipeline.geometry
    settings = {
        "prompts": len(asked),
        "prompts_from": "moving shapes" if isinstance(prompts, int) else prompts.name,
        "seed": seed,
        "steps": counts,
        **settings,
        **({"adherence_left_out": why} if why else {}),
        "width": geometry.width,
        "height": geometry.height,
        "frames": geometry.frames,
    }
    document = summed_up(one, other, settings, runs, machine or {})
    files = _write(output, document, runs, attached)
    if forget:
        kept.forget()
    return Quality(document, Report.from_json(document), files, kept.bytes)


def _compared(
    reference: Side,
    candidate: Side,
    asked: Sequence[Asked],
    steps: Sequence[int],
    settings: Mapping[str, Any],
    kept: Kept,
    progress: Progress,
) -> list[Run]:
    """Every pair, measured now or before.

    Raises:
        InputError: A pair cannot be kept.
    """
    found = sum(kept.path(each, count).exists() for count in steps for each in asked)
    if found:
        log.info("%d of %d pairs of videos were measured before", found, len(asked) * len(steps))
    try:
        return compare(
            reference,
            candidate,
            asked,
            steps=steps,
            guidance=settings["guidance"],
            solver=settings["solver"],
            judged=settings["adherence"],
            kept=kept,
            progress=progress,
        )
    except OSError as error:
        raise InputError(f"cannot write to {kept.folder}: {error.strerror or error}.") from error
    except KeyboardInterrupt:
        log.info("what was measured is kept in %s; the same command goes on from there", kept.folder)
        raise


def _is_better(attached: Path, prompts: int) -> bool:
    """Whether a bundle has a report of its own already that is over more prompts."""
    try:
        report = Report.load(attached)
    except IntegrityError:
        return False
    return report.bundle == sha256(attached.with_name(MANIFEST)) and report.prompts > prompts


def _check_output(output: Path, *compared: Path) -> None:
    """Refuse to put pages and plots into a folder that is written as a whole.

    Raises:
        InputError: The message names the folder.
    """
    for folder in compared:
        if output.resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"{output} lies in {folder}, which is compared, and holds nothing but its own files.",
                "Name another folder with --output.",
            )


def _check_packages() -> None:
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise BackendError(
            f"a quality report needs {', '.join(missing)}, which {verb} not installed.",
            "Install it with `pip install 'reelrt[calibration]'`.",
        )


def _requests(prompts: int | Path, seed: int) -> list[Asked]:
    """What shall be made, each with a seed of its own.

    Raises:
        InputError: An impossible number, file or seed.
    """
    check_seed(seed)
    if isinstance(prompts, int):
        check_prompts(prompts)
        asked = pairs.numbered(prompts, seed)
    else:
        asked = pairs.from_file(prompts, seed, MOST_PROMPTS)
    check_seed(asked[-1].seed)
    return asked


def _check_picture(side: EngineSet) -> None:
    geometry = side.pipeline.geometry
    if min(geometry.width, geometry.height) < LEAST_SIDE:
        size = f"{geometry.width} x {geometry.height}"
        raise InputError(
            f"SSIM needs pictures of {LEAST_SIDE} pixels each way or more; {side.folder} makes {size}."
        )


def _judged(model: str, asked: Sequence[Asked], numbered: bool, wanted: bool | None) -> tuple[bool, str]:
    """Whether videos are judged, and if not, why.

    Raises:
        InputError: It is wanted and impossible, or the default prompts mean nothing to the model.
    """
    shapes = model.startswith(SHAPES_MODEL)
    unread = next((each.prompt for each in asked if each.scene is None), None)
    if numbered and not shapes and wanted is None:
        raise InputError(
            f"the model {model!r} is not known to show moving shapes, which the built-in prompts ask for.",
            "Name a text file with a prompt in each line with `--prompts FILE`, or say `--adherence` if it "
            "was trained on moving shapes.",
        )
    if wanted and unread is not None:
        raise InputError(f"adherence cannot be judged: {unread!r} is no sentence about moving shapes.")
    if wanted is False and shapes and unread is None:
        return False, REFUSED
    if wanted is not True and not shapes:
        return False, f"the judge knows moving shapes only, and the model is {model}"
    if unread is not None:
        return False, f"the judge knows moving shapes only, and one prompt is {unread!r}"
    return True, ""


def _write(
    output: Path, document: Mapping[str, Any], runs: Sequence[Run], attached: Path | None
) -> list[Path]:
    """Write every file of the report, and the copy in the candidate's bundle.

    Raises:
        InputError: A file cannot be written.
    """
    light, dark = (plots.plots(document, theme) for theme in plots.THEMES)
    sheets = {f"quality-{run.steps}.png": _sheet(document, run) for run in runs}
    texts = {
        QUALITY: json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "quality.html": page.render(document, light, dark, sheets),
    }
    pictures = {**{f"quality-{name}.png": data for name, data in light.items()}, **sheets}
    data = {**{name: text.encode() for name, text in texts.items()}, **pictures}
    paths = [output / name for name in data]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with atomic_files(paths) as partial:
            for file, content in zip(partial, data.values(), strict=True):
                file.write_bytes(content)
        if attached:
            with atomic_files([attached]) as (file,):
                shutil.copyfile(output / QUALITY, file)
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror or error}.") from error
    return [*paths, attached] if attached else paths


def _sheet(document: Mapping[str, Any], run: Run) -> bytes:
    """A contact sheet as PNG: the reference's frames above the candidate's, the least alike first."""
    rows = []
    for pair in run.worst_first[:SHEET_PAIRS]:
        count, _, width, _ = pair.frames.shape
        gap = np.full((count, SHEET_GAP, width, 3), PAPER, np.uint8)
        frames = np.concatenate([pair.frames, gap, pair.other], axis=1)
        caption = f"SSIM {pair.figures['ssim']:.5f}, seed {pair.asked.seed}: {pair.asked.prompt}"
        rows.append(Row(frames, caption, [f"lost {name}" for name in pair.lost]))
    file = io.BytesIO()
    above, below = (
        f"{document[side]['folder']} ({document[side]['precision']})" for side in ("reference", "candidate")
    )
    title = f"{counted(run.steps, 'step')}, the least alike first; above: {above}, below: {below}"
    contact_sheet(rows, title=title).save(file, format="PNG")
    return file.getvalue()
