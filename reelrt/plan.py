"""`reelrt plan`: what a video needs on a device, before anything is built or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reelrt.console import Debug, Json, command, note, parse_size, show
from reelrt.errors import InputError, PlanError

if TYPE_CHECKING:
    from reelrt.bundle.manifest import Bundle, EngineSet
    from reelrt.engines.memory import Plan, Planner, Video
    from reelrt.engines.roofline import StageBound
    from reelrt.jetson.boards import Board
    from reelrt.jetson.targets import Target

PlanPrecision = Literal["fp32", "fp16", "int8", "int8-weights"]


@command
def plan(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle that `reelrt export` wrote.")],
    target: Annotated[
        str, typer.Option(help="host, orin-nano-8gb, orin-nx-16gb, rtx3060-laptop-6gb and the like.")
    ] = "host",
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Picture, in pixels.", show_default="the model's")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.", show_default="the model's")] = None,
    batch: Annotated[int, typer.Option(help="Videos at once.")] = 1,
    precision: Annotated[
        PlanPrecision | None,
        typer.Option(help="What the step runs in.", show_default="what the target's backend builds"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; 1 is none.", show_default="the model's")
    ] = None,
    engines: Annotated[
        Path | None,
        typer.Option(metavar="ENGINES", help="Built engines, whose numbers replace the estimates."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say whether a video fits a device, what would make it fit, and the least time it can take there."""
    from reelrt.bundle.manifest import Bundle, EngineSet
    from reelrt.engines.memory import Planner, Video, does_not_fit

    source = Bundle.load(bundle)
    built = EngineSet.load(engines, check=False) if engines else None
    if built is not None and built.bundle != source.sha256:
        raise InputError(f"{engines} was not built from {bundle}.", "Give the bundle it was built from.")
    aim = _target(target)
    geometry = source.pipeline.geometry
    width, height = parse_size(size) or (geometry.width, geometry.height)
    video = Video(
        width=width,
        height=height,
        frames=geometry.frames if frames is None else frames,
        batch=batch,
        precision=precision or _precision(source, aim),
        cfg=source.pipeline.cfg,
    )
    planner = Planner(source, aim, built)
    made = planner.plan(video)
    fits = any(made.fits.values())
    remedies = [] if made.fits["all"] else planner.remedies(video)
    schedule = source.schedules.get(source.pipeline.solver, steps)
    scale = source.pipeline.guidance if guidance is None else guidance
    launches = schedule.rows(scale, video.cfg)
    document = _document(made, launches)
    document["remedies"] = [asdict(each) for each in remedies]
    document["builder"] = _compare(planner, built) if built is not None else {}
    show(document if as_json else _overview(document), as_json)
    if not fits:
        error = does_not_fit(made, remedies)
        note(f"Error: {error}")
        raise typer.Exit(PlanError.exit_code)


def _target(name: str) -> Target:
    """A target by name; `host` is this machine."""
    from reelrt.jetson.device import detect, host_target
    from reelrt.jetson.targets import HOST, find

    return host_target(detect()) if name == HOST else find(name)


def _precision(bundle: Bundle, target: Target) -> str:
    """What `reelrt build` makes for a target when it is not told: FP16 on a GPU."""
    stored = bundle.stages["step"].precision
    return "fp16" if stored == "fp32" and target.compute_capability else stored


def _document(plan: Plan, launches: int) -> dict[str, Any]:
    """A plan as `--json` prints it."""
    from reelrt.engines.memory import POLICIES
    from reelrt.engines.roofline import bounds

    target, board = plan.target, plan.target.board
    stages = {
        name: {
            "weight_bytes": need.weight_bytes,
            "activation_bytes": need.activation_bytes,
            "state_bytes": need.state_bytes,
            "from": need.source,
        }
        for name, need in plan.stages.items()
    }
    policies = {
        name: {"peak_bytes": peak, "fits": plan.fits[name], "what": POLICIES[name]}
        for name, peak in plan.peaks.items()
    }
    if board is not None and board.shared:
        policies["streamed"]["what"] = "gains nothing here: CPU and GPU share the memory"
    return {
        "target": target.name,
        "board": board.title if board else target.description,
        "video": asdict(plan.video),
        "memory": {
            "available_bytes": plan.available_bytes,
            "frame_bytes": plan.frame_bytes,
            "context_bytes": plan.context_bytes,
        },
        "stages": stages,
        "policies": policies,
        "fits": any(plan.fits.values()),
        "roofline": _roofline(bounds(plan, board, launches), board, plan.video) if board else {},
    }


