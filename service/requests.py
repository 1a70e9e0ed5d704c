"""A client's request, checked once and completed, so that it gives the same video whenever it is run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reelrt import __version__
from reelrt.bundle.manifest import EngineSet
from reelrt.bundle.spec import is_whole
from reelrt.errors import InputError, RangeError
from reelrt.runtime.pipeline import TextToVideo
from reelrt.runtime.request import Job as Plan
from reelrt.runtime.request import plan
from reelrt.runtime.video import check_rate
from reelrt.service.jobs import VIDEO_TYPES, Remix, VideoRequest

STEPS = 25
"""Denoising steps when a request names none."""
MOST_LETTERS, MOST_NAME = 10_000, 100
HIGHEST_PRIORITY = 10
LONGEST_DEADLINE = 366 * 86400.0
REMIX_FROM = 0.5
"""Fraction of the parent's schedule that a remix takes over when it names none."""


def check(request: VideoRequest) -> None:
    """Refuse what no model can do. What a model can do is checked by `resolve`.

    Raises:
        InputError: A value that is not possible; the message names it.
    """
    for name in ("prompt", "negative_prompt"):
        text = getattr(request, name)
        if not isinstance(text, str):
            raise InputError(f"{name} {text!r} is no text.")
        if len(text) > MOST_LETTERS:
            raise InputError(f"{name} has {len(text)} letters; at most {MOST_LETTERS} are taken.")
    for name in ("model", "solver", "latents", "remix_of"):
        text = getattr(request, name)
        if text is not None and not (
            isinstance(text, str) and text.isprintable() and 0 < len(text) <= MOST_NAME
        ):
            raise InputError(f"{name} {text!r:.120} is no name of 1 to {MOST_NAME} printable letters.")
    if request.format not in VIDEO_TYPES:
        raise RangeError("format", repr(request.format), f"choose one of {', '.join(VIDEO_TYPES)}")
    check_rate(request.fps)
    highest = HIGHEST_PRIORITY
    if not is_whole(request.priority) or abs(request.priority) > highest:
        raise InputError(f"priority {request.priority!r} is no whole number from -{highest} to {highest}.")
    deadline = request.deadline
    if deadline is not None and not (_number(deadline) and 0 < deadline <= LONGEST_DEADLINE):
        raise InputError(f"deadline {deadline!r} is no number of seconds from 0 to {LONGEST_DEADLINE:.0f}.")
    if (request.width is None) != (request.height is None):
        raise InputError("width and height belong together: give both or none.")
    if request.remix_of is None and request.remix_from is not None:
        raise InputError("remix_from was given without remix_of, the job to vary.")
    if request.remix_of is not None and request.latents is not None:
        raise InputError("latents and remix_of were given; a remix starts from the other job's latents.")
    if request.remix_from is not None and not _number(request.remix_from):
        raise InputError(f"remix_from {request.remix_from!r} is no number.")


def resolve(request: VideoRequest, model: str, pipe: TextToVideo) -> tuple[VideoRequest, Plan]:
    """Fill in what a checked request leaves to the model, and draw its seed.

    Args:
        request: What the client asked for; see `check`.
        model: The model's name.
        pipe: The model.

    Returns:
        The complete request, and the runtime's plan of it.

    Raises:
        InputError: A value that is not possible (RangeError: not with this model).
    """
    job = replan(request, pipe)
    scale = pipe.engines.pipeline.geometry.spatial_scale
    _, frames, height, width = job.shape
    complete = replace(
        request,
        model=model,
        width=width * scale,
        height=height * scale,
        frames=frames,
        fps=float(request.fps),
        steps=job.steps,
        guidance=job.guidance,
        solver=job.solver,
        seed=job.seed,
    )
    return complete, job


def replan(request: VideoRequest, pipe: TextToVideo) -> Plan:
    """The runtime's plan of a request.

    Raises:
        InputError: A value that is not possible (RangeError: not with this model).
    """
    size = None if request.width is None or request.height is None else (request.width, request.height)
    (job,) = plan(
        pipe.limits,
        [request.prompt],
        negative_prompt=request.negative_prompt,
        steps=STEPS if request.steps is None else request.steps,
        guidance=request.guidance,
        seed=request.seed,
        frames=request.frames,
        size=size,
        solver=request.solver,
        latents=None,
    )
    return job


TAKEN_OVER = ("width", "height", "frames", "steps", "solver", "seed")
"""What a remix has from its parent, and cannot have otherwise."""


def remixed(request: VideoRequest, parent: VideoRequest) -> VideoRequest:
    """A remix with what it takes over of its parent.

    Raises:
        InputError: It asks for something else than the parent's.
    """
    for name in TAKEN_OVER:
        wanted, given = getattr(parent, name), getattr(request, name)
        if given is not None and given != wanted:
            raise InputError(
                f"{name} {given!r} was asked for; a remix keeps the {wanted!r} of {request.remix_of}."
            )
    taken = {name: getattr(parent, name) for name in TAKEN_OVER}
    guidance = parent.guidance if request.guidance is None else request.guidance
    remix_from = REMIX_FROM if request.remix_from is None else float(request.remix_from)
    return replace(request, **taken, guidance=guidance, remix_from=remix_from)


def point_step(point: float, steps: int) -> int:
    """The step of a schedule at a fraction of it."""
    return round(point * steps)


def rows_per_step(job: Plan) -> int:
    """Launches that a step takes: two with split guidance."""
    return len(job.table) // job.steps


def asked(request: VideoRequest | Remix) -> str:
    """A digest of what a client asked for, to tell a repeated request from another one."""
    return _digest(request.to_json())


def fingerprint(request: VideoRequest, engines: EngineSet, parent: str) -> str:
    """A digest of all that a complete request's file depends on.

    Args:
        request: The complete request.
        engines: The model's engines.
        parent: The fingerprint of the job that it varies, or "".
    """
    values = request.to_json()
    for name in ("model", "priority", "deadline", "latents", "remix_of"):
        del values[name]
    built: Mapping[str, Any] = {
        "reelrt": __version__,
        "model": engines.pipeline.model.name,
        "sha256": engines.pipeline.model.sha256,
        "bundle": engines.bundle,
        "backend": [engines.backend, engines.backend_version],
        "engines": {name: [each.key, each.precision] for name, each in engines.engines.items()},
    }
    return _digest({"request": values, "parent": parent, **built})


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # noqa: PLR0124
