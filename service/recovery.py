"""What is done when a service starts on a folder that another one has left, however that ended."""

from __future__ import annotations

import time
from collections.abc import Collection

from reelrt.service.board import INTERRUPTED
from reelrt.service.jobs import Job, JobError
from reelrt.service.results import Results
from reelrt.service.store import JobStore
from reelrt.service.trajectories import Trajectories

LOST = JobError("file_lost", "Its file is not there any more.")


def recover(
    store: JobStore,
    results: Results,
    trajectories: Trajectories,
    *,
    models: Collection[str],
    attempts: int,
    retention: float,
) -> list[Job]:
    """Make store and files agree.

    A job that was not over is started again, unless it has been started too often or its model is not
    there any more: then it fails. Files that belong to no completed job go, and so does what is
    half-written.

    Args:
        store: The jobs.
        results: Their files.
        trajectories: States for remixes.
        models: The models' names.
        attempts: How often a job may have been started.
        retention: Seconds for which failed jobs are kept.

    Returns:
        The jobs that have to be done, in order of submission.
    """
    completed = store.completed()
    for job_id, files in completed.items():
        if results.files(job_id) != files:
            store.lost(job_id, LOST)
    waiting = []
    for job in store.live():
        error = _hopeless(job, models, attempts)
        if error is None:
            store.wait_again(job.id)
            waiting.append(job.but(status="queued", started_at=None))
        else:
            store.finish(ended(job, error, retention))
    kept = store.completed()
    results.keep_only(kept)
    trajectories.keep_only(kept, [job.id for job in waiting])
    return waiting


def _hopeless(job: Job, models: Collection[str], attempts: int) -> JobError | None:
    if job.request.model not in models:
        return JobError("model_gone", f"The model {job.request.model!r} is not there any more.")
    if job.status == "in_progress" and job.attempts >= attempts:
        return JobError("interrupted", INTERRUPTED.format(attempts=job.attempts))
    return None


def ended(job: Job, error: JobError, retention: float) -> Job:
    """A job that failed now, without a file."""
    now = time.time()
    return job.but(status="failed", error=error, completed_at=now, expires_at=now + retention)
