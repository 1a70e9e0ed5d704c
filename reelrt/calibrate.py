"""`reelrt calibrate`: an FP32 bundle and real prompts become an INT8 or FP16 bundle."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reelrt.console import Debug, Json, command, note, progress_bars, show
from reelrt.errors import InputError

if TYPE_CHECKING:
    from reelrt.bundle.manifest import Bundle
    from reelrt.calibration.trajectories import Trajectories
    from reelrt.progress import Progress

REQUEST = "calibration-request.json"
"""What a bundle was calibrated with, beside it, so that the same request is done already."""

Precision = Literal["int8", "int8-weights", "fp16"]
Method = Literal["percentile", "entropy", "max"]


@command
def calibrate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="FP32 bundle that `reelrt export` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle folder to write.")],
    precision: Annotated[Precision, typer.Option(help="What to calibrate for.")],
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One prompt per line.", show_default="a set that ships"),
    ] = None,
    method: Annotated[Method, typer.Option(help="How an INT8 range is found.")] = "percentile",
    samples: Annotated[int, typer.Option(help="Solver steps kept of each prompt.")] = 2,
    steps: Annotated[int, typer.Option(help="Denoising steps of each prompt.")] = 25,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Measure every layer's sensitivity; keep the worst in FP32 until the final latents' "
            "relative error is below this.",
            show_default="the family's default layers",
        ),
    ] = None,
    error: Annotated[
        float, typer.Option(help="FP16: most that it may change in one layer's output, relative to it.")
    ] = 0.01,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Layers to keep in FP32 as well: a regular expression."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for trajectories; stopped runs go on.", show_default="OUTPUT.work"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt's noise.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Calibrate even if nothing has changed.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run real prompts through the real loop, and make an INT8 or FP16 bundle of what they show."""
    from reelrt.bundle.files import check_replaceable
    from reelrt.bundle.manifest import Bundle
    from reelrt.calibration.prompt_sets import default_prompts, read_prompts, warn_if_alike
    from reelrt.calibration.trajectories import estimate_bytes, record

    began = time.monotonic()
    _check_options(precision, samples, steps, budget, keep or [])
    source = Bundle.load(bundle)
    if output.resolve() == bundle.resolve():
        raise InputError(f"{output} is the bundle itself.", "Name another folder to write to.")
    check_replaceable(output, Bundle.kind)
    words = read_prompts(prompts) if prompts else default_prompts(source.pipeline.model.name)
    request = {
        "bundle": source.sha256,
        "precision": precision,
        "prompts": words,
        "method": method,
        "samples": samples,
        "steps": steps,
        "budget": budget,
        "error": error,
        "keep": keep or [],
        "seed": seed,
    }
    if not force and _is_calibrated(output, request):
        if not as_json:
            note(f"{output} is up to date")
            return
        report: Mapping[str, Any] = _read(output)
    else:
        warn_if_alike(words)
        folder = work or output.with_name(f"{output.name}.work")
        size = estimate_bytes(source.pipeline, len(words), samples)
        note(f"Prompts: {len(words)}; their trajectories take up to {size / 2**20:,.1f} MiB in {folder}")
        with progress_bars() as progress:
            trajectories = record(
                bundle, words, folder, steps=steps, samples_per_prompt=samples, seed=seed, progress=progress
            )
            report = _calibrate(source, trajectories, output, request, folder, progress)
        _remember(output, request)
    seconds = time.monotonic() - began
    made = Bundle.load(output, check=False)
    sizes = {
        name: {"precision": stage.precision, "weight_bytes": stage.weight_bytes, "before_bytes": before}
        for name, stage in made.stages.items()
        for before in [source.stages[name].weight_bytes]
    }
    if as_json:
        show({"folder": str(output), "stages": sizes, "report": report, "seconds": seconds}, as_json)
    else:
        show({"wrote": str(output), "took_seconds": seconds, **_brief(report), "stages": sizes}, as_json)


