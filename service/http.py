"""The HTTP door: OpenAI's video routes and server-sent events.

Whatever waits for a disk runs in threads. Knows nothing of engines: `VideoService` does the work.
"""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, HTTPException, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from reelrt.service import answers, bodies, schemas, sse
from reelrt.service.documents import body_of, errors_of
from reelrt.service.files import RangeFile
from reelrt.service.jobs import PICTURE_TYPE, VIDEO_TYPES, Job, Variant
from reelrt.service.jobservice import VideoService
from reelrt.service.refusals import Refusal
from reelrt.service.routing import Owner, Service, json_of

DISCONNECT_SECONDS = 1.0
"""How often a waiting `/v1/videos/sync` looks whether its client is still there."""
_FAILED_SYNC = {"deadline_exceeded": 408, "disk_full": 507, "quota_exceeded": 507}

VIDEO_FILES: dict[str, dict[str, Any]] = {kind: {} for kind in VIDEO_TYPES.values()}
ALL_FILES: dict[str, dict[str, Any]] = {**VIDEO_FILES, PICTURE_TYPE: {}}

EVENT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "event": {"enum": ["video", "preview", "deleted"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}

router = APIRouter()


VideoId = Annotated[str, Path(description="A video's id.", json_schema_extra={"pattern": schemas.VIDEO_ID})]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[!-~]+$",
        description="The same key with the same request answers the same video, however often it is sent.",
    ),
]


@router.post(
    "/v1/videos",
    response_model=schemas.Video,
    openapi_extra=body_of(schemas.CreateVideo),
    responses=errors_of(400, 404, 409, 415, 429, 503, 507),
    summary="Ask for a video",
)
async def create(
    request: Request, service: Service, owner: Owner, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """Accept a job; once this is answered, it survives whatever happens to the service."""
    asked = await bodies.read(request, schemas.CreateVideo)
    job = await run_in_threadpool(service.submit, asked.request(), owner, idempotency_key)
    return json_of(answers.video(job))


@router.post(
    "/v1/videos/sync",
    response_class=Response,
    openapi_extra=body_of(schemas.CreateVideo),
    responses={200: {"content": VIDEO_FILES}, **errors_of(400, 404, 409, 415, 429, 503, 507)},
    summary="Make a video and answer it",
)
async def create_sync(
    request: Request, service: Service, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Response:
    """Like `POST /v1/videos`, and wait for the file. The headers tell id, seed and times.

    Without an `Idempotency-Key` the job is cancelled when the client goes away.
    """
    asked = await bodies.read(request, schemas.CreateVideo)
    job = await run_in_threadpool(service.submit, asked.request(), owner, idempotency_key)
    try:
        done = await asyncio.wait_for(_end(request, service, job), request.app.state.settings.sync_seconds)
    except asyncio.TimeoutError:
        raise Refusal(
            408, f"{job.id} is not done yet; see /v1/videos/{job.id}.", code="sync_timeout"
        ) from None
    if done is None:
        if idempotency_key is None:
            await run_in_threadpool(service.cancel, job.id, owner)
        return Response(status_code=408)  # nobody reads it
    if done.status != "completed":
        error = answers.video(done).error
        code, message = (error.code, error.message) if error else (done.status, "The video is gone.")
        raise Refusal(409 if done.status == "cancelled" else _FAILED_SYNC.get(code, 500), message, code=code)
    return await _file(service, done.id, owner, "video", _sync_headers(done))


@router.api_route("/v1/videos/sync", methods=["GET", "HEAD", "DELETE"], include_in_schema=False)
async def no_such_video() -> None:
    """`sync` is no id, lest a mistyped method looks like a video that is gone."""
    raise HTTPException(405)


@router.get(
    "/v1/videos",
    response_model=schemas.VideoList,
    responses=errors_of(400, 404),
    summary="List videos",
)
async def list_videos(
    service: Service,
    owner: Owner,
    after: Annotated[
        str | None, Query(max_length=100, description="Id of the last one of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Most videos of a page.")] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="By the time of creation.")] = "desc",
) -> JSONResponse:
    """Videos of this key, a page of them."""

    def page() -> schemas.VideoList:
        jobs, more = service.list(owner, after=after, limit=limit, order=order)
        return answers.page_of(jobs, more)

    return json_of(await run_in_threadpool(page))


@router.get(
    "/v1/videos/{video_id}", response_model=schemas.Video, responses=errors_of(404), summary="How a video is"
)
async def get(video_id: VideoId, service: Service, owner: Owner) -> JSONResponse:
    """A job as it is now."""
    return json_of(answers.video(await run_in_threadpool(service.get, video_id, owner)))