def _roofline(stages: Mapping[str, StageBound], board: Board, video: Video) -> dict[str, Any]:
    """The bounds of every stage, and what they were made of."""
    from reelrt.engines.roofline import peak_flops

    return {
        "stages": {name: asdict(bound) for name, bound in stages.items()},
        "least_seconds": sum(bound.seconds for bound in stages.values()),
        "peak_flops_per_second": peak_flops(board, video.precision),
        "bandwidth_bytes_per_second": board.bandwidth_gbs * 1e9,
        "sources": dict(board.sources),
        "note": board.note,
    }


def _compare(planner: Planner, engines: EngineSet) -> dict[str, Any]:
    """Stage to the builder's numbers and how far the estimate was off, at the size the set was built for."""
    found = {}
    for name, engine in engines.engines.items():
        if not engine.activation_bytes:  # the backend does not say before it runs
            continue
        sizes = {axis: each.max for axis, each in engine.profile.items()}
        cost = planner.cost(name, engine.precision, sizes)
        found[name] = {
            "built_activation_bytes": engine.activation_bytes,
            "estimated_activation_bytes": cost.activation_bytes,
            "activations_off": cost.activation_bytes / engine.activation_bytes - 1,
            "built_weight_bytes": engine.weight_bytes,
            "estimated_weight_bytes": cost.weight_bytes,
            "weights_off": cost.weight_bytes / engine.weight_bytes - 1,
        }
    return found


def _overview(found: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a plan that people read."""
    video, memory, roofline = found["video"], found["memory"], found["roofline"]
    guidance = f"{video['cfg']} guidance"
    parts: dict[str, Any] = {
        "target": f"{found['target']} ({found['board']})",
        "video": f"{video['batch']} x {video['frames']} frames of {video['width']}x{video['height']}, "
        f"{video['precision']}, {guidance}",
        "memory for engines, system deducted_bytes": memory["available_bytes"],
        "CUDA context (an estimate)_bytes": memory["context_bytes"],
        "frames, uint8_bytes": memory["frame_bytes"],
        "stages": found["stages"],
        "loaded": found["policies"],
    }
    if found["remedies"]:
        parts["needs less"] = [
            {
                "with": each["what"],
                "peak_bytes": each["peak_bytes"],
                "loaded": each["policy"],
                "fits": each["fits"],
            }
            for each in found["remedies"]
        ]
    if found["builder"]:
        parts["estimate against the builder, at the size the engines were built for"] = {
            name: {
                "built activation_bytes": each["built_activation_bytes"],
                "estimate_bytes": each["estimated_activation_bytes"],
                "off": f"{each['activations_off']:+.1%}",
                "built weight_bytes": each["built_weight_bytes"],
                "weights off": f"{each['weights_off']:+.1%}",
            }
            for name, each in found["builder"].items()
        }
    if roofline:
        parts["least time (a bound, no prediction)"] = {
            name: {
                "launches": bound["launches"],
                "arithmetic of one": f"{bound['flops'] / 1e12:.3f} TFLOP",
                "weights, inputs, outputs_bytes": bound["bytes"],
                "if every kernel used memory_bytes": bound["kernel_bytes"],
                "least": f"{bound['seconds']:.3f} s",
                "by": bound["limit"],
            }
            for name, bound in roofline["stages"].items()
        }
        rate, bandwidth = roofline["peak_flops_per_second"], roofline["bandwidth_bytes_per_second"]
        parts["bound"] = (
            f"no video faster than {roofline['least_seconds']:.2f} s: {rate / 1e12:g} TFLOPS dense, "
            f"{bandwidth / 1e9:g} GB/s. {roofline['note']}"
        )
    return parts
