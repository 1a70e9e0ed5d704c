"""The service's memory over many small jobs: what stays of each when everything bounded is full.

    python -m benchmarks.service_memory              1,000 jobs; writes results/service-memory.json
    python -m benchmarks.service_memory --jobs 50    whether it works

`reelrt serve` runs in a process of its own on the tests' tiny model: what it keeps of a job does not depend
on the video's size. Each job has a prompt of its own, is watched to its end and downloaded. The first 306
fill the cache of prompts and are not looked at. Wanted: the last ones' resident size at most 1.05 times the
first ones', and less than 4 KiB more per job in the second half. The last line on stdout is JSON; the exit
code is 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import machine
from benchmarks.service_load import fresh, make
from benchmarks.service_process import Running, running
from benchmarks.verdicts import Goal, growth
from reelrt.client import Client
from reelrt.runtime.text import CACHED_PROMPTS

RESULT = Path(__file__).parent / "results" / "service-memory.json"
JOBS = 1000
WARM_JOBS, SAMPLE_EVERY = CACHED_PROMPTS + 50, 10
"""Jobs until everything that is kept up to a number is full, and jobs between two looks at the memory."""
GROWTH, BYTES_PER_JOB = 1.05, 4096


def tiny_engines(folder: Path) -> Path:
    """Engines of the tests' tiny model."""
    from reelrt.engines.builder import build_engines
    from reelrt.export.exporter import export_bundle
    from tests.models import tiny_model

    export_bundle(tiny_model(folder / "model"), folder / "bundle")
    return build_engines(folder / "bundle", folder / "engines", backend="onnxruntime").folder


def memory(service: Running, folder: Path, *, jobs: int) -> dict[str, Any]:
    """Resident memory of a service over small jobs, after as many as fill its caches."""
    done, sizes = list[int](), list[float]()
    warm = min(WARM_JOBS, jobs)
    began = time.monotonic()
    with Client(service.url) as client:
        for number in range(-warm, jobs + 1):
            if number >= 0 and number % SAMPLE_EVERY == 0:
                done.append(number)
                sizes.append(service.figures()["reelrt_memory_bytes"])
            if number < jobs:
                make(client, folder / "small.mp4", fresh(), num_inference_steps=2, num_frames=2)
    grown = growth(done, sizes)
    return {
        "jobs": jobs,
        "warm_jobs": warm,
        "seconds": round(time.monotonic() - began, 1),
        "megabytes": [round(size / 1e6, 2) for size in sizes],
        "first_megabytes": round(grown.first / 1e6, 2),
        "last_megabytes": round(grown.last / 1e6, 2),
        "bytes_per_job": round(grown.per_job),
        "ratio": round(grown.last / grown.first, 4),
    }


def goals(memory: dict[str, Any]) -> list[Goal]:
    """What was wanted, and what is."""
    return [
        Goal("memory, last over first", memory["ratio"], GROWTH),
        Goal("memory, growth per job", memory["bytes_per_job"], BYTES_PER_JOB, "bytes", strict=True),
    ]


def measure(folder: Path, jobs: int) -> dict[str, Any]:
    """A service of its own and its memory, for JSON."""
    with running(tiny_engines(folder / "tiny"), folder / "memory") as service:
        return memory(service, folder, jobs=jobs)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"by default {JOBS}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reelrt-memory-") as name:
        result = {"benchmark": "service memory", **measure(Path(name), options.jobs)}
    wanted, console = goals(result), Console(stderr=True)
    result["goals"] = [{**asdict(goal), "reached": goal.reached} for goal in wanted]
    result["load_average"] = round(os.getloadavg()[0], 2)
    result["machine"] = machine("onnxruntime", "av", "uvicorn", "fastapi", "starlette")
    for goal in wanted:
        console.print(f"{goal.name}: {goal.value:g} {goal.unit} of {goal.most:g}, {goal.reached}")
    if options.jobs >= JOBS:
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return int(not all(goal.reached for goal in wanted))


if __name__ == "__main__":
    sys.exit(main())
