"""`reelrt plan`: what a video needs on a device, before anything is built or loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reelrt.console import Debug, Json, command, note, parse_size, show
from reelrt.errors import InputError, PlanError
from reelrt.jetson.targets import HOST
from reelrt.wording import counted

if TYPE_CHECKING:
    from reelrt.bundle.manifest import Bundle, EngineSet
    from reelrt.engines.memory import Plan, Planner
    from reelrt.engines.remedies import Remedy
    from reelrt.jetson.boards import Board
    from reelrt.jetson.targets import Target

PlanPrecision = Literal["fp32", "fp16", "int8", "int8-weights"]
STEPS = 25


@command
def plan(
    folder: Annotated[
        Path,
        typer.Argument(metavar="BUNDLE_OR_ENGINES", help="What `reelrt export` or `reelrt build` wrote."),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="host, orin-nano-8gb, orin-nx-16gb, rtx3060-laptop-6gb and the like.",
            show_default="what the engines were built for, else host",
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Picture, in pixels.", show_default="the model's")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames.", show_default="the model's")] = None,
    batch: Annotated[int | None, typer.Option(help="Videos at once.", show_default="1")] = None,
    precision: Annotated[
        PlanPrecision | None,
        typer.Option(help="What the step runs in.", show_default="what the target's backend builds"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="25")] = None,
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
    from reelrt.bundle.manifest import Bundle, EngineSet, check_either, kind_of
    from reelrt.engines.memory import Planner, Video, plan_of_engines
    from reelrt.engines.remedies import find_remedies
    from reelrt.runtime.request import check_guidance

    wanted = parse_size(size)
    check_either(folder)
    if kind_of(folder) == EngineSet.kind:
        given = {
            "--size": size,
            "--frames": frames,
            "--batch": batch,
            "--precision": precision,
            "--steps": steps,
            "--guidance": guidance,
            "--engines": engines,
        }
        _refuse([name for name, value in given.items() if value is not None])
        alone = EngineSet.load(folder, check=False)
        _finish(
            _document(plan_of_engines(alone, _target(alone.target if target is None else target))), as_json
        )
        return
    source = Bundle.load(folder)
    built = EngineSet.load(engines, check=False) if engines else None
    if built is not None and built.bundle != source.sha256:
        raise InputError(f"{engines} was not built from {folder}.", "Give the bundle it was built from.")
    default = built.target if built else HOST
    aim = _target(default if target is None else target)
    geometry = source.pipeline.geometry
    width, height = wanted or (geometry.width, geometry.height)
    video = Video(
        width=width,
        height=height,
        frames=geometry.frames if frames is None else frames,
        batch=1 if batch is None else batch,
        precision=precision or _precision(source, aim),
        cfg=source.pipeline.cfg,
    )
    scale = source.pipeline.guidance if guidance is None else guidance
    check_guidance(scale)
    schedule = source.schedules.get(source.pipeline.solver, STEPS if steps is None else steps)
    planner = Planner(source, aim, built)
    made = planner.plan(video)
    remedies = [] if made.fits["all"] else find_remedies(planner, video)
    document = _document(made, remedies)
    if aim.board:
        launches = schedule.rows(scale, video.cfg)
        document["roofline"] = _roofline(made, aim.board, launches)
    if built is not None:
        document["builder"] = _compare(planner, built)
    _finish(document, as_json)


def _refuse(given: Sequence[str]) -> None:
    """Refuse options that mean nothing for engines alone.

    Raises:
        InputError: The message names them.
    """
    if given:
        raise InputError(
            f"{', '.join(given)} cannot be given with an engine set alone: it is planned as it was built, "
            "and without graphs there is no least time.",
            "Give the bundle, and the engine set with `--engines`.",
        )


def _finish(document: dict[str, Any], as_json: bool) -> None:
    """Show a plan; end with its exit code when it does not fit."""
    show(document if as_json else _overview(document), as_json)
    if not document["fits"]:
        note(f"Error: {document['error']}")
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


def _document(plan: Plan, remedies: Sequence[Remedy] = ()) -> dict[str, Any]:
    """A plan as `--json` prints it."""
    from reelrt.engines.memory import POLICIES
    from reelrt.engines.remedies import does_not_fit

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
    elif plan.stages["step"].cost is None:
        policies["streamed"]["what"] = "not known without the bundle's graphs; counted as staged"
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
        "error": "" if any(plan.fits.values()) else str(does_not_fit(plan, remedies)),
        "remedies": [asdict(each) for each in remedies],
        "builder": {},
        "roofline": {},
    }


def _roofline(plan: Plan, board: Board, launches: int) -> dict[str, Any]:
    """The bounds of every stage, and what they were made of."""
    from reelrt.engines.roofline import bounds, peak_flops

    stages = bounds(plan, board, launches)
    return {
        "stages": {name: asdict(bound) for name, bound in stages.items()},
        "least_seconds": sum(bound.seconds for bound in stages.values()),
        "peak_flops_per_second": peak_flops(board, plan.video.precision),
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
    guidance, frames = f"{video['cfg']} guidance", counted(video["frames"], "frame")
    parts: dict[str, Any] = {
        "target": f"{found['target']} ({found['board']})",
        "video": f"{video['batch']} x {frames} of {video['width']}x{video['height']}, "
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
