"""How a service is set up: limits, times and sizes, checked once when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reelrt.errors import InputError


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """Options of `VideoService`. Times are seconds, sizes are bytes.

    Attributes:
        folder: Where jobs (`jobs.sqlite`) and results lie; made if missing. One service at a time.
        slots: Most videos in a batch; the engines' own maximum holds too.
        queue_size: Most jobs that wait, over all models.
        jobs_per_owner: Most jobs of one owner that wait or run; 0 is no limit.
        ageing: Seconds of waiting that a point of priority is worth.
        overtakes: How often a waiting job may be overtaken by later ones of the running batch's size.
        preview_every: Launches between two previews of a job that somebody watches; 0 makes none.
        retention: How long a job and its files are kept after it is over.
        quota: Most bytes of results.
        reserve: Bytes of the disk that stay free; a request is refused when fewer are.
        trajectory_bytes: Most bytes of trajectories kept for remixes; 0 keeps none.
        remix_points: Fractions of the schedule at which a trajectory is kept.
        attempts: How often a job is started before it fails as `interrupted`.
        threads: CPU threads of the engines; None takes one per physical core.
    """

    folder: Path
    slots: int = 4
    queue_size: int = 64
    jobs_per_owner: int = 16
    ageing: float = 30.0
    overtakes: int = 4
    preview_every: int = 5
    retention: float = 7 * 86400.0
    quota: int = 8 * 2**30
    reserve: int = 64 * 2**20
    trajectory_bytes: int = 256 * 2**20
    remix_points: tuple[float, ...] = (0.25, 0.5, 0.75)
    attempts: int = 3
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            InputError: A number out of its range; the message names it.
        """
        least = {"slots": 1, "queue_size": 1, "attempts": 1, "ageing": 0.001, "retention": 1, "quota": 1}
        for name in (
            *least,
            "jobs_per_owner",
            "overtakes",
            "preview_every",
            "reserve",
            "trajectory_bytes",
        ):
            if not getattr(self, name) >= least.get(name, 0):
                raise InputError(f"{name} {getattr(self, name)!r} is less than {least.get(name, 0)}.")
        if not all(0 < point < 1 for point in self.remix_points):
            raise InputError(f"remix_points {self.remix_points} are not all between 0 and 1.")
