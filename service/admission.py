"""How a request becomes a job: checked, completed, and on the disk before anybody is told so.

One at a time, so that limits and keys hold however many clients ask at once. Knows the caches that
make a job cheaper: named latents, whole results, and trajectories for remixes.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

from reelrt.errors import (
    ConflictError,
    InputError,
    JobLimitError,
    NotFoundError,
    QueueFullError,
    StorageError,
)
from reelrt.runtime.noise import draw_seed
from reelrt.runtime.request import Job as Plan
from reelrt.service import requests
from reelrt.service.board import Board
from reelrt.service.jobs import Event, Job, Remix, VideoRequest, new_id
from reelrt.service.options import ServiceOptions
from reelrt.service.results import Results
from reelrt.service.task import Task
from reelrt.service.worker import Worker

LONGEST_KEY = 255


class Admission:
    """What accepts requests.

    Args:
        board: The live tasks.
        results: Finished files.
        workers: Model name to its worker; the first is the default.
        options: Limits.
    """

    def __init__(
        self, board: Board, results: Results, workers: Mapping[str, Worker], options: ServiceOptions
    ) -> None:
        self._board, self._store, self._results = board, board.store, results
        self._workers, self._options = workers, options
        self._order = itertools.count()
        self.lock = threading.Lock()

    def submit(self, request: VideoRequest | Remix, owner: str, key: str | None) -> Job:
        """Accept a request; see `VideoService.submit`. Its caller holds `lock`."""
        if isinstance(request, VideoRequest):
            requests.check(request)
        if key is not None and not (isinstance(key, str) and 0 < len(key) <= LONGEST_KEY):
            raise InputError(f"an idempotency key has 1 to {LONGEST_KEY} letters, not {len(key)}.")
        asked = requests.asked(request)
        if key is not None and (known := self._store.by_key(owner, key)) is not None:
            job, before = known
            if before != asked:
                raise ConflictError(
                    f"the idempotency key {key!r} was used for another request.", "Take a new key."
                )
            return self._board.job(job.id) or job
        if isinstance(request, Remix):
            request = request.request(self._own(request.of, owner).request)
            requests.check(request)
        parent = self._parent(request, owner)
        if parent is not None:
            request = requests.remixed(replace(request, model=parent.request.model), parent.request)
        worker = self._worker(request.model)
        request, reused = self._named(request, owner)
        complete, plan = requests.resolve(request, worker.name, worker.pipe)
        before = "" if parent is None else self._store.fingerprint(parent.id)
        fingerprint = requests.fingerprint(complete, worker.pipe.engines, before)
        job = Job(new_id(), owner, complete, created_at=time.time(), reused=reused)
        finished = self._finished(job, fingerprint, asked, key)
        if finished is None:
            self._check_room(owner, worker)
            self._write(job, parent, fingerprint, asked, key)
            self._board.meter.count("submitted")
            self.enqueue(job, worker, plan)
            finished = self._board.job(job.id) or job
        return finished

    def enqueue(self, job: Job, worker: Worker, plan: Plan) -> None:
        """Let an accepted job wait for its turn."""
        request, rows = job.request, requests.rows_per_step(plan)
        skipped = 0 if request.remix_from is None else requests.point_step(request.remix_from, plan.steps)
        task = Task(
            job,
            order=(job.created_at - request.priority * self._options.ageing, next(self._order)),
            shape=plan.shape,
            launches=len(plan.table) - skipped * rows,
            alone=job.attempts > 1,  # it may be what ended the service twice
            expires=None if request.deadline is None else job.created_at + request.deadline,
        )
        self._board.add(task)
        worker.add(task)

    def _worker(self, name: str | None) -> Worker:
        worker = next(iter(self._workers.values())) if name is None else self._workers.get(name)
        if worker is None:
            raise NotFoundError(f"there is no model {name!r}.", f"There is {', '.join(self._workers)}.")
        return worker

    def _own(self, job_id: str, owner: str) -> Job:
        """A job of an owner that shall be varied."""
        job = self._board.job(job_id)
        if job is None or job.owner != owner:
            raise NotFoundError(f"there is no job {job_id!r:.100} to remix.")
        return job

    def _parent(self, request: VideoRequest, owner: str) -> Job | None:
        """The job that a remix varies."""
        if request.remix_of is None:
            return None
        parent = self._own(request.remix_of, owner)
        if parent.status != "completed":
            raise ConflictError(f"{parent.id} is {parent.status}; only a completed job can be remixed.")
        if request.model not in (None, parent.request.model):
            raise InputError(f"{parent.id} was made by {parent.request.model!r}, not {request.model!r}.")
        if request.remix_from is not None and not 0 < request.remix_from < 1:
            raise InputError(f"remix_from {request.remix_from!r} is not between 0 and 1.")
        return parent

    def _named(self, request: VideoRequest, owner: str) -> tuple[VideoRequest, tuple[str, ...]]:
        """The request with the seed that its name for starting noise stands for."""
        if request.latents is None:
            return request, ()
        seed = self._store.named_seed(owner, request.latents)
        self._board.meter.count("miss" if seed is None else "hit", "latents")
        if seed is None:
            return replace(request, seed=draw_seed() if request.seed is None else request.seed), ()
        if request.seed not in (None, seed):
            raise ConflictError(
                f"the latents {request.latents!r} are those of seed {seed}, not {request.seed}.",
                "Leave the seed out, or take another name.",
            )
        return replace(request, seed=seed), ("latents",)

    def _finished(self, job: Job, fingerprint: str, asked: str, key: str | None) -> Job | None:
        """The job, completed with the files of an earlier one of the same request, if there is one."""
        same = self._store.with_result(job.owner, fingerprint)
        files = None
        if same is not None:
            try:
                files = self._results.copy(job.id, same.id)
            except FileNotFoundError:  # it is being deleted
                files = None
        if same is None or files != same.files:
            self._results.remove(job.id)
            self._board.meter.count("miss", "result")
            return None
        now = time.time()
        done = job.but(
            status="completed",
            progress=100,
            started_at=now,
            completed_at=now,
            expires_at=now + self._options.retention,
            reused=(*job.reused, "result"),
            files=files,
        )
        try:
            self._store.add(done, fingerprint, asked, key)
        except StorageError:
            self._results.remove(job.id)
            raise
        self._board.meter.count("hit", "result")
        self._board.meter.count("submitted")
        self._board.meter.count("ended", "completed")
        self._board.hub.publish(Event("completed", done))
        return done

    def _check_room(self, owner: str, worker: Worker) -> None:
        waiting = sum(each.waiting for each in self._workers.values())
        if waiting >= self._options.queue_size:
            raise QueueFullError(
                f"the queue is full: {waiting} jobs wait.", max(1.0, worker.seconds_to_next())
            )
        most = self._options.jobs_per_owner
        if most and (own := sum(task.job.owner == owner for task in self._board.tasks())) >= most:
            raise JobLimitError(f"{own} jobs of this key wait or run.", max(1.0, worker.seconds_to_next()))
        self._results.check_room()

    def _write(self, job: Job, parent: Job | None, fingerprint: str, asked: str, key: str | None) -> None:
        """Put a job on the disk, with what it needs."""
        trajectories = self._board.trajectories
        if parent is not None:
            steps, point = job.request.steps, job.request.remix_from
            assert steps is not None
            assert point is not None
            given = trajectories.give(parent.id, requests.point_step(point, steps), job.id)
            self._board.meter.count("hit" if given else "miss", "trajectory")
            if not given:
                kept = ", ".join(f"{step / steps:.3g}" for step in trajectories.steps(parent.id))
                raise ConflictError(
                    f"{parent.id} has no state at {point:g} of its schedule.",
                    f"It has some at {kept}." if kept else "It has none any more; submit it anew.",
                )
        try:
            self._store.add(job, fingerprint, asked, key)
        except StorageError:
            trajectories.forget_input(job.id)
            raise