@router.delete(
    "/v1/videos/{video_id}",
    response_model=schemas.DeletedVideo,
    responses=errors_of(404, 503, 507),
    summary="Cancel and delete a video",
)
async def delete(video_id: VideoId, service: Service, owner: Owner) -> JSONResponse:
    """Stop a job, which leaves the batch before the next step, and remove it with its files."""
    await run_in_threadpool(service.delete, video_id, owner)
    return json_of(schemas.DeletedVideo(id=video_id))


@router.post(
    "/v1/videos/{video_id}/remix",
    response_model=schemas.Video,
    openapi_extra=body_of(schemas.RemixVideo),
    responses=errors_of(400, 404, 409, 415, 429, 503, 507),
    summary="Vary a video",
)
async def remix(
    video_id: VideoId,
    request: Request,
    service: Service,
    owner: Owner,
    idempotency_key: IdempotencyKey = None,
) -> JSONResponse:
    """Go on with another prompt from where a finished video was at a share of its schedule."""
    asked = await bodies.read(request, schemas.RemixVideo)
    job = await run_in_threadpool(service.submit, asked.request(video_id), owner, idempotency_key)
    return json_of(answers.video(job))


@router.get(
    "/v1/videos/{video_id}/content",
    response_class=Response,
    responses={
        200: {"content": ALL_FILES},
        206: {"content": {**ALL_FILES, "multipart/byteranges": {}}, "description": "The ranges asked for"},
        **errors_of(400, 404, 409, 416),
    },
    summary="A video's files",
)
@router.head(
    "/v1/videos/{video_id}/content",
    response_class=Response,
    responses={206: {"description": "The ranges asked for"}, **errors_of(400, 404, 409, 416)},
    summary="What `GET` would answer, without the file",
)
async def content(
    video_id: VideoId,
    service: Service,
    owner: Owner,
    variant: Annotated[Variant, Query(description="Which file.")] = "video",
) -> Response:
    """The video, a thumbnail, or a sheet of its frames; `Range` asks for a part."""
    return await _file(service, video_id, owner, variant)


@router.get(
    "/v1/videos/{video_id}/events",
    response_class=Response,
    responses={
        200: {
            "content": {"text/event-stream": {"schema": EVENT}},
            "description": "`video` (the object) at every change, `preview` (`{id, progress, image}`, the "
            "image a data URL), at last a `video` that is completed or failed, or `deleted` (`{id}`)",
        },
        **errors_of(404, 429, 503),
    },
    summary="Follow a video",
)
async def events(
    video_id: VideoId,
    request: Request,
    service: Service,
    owner: Owner,
    previews: Annotated[bool, Query(description="Whether to send preview pictures.")] = True,
) -> sse.EventStream:
    """Server-sent events of a job, until it is over."""
    streams: sse.Streams = request.app.state.streams
    if refusal := streams.refusal():  # somebody may have come first since `FewStreams` looked
        raise refusal
    waker, ring = sse.bell()
    streams.add(waker)
    try:
        subscription = await run_in_threadpool(service.watch, video_id, owner, previews=previews, notify=ring)
    except BaseException:
        streams.remove(waker)
        raise

    def done() -> None:
        subscription.close()
        streams.remove(waker)

    return sse.EventStream(sse.events(subscription, waker, streams), done)


async def _file(
    service: VideoService, video_id: str, owner: str, variant: Variant, headers: dict[str, str] | None = None
) -> RangeFile:
    def found() -> RangeFile:
        job, path = service.get(video_id, owner), service.file(video_id, owner, variant)
        kind = VIDEO_TYPES[job.request.format] if variant == "video" else PICTURE_TYPE
        name = f"{video_id}{'' if variant == 'video' else f'-{variant}'}{path.suffix}"
        try:
            return RangeFile(path, kind, name, headers)
        except FileNotFoundError:  # deleted between the two lines above
            raise Refusal(404, f"{video_id} is gone.") from None

    return await run_in_threadpool(found)


async def _end(request: Request, service: VideoService, job: Job) -> Job | None:
    """The job when it is over; None when the client went away before."""
    waker, ring = sse.bell()
    subscription = await run_in_threadpool(service.watch, job.id, job.owner, previews=False, notify=ring)
    try:
        while True:
            waker.clear()
            for event in subscription.take():
                if event.last:
                    return event.job
            try:
                await asyncio.wait_for(waker.wait(), DISCONNECT_SECONDS)
            except asyncio.TimeoutError:
                if await request.is_disconnected():
                    return None
    finally:
        subscription.close()


def _sync_headers(job: Job) -> dict[str, str]:
    made = answers.video(job)
    return {
        "X-Request-Id": made.id,
        "X-Model": made.model.encode("ascii", "replace").decode(),
        "X-Seed": str(made.seed),
        "X-Inference-Time-S": f"{made.inference_time_s or 0:.3f}",
        "X-Stage-Durations": json.dumps(made.stage_durations or {}),
        "X-Peak-Memory-MB": f"{made.peak_memory_mb or 0:.1f}",
    }
