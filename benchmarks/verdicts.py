"""The arithmetic of the load test: percentiles, growth, and whether a goal is reached. Measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PERCENTS = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Goal:
    """A value and the most it may be.

    Attributes:
        name: What it is.
        value: What was measured.
        most: The largest value that reaches the goal; a `strict` goal is missed by that one, too.
        unit: Of both; "" for a ratio.
    """

    name: str
    value: float
    most: float
    unit: str = ""
    strict: bool = False

    @property
    def reached(self) -> bool:
        """Whether it is; a value that is no number reaches nothing."""
        return self.value < self.most if self.strict else self.value <= self.most


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Number, median, p95, p99 and largest, in milliseconds.

    A percentile is a value that was measured, the least that so many percent do not exceed: of few values
    p99 is the largest.

    Raises:
        ValueError: There are none.
    """
    if not seconds:
        raise ValueError("nothing was measured")
    found = np.percentile(seconds, PERCENTS, method="inverted_cdf")
    told = {f"p{percent}_ms": float(value) for percent, value in zip(PERCENTS, found, strict=True)}
    return {
        "count": len(seconds),
        **{name: round(1000 * value, 2) for name, value in told.items()},
        "max_ms": round(1000 * max(seconds), 2),
    }


def per_minute(videos: int, seconds: float) -> float:
    """Videos per minute."""
    return 60 * videos / seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over median."""
    return statistics.median(ours) / statistics.median(theirs)


@dataclass(frozen=True, slots=True)
class Growth:
    """How a size grew over jobs.

    Attributes:
        first: Median of the first tenth, in bytes.
        last: Median of the last tenth, in bytes.
        per_job: Slope of the line of least squares over the second half, in bytes per job.
    """

    first: float
    last: float
    per_job: float


def growth(jobs: Sequence[int], sizes: Sequence[float]) -> Growth:
    """How a size grew.

    Args:
        jobs: How many jobs were done at each sample, ascending.
        sizes: The size then, in bytes.

    Raises:
        ValueError: Fewer than four samples.
    """
    if len(sizes) < 4:  # a line through the second half takes two
        raise ValueError(f"{len(sizes)} samples are too few")
    tenth, half = max(1, len(sizes) // 10), len(sizes) // 2
    slope = np.polyfit(jobs[half:], sizes[half:], 1)[0]
    return Growth(statistics.median(sizes[:tenth]), statistics.median(sizes[-tenth:]), float(slope))


@dataclass(frozen=True, slots=True)
class Costs:
    """What the engines take without a service.

    Attributes:
        cores: Cores of the machine that this process may use.
        launches: Launches of a video.
        video: Seconds of a video alone, and the seconds of processors in it.
        one: The same of a launch with one video in the batch.
        full: The same of a launch with a full batch.
        batch: Videos of that one.
    """

    cores: int
    launches: int
    video: tuple[float, float]
    one: tuple[float, float]
    full: tuple[float, float]
    batch: int

    @property
    def busy(self) -> float:
        """Share of the cores that a video alone keeps busy."""
        return self.video[1] / (self.video[0] * self.cores)

    @property
    def launch_gain(self) -> float:
        """How many times cheaper a launch is per video in a full batch."""
        return self.one[0] * self.batch / self.full[0]

    @property
    def bound(self) -> float:
        """Most times faster that any order of the work makes videos than one after the other does.

        Nothing is faster than all cores busy: the processors' seconds of a video whose launches come from
        full batches, parted among the cores.
        """
        batched = self.video[1] - self.launches * (self.one[1] - self.full[1] / self.batch)
        return self.video[0] * self.cores / batched
