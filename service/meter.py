"""Counting and timing: what `figures.Figures` is made of. Any thread may count; nobody waits long."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping

from reelrt.service.figures import Histogram

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
"""Seconds."""
RECENT = 0.1
"""Weight of a new duration in the recent mean."""


class _Durations:
    def __init__(self) -> None:
        self.counts, self.total, self.recent = [0] * (len(BOUNDS) + 1), 0.0, 0.0

    def add(self, seconds: float) -> None:
        self.recent = seconds if not self.total else self.recent + RECENT * (seconds - self.recent)
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def histogram(self) -> Histogram:
        sums = [sum(self.counts[: end + 1]) for end in range(len(self.counts))]
        return Histogram(BOUNDS, tuple(sums), self.total)


class Meter:
    """Everything that is counted since the start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._batches: dict[str, Counter[int]] = defaultdict(Counter)
        self._durations: dict[str, dict[str, _Durations]] = defaultdict(lambda: defaultdict(_Durations))

    def count(self, what: str, which: str = "", number: int = 1) -> None:
        """So many more: `("rejected", "queue_full")`, say."""
        with self._lock:
            self._counts[what][which] += number

    def launched(self, model: str, batch: int, seconds: float) -> None:
        """The step engine ran."""
        with self._lock:
            self._batches[model][batch] += 1
            self._durations["step"][model].add(seconds)

    def stage(self, stage: str, seconds: float) -> None:
        """A job is through a stage."""
        with self._lock:
            self._durations["stage"][stage].add(seconds)

    def counted(self, what: str) -> dict[str, int]:
        """How many, by which."""
        with self._lock:
            return dict(self._counts[what])

    def batches(self) -> dict[str, Mapping[int, int]]:
        """Model to batch size to launches."""
        with self._lock:
            return {model: dict(sizes) for model, sizes in self._batches.items()}

    def histograms(self, what: str) -> dict[str, Histogram]:
        """Durations of `step` by model, or of `stage` by stage."""
        with self._lock:
            return {which: found.histogram() for which, found in self._durations[what].items()}

    def recent(self, model: str) -> float | None:
        """Seconds of a launch lately; None before the first."""
        with self._lock:
            found = self._durations["step"].get(model)
            return None if found is None else found.recent
