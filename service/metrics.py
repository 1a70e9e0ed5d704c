"""What the service has measured, as Prometheus reads it.

Counts nothing of jobs itself: the job service's figures are taken at each scrape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client import Histogram as Buckets
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from reelrt.service.figures import Figures, Histogram
from reelrt.service.jobservice import VideoService

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
THERMAL = Path("/sys/class/thermal")
GAPS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Seconds between two beats of the event loop, which is due every 0.005."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The registry of one service.

    Attributes:
        requests: HTTP requests by method and status.
        streams_refused: Event streams that were one too many.

    Args:
        service: Whose figures.
    """

    def __init__(self, service: VideoService) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self.requests = Counter(
            "reelrt_http_requests", "HTTP requests answered.", ["method", "status"], registry=self._registry
        )
        self.streams_refused = Counter(
            "reelrt_event_streams_refused", "Event streams that were one too many.", registry=self._registry
        )
        text = "From one beat of the event loop to the next; one is due every 0.005 s."
        self._gaps = Buckets("reelrt_event_loop_gap_seconds", text, buckets=GAPS, registry=self._registry)
        self._longest = 0.0
        longest = Gauge(
            "reelrt_event_loop_longest_gap_seconds", "The longest of them so far.", registry=self._registry
        )
        longest.set_function(lambda: self._longest)
        ProcessCollector(registry=self._registry)
        self._registry.register(_Figures(service))

    def count(self, method: str, status: int) -> None:
        """One more request; methods that nobody knows are counted as one, lest a client makes up labels."""
        self.requests.labels(method if method in METHODS else "other", str(status)).inc()

    def beat(self, seconds: float) -> None:
        """The event loop has come round again after so long; on its thread only."""
        self._gaps.observe(seconds)
        self._longest = max(self._longest, seconds)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Figures(Collector):
    def __init__(self, service: VideoService) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        figures = self._service.figures()
        yield from _gauges(figures)
        yield from _counters(figures)
        yield _durations("reelrt_step_seconds", "Launches of the step engine.", "model", figures.step_seconds)
        yield _durations("reelrt_stage_seconds", "Stages of a job.", "stage", figures.stage_seconds)
        yield _temperatures()


def _gauges(figures: Figures) -> Iterator[Metric]:
    plain = {
        "reelrt_ready": ("Whether jobs are taken.", float(figures.ready)),
        "reelrt_jobs_finishing": ("Jobs being decoded or written to a file.", figures.finishing),
        "reelrt_watchers": ("Open event streams.", figures.watchers),
        "reelrt_results_bytes": ("Size of the results.", figures.results_bytes),
        "reelrt_results_quota_bytes": ("What the results may have.", figures.quota_bytes),
        "reelrt_trajectory_bytes": ("Size of the trajectories kept for remixes.", figures.trajectory_bytes),
        "reelrt_disk_free_bytes": ("Free bytes of the results' disk.", figures.free_bytes),
        "reelrt_memory_bytes": ("Resident size of the process.", figures.memory_bytes),
        "reelrt_memory_peak_bytes": ("Its largest so far.", figures.peak_memory_bytes),
        "reelrt_started_seconds": ("When the service started, Unix seconds.", figures.started_at),
    }
    for name, (text, value) in plain.items():
        yield GaugeMetricFamily(name, text, value=value)
    yield _labelled(
        GaugeMetricFamily("reelrt_jobs_waiting", "Jobs that wait.", labels=["model"]), figures.waiting
    )
    yield _labelled(
        GaugeMetricFamily("reelrt_jobs_running", "Jobs in the batch.", labels=["model"]), figures.running
    )


def _counters(figures: Figures) -> Iterator[Metric]:
    yield CounterMetricFamily("reelrt_jobs_submitted", "Jobs accepted.", value=figures.submitted)
    each = (
        ("reelrt_jobs_ended", "Jobs that are over, by their status.", "status", figures.ended),
        ("reelrt_jobs_rejected", "Jobs that were refused, by the reason.", "reason", figures.rejected),
        ("reelrt_cache_hits", "What a cache held.", "cache", figures.cache_hits),
        ("reelrt_cache_misses", "What a cache did not hold.", "cache", figures.cache_misses),
    )
    for name, text, label, values in each:
        yield _labelled(CounterMetricFamily(name, text, labels=[label]), values)
    launches = CounterMetricFamily(
        "reelrt_launches", "Launches of the step engine, by the videos in them.", labels=["model", "batch"]
    )
    for model, sizes in figures.batch_sizes.items():
        for size, count in sizes.items():
            launches.add_metric([model, str(size)], count)
    yield launches


def _labelled(
    family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, int]
) -> GaugeMetricFamily | CounterMetricFamily:
    for label, value in values.items():
        family.add_metric([label], value)
    return family


def _durations(name: str, text: str, label: str, each: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=[label])
    for value, histogram in each.items():
        bounds = [*map(str, histogram.bounds), "+Inf"]
        family.add_metric([value], list(zip(bounds, histogram.counts, strict=True)), histogram.total)
    return family


def _temperatures() -> Metric:
    """Degrees of every thermal zone that the kernel shows; none in most containers."""
    family = GaugeMetricFamily("reelrt_temperature_celsius", "Temperature of the device.", labels=["zone"])
    for zone in sorted(THERMAL.glob("thermal_zone*")):
        with suppress(OSError, ValueError):
            degrees = int((zone / "temp").read_text()) / 1000
            family.add_metric([(zone / "type").read_text().strip()], degrees)
    return family
