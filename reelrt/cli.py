"""The command line: one function per command; everything heavy is imported inside them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from reelrt import __version__
from reelrt.calibrate import calibrate
from reelrt.console import (
    EPILOG,
    Debug,
    Json,
    Solver,
    command,
    note,
    parse_size,
    progress_bars,
    run,
    show,
)
from reelrt.errors import IntegrityError
from reelrt.evaluate import evaluate
from reelrt.plan import plan
from reelrt.remote import cancel, list_videos, submit, watch
from reelrt.serve import serve
from reelrt.wording import counted

app = typer.Typer(
    name="reelrt",
    help="Turn a diffusers text-to-video model into engines for NVIDIA Jetson and RTX, and run them.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(evaluate)
app.command(epilog=EPILOG)(plan)
app.command(epilog=EPILOG)(serve)
app.command(epilog=EPILOG)(submit)
app.command(epilog=EPILOG)(watch)
app.command("list", epilog=EPILOG)(list_videos)
app.command(epilog=EPILOG)(cancel)

Precision = Literal["fp32", "fp16"]
EnginePrecision = Literal["fp32", "fp16", "int8", "int8-weights"]
Cfg = Literal["split", "batched"]
Backend = Literal["auto", "onnxruntime", "tensorrt_rtx", "tensorrt"]


def _version(show: bool) -> None:
    if show:
        sys.stdout.write(f"reelrt {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn a diffusers text-to-video model into engines for NVIDIA Jetson and RTX, and run them."""


