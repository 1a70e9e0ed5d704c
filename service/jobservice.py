"""The service behind the doors: takes requests, keeps jobs, tells how they are.

HTTP, gRPC and the command line all talk to `VideoService`; none of them is known here.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from reelrt.errors import (
    ConflictError,
    InputError,
    JobLimitError,
    NotFoundError,
    QueueFullError,
    ReelError,
    StoppingError,
    StorageError,
)
from reelrt.runtime.memory import peak_memory, resident_memory
from reelrt.runtime.pipeline import TextToVideo, load
from reelrt.service import requests
from reelrt.service.admission import Admission
from reelrt.service.board import DEADLINE, Board, job_error
from reelrt.service.catalogue import ModelInfo, describe
from reelrt.service.disk import unusable
from reelrt.service.events import Hub, Subscription
from reelrt.service.figures import Figures, Health
from reelrt.service.finisher import Finisher
from reelrt.service.jobs import VARIANTS, Event, Job, Remix, Variant, VideoRequest
from reelrt.service.lock import FolderLock
from reelrt.service.meter import Meter
from reelrt.service.options import ServiceOptions
from reelrt.service.recovery import ended, recover
from reelrt.service.results import Results
from reelrt.service.store import JobStore
from reelrt.service.task import Task
from reelrt.service.trajectories import Trajectories
from reelrt.service.worker import Worker

log = logging.getLogger("reelrt")

TICK = 0.5
"""Seconds between two looks at deadlines and at what has expired."""
MOST_LISTED = 100
FINISHING_PER_SLOT = 2
"""Videos that may be decoded or written, per slot, before no further one is started."""

REASONS: tuple[tuple[type[ReelError], str], ...] = (
    (JobLimitError, "owner_limit"),
    (QueueFullError, "queue_full"),
    (StoppingError, "stopping"),
    (StorageError, "storage"),
    (ConflictError, "conflict"),
    (NotFoundError, "not_found"),
    (InputError, "invalid"),
)
"""Why a request was refused, as the figures call it."""


class VideoService:
    """Jobs from their submission to their files.

    All methods may be called from any thread. Those that write (`submit`, `cancel`, `delete`) wait
    for the disk, some milliseconds: call them outside of an event loop. Ids of others' jobs are as
    unknown as ids that never were.

    Args:
        pipelines: Model name to its pipeline, the default first; the service is their only user.
        options: How it is set up.

    Raises:
        StorageError: Another service uses the folder, or it cannot be written.
    """

    def __init__(self, pipelines: Mapping[str, TextToVideo], options: ServiceOptions) -> None:
        self._options, self._began = options, time.time()
        self._stopping, self._closed = False, threading.Event()
        self._lock = FolderLock(options.folder)
        try:
            self._store = JobStore(options.folder / "jobs.sqlite")
            self._results = Results(options.folder, options.quota, options.reserve)
            self._trajectories = Trajectories(options.folder, options.trajectory_bytes)
            waiting = recover(
                self._store,
                self._results,
                self._trajectories,
                models=pipelines,
                attempts=options.attempts,
                retention=options.retention,
            )
        except BaseException as error:
            self._lock.release()
            if isinstance(error, StorageError) and (found := unusable(options.folder, error)) is not error:
                raise found from error
            raise
        self._hub, self._meter = Hub(), Meter()
        self._board = Board(self._store, self._trajectories, self._hub, self._meter, options.retention)
        self._finisher = Finisher(self._board, self._results)
        self._workers = {
            name: Worker(
                name,
                pipe,
                self._board,
                options,
                finish=self._finisher.take,
                congested=lambda worker: (
                    self._finisher.pending_of(worker) >= FINISHING_PER_SLOT * worker.slots
                ),
                show=self._finisher.show,
            )
            for name, pipe in pipelines.items()
        }
        self._admission = Admission(self._board, self._results, self._workers, options)
        self._board.left = lambda task: self._worker_of(task).forget(task)
        self._board.position = lambda task: self._worker_of(task).position(task)
        self._resume(waiting)
        for worker in self._workers.values():
            worker.start()
        self._sweeper = threading.Thread(target=self._sweep, name="reelrt-sweeper", daemon=True)
        self._sweeper.start()

    def _worker_of(self, task: Task) -> Worker:
        assert task.job.request.model is not None
        return self._workers[task.job.request.model]

    def _resume(self, waiting: Sequence[Job]) -> None:
        """Let the jobs of an earlier service wait again."""
        for job in waiting:
            assert job.request.model is not None
            worker = self._workers[job.request.model]
            try:
                plan = requests.replan(job.request, worker.pipe)
            except InputError as error:  # the engines are others now
                self._store.finish(ended(job, job_error(error), self._options.retention))
                continue
            self._admission.enqueue(job, worker, plan)

    def submit(
        self, request: VideoRequest | Remix, owner: str = "", idempotency_key: str | None = None
    ) -> Job:
        """Accept a request. When this returns, the job survives whatever happens to the process.

        Args:
            request: What is asked for.
            owner: Whose job it is; "" without keys.
            idempotency_key: Up to 255 characters. The same key and request of the same owner answer the
                same job, as it is then, for as long as that job is kept (whatever became of its parent).

        Returns:
            The job; completed already when its very request was answered before.

        Raises:
            InputError: A value that is not possible (RangeError: not with this model).
            NotFoundError: No such model or job to remix.
            ConflictError: The idempotency key was used for another request, the name of latents for
                another seed, or the job to remix is not completed or has no such state any more.
            QueueFullError: The queue is full (JobLimitError: this owner's share); with `retry_after`.
            StorageError: The disk or the quota is full.
            StoppingError: The service is stopping.
        """
        with self._counting_refusals(), self._admission.lock:
            if self._stopping:
                raise StoppingError("the service is stopping.", "Try again when it is back.")
            return self._admission.submit(request, owner, idempotency_key)

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except ReelError as error:
            reason = next((name for kind, name in REASONS if isinstance(error, kind)), "other")
            self._meter.count("rejected", reason)
            raise

    def get(self, job_id: str, owner: str = "") -> Job:
        """A job as it is now.

        Raises:
            NotFoundError: No such job of this owner.
        """
        job = self._board.job(job_id)
        if job is None or job.owner != owner:
            raise NotFoundError(f"there is no job {job_id!r:.100}.")
        return job

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
        if not 1 <= limit <= MOST_LISTED:
            raise InputError(f"limit {limit} is not possible: give a number from 1 to {MOST_LISTED}.")
        if order not in ("asc", "desc"):
            raise InputError(f"order {order!r} is not possible: give asc or desc.")
        found = self._store.page(owner, after, limit + 1, order == "desc")
        if found is None:
            raise NotFoundError(f"there is no job {after!r:.100}.")
        jobs = [self._board.job(job.id) or job if job.live else job for job in found[:limit]]
        return jobs, len(found) > limit

    def cancel(self, job_id: str, owner: str = "") -> Job:
        """Stop a job; it leaves the batch before the next launch. One that is over stays as it is.

        Raises:
            NotFoundError: No such job of this owner.
            StorageError: It could not be written down; the job goes on.
        """
        job = self.get(job_id, owner)
        task = self._board.task(job_id)
        if task is None:
            return job
        self._board.end(task, "cancelled")
        return self.get(job_id, owner)

    def delete(self, job_id: str, owner: str = "") -> None:
        """Cancel a job if it is not over, and remove it with its files.

        Raises:
            NotFoundError: No such job of this owner.
            StorageError: It could not be written down; a full disk has lost the job's files all the same.
        """
        if not self._remove(self.get(job_id, owner)):
            raise NotFoundError(f"there is no job {job_id!r:.100}.")

    def _remove(self, job: Job) -> bool:
        try:
            removed = self._board.remove(job)
        except StorageError as error:
            if error.code != "disk_full" or self._board.task(job.id) is not None:
                raise
            self._results.remove(job.id)  # they make the room to write down that they are gone
            self._trajectories.remove(job.id)
            removed = self._board.remove(job)
        self._results.remove(job.id)
        return removed

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
        self.get(job_id, owner)
        subscription = self._hub.subscribe(job_id, notify, previews)
        try:
            job = self.get(job_id, owner)  # again: it may have ended in between
        except NotFoundError:
            subscription.close()
            raise
        subscription.begin(Event("progress" if job.status == "in_progress" else job.status, job))
        return subscription

    def file(self, job_id: str, owner: str = "", variant: Variant = "video") -> Path:
        """A file of a completed job, whole. The path is for reading only, and goes with the job.

        Raises:
            InputError: No such variant.
            NotFoundError: No such job of this owner.
            ConflictError: The job is not completed.
        """
        if variant not in VARIANTS:
            raise InputError(f"variant {variant!r} is not known: give one of {', '.join(VARIANTS)}.")
        job = self.get(job_id, owner)
        if job.status != "completed":
            raise ConflictError(f"{job.id} is {job.status}; it has no files.")
        path = self._results.path(job.id, variant)
        if path is None:
            raise NotFoundError(f"there is no {variant} of {job.id} any more.")
        return path

    def models(self) -> Sequence[ModelInfo]:
        """The models it runs; the first is the default."""
        return [describe(name, each.pipe, each.slots, self._began) for name, each in self._workers.items()]

    @property
    def alive(self) -> bool:
        """Whether every engine's thread runs. Never waits."""
        return all(worker.alive for worker in self._workers.values())

    def health(self) -> Health:
        """Whether it lives and takes requests."""
        alive = self.alive
        if not alive or self._stopping:
            return Health(alive, False, "it is stopping" if self._stopping else "an engine thread ended")
        try:
            self._results.check_room()
        except StorageError as error:
            return Health(alive, False, str(error))
        return Health(alive, True)

    def figures(self) -> Figures:
        """What it has measured."""
        return Figures(
            ready=self.health().ready,
            waiting={name: worker.waiting for name, worker in self._workers.items()},
            running={name: worker.running for name, worker in self._workers.items()},
            finishing=self._finisher.pending,
            step_seconds=self._meter.histograms("step"),
            batch_sizes=self._meter.batches(),
            stage_seconds=self._meter.histograms("stage"),
            submitted=self._meter.counted("submitted").get("", 0),
            ended=self._meter.counted("ended"),
            rejected=self._meter.counted("rejected"),
            cache_hits=self._meter.counted("hit"),
            cache_misses=self._meter.counted("miss"),
            watchers=len(self._hub),
            results_bytes=self._results.bytes,
            quota_bytes=self._results.quota,
            trajectory_bytes=self._trajectories.bytes,
            free_bytes=self._results.free,
            memory_bytes=resident_memory(),
            peak_memory_bytes=peak_memory(),
            started_at=self._began,
        )

    def drain(self, grace: float = 30.0) -> None:
        """Take no more requests, and wait until running jobs are over.

        Args:
            grace: Seconds to wait. `close` puts those that still run back into the queue; waiting jobs
                stay in it. All of them go on at the next start.
        """
        with self._admission.lock:
            self._stopping = True
        for worker in self._workers.values():
            worker.pause()
        end = time.monotonic() + grace
        while time.monotonic() < end and (
            self._finisher.pending or any(worker.running for worker in self._workers.values())
        ):
            time.sleep(0.02)

    def close(self) -> None:
        """Put running jobs back, end all threads and let go of the folder. May be called twice."""
        if self._closed.is_set():
            return
        self.drain(0)
        self._closed.set()
        self._sweeper.join()
        for worker in self._workers.values():
            worker.stop()
        self._finisher.close()
        for task in self._board.tasks():
            if task.started_at is not None:
                self._board.put_back(task)
        self._hub.close()
        self._board.clerk.close()
        self._store.close()
        self._lock.release()

    def _sweep(self) -> None:
        """See to deadlines of waiting jobs, to what has expired, and to ends that were not written."""
        while not self._closed.wait(TICK):
            now = time.time()
            try:
                for worker in self._workers.values():
                    for task in worker.overdue(now):
                        self._board.end(task, "failed", DEADLINE)
                self._board.save_unsaved()
                for job_id in self._store.expired(now):
                    if (job := self._store.get(job_id)) is not None:
                        self._remove(job)
            except StorageError as error:
                log.warning("the sweeper waits: %s", error)
            except Exception:  # deadlines go on
                log.exception("the sweeper failed")

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
        InputError: No engine set was given.
        ReelError: See `reelrt.load`.
        StorageError: See `VideoService`.
    """
    if not engines:
        raise InputError("no engine set was given.")
    pipelines: dict[str, TextToVideo] = {}
    for folder in engines:
        pipe = load(folder, threads=options.threads, check=check)
        name = pipe.engines.pipeline.model.name
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        pipelines[next(each for each in names if each not in pipelines)] = pipe
    return VideoService(pipelines, options)