def _check_options(
    precision: str, samples: int, steps: int, budget: float | None, keep: Sequence[str]
) -> None:
    """Refuse impossible options before anything is recorded.

    Raises:
        InputError: The message names the option and its value.
    """
    from reelrt.calibration.layers import check_patterns
    from reelrt.calibration.sensitivity import check_budget

    if steps < 1:
        raise InputError(f"steps {steps} is not possible: give 1 or more.")
    if not 1 <= samples <= steps:
        raise InputError(
            f"{samples} samples per prompt are not possible with {steps} steps: give 1 to {steps}."
        )
    if budget is not None:
        check_budget(budget)
    check_patterns(keep)
    if precision != "int8" and (budget is not None or keep):
        option = "--keep" if budget is None else "--budget"
        raise InputError(f"{option} is for --precision int8, not for {precision}.", "Leave it out.")


def _calibrate(
    bundle: Bundle,
    trajectories: Trajectories,
    output: Path,
    request: Mapping[str, Any],
    work: Path,
    progress: Progress,
) -> Mapping[str, Any]:
    """Write the bundle; returns what was decided."""
    if request["precision"] == "fp16":
        from reelrt.calibration.fp16 import calibrate_fp16

        calibrate_fp16(bundle, trajectories, output, error=request["error"], progress=progress)
        return _read(output)
    from reelrt.calibration.bundles import calibrate_int8, calibrate_weights

    if request["precision"] == "int8-weights":
        from reelrt.engines.weight_only import quantize_weights

        return calibrate_weights(bundle, trajectories, output, quantize_weights, progress=progress).report
    return calibrate_int8(
        bundle,
        trajectories,
        output,
        method=request["method"],
        budget=request["budget"],
        keep=request["keep"],
        work=work,
        progress=progress,
    ).report


def _is_calibrated(output: Path, request: Mapping[str, Any]) -> bool:
    """Whether a bundle is what this version would make of the request."""
    from reelrt import __version__
    from reelrt.bundle.manifest import Bundle
    from reelrt.errors import IntegrityError

    try:
        made = json.loads((output / REQUEST).read_text(encoding="utf-8"))
        return bool(made == dict(request) and Bundle.load(output).version == __version__)
    except (OSError, ValueError):
        return False
    except IntegrityError as error:
        note(f"{output} is calibrated anew: {error.message}")
        return False


def _remember(output: Path, request: Mapping[str, Any]) -> None:
    """Keep the request beside the bundle; it is none of the bundle's own files."""
    from reelrt.bundle.files import atomic_files

    with atomic_files([output / REQUEST]) as (path,):
        path.write_text(json.dumps(dict(request), indent=1) + "\n", encoding="utf-8")


def _read(output: Path) -> Mapping[str, Any]:
    """The report that a calibration left in its bundle."""
    for name in ("calibration.json", "fp16-audit.json"):
        if (output / name).is_file():
            found: Mapping[str, Any] = json.loads((output / name).read_text(encoding="utf-8"))
            return found
    return {}


def _brief(report: Mapping[str, Any]) -> dict[str, Any]:
    """What people read of a report."""
    brief: dict[str, Any] = {}
    if "layers" in report and "method" in report:
        kept = report["layers"]["kept_fp32"]
        brief["layers"] = f"{report['layers']['quantised']} in INT8, {len(kept)} in FP32"
        brief["ranges"] = f"{report['method']}, {report['samples']} samples of {report['prompts']} prompts"
    if "final_latents" in report:
        brief["error of the final latents"] = f"{report['final_latents']['relative_error']:.2%}"
    for name, found in report.get("stages", {}).items() if "settings" in report else ():
        kept = [f"{layer['name']} ({', '.join(layer['reasons'])})" for layer in found["keep_fp32"]]
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        listed = f"FP32 for {'; '.join(kept[:3])}{more}" if kept else "FP16 throughout"
        brief[name.replace("_", " ")] = f"{found['layers']} layers measured, {listed}"
    for name, found in report.get("other_stages", {}).items():
        if found["error"] is None:
            brief[name.replace("_", " ")] = f"FP32: {found['why']}"
            continue
        verdict = "INT8" if found["used"] else "FP32: INT8 does not hold"
        brief[name.replace("_", " ")] = (
            f"{verdict}, {found['measured']} {found['error']:.2%}, allowed {found['allowed']:.0%}"
        )
    return brief
