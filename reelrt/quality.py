"""`reelrt evaluate quality`: how close a candidate's videos are to a reference's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from reelrt.console import BELOW_MINIMUM_CODE, Debug, Json, Solver, command, note, progress_bars, show


@command
def quality(
    reference: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Bundle or engine set that sets the standard, FP32.")
    ],
    candidate: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Bundle or engine set of the same model to measure.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for quality.json, quality.html and pictures.")
    ] = Path("build/quality"),
    prompts: Annotated[
        str, typer.Option(metavar="NUMBER|FILE", help="How many moving-shapes prompts, or one in each line.")
    ] = "200",
    steps: Annotated[
        list[int] | None,
        typer.Option(help="Denoising steps; give it again to measure several.", show_default="25 and 10"),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale.", show_default="the reference's")
    ] = None,
    solver: Annotated[Solver | None, typer.Option(help="Sampler.", show_default="the reference's")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the noise.")] = 0,
    adherence: Annotated[
        bool | None,
        typer.Option(
            "--adherence/--no-adherence",
            help="Judge the videos as moving shapes.",
            show_default="when the model's name begins with moving-shapes",
        ),
    ] = None,
    emulate_fp16: Annotated[
        bool,
        typer.Option(
            "--emulate-fp16",
            help="Round what the candidate bundle has in FP32 as its FP16 engines would.",
        ),
    ] = False,
    attach: Annotated[
        bool, typer.Option("--attach/--no-attach", help="Put quality.json into the candidate's bundle.")
    ] = True,
    forget: Annotated[
        bool, typer.Option("--forget", help="Remove the measured pairs when the report is written.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how close a candidate's videos are to a reference's, and write a report."""
    from reelrt.bundle.report import STEPS
    from reelrt.calibration.pairs import KEPT
    from reelrt.calibration.quality import evaluate_quality

    began = time.monotonic()
    with progress_bars() as progress:
        found = evaluate_quality(
            reference,
            candidate,
            output,
            prompts=int(prompts) if prompts.isdecimal() else Path(prompts),
            steps=steps or STEPS,
            guidance=guidance,
            solver=solver,
            seed=seed,
            adherence=adherence,
            emulate_fp16=emulate_fp16,
            attach=attach,
            forget=forget,
            machine=_machine(),
            progress=progress,
        )
    kept = output / KEPT
    head = {
        "wrote": [str(file) for file in found.files],
        "kept": {"folder": str(kept), "bytes": found.kept_bytes} if found.kept_bytes else None,
        "seconds": time.monotonic() - began,
    }
    if as_json:
        runs = [
            {name: value for name, value in run.items() if name != "videos"} for run in found.document["runs"]
        ]
        show({**found.document, "runs": runs, **head}, as_json)
    else:
        show({**_tables(found.document), "took_seconds": head["seconds"], "wrote": head["wrote"]}, as_json)
    if found.kept_bytes:
        note(
            f"The measured pairs take {found.kept_bytes / 2**20:.1f} MiB in {kept}: more prompts or steps "
            "go on from them. --forget removes them."
        )
    for sentence in (*found.document["notes"], *(run["speed"] for run in found.document["runs"])):
        note(sentence)
    for check in found.report.missed:
        note(f"Missed: {check}.")
    if found.report.missed:
        raise typer.Exit(BELOW_MINIMUM_CODE)


def _machine() -> dict[str, Any]:
    """What the figures are measured on: no host name, no path."""
    from reelrt.jetson.device import detect

    device = detect()
    return {
        "cpu": device.cpu,
        "cores": device.cpu_cores,
        "architecture": device.architecture,
        "memory_bytes": device.memory_bytes,
        "gpu": device.gpu.name if device.gpu else None,
    }


def _tables(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report for people: settings, likeness, adherence, targets."""
    settings, sides = report["settings"], (report["reference"], report["candidate"])
    reference, candidate = (f"{side['folder']} ({side['precision']})" for side in sides)
    passed = {True: "every target is reached", False: "a target is missed"}
    adherence = [
        {
            "steps": run["steps"],
            "attribute": name,
            "reference": f"{each['reference_percent']:.1f} %",
            "candidate": f"{each['candidate_percent']:.1f} %",
            "difference": f"{each['difference_points']:+.1f} points",
            "95 % interval": "{:+.1f} to {:+.1f}".format(*each["interval_points"]),
        }
        for run in report["runs"]
        for name, each in (run["adherence"] or {}).items()
    ]
    targets = [
        {
            "figure": check["name"],
            "steps": check["steps"],
            "measured": f"{check['measured']:.5f}" if not check["unit"] else f"{check['measured']:+.1f}",
            "at least": f"{check['least']:g} {check['unit']}".strip(),
            "reached": check["passed"],
        }
        for check in report["targets"]
    ]
    return {
        "reference": reference,
        "candidate": candidate,
        "prompts": f"{settings['prompts']}, seeds from {settings['seed']}",
        "settings": f"guidance {settings['guidance']:g}, solver {settings['solver']}",
        "verdict": passed.get(report["passed"], "no target was tested"),
        **({"adherence": f"not measured: {settings['adherence_left_out']}"} if not adherence else {}),
        "likeness": [_likeness(run) for run in report["runs"]],
        **({"adherence": adherence} if adherence else {}),
        **({"targets": targets} if targets else {}),
    }


def _likeness(run: Mapping[str, Any]) -> dict[str, Any]:
    """One run's figures of frames, latents, motion and time."""
    rough, seconds = run["roughness"], run["denoise_seconds"]
    psnr, error = run["psnr_db"], run["latent_error"]["last_step"]
    return {
        "steps": run["steps"],
        "SSIM, mean": f"{run['ssim']['mean']:.5f}",
        "95 % reach": f"{run['ssim']['percentile_5']:.5f}",
        "worst": f"{run['ssim']['worst']:.5f}",
        "PSNR, mean": f"{psnr['mean']:.1f} dB",
        "PSNR, worst": f"{psnr['worst']:.1f} dB",
        "error of latents": f"{100 * error['mean']:.3g} %",
        "error, worst": f"{100 * error['worst']:.3g} %",
        "roughness": f"{rough['candidate']:.3f} / {rough['reference']:.3f}" if rough else None,
        "denoising": f"{seconds['candidate']:.2f} / {seconds['reference']:.2f} s",
    }
