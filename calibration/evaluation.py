"""An evaluation on disk: a JSON file, and a contact sheet for each guidance scale.

Files appear whole or not at all, and only when everything is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reelrt.bundle.files import atomic_files
from reelrt.bundle.schedule import MAX_GUIDANCE
from reelrt.calibration.adherence import Adherence, Outcome, check_prompts, measure
from reelrt.calibration.sheet import Row, contact_sheet, small_frames
from reelrt.errors import InputError
from reelrt.progress import Progress
from reelrt.runtime.noise import check_seed
from reelrt.runtime.pipeline import load
from reelrt.runtime.video import check_writable

SHEET_ROWS = 240
"""Videos on a contact sheet: the first so many."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured, and where it was written.

    Attributes:
        runs: One result per guidance scale.
        json: The file with all of them.
        sheets: A contact sheet of each.
    """

    runs: Sequence[Adherence]
    json: Path
    sheets: Sequence[Path]


def evaluate_adherence(
    engines: Path,
    output: Path,
    *,
    prompts: int = 200,
    paraphrases: bool = False,
    steps: int = 25,
    guidance: Sequence[float] = (),
    solver: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how often an engine set shows what its prompts ask for.

    Args:
        engines: Engine set of a model that was trained on moving shapes.
        output: Folder for `adherence.json` and `adherence.png`; with several guidance scales the
            sheets are `adherence-2.png`, `adherence-3.5.png` and so on.
        prompts: Number of prompts, balanced over what they ask for.
        paraphrases: Whether to ask in other words than the canonical sentence.
        steps: Denoising steps.
        guidance: Guidance scales, each measured on the same prompts and noise. Default: the
            model's own.
        solver: Sampler. Default: the model's own.
        seed: Of the prompts' choice and of the noise.
        progress: Told of the videos that are done, for each guidance scale.

    Raises:
        InputError: An impossible number, or an output that cannot be written.
        RangeError: Steps or a solver that the engines do not have.
        IntegrityError: As `reelrt.load`, as are CompatibilityError and BackendError.
    """
    check_prompts(prompts)
    check_seed(seed)
    scales = {f"{_checked(scale):g}": scale for scale in guidance}
    document = output / "adherence.json"
    names = [f"adherence-{name}.png" for name in scales] if len(scales) > 1 else ["adherence.png"]
    sheets = [output / name for name in names]
    for sheet in sheets:
        check_writable(sheet)
    pipe = load(engines)
    runs, pages = [], []
    for scale in list(scales.values()) or [pipe.engines.pipeline.guidance]:
        page: list[Row] = []

        def look(outcome: Outcome, frames: npt.NDArray[np.uint8], page: list[Row] = page) -> None:
            if len(page) < SHEET_ROWS:
                page.append(Row(small_frames(frames), outcome.prompt, outcome.failed))

        run = measure(
            pipe,
            prompts=prompts,
            paraphrases=paraphrases,
            steps=steps,
            guidance=scale,
            solver=solver,
            seed=seed,
            progress=progress,
            look=look,
        )
        runs.append(run)
        pages.append(page)
    _write(document, {"runs": [run.document() for run in runs]}, dict(zip(sheets, pages, strict=True)))
    return Evaluation(runs, document, sheets)


def _checked(scale: float) -> float:
    if not (math.isfinite(scale) and 0 <= scale <= MAX_GUIDANCE):
        raise InputError(f"guidance {scale} is not possible: give a number from 0 to {MAX_GUIDANCE}.")
    return scale


def _write(document: Path, found: Mapping[str, Any], pages: Mapping[Path, Sequence[Row]]) -> None:
    try:
        document.parent.mkdir(parents=True, exist_ok=True)
        with atomic_files([document, *pages]) as (text, *pictures):
            text.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            for picture, rows in zip(pictures, pages.values(), strict=True):
                contact_sheet(rows).save(picture)
    except OSError as error:
        raise InputError(f"cannot write to {document.parent}: {error.strerror or error}.") from error