@app.command(epilog=EPILOG)
@command
def export(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of a diffusers text-to-video model.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Bundle folder to write.")],
    precision: Annotated[Precision, typer.Option(help="Type of the weights.")] = "fp32",
    cfg: Annotated[Cfg, typer.Option(help="How guidance is computed.")] = "split",
    force: Annotated[bool, typer.Option("--force", help="Export even if nothing has changed.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a diffusers model folder to an ONNX bundle, checked against the model."""
    from reelrt.engines.inspection import describe
    from reelrt.export.exporter import export_bundle

    began = time.monotonic()
    up_to_date = not force and _is_export(output, model, precision, cfg)
    if not up_to_date:
        with progress_bars() as progress:
            export_bundle(model, output, precision=precision, cfg=cfg, progress=progress)
    elif not as_json:
        note(f"{output} is up to date")
        return
    made = {**describe(output), "up_to_date": up_to_date, "seconds": time.monotonic() - began}
    show(made if as_json else _brief(made), as_json)


app.command(epilog=EPILOG)(calibrate)


@app.command(epilog=EPILOG)
@command
def build(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle that `reelrt export` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Engine set folder to write.")],
    backend: Annotated[Backend, typer.Option(help="What shall run the engines.")] = "auto",
    target: Annotated[
        str, typer.Option(help="host, rtx3060, rtx4060, orin-agx, orin-nano, or sm86 and the like.")
    ] = "host",
    precision: Annotated[
        EnginePrecision | None,
        typer.Option(help="Type of the weights.", show_default="the bundle's, or what suits the backend"),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Largest picture (pixels).", show_default="the model's"),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Most frames.", show_default="the model's")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Most videos at once.", show_default="what suits the target")
    ] = None,
    memory_check: Annotated[
        bool, typer.Option(help="Refuse, before building, what does not fit the target's memory.")
    ] = True,
    quality_gate: Annotated[
        bool,
        typer.Option(
            "--quality-gate/--no-quality-gate",
            help="Refuse an INT8 bundle without a quality report that it passes.",
        ),
    ] = True,
    weight_streaming: Annotated[
        bool,
        typer.Option(
            "--weight-streaming",
            help="Let the step's weights stay in the host's memory, for a card that is too small for them.",
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Build the engines of a bundle for one device; what is built already is kept."""
    from reelrt.engines.builder import build_engines
    from reelrt.engines.inspection import describe

    began, before = time.monotonic(), _manifest_time(output)
    with progress_bars() as progress:
        engines = build_engines(
            bundle,
            output,
            backend=backend,
            target=target,
            precision=precision,
            size=parse_size(size),
            frames=frames,
            batch=batch,
            check_memory=memory_check,
            quality_gate=quality_gate,
            weight_streaming=weight_streaming,
            progress=progress,
        )
    up_to_date = _manifest_time(output) == before
    made = {**describe(engines.folder), "up_to_date": up_to_date, "seconds": time.monotonic() - began}
    if as_json or not up_to_date:
        show(made if as_json else _brief(made), as_json)


@app.command(epilog=EPILOG)
@command
def generate(
    engines: Annotated[Path, typer.Argument(metavar="ENGINES", help="Engine set that `reelrt build` wrote.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One video per prompt.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Video to write: .mp4, .webm, .gif, or .png for frames.",
        ),
    ],
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; 1 is none.", show_default="the model's")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the noise of the first prompt.", show_default="drawn"),
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What the video shall not show.")] = "",
    solver: Annotated[Solver | None, typer.Option(help="Sampler.", show_default="the model's")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Picture, in pixels.", show_default="the model's")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.", show_default="the model's")] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of the file.")] = 8,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate a video from a prompt; several prompts share the batch."""
    from reelrt.runtime.pipeline import load
    from reelrt.runtime.video import check_writable

    paths = _outputs(output, len(prompts))
    for path in paths:
        check_writable(path, fps)
    began = time.monotonic()
    pipe = load(engines)
    seconds = {"load": time.monotonic() - began}
    with progress_bars() as progress:
        videos = pipe.generate(
            prompts,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance=guidance,
            seed=seed,
            frames=frames,
            size=parse_size(size),
            solver=solver,
            save_to=paths,
            fps=fps,
            progress=progress,
        )
    for stage in videos[0].timings:
        together = sum if stage == "encode" else max
        seconds[stage] = together(video.timings[stage] for video in videos)
    written = [str(video.path) for video in videos]
    result = {"seconds": seconds, "peak_memory_bytes": videos[-1].peak_memory}
    if as_json:
        made = [{"path": path, **video.metadata} for path, video in zip(written, videos, strict=True)]
        show({"videos": made, **result}, as_json)
    else:
        show({**result, "wrote": ", ".join(written)}, as_json)


@app.command(epilog=EPILOG)
@command
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A bundle or an engine set.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a bundle or an engine set against its hashes, and show what it holds."""
    from reelrt.engines.inspection import describe

    found = describe(folder)
    show(found if as_json else _overview(found), as_json)
    if not found["intact"]:
        raise typer.Exit(IntegrityError.exit_code)


@app.command(epilog=EPILOG)
@command
def doctor(
    engines: Annotated[
        list[Path] | None, typer.Argument(metavar="[ENGINES]...", help="Engine sets that shall run here.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what this machine can export, build and run, and what is missing."""
    from dataclasses import asdict

    from reelrt.engines.doctor import examine

    show({"checks": [asdict(check) for check in examine(engines=engines or ())]}, as_json)


@app.command("video-info", epilog=EPILOG)
@command
def video_info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A video that ReelRT wrote.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show how a video was made: prompt, seed, steps, guidance, model hash."""
    from reelrt.runtime.video import read_metadata

    show(read_metadata(file), as_json)


def _overview(found: Mapping[str, Any]) -> dict[str, Any]:
    """A description of a bundle or an engine set, the part of it that people read."""
    geometry, stages = found["geometry"], found["stages"]
    names = ("kind", "folder", "reelrt", "intact", "damage", "backend", "backend_version", "target")
    largest = found.get("largest", {})
    picture = {**{name: geometry[name] for name in ("width", "height", "frames")}, **largest}
    tensors = {
        f"{stage} {name}": tensor
        for stage, entry in stages.items()
        for name, tensor in {**entry["inputs"], **entry["outputs"]}.items()
    }
    return {
        **{name: found[name] for name in names if name in found},
        "compute capability": found.get("compute_capability") or None,
        "model": f"{found['model']['name']} ({found['model']['family']}, {found['model']['sha256'][:12]})",
        "licence": found["model"]["licence"] or "not stated",
        "largest video" if largest else "video": picture,
        "guidance": f"{found['guidance']:g}, {found['cfg']}",
        "solvers": ", ".join(found["schedules"]),
        **({"quality": _quality(found["quality"])} if found.get("quality") else {}),
        "total_bytes": found["total_bytes"],
        "stages": _stages(found),
        **({"layers": rows} if (rows := _layers(found)) else {}),
        "tensors": tensors,
    }


def _quality(found: Mapping[str, Any]) -> str:
    """What is known of the quality of a bundle or an engine set, in a line."""
    if "measured" in found:
        return str(found["measured"])
    verdict = {True: "every target reached", False: "a target missed"}
    points = found["adherence_points"]
    worst = f"adherence {min(points.values()):+.1f} points at worst" if points else "adherence not measured"
    *others, last = found["steps"]
    steps = " and ".join([*map(str, others), counted(last, "step")])
    return (
        f"{verdict.get(found['passed'], 'no target tested')}: SSIM {found['ssim']:.5f}, {worst}, against "
        f"{found['reference']} over {counted(found['prompts'], 'prompt')} at {steps}"
    )


def _brief(made: Mapping[str, Any]) -> dict[str, Any]:
    """What people read after an export or a build; `reelrt inspect` shows the rest."""
    names = ("total_bytes", "backend", "backend_version", "target")
    head = {name: made[name] for name in names if name in made}
    return {"wrote": made["folder"], **head, "took_seconds": made["seconds"], "stages": _stages(made)}


def _stages(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Stage to what of its description is neither a mapping nor a key."""
    return {
        stage: {
            name: len(value) if name == "keep_fp32" else value
            for name, value in entry.items()
            if not isinstance(value, Mapping) and name != "key" and (name != "keep_fp32" or value)
        }
        for stage, entry in found["stages"].items()
    }


def _layers(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """In which precision each class of layers runs, a row for each; empty for a bundle."""
    return [
        {"stage": stage, "class": kind, "precision": precision, **entry}
        for stage, each in found["stages"].items()
        for kind, precisions in each.get("layers", {}).items()
        for precision, entry in precisions.items()
    ]


def _is_export(output: Path, model: Path, precision: str, cfg: str) -> bool:
    """Whether a bundle is what this version would export from a model, by the recorded hashes.

    The model card counts: it sets the guidance, the frames and the licence.
    """
    from reelrt.bundle.files import sha256
    from reelrt.bundle.manifest import MANIFEST, Bundle
    from reelrt.export.folder import open_folder

    if not (output / MANIFEST).is_file():
        return False
    try:
        bundle = Bundle.load(output)
    except IntegrityError as error:
        note(f"{output} is exported anew: {error.message}")
        return False
    made = (bundle.version, bundle.pipeline.cfg, bundle.stages["step"].precision)
    folder = open_folder(model)
    return (
        made == (__version__, cfg, precision)
        and bundle.pipeline.model.sha256 == folder.sha256()
        and all(bundle.files.get(paper.name) == sha256(paper) for paper in folder.papers())
    )


def _manifest_time(folder: Path) -> int:
    """When a folder was made, in nanoseconds; 0 when it was not."""
    from reelrt.bundle.manifest import MANIFEST

    path = folder / MANIFEST
    return path.stat().st_mtime_ns if path.is_file() else 0


def _outputs(output: Path, count: int) -> list[Path]:
    """One path per video: `red.mp4`, or `red-1.mp4`, `red-2.mp4` and so on."""
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(1, count + 1)]


def main() -> None:
    """The `reelrt` command."""
    run(app)
