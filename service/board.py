"""The jobs that are not over: who has which, how far it is, and the one way in which each ends.

Everybody who drives a job forward (the batch, the decoder, the encoder, a client who cancels) ends it
here. The store decides who was first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from reelrt.errors import BackendError, DeviceMemoryError, InputError, ReelError, StorageError
from reelrt.runtime.memory import peak_memory
from reelrt.service.clerk import Clerk
from reelrt.service.disk import is_full
from reelrt.service.events import Hub
from reelrt.service.jobs import Event, Job, JobError, Status
from reelrt.service.meter import Meter
from reelrt.service.store import JobStore
from reelrt.service.task import Task
from reelrt.service.trajectories import Trajectories

log = logging.getLogger("reelrt")


class Board:
    """Live tasks, by job.

    Attributes:
        store: Where jobs are kept.
        trajectories: Where states are kept.
        hub: Who is told.
        meter: What is counted.
        clerk: Who writes what nobody waits for.
        left: Called with a task that has ended, by whoever ended it.
        position: How many are before a task in its line.

    Args:
        retention: Seconds for which a job is kept after its end.
    """

    def __init__(
        self, store: JobStore, trajectories: Trajectories, hub: Hub, meter: Meter, retention: float
    ) -> None:
        self.store, self.trajectories, self.hub, self.meter = store, trajectories, hub, meter
        self.clerk = Clerk()
        self.left: Callable[[Task], None] = lambda _: None
        self.position: Callable[[Task], int | None] = lambda _: None
        self._retention = retention
        self._lock = threading.Lock()
        self._tasks: dict[str, Task] = {}
        self._unsaved: dict[str, Job] = {}

    def add(self, task: Task) -> None:
        """A task is on its way."""
        with self._lock:
            self._tasks[task.job.id] = task

    def tasks(self) -> list[Task]:
        """All that are on their way."""
        with self._lock:
            return list(self._tasks.values())

    def task(self, job_id: str) -> Task | None:
        """A job's task, if it is on its way."""
        with self._lock:
            return self._tasks.get(job_id)

    def job(self, job_id: str) -> Job | None:
        """A job as it is now, over or not."""
        with self._lock:
            task, unsaved = self._tasks.get(job_id), self._unsaved.get(job_id)
        if unsaved is not None:
            return unsaved
        return self.store.get(job_id) if task is None else self.now(task)

    def now(self, task: Task) -> Job:
        """A task's job as it is now."""
        if task.started_at is None:
            before = self.position(task) or 0  # it has left the line already when it is about to start
            return task.job.but(status="queued", queue_position=before, started_at=None)
        return task.job.but(
            status="in_progress",
            progress=task.progress,
            started_at=task.started_at,
            timings=dict(task.timings),
            reused=task.prepared.reused if task.prepared else task.job.reused,
            attempts=task.job.attempts + 1,
        )

    def tell(self, task: Task, image: bytes = b"") -> None:
        """Tell those who watch a task how it is, or show them a preview. Never waits.

        Of a task in a line only whoever holds that line tells: its place there may change.
        """
        if not self.hub.wanted(task.job.id) or task.over:
            return
        job = self.now(task)
        waits = job.status == "queued"
        if not (image and waits):  # a preview of a task that was put back shows nothing any more
            self.hub.publish(Event("preview" if image else "queued" if waits else "progress", job, image))

    def started(self, task: Task, at: float) -> None:
        """A task joined the batch. Never waits."""
        task.started_at = at
        self.clerk.do(lambda: self.store.started(task.job.id, at))
        self.tell(task)

    def put_back(self, task: Task) -> None:
        """A task waits again, as if it had not been started. Never waits."""
        task.put_back()
        self.clerk.do(lambda: self.store.put_back(task.job.id))

    def end(
        self,
        task: Task,
        status: Status,
        error: JobError | None = None,
        files: Mapping[Any, int] | None = None,
    ) -> bool:
        """End a job, if it is not over. Waits for the disk.

        Returns:
            Whether this was its end; False when it was over, or deleted.

        Raises:
            StorageError: That it is completed or cancelled could not be written; it is not over then.
        """
        now = time.time()
        job = self.now(task).but(
            status=status,
            progress=100 if status == "completed" else task.progress if task.started_at else 0,
            queue_position=None,
            completed_at=now,
            expires_at=now + self._retention,
            error=error,
            peak_memory=peak_memory(),
            files=dict(files or {}),
        )
        try:
            won = self.store.finish(job)
        except StorageError:
            if status != "failed":
                raise
            with self._lock:  # it is over all the same; the sweeper writes it when the disk allows
                won = not task.over
                if won:
                    self._unsaved[job.id] = job
        self._leave(task, status)
        if won:
            self.meter.count("ended", status)
            for stage, seconds in job.timings.items():
                self.meter.stage(stage, seconds)
            self.hub.publish(Event(status, job))  # type: ignore[arg-type] # an end is an event's kind
            if status == "completed":
                self.trajectories.forget_input(job.id)
            else:
                self.clerk.do(lambda: self.trajectories.remove(job.id))
        return won

    def remove(self, job: Job) -> bool:
        """Delete a job, over or not; whether it was there. Waits for the disk."""
        task = self.task(job.id)
        won = self.store.remove(job.id)
        with self._lock:
            self._unsaved.pop(job.id, None)
        if task is not None:
            self._leave(task, "cancelled")
            if won:
                self.meter.count("ended", "cancelled")
                self.hub.publish(Event("deleted", job.but(status="cancelled")))
        self.clerk.do(lambda: self.trajectories.remove(job.id))
        return won

    def _leave(self, task: Task, outcome: Status) -> None:
        with self._lock:
            task.outcome = task.outcome or outcome
            self._tasks.pop(task.job.id, None)
        self.left(task)

    def fail(self, task: Task, error: BaseException) -> None:
        """End a job with an error. Waits for the disk."""
        self.end(task, "failed", job_error(error))

    @contextmanager
    def failing(self, task: Task) -> Iterator[None]:
        """Whatever the block raises fails the job, and nothing else."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (the service outlives every job)
            self.fail(task, error)

    def save_unsaved(self) -> None:
        """Write ends that could not be written.

        Raises:
            StorageError: The disk still refuses.
        """
        with self._lock:
            unsaved = list(self._unsaved.values())
        for job in unsaved:
            self.store.finish(job)
            with self._lock:
                self._unsaved.pop(job.id, None)


DEADLINE = JobError("deadline_exceeded", "It was not completed before its deadline.")
INTERRUPTED = "The service ended {attempts} times while this job ran."


def job_error(error: BaseException) -> JobError:
    """Why a job failed, for its client."""
    if is_full(error):
        return JobError("disk_full", "The disk is full.")
    if isinstance(error, StorageError):
        return JobError(error.code, str(error))
    if isinstance(error, DeviceMemoryError | MemoryError):
        return JobError("out_of_memory", str(error) or "There was not enough memory.")
    for kind, code in ((BackendError, "backend_error"), (InputError, "invalid_request")):
        if isinstance(error, kind):
            return JobError(code, str(error))
    log.error("a job failed", exc_info=error)
    message = (
        str(error) if isinstance(error, ReelError) else "Something unexpected failed; the log says what."
    )
    return JobError("internal_error", message)
