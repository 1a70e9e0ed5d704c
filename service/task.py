"""A job that is not over: what the service knows of it beside what is stored."""

from __future__ import annotations

from dataclasses import dataclass, field

from reelrt.runtime import loop, request
from reelrt.service.jobs import Job, Status


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """All that a task needs to join the batch.

    Attributes:
        plan: The request as the runtime checked it.
        request: What the loop needs.
        cut: Words of the prompts that did not fit.
        reused: What caches saved.
        points: Launches done to step of the schedule, where its trajectory is kept.
    """

    plan: request.Job
    request: loop.Request
    cut: dict[str, str]
    reused: tuple[str, ...]
    points: dict[int, int]


@dataclass(slots=True, eq=False)
class Task:
    """A job on its way. Written by one thread at a time: whoever has it.

    Attributes:
        job: The job as it was accepted, or recovered.
        order: Where it belongs in the line: smaller is earlier.
        shape: Of its latents (C, F, h, w).
        launches: Launches it takes.
        alone: Whether it runs without others: it was in a batch that failed.
        overtaken: How often others were before it that came after it.
        prepared: What it needs to join the batch, once that is there.
        preparing: Whether somebody sees to that, or has done.
        outcome: How it ended, once it has; whoever has it lets go of it.
        done: Launches it has seen.
        timings: Seconds of the stages so far.
        started_at: When it joined the batch, in seconds since 1970.
        joined: The same by `time.perf_counter`.
        expires: When its deadline is, in seconds since 1970; None is never.
    """

    job: Job
    order: tuple[float, int]
    shape: tuple[int, int, int, int]
    launches: int
    alone: bool = False
    overtaken: int = 0
    prepared: Prepared | None = None
    preparing: bool = False
    outcome: Status | None = None
    done: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    started_at: float | None = None
    joined: float = 0.0
    expires: float | None = None

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.outcome is not None

    @property
    def progress(self) -> int:
        """Percent of launches done; 100 is for what is completed."""
        return min(99, 100 * self.done // max(self.launches, 1))

    def put_back(self) -> None:
        """Forget that it was started."""
        self.done, self.started_at = 0, None
