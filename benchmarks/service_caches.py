"""What each cache of the job service saves, on real engines.

    python -m benchmarks.service_caches ENGINES

Every round submits the same kinds of job one after the other, alone, and takes the seconds from submission
to completion and the launches of the step engine. Medians over the rounds, the spread, and the share of a
job that nothing is known of. A new seed is expected to save the text encoder and no more. The last line on
stdout is JSON; a full run also writes it to `benchmarks/results/service-caches.json`. Exit code 1 when a
remix takes another number of launches than its share, or a repeated request takes any.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from reelrt.service.jobs import Job, VideoRequest
from reelrt.service.jobservice import VideoService, open_service
from reelrt.service.options import ServiceOptions

ROUNDS, STEPS = 7, 20
POINTS = (0.25, 0.5, 0.75)
RESULT = Path(__file__).parent / "results" / "service-caches.json"


def launches(service: VideoService) -> int:
    """Launches of the step engine so far."""
    return sum(sum(sizes.values()) for sizes in service.figures().batch_sizes.values())


def run(service: VideoService, request: VideoRequest) -> tuple[Job, float, int]:
    """A job from its submission to its end: the job, seconds, launches."""
    before, began = launches(service), time.perf_counter()
    job = service.submit(request)
    with service.watch(job.id, previews=False) as subscription:
        while not any(event.last for event in subscription.wait()):
            pass
    seconds = time.perf_counter() - began
    job = service.get(job.id)
    assert job.status == "completed", job.error
    return job, seconds, launches(service) - before


def measure(service: VideoService, number: int) -> dict[str, tuple[float, int]]:
    """One round: name of a kind of job to its seconds and launches."""
    fresh = VideoRequest(f"a red circle moving right, number {number}", steps=STEPS, seed=number)
    first, seconds, count = run(service, fresh)
    found = {"nothing known": (seconds, count)}
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
        found[name] = run(service, request)[1:]
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
    whole = rounds[0]["nothing known"][1]
    kinds: dict[str, dict[str, Any]] = {}
    for name in rounds[0]:
        seconds = sorted(each[name][0] for each in rounds)
        base = statistics.median(each["nothing known"][0] for each in rounds)
        kinds[name] = {
            "seconds": [round(value, 4) for value in seconds],
            "median_seconds": round(statistics.median(seconds), 4),
            "share_of_time": round(statistics.median(seconds) / base, 3),
            "launches": rounds[0][name][1],
            "share_of_launches": round(rounds[0][name][1] / whole, 3),
        }
    table = Table("job", "launches", "median", "least to most", "share of time")
    for name, kind in kinds.items():
        spread = f"{kind['seconds'][0]:.3f} to {kind['seconds'][-1]:.3f} s"
        share = f"{100 * kind['share_of_time']:.0f} %"
        table.add_row(name, str(kind["launches"]), f"{kind['median_seconds']:.3f} s", spread, share)
    console.print(table)
    expected = {f"remix from {point:g}": whole * (1 - point) for point in POINTS}
    expected.update({"same request": 0, "same prompt, new seed": whole})
    wrong = [name for name, count in expected.items() if any(each[name][1] != count for each in rounds)]
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
