"""The gRPC door: the jobs of `videos.proto`, health and reflection, over the same job service as HTTP.

Requests are checked by the same schemas. Whatever waits for a disk runs in threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from pydantic import ValidationError

from reelrt.errors import (
    ConflictError,
    InputError,
    NotFoundError,
    QueueFullError,
    ReelError,
    StoppingError,
    StorageError,
)
from reelrt.service import schemas, sse
from reelrt.service import videos_pb2 as pb
from reelrt.service.events import Subscription
from reelrt.service.guards import owner_for
from reelrt.service.jobs import Event, Job, Remix, Variant, VideoRequest
from reelrt.service.jobservice import VideoService
from reelrt.service.refusals import of_validation
from reelrt.service.videos_pb2_grpc import VideosServicer, add_VideosServicer_to_server

log = logging.getLogger(__name__)

NAME = pb.DESCRIPTOR.services_by_name["Videos"].full_name
CHUNK_BYTES = 64 * 1024
LISTED, MOST_LISTED = 20, 100
CODES: tuple[tuple[type[ReelError], grpc.StatusCode], ...] = (
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (ConflictError, grpc.StatusCode.FAILED_PRECONDITION),
    (QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (StorageError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (StoppingError, grpc.StatusCode.UNAVAILABLE),
)
_VARIANTS: dict[int, Variant] = {pb.VIDEO: "video", pb.THUMBNAIL: "thumbnail", pb.SPRITESHEET: "spritesheet"}


class Door:
    """A gRPC server on the running event loop.

    Attributes:
        port: The port it listens on.

    Args:
        service: The job service.
        keys: API keys that are good; none: everybody may.
        streams: Where its `Watch` calls are counted, with the event streams of HTTP.
        address: Host and port; port 0 takes a free one.
        most_bytes: Largest message that is read.
        most_calls: Most calls at once.

    Raises:
        InputError: The address cannot be listened on.
    """

    def __init__(
        self,
        service: VideoService,
        keys: Sequence[str],
        streams: sse.Streams,
        address: tuple[str, int],
        most_bytes: int,
        most_calls: int,
    ) -> None:
        options = [("grpc.max_receive_message_length", most_bytes), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=options, maximum_concurrent_rpcs=most_calls)
        self._health = health.aio.HealthServicer()
        add_VideosServicer_to_server(_Videos(service, keys, streams), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        host, port = address
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port: int = self._server.add_insecure_port(where)
        except RuntimeError as error:
            raise InputError(f"cannot listen on {where} for gRPC.", "Name another --grpc-port.") from error

    async def start(self) -> None:
        """Answer calls."""
        await self._server.start()
        for name in ("", NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float = 5.0) -> None:
        """Take no more calls; those under way get some seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)


