"""What a service has measured: plain numbers, for any kind of monitoring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Histogram:
    """Durations that were measured: how many were up to each bound, in seconds.

    Attributes:
        bounds: Upper bounds in seconds, ascending, without infinity.
        counts: How many were at most each bound, cumulative; then all.
        total: Sum of all, in seconds.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the service has measured, at one moment.

    Attributes:
        ready: Whether it takes requests.
        waiting: Model to the number of jobs that wait.
        running: Model to the number of jobs in the batch.
        finishing: Jobs that are decoded or written to a file.
        step_seconds: Model to durations of launches.
        batch_sizes: Model to batch size to the number of launches.
        stage_seconds: Stage (`queue`, `text`, `denoise`, `decode`, `encode`) to durations.
        submitted: Jobs accepted since the start.
        ended: Status to jobs that ended so since the start.
        rejected: Reason (`queue_full`, `owner_limit`, `invalid`, `conflict`, `not_found`, `storage`,
            `stopping`) to requests refused since the start.
        cache_hits: Cache (`prompt`, `latents`, `trajectory`, `result`) to hits since the start.
        cache_misses: The same to misses.
        watchers: Open subscriptions.
        results_bytes: Size of the results.
        quota_bytes: What they may have.
        trajectory_bytes: Size of the stored trajectories.
        free_bytes: Free bytes of the disk.
        memory_bytes: Resident size of the process; 0 where the system does not say.
        peak_memory_bytes: Its largest so far.
        started_at: When the service started, in seconds since 1970.
    """

    ready: bool
    waiting: Mapping[str, int]
    running: Mapping[str, int]
    finishing: int
    step_seconds: Mapping[str, Histogram]
    batch_sizes: Mapping[str, Mapping[int, int]]
    stage_seconds: Mapping[str, Histogram]
    submitted: int
    ended: Mapping[str, int]
    rejected: Mapping[str, int]
    cache_hits: Mapping[str, int]
    cache_misses: Mapping[str, int]
    watchers: int
    results_bytes: int
    quota_bytes: int
    trajectory_bytes: int
    free_bytes: int
    memory_bytes: int
    peak_memory_bytes: int
    started_at: float


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the service lives and takes requests.

    Attributes:
        alive: Every engine thread is running.
        ready: It takes requests.
        reason: Why it does not, or "".
    """

    alive: bool
    ready: bool
    reason: str = ""
