"""What would make a video fit a board that has too little memory for it.

Each remedy is a memory plan of its own, with the peak it leads to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reelrt.engines import profiles
from reelrt.engines.memory import Plan, Planner, Video
from reelrt.errors import PlanError
from reelrt.jetson.boards import GIB
from reelrt.wording import counted

SHRINK = (0.75, 0.5, 0.25)
"""Parts of the frames, and of width and height, that are tried as remedies."""
TOGETHER = "all changes that keep the size"


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change and what it leads to: the peak of the first policy that fits, else of the smallest one."""

    what: str
    policy: str
    peak_bytes: int
    fits: bool


def find_remedies(planner: Planner, video: Video) -> list[Remedy]:
    """What would make a video need less, each with the peak it leads to.

    Single changes first; when none of them is enough, all of those that keep the size together, and if
    need be a smaller picture on top.
    """
    found: list[Remedy] = []
    everything = video
    for what, changes in _changes(planner, video):
        found.append(_remedy(planner, what, replace(video, **changes)))
        everything = replace(everything, **changes)
    found += _first_fitting(planner, "", video, _shorter(video))
    found += _first_fitting(planner, "", video, _smaller(planner, video))
    if any(each.fits for each in found):
        return found
    if everything != video:
        found.append(_remedy(planner, f"{TOGETHER}, at the same size", everything))
    if not found or not found[-1].fits:
        found += _first_fitting(planner, f"{TOGETHER}, and ", everything, _smaller(planner, video))
    return found


def _first_fitting(
    planner: Planner, prefix: str, video: Video, changes: Iterator[tuple[str, dict[str, Any]]]
) -> list[Remedy]:
    """The first of ever larger changes that fits, else the last."""
    remedy = None
    for what, change in changes:
        remedy = _remedy(planner, prefix + what, replace(video, **change))
        if remedy.fits:
            break
    return [remedy] if remedy else []


def _remedy(planner: Planner, what: str, video: Video) -> Remedy:
    plan = planner.plan(video)
    policy = next((name for name, fits in plan.fits.items() if fits), plan.smallest)
    return Remedy(what, policy, plan.peaks[policy], plan.fits[policy])


def _changes(planner: Planner, video: Video) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes that keep the video's size and length."""
    if video.batch > 1:
        yield "--batch 1", {"batch": 1}
    if video.cfg == "batched":
        yield "a bundle exported with --cfg split", {"cfg": "split"}
    stored = {stage.precision for stage in planner.bundle.stages.values()}
    if video.precision == "fp32":
        yield "--precision fp16", {"precision": "fp16"}
    if not video.precision.startswith("int8") and stored <= {"fp32", "fp16"}:
        yield "INT8 weights (--precision int8-weights)", {"precision": "int8-weights"}
    if min(video.decoder_frames, video.frames) > 1:
        yield "one frame per call of the decoder", {"decoder_frames": 1}


def _shorter(video: Video) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fewer frames."""
    for factor in SHRINK:
        frames = max(int(video.frames * factor), profiles.SMALLEST_CELLS)
        if frames < video.frames:
            yield f"--frames {frames}", {"frames": frames}


def _smaller(planner: Planner, video: Video) -> Iterator[tuple[str, dict[str, Any]]]:
    """Smaller pictures."""
    geometry = planner.bundle.pipeline.geometry
    for factor in SHRINK:
        unit = geometry.size_multiple
        least = max(unit, profiles.SMALLEST_CELLS * geometry.spatial_scale)
        width, height = (
            max(int(side * factor) // unit * unit, least) for side in (video.width, video.height)
        )
        if (width, height) != (video.width, video.height):
            yield f"--size {width}x{height}", {"width": width, "height": height}


def check_fits(planner: Planner, video: Video, weight_streaming: bool = True) -> Plan:
    """The plan for a video, if it fits under some policy.

    Args:
        planner: Of the bundle and the target.
        video: What is planned.
        weight_streaming: Whether the step engine is built so that its weights can be streamed.

    Raises:
        PlanError: It does not; the remedies, each with its peak, are in the message.
    """
    plan = planner.plan(video)
    if not weight_streaming and [policy for policy, fits in plan.fits.items() if fits] == ["streamed"]:
        raise PlanError(
            f"the engines fit {plan.target.name} only with the step's weights streamed from the host: "
            f"{_gib(plan.peaks['streamed'])}, where {_gib(plan.peaks['staged'])} are needed without and "
            f"{_gib(plan.available_bytes)} are left.",
            "Build them with --weight-streaming, or see `reelrt plan` for what else fits.",
        )
    if not any(plan.fits.values()):
        raise does_not_fit(plan, find_remedies(planner, video))
    return plan


def does_not_fit(plan: Plan, remedies: Sequence[Remedy]) -> PlanError:
    """The error that says so, with the remedies that help."""
    video, least = plan.video, plan.peaks[plan.smallest]
    frames = counted(video.frames, "frame")
    what = f"{video.batch} x {frames} of {video.width}x{video.height} in {video.precision}"
    helping = [each for each in remedies if each.fits] or remedies
    offers = "; ".join(f"{each.what} ({_gib(each.peak_bytes)}, {each.policy})" for each in helping)
    kind = "What fits" if helping and helping[0].fits else "Nothing tried fits; closest"
    return PlanError(
        f"{what} needs {_gib(least)} at least, and {plan.target.name} leaves {_gib(plan.available_bytes)}.",
        f"{kind}: {offers}." if offers else "",
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