class _Videos(VideosServicer):
    def __init__(self, service: VideoService, keys: Sequence[str], streams: sse.Streams) -> None:
        self._service, self._keys, self._streams = service, keys, streams

    async def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.Video:  # noqa: N802 (the proto's)
        """Accept a job."""
        owner = await self._owner(context)
        fields = {field.name: value for field, value in request.ListFields()}
        key, parent = fields.pop("idempotency_key", None), fields.pop("remix_of", None)

        def submit() -> Job:
            return self._service.submit(self._asked(fields, parent), owner, key)

        return await self._done(context, submit)

    def _asked(self, fields: dict[str, Any], parent: str | None) -> VideoRequest | Remix:
        try:
            if parent is None:
                return schemas.CreateVideo.model_validate(fields).request()
            return schemas.RemixVideo.model_validate(fields).request(parent)
        except ValidationError as error:
            raise InputError(of_validation(error.errors(include_url=False)).message) from error

    async def Get(self, request: pb.VideoRequest, context: Any) -> pb.Video:  # noqa: N802
        """A job as it is now."""
        owner = await self._owner(context)
        return await self._done(context, self._service.get, request.id, owner)

    async def Cancel(self, request: pb.VideoRequest, context: Any) -> pb.Video:  # noqa: N802
        """Stop a job, and keep its record."""
        owner = await self._owner(context)
        return await self._done(context, self._service.cancel, request.id, owner)

    async def Delete(self, request: pb.VideoRequest, context: Any) -> pb.DeleteReply:  # noqa: N802
        """Stop a job, and remove it."""
        owner = await self._owner(context)
        await self._call(context, self._service.delete, request.id, owner)
        return pb.DeleteReply()

    async def List(self, request: pb.ListRequest, context: Any) -> pb.ListReply:  # noqa: N802
        """A page of jobs."""
        owner = await self._owner(context)

        def page() -> tuple[Sequence[Job], bool]:
            return self._service.list(
                owner,
                after=request.after if request.HasField("after") else None,
                limit=request.limit if request.HasField("limit") else LISTED,
                order="asc" if request.oldest_first else "desc",
            )

        jobs, more = await self._call(context, page)
        return pb.ListReply(videos=[video(job) for job in jobs], has_more=more)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.Event]:  # noqa: N802
        """A job's events until it is over."""
        owner = await self._owner(context)
        if self._streams.stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the service is stopping")
        if self._streams.full:
            text = f"{self._streams.most} event streams are open already"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        waker, ring = sse.bell()
        self._streams.add(waker)
        options: dict[str, Any] = {"previews": request.previews, "notify": ring}
        opened = asyncio.ensure_future(asyncio.to_thread(self._service.watch, request.id, owner, **options))
        try:
            subscription = await _answered(context, asyncio.shield(opened))
            while not self._streams.stopping:
                waker.clear()
                for event in subscription.take():
                    yield event_of(event)
                    if event.last:
                        return
                await waker.wait()
        finally:  # a call that is cancelled while the thread subscribes has a subscription all the same
            opened.add_done_callback(_closed)
            self._streams.remove(waker)

    async def Download(self, request: pb.DownloadRequest, context: Any) -> AsyncIterator[pb.Chunk]:  # noqa: N802
        """A file of a finished job."""
        owner = await self._owner(context)
        variant = _VARIANTS.get(request.variant, "video")
        path = await self._call(context, self._service.file, request.id, owner, variant)
        try:
            file = await asyncio.to_thread(path.open, "rb")
        except FileNotFoundError:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{request.id} is gone")
        with file:
            while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield pb.Chunk(data=data)

    async def _owner(self, context: Any) -> str:
        """Whose call it is; ends it where the key is wrong."""
        header = dict(context.invocation_metadata() or ()).get("authorization", "")
        owner = owner_for(str(header), self._keys)
        if owner is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the API key is missing or wrong")
        return owner or ""

    async def _done(self, context: Any, work: Any, *arguments: Any) -> pb.Video:
        return video(await self._call(context, work, *arguments))

    async def _call(self, context: Any, work: Any, *arguments: Any) -> Any:
        """Do it in a thread; an error of the job service ends the call with its status."""
        return await _answered(context, asyncio.to_thread(work, *arguments))


async def _answered(context: Any, work: Awaitable[Any]) -> Any:
    try:
        return await work
    except ReelError as error:
        await _abort(context, error)


def _closed(opened: asyncio.Future[Subscription]) -> None:
    if not opened.cancelled() and opened.exception() is None:
        opened.result().close()


async def _abort(context: Any, error: ReelError) -> NoReturn:
    code = next((code for kind, code in CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
    if code is grpc.StatusCode.INTERNAL:
        log.error("a gRPC call failed", exc_info=error)
    if isinstance(error, QueueFullError):
        context.set_trailing_metadata((("retry-after", f"{max(1, round(error.retry_after))}"),))
    await context.abort(code, str(error))
    raise AssertionError("abort raises")


def video(job: Job) -> pb.Video:
    """A job as a message."""
    asked = job.request
    made = pb.Video(
        id=job.id,
        model=asked.model or "",
        status=pb.Status.Value(job.status.upper()),
        progress=job.progress,
        created_at=job.created_at,
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt,
        width=asked.width or 0,
        height=asked.height or 0,
        num_frames=asked.frames or 0,
        fps=asked.fps,
        num_inference_steps=asked.steps or 0,
        guidance_scale=asked.guidance or 0.0,
        solver=asked.solver or "",
        format=asked.format,
        priority=asked.priority,
        remixed_from_id=asked.remix_of or "",
        stage_seconds=dict(job.timings),
        reused=job.reused,
    )
    if job.error is not None:
        made.error_code, made.error_message = job.error.code, job.error.message
    seldom = {
        "queue_position": job.queue_position,
        "completed_at": job.completed_at,
        "expires_at": job.expires_at,
        "seed": asked.seed,
    }
    for name, value in seldom.items():
        if value is not None:
            setattr(made, name, value)
    return made


def event_of(event: Event) -> pb.Event:
    """An event as a message."""
    return pb.Event(video=video(event.job), preview=event.image, deleted=event.kind == "deleted")
