"""The service behind the doors: takes requests, keeps jobs, tells how they are.

HTTP, gRPC and the command line all talk to `VideoService`; none of them is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from reelrt.runtime.pipeline import TextToVideo
from reelrt.service.catalogue import ModelInfo
from reelrt.service.events import Subscription
from reelrt.service.figures import Figures, Health
from reelrt.service.jobs import Job, Variant, VideoRequest
from reelrt.service.options import ServiceOptions


class VideoService:
    """Jobs from their submission to their files.

    All methods may be called from any thread. Those that write (`submit`, `cancel`, `delete`) wait
    for the disk, some milliseconds: call them outside of an event loop. Ids of others' jobs are as
    unknown as ids that never were.

    Args:
        pipelines: Model name to its pipeline; the service is its only user while it lives.
        options: How it is set up.

    Raises:
        StorageError: Another service uses the folder, or it cannot be written.
    """

    def __init__(self, pipelines: Mapping[str, TextToVideo], options: ServiceOptions) -> None:
        raise NotImplementedError

    def submit(self, request: VideoRequest, owner: str = "", idempotency_key: str | None = None) -> Job:
        """Accept a request. When this returns, the job survives whatever happens to the process.

        Args:
            request: What is asked for.
            owner: Whose job it is; "" without keys.
            idempotency_key: Up to 255 characters. The same key and request of the same owner answer the
                same job, as it is then.

        Returns:
            The job; completed already when its very request was answered before.

        Raises:
            InputError: A value that is not possible (RangeError: not with this model).
            NotFoundError: No such model or job to remix.
            ConflictError: The idempotency key was used for another request, or the job to remix has no
                trajectory any more or is not completed.
            QueueFullError: The queue is full (JobLimitError: this owner's share); with `retry_after`.
            StorageError: The disk or the quota is full.
            StoppingError: The service is stopping.
        """
        raise NotImplementedError

    def get(self, job_id: str, owner: str = "") -> Job:
        """A job as it is now.

        Raises:
            NotFoundError: No such job of this owner.
        """
        raise NotImplementedError

    def list(
        self,
        owner: str = "",
        *,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[Sequence[Job], bool]:
        """Jobs of an owner by the time of their submission.

        Args:
            owner: Whose.
            after: Id of the job that the list begins behind.
            limit: 1 to 100.
            order: `desc` begins with the newest.

        Returns:
            The jobs, and whether there are more.

        Raises:
            InputError: An impossible limit or order.
            NotFoundError: `after` is no job of this owner.
        """
        raise NotImplementedError

    def cancel(self, job_id: str, owner: str = "") -> Job:
        """Stop a job; it leaves the batch before the next launch. One that is over stays as it is.

        Raises:
            NotFoundError: No such job of this owner.
        """
        raise NotImplementedError

    def delete(self, job_id: str, owner: str = "") -> None:
        """Cancel a job if it is not over, and remove it with its files.

        Raises:
            NotFoundError: No such job of this owner.
        """
        raise NotImplementedError

    def watch(
        self, job_id: str, owner: str = "", *, previews: bool = True, notify: Callable[[], None] | None = None
    ) -> Subscription:
        """Be told of what happens to a job. The first event, how it is now, is there at once.

        Args:
            job_id: The job.
            owner: Whose.
            previews: Whether to make preview images.
            notify: Called from another thread whenever `take` has something; has to return at once
                (`loop.call_soon_threadsafe(event.set)`, say).

        Raises:
            NotFoundError: No such job of this owner.
        """
        raise NotImplementedError

    def file(self, job_id: str, owner: str = "", variant: Variant = "video") -> Path:
        """A file of a completed job, whole. The path is for reading only, and goes with the job.

        Raises:
            NotFoundError: No such job of this owner.
            ConflictError: The job is not completed.
        """
        raise NotImplementedError

    def models(self) -> Sequence[ModelInfo]:
        """The models it runs; the first is the default."""
        raise NotImplementedError

    def health(self) -> Health:
        """Whether it lives and takes requests."""
        raise NotImplementedError

    def figures(self) -> Figures:
        """What it has measured."""
        raise NotImplementedError

    def drain(self, grace: float = 30.0) -> None:
        """Take no more requests, and wait until running jobs are over.

        Args:
            grace: Seconds after which those that still run are put back into the queue. Waiting jobs
                stay in it; all of them go on at the next start.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Put running jobs back, end all threads and let go of the folder. May be called twice."""
        raise NotImplementedError

    def __enter__(self) -> VideoService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_service(engines: Sequence[Path], options: ServiceOptions, *, check: bool = True) -> VideoService:
    """Load engine sets and start a service on them.

    Args:
        engines: Engine sets; a model is called as its manifest says, with `-2` and so on for further
            ones of the same name.
        options: How it is set up.
        check: Whether to verify the engines' files first.

    Raises:
        ReelError: See `reelrt.load`.
        StorageError: See `VideoService`.
    """
    raise NotImplementedError
