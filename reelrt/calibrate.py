"""`reelrt calibrate`: an FP32 bundle and real prompts become an INT8 or FP16 bundle."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reelrt.console import Debug, Json, command, note, parse_size, progress_bars, show
from reelrt.errors import InputError
from reelrt.wording import counted

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
    method: Annotated[
        Method | None, typer.Option(help="How an INT8 range is found.", show_default="percentile")
    ] = None,
    samples: Annotated[int, typer.Option(help="Solver steps kept of each prompt.")] = 2,
    steps: Annotated[int, typer.Option(help="Denoising steps of each prompt.")] = 25,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            help="Size to record at; ranges of a large model can be found at a small one.",
            show_default="the model's",
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Frames of each video.", show_default="the model's")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Measure every layer's sensitivity; keep the worst in FP32 until the final latents' "
            "relative error is below this.",
            show_default="the family's default layers",
        ),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            help="Most that FP16 may change in one layer's output, relative to it.", show_default="0.01"
        ),
    ] = None,
    audit: Annotated[
        bool | None,
        typer.Option(
            "--audit/--no-audit",
            help="INT8: look for layers beside the INT8 ones that FP16 would harm.",
            show_default="audit",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Layers to keep in FP32 as well: a regular expression."),
    ] = None,
    smooth: Annotated[
        float | None,
        typer.Option(
            metavar="ALPHA",
            help="Measure SmoothQuant for each matrix product and use it where the error gets smaller.",
            show_default="not measured",
        ),
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
    from reelrt.calibration.audit import ERROR
    from reelrt.calibration.bundles import check_ranges
    from reelrt.calibration.prompt_sets import default_prompts, read_prompts, warn_if_alike
    from reelrt.calibration.recording import count_samples, estimate_bytes, record, settle

    began = time.monotonic()
    given = {
        "--method": method,
        "--budget": budget,
        "--keep": keep,
        "--smooth": smooth,
        "--error": error,
        "--audit": audit,
    }
    _check_options(precision, samples, steps, {name for name, value in given.items() if value is not None})
    wanted = parse_size(size)
    _check_values(budget, keep or [], smooth, error, audit)
    source = Bundle.load(bundle)
    folder = work or output.with_name(f"{output.name}.work")
    _check_places(bundle, output, folder)
    check_replaceable(output, Bundle.kind)
    words = read_prompts(prompts) if prompts else default_prompts(source.pipeline.model.name)
    request = {
        "bundle": source.sha256,
        "precision": precision,
        "prompts": words,
        "method": method or "percentile",
        "samples": samples,
        "steps": steps,
        "size": None if wanted is None else list(wanted),
        "frames": frames,
        "budget": budget,
        "error": ERROR if error is None else error,
        "audit": audit is not False,
        "keep": keep or [],
        "smooth": smooth,
        "seed": seed,
    }
    if not force and _is_calibrated(output, request):
        if not as_json:
            note(f"{output} is up to date")
            return
        report: Mapping[str, Any] = _read(output)
    else:
        _check_source(source, output, precision)
        settle(source, words, steps=steps, samples_per_prompt=samples, seed=seed, size=wanted, frames=frames)
        if precision == "int8":  # looks for ModelOpt, which takes seconds: after all else
            check_ranges(source, count_samples(source.pipeline, len(words), samples), keep or [])
        warn_if_alike(words)
        room = estimate_bytes(source.pipeline, len(words), samples, size=wanted, frames=frames)
        note(f"Prompts: {len(words)}; their trajectories take up to {room / 2**20:,.1f} MiB in {folder}")
        with progress_bars() as progress:
            trajectories = record(
                bundle,
                words,
                folder,
                steps=steps,
                samples_per_prompt=samples,
                seed=seed,
                size=wanted,
                frames=frames,
                progress=progress,
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


APPLIES: Mapping[str, Sequence[Precision]] = {
    "--method": ("int8",),
    "--budget": ("int8",),
    "--keep": ("int8",),
    "--smooth": ("int8",),
    "--audit": ("int8", "int8-weights"),
    "--error": ("int8", "int8-weights", "fp16"),
}
"""Option to the precisions that it means something for."""


def _check_options(precision: Precision, samples: int, steps: int, given: Collection[str]) -> None:
    """Refuse impossible options before anything is recorded.

    Raises:
        InputError: The message names the option and its value.
    """
    if steps < 1:
        raise InputError(f"steps {steps} is not possible: give 1 or more.")
    if not 1 <= samples <= steps:
        raise InputError(
            f"{samples} samples per prompt are not possible with {counted(steps, 'step')}: give 1 to {steps}."
        )
    for option, precisions in APPLIES.items():
        if option in given and precision not in precisions:
            names = " or ".join(precisions)
            raise InputError(f"{option} is for --precision {names}, not for {precision}.", "Leave it out.")


def _check_values(
    budget: float | None,
    keep: Sequence[str],
    smooth: float | None,
    error: float | None,
    audit: bool | None,
) -> None:
    """Refuse impossible values of options that apply.

    Raises:
        InputError: The message names the option and its value.
    """
    from reelrt.calibration.fp16 import check_error
    from reelrt.calibration.layers import check_patterns
    from reelrt.calibration.sensitivity import check_budget
    from reelrt.calibration.smoothing import check_alpha

    if budget is not None:
        check_budget(budget)
    check_patterns(keep)
    if smooth is not None:
        check_alpha(smooth)
    if error is not None:
        check_error(error)
        if audit is False:
            raise InputError("--error says what the audit allows, and --no-audit leaves it out.", "Give one.")


def _check_places(bundle: Path, output: Path, work: Path) -> None:
    """Refuse folders that would lie in one another.

    Raises:
        InputError: The message names both.
    """
    source, target, kept = (folder.resolve() for folder in (bundle, output, work))
    if target == source:
        raise InputError(f"{output} is the bundle itself.", "Name another folder to write to.")
    for inner, outer, shown in (
        (target, source, f"{output} lies in the bundle {bundle}"),
        (kept, source, f"the folder for trajectories {work} lies in the bundle {bundle}"),
        (kept, target, f"the folder for trajectories {work} lies in {output}, which is written as a whole"),
    ):
        if inner.is_relative_to(outer):
            raise InputError(f"{shown}.", "Name a folder beside it.")


def _check_source(bundle: Bundle, output: Path, precision: Precision) -> None:
    """Refuse, before anything is recorded, a bundle with the wrong weights.

    Raises:
        InputError: The message names the bundle.
    """
    from reelrt.calibration.calibrated import check_source
    from reelrt.calibration.fp16 import check_auditable

    check = check_auditable if precision == "fp16" else check_source
    check(bundle, output)


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

    allowed = request["error"] if request["audit"] else None
    if request["precision"] == "int8-weights":
        from reelrt.engines.weight_only import quantize_weights

        return calibrate_weights(
            bundle, trajectories, output, quantize_weights, fp16_error=allowed, progress=progress
        ).report
    return calibrate_int8(
        bundle,
        trajectories,
        output,
        method=request["method"],
        budget=request["budget"],
        keep=request["keep"],
        smooth=request["smooth"],
        fp16_error=allowed,
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
        samples, prompts = counted(report["samples"], "sample"), counted(report["prompts"], "prompt")
        brief["layers"] = f"{report['layers']['quantised']} in INT8, {len(kept)} in FP32"
        brief["ranges"] = f"{report['method']}, {samples} of {prompts}"
    if "final_latents" in report:
        brief["error of the final latents"] = f"{report['final_latents']['relative_error']:.2%}"
    for name, found in report.get("stages", {}).items() if "settings" in report else ():
        kept = [f"{layer['name']} ({', '.join(layer['reasons'])})" for layer in found["keep_fp32"]]
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        listed = f"FP32 for {'; '.join(kept[:3])}{more}" if kept else "FP16 throughout"
        brief[name.replace("_", " ")] = f"{counted(found['layers'], 'layer')} measured, {listed}"
    if report.get("smoothing"):
        smoothed = report["smoothing"]
        products = counted(len(smoothed["layers"]), "product")
        brief["smoothed"] = f"{smoothed['used']} of {products}, alpha {smoothed['alpha']:g}"
    if "fp16_audit" in report:
        brief["beside INT8"] = _beside(report["fp16_audit"])
    for name, found in report.get("other_stages", {}).items():
        if found["error"] is None:
            brief[name.replace("_", " ")] = f"FP32: {found['why']}"
            continue
        verdict = "INT8" if found["used"] else "FP32: INT8 does not hold"
        brief[name.replace("_", " ")] = (
            f"{verdict}, {found['measured']} {found['error']:.2%}, allowed {found['allowed']:.0%}"
        )
    return brief


def _beside(audit: Mapping[str, Any] | None) -> str:
    """What the FP16 audit said of the layers that are not INT8."""
    if audit is None:
        return "not audited for FP16"
    kept = ", ".join(f"{count} of {name}" for name, count in audit["kept_fp32"].items() if count)
    return f"FP16 but for {kept}" if kept else "FP16 throughout"
