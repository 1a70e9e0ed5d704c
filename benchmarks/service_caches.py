"""What each cache of the job service saves, on real engines.

    python -m benchmarks.service_caches ENGINES

Every round submits the same kinds of job one after the other, alone, and takes the seconds from submission
to completion, the processors' seconds of this process (other work on the machine changes them less), and the
launches of the step engine. Medians over the rounds, the spread, and the share of a job that nothing is
known of. A new seed is expected to save the text encoder and no more. The last line on stdout is JSON; a
full run also writes it to `benchmarks/results/service-caches.json`. Exit code 1 when a remix takes another
number of launches than its share, or a repeated request takes any.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.verdicts import ratio
from reelrt.service.jobs import Job, VideoRequest
from reelrt.service.jobservice import VideoService, open_service
from reelrt.service.options import ServiceOptions

ROUNDS, STEPS = 7, 20
POINTS = (0.25, 0.5, 0.75)
RESULT = Path(__file__).parent / "results" / "service-caches.json"


def launches(service: VideoService) -> int:
    """Launches of the step engine so far."""
    return sum(sum(sizes.values()) for sizes in service.figures().batch_sizes.values())


@dataclass(frozen=True, slots=True)
class Cost:
    """What a job took: seconds, the processors' seconds, launches."""

    seconds: float
    cpu: float
    launches: int


def run(service: VideoService, request: VideoRequest) -> tuple[Job, Cost]:
    """A job from its submission to its end."""
    before, busy, began = launches(service), time.process_time(), time.perf_counter()
    job = service.submit(request)
    with service.watch(job.id, previews=False) as subscription:
        while not any(event.last for event in subscription.wait()):
            pass
    seconds, cpu = time.perf_counter() - began, time.process_time() - busy
    job = service.get(job.id)
    assert job.status == "completed", job.error
    return job, Cost(seconds, cpu, launches(service) - before)


def measure(service: VideoService, number: int) -> dict[str, Cost]:
    """One round: name of a kind of job to what it took."""
    fresh = VideoRequest(f"a red circle moving right, number {number}", steps=STEPS, seed=number)
    first, cost = run(service, fresh)
    found = {"nothing known": cost}
    seed = VideoRequest(fresh.prompt, steps=STEPS, seed=1000 + number)
    kinds = {
        "same prompt, new seed": seed,
        "same request": fresh,
        **{
            f"remix from {point:g}": VideoRequest(
                f"a blue square, {number}", remix_of=first.id, remix_from=point
            )
            for point in POINTS
        },
    }
    for name, request in kinds.items():
        found[name] = run(service, request)[1]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("engines", type=Path, help="an engine set")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    console = Console(stderr=True)
    console.print("wanted: a remix from f takes 1 - f of the launches; the same request takes none")
    with tempfile.TemporaryDirectory() as name:
        settings = ServiceOptions(Path(name), remix_points=POINTS)
        with open_service([options.engines], settings, check=False) as service:
            measure(service, 10_000)  # warms up
            rounds = [measure(service, number) for number in range(options.rounds)]
            hits, misses = service.figures().cache_hits, service.figures().cache_misses
    base = [each["nothing known"] for each in rounds]
    whole = base[0].launches
    kinds: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        costs = [each[name] for each in rounds]
        seconds, cpu = sorted(cost.seconds for cost in costs), sorted(cost.cpu for cost in costs)
        kinds[name] = {
            "seconds": [round(value, 4) for value in seconds],
            "median_seconds": round(statistics.median(seconds), 4),
            "cpu_seconds": [round(value, 4) for value in cpu],
            "median_cpu_seconds": round(statistics.median(cpu), 4),
            "share_of_time": round(ratio(seconds, [cost.seconds for cost in base]), 3),
            "share_of_cpu": round(ratio(cpu, [cost.cpu for cost in base]), 3),
            "launches": costs[0].launches,
            "share_of_launches": round(costs[0].launches / whole, 3),
        }
    table = Table("job", "launches", "median", "least to most", "share of time", "of the processors'")
    for name, kind in kinds.items():
        spread = f"{kind['seconds'][0]:.3f} to {kind['seconds'][-1]:.3f} s"
        shares = [f"{100 * kind[share]:.0f} %" for share in ("share_of_time", "share_of_cpu")]
        table.add_row(name, str(kind["launches"]), f"{kind['median_seconds']:.3f} s", spread, *shares)
    console.print(table)
    expected = {f"remix from {point:g}": whole * (1 - point) for point in POINTS}
    expected.update({"same request": 0, "same prompt, new seed": whole})
    wrong = [name for name, count in expected.items() if any(each[name].launches != count for each in rounds)]
    result = {
        "steps": STEPS,
        "rounds": options.rounds,
        "jobs": kinds,
        "cache_hits": hits,
        "cache_misses": misses,
        "wrong": wrong,
        "load_average": round(os.getloadavg()[0], 2),
        "machine": machine("onnxruntime", "av"),
    }
    if options.rounds >= ROUNDS:
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
