"""The job service's objects as answers over HTTP, and its errors as refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reelrt.errors import (
    ConflictError,
    InputError,
    NotFoundError,
    QueueFullError,
    RangeError,
    ReelError,
    StoppingError,
    StorageError,
)
from reelrt.service import schemas
from reelrt.service.catalogue import ModelInfo
from reelrt.service.jobs import Job
from reelrt.service.refusals import Refusal

STATUSES: tuple[tuple[type[ReelError], int], ...] = (
    (InputError, 400),
    (NotFoundError, 404),
    (ConflictError, 409),
    (QueueFullError, 429),
    (StoppingError, 503),
    (StorageError, 507),
)
_FIELDS = {
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "deadline": "deadline_s",
}
"""The service's names to the fields of a request where they differ."""


def video(job: Job) -> schemas.Video:
    """A job as OpenAI's object; it knows no cancelled job, so one is a failed one that says so."""
    asked, seconds = job.request, dict(job.timings)
    error = schemas.VideoError(code=job.error.code, message=job.error.message) if job.error else None
    if job.status == "cancelled":
        error = schemas.VideoError(code=job.status, message="The job was cancelled.")
    done = job.status == "completed"
    took = job.completed_at - job.started_at if done and job.completed_at and job.started_at else None
    width, height, frames = asked.width or 0, asked.height or 0, asked.frames or 0
    return schemas.Video(
        id=job.id,
        model=asked.model or "",
        status="failed" if job.status == "cancelled" else job.status,
        progress=job.progress,
        created_at=int(job.created_at),
        completed_at=_whole(job.completed_at),
        expires_at=_whole(job.expires_at),
        prompt=asked.prompt,
        size=f"{width}x{height}",
        seconds=f"{frames / asked.fps:g}",
        error=error,
        remixed_from_video_id=asked.remix_of,
        queue_position=job.queue_position,
        width=width,
        height=height,
        num_frames=frames,
        fps=asked.fps,
        num_inference_steps=asked.steps or 0,
        guidance_scale=asked.guidance or 0.0,
        seed=asked.seed,
        negative_prompt=asked.negative_prompt,
        solver=asked.solver or "",
        format="webm" if asked.format == "webm" else "mp4",
        priority=asked.priority,
        inference_time_s=took,
        stage_durations=seconds or None,
        peak_memory_mb=round(job.peak_memory / 2**20, 1) if job.peak_memory else None,
        reused=list(job.reused),
    )


def page_of(jobs: Sequence[Job], more: bool) -> schemas.VideoList:
    """Some jobs as a page of a list."""
    data = [video(job) for job in jobs]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return schemas.VideoList(data=data, first_id=ends[0], last_id=ends[1], has_more=more)


def model(info: ModelInfo, remix_points: Sequence[float]) -> schemas.ModelObject:
    """A model with what it takes."""
    ranges = {
        name: schemas.Range(minimum=least, maximum=most, default=int(info.defaults[name]))
        for name, (least, most) in info.limits.items()
        if name in ("width", "height", "frames", "steps")
    }
    limits = schemas.ModelLimits(
        width=ranges["width"],
        height=ranges["height"],
        num_frames=ranges["frames"],
        num_inference_steps=ranges["steps"],
        size_multiple=info.size_multiple,
        guidance_scale=float(info.defaults["guidance"]),
        solvers=sorted(info.solvers),
        solver=str(info.defaults["solver"]),
        remix_points=list(remix_points),
        slots=info.slots,
    )
    return schemas.ModelObject(id=info.name, created=int(info.loaded_at), owned_by="reelrt", limits=limits)


def refusal(error: ReelError) -> Refusal:
    """The answer to an error of the job service."""
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    name = error.name if isinstance(error, RangeError) else None
    headers = {}
    if isinstance(error, QueueFullError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    elif status == 503:
        headers["Retry-After"] = "5"
    return Refusal(status, str(error), param=_FIELDS.get(name, name) if name else None, headers=headers)


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
