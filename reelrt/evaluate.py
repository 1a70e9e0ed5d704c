"""`reelrt evaluate`: measures what a set of engines generates, and shows the result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reelrt.console import BELOW_MINIMUM_CODE, EPILOG, Debug, Json, Solver, command, note, progress_bars, show
from reelrt.errors import InputError
from reelrt.quality import quality

if TYPE_CHECKING:
    from reelrt.calibration.adherence import Adherence

evaluate = typer.Typer(name="evaluate", help="Measure what a set of engines generates.", no_args_is_help=True)


evaluate.command(epilog=EPILOG)(quality)


@evaluate.callback()
def options() -> None:
    """Measure what a set of engines generates."""


@evaluate.command(epilog=EPILOG)
@command
def adherence(
    engines: Annotated[
        Path, typer.Argument(metavar="ENGINES", help="Engine set of a model trained on moving shapes.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for adherence.json and adherence.png.")
    ] = Path("build/adherence"),
    prompts: Annotated[int, typer.Option(help="Number of prompts, balanced over what they ask.")] = 200,
    paraphrases: Annotated[
        bool, typer.Option("--paraphrases", help="Ask in other words than the canonical sentence.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[
        list[float] | None,
        typer.Option(help="Guidance scale; give it again to compare several.", show_default="the model's"),
    ] = None,
    solver: Annotated[Solver | None, typer.Option(help="Sampler.", show_default="the model's")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the noise.")] = 0,
    minimum: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=PERCENT,...",
            help=f"Exit with {BELOW_MINIMUM_CODE} when less is right: color=90,motion=80 and so on.",
            show_default="none",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Count how often videos show what was asked for, judged from their pixels alone."""
    from reelrt.calibration.evaluation import evaluate_adherence

    least = _minimum(minimum)
    began = time.monotonic()
    with progress_bars() as progress:
        found = evaluate_adherence(
            engines,
            output,
            prompts=prompts,
            paraphrases=paraphrases,
            steps=steps,
            guidance=guidance or (),
            solver=solver,
            seed=seed,
            progress=progress,
        )
    files = [str(path) for path in (found.json, *found.sheets)]
    seconds = time.monotonic() - began
    if as_json:
        runs = [run.document(videos=False) for run in found.runs]
        show({"runs": runs, "wrote": files, "seconds": seconds}, as_json)
    else:
        head = {"videos": prompts * len(found.runs), "wrote": ", ".join(files), "took_seconds": seconds}
        show({**head, **(_result(found.runs[0]) if len(found.runs) == 1 else _sweep(found.runs))}, as_json)
    missed = False
    for run in found.runs:
        for name, (percent, wanted) in run.below(least).items():
            missed = True
            note(
                f"{name} is right in {percent:.1f} % of the videos at guidance "
                f"{run.settings['guidance']:g}; the minimum is {wanted:g} %."
            )
    if missed:
        raise typer.Exit(BELOW_MINIMUM_CODE)


def _result(run: Adherence) -> dict[str, Any]:
    """One result for people: the scores, and what was seen instead of what was asked for."""
    scores = []
    for name, score in run.scores.items():
        low, high = score.interval
        scores.append(
            {
                "attribute": name,
                "right": score.right,
                "of": score.of,
                "share": f"{score.percent:.1f} %",
                "95 % interval": f"{low:.1f} to {high:.1f} %",
            }
        )
    confusions = {
        f"{name}: asked for, and seen in so many videos": run.confusion(name) for name in ("motion", "shape")
    }
    return {**_head(run), "scores": scores, **confusions}


def _sweep(runs: Sequence[Adherence]) -> dict[str, Any]:
    """Several results for people: a row per guidance scale."""
    rows = [
        {
            "guidance": f"{run.settings['guidance']:g}",
            **{name: f"{score.percent:.1f} %" for name, score in run.scores.items()},
        }
        for run in runs
    ]
    return {**_head(runs[0], "guidance"), "right": rows}


def _head(run: Adherence, *without: str) -> dict[str, str]:
    """How the videos were made, in the words of the metadata."""
    settings = run.settings
    names = [name for name in ("steps", "guidance", "solver", "seed") if name not in without]
    return {
        "model": f"{settings['model']} ({settings['model_sha256'][:12]})",
        "backend": f"{settings['backend']}, {settings['precision']}",
        "settings": ", ".join(f"{name} {_plain(settings[name])}" for name in names)
        + (", paraphrases" if settings["paraphrases"] else ""),
    }


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _minimum(text: str | None) -> dict[str, float]:
    """Attribute to least percentage, of `color=90,motion=80`.

    Raises:
        InputError: It does not read so, or names no attribute.
    """
    from reelrt.calibration.adherence import SCORED

    least: dict[str, float] = {}
    for part in (text or "").split(",") if text is not None else ():
        name, equals, number = (word.strip() for word in part.partition("="))
        try:
            percent = float(number)
        except ValueError:
            percent = -1
        if not equals or name not in SCORED or not 0 <= percent <= 100:
            raise InputError(
                f"minimum {part.strip()!r} is not NAME=PERCENT with a name of {', '.join(SCORED)} "
                "and a percentage from 0 to 100."
            )
        least[name] = percent
    return least
