"""The job service under load: throughput, latency, overhead, event loop, memory, kills.

    python -m benchmarks.service ENGINES            some minutes; writes benchmarks/results/service.json
    python -m benchmarks.service ENGINES --quick    whether it all works; only the kills are judged

`reelrt serve` runs in processes of its own and is asked over HTTP, as by anybody:

- Throughput: four clients at once, whose videos share batches, against one at a time without batching, in
  turns. What the processors allow is worked out from the engine's own times first: nothing is faster than
  all cores busy.
- Latency of requests and of whole videos while four clients make videos.
- Overhead: a video through HTTP (create, events, download) over the same from `generate(..., save_to=...)`
  in a process of its own, in turns; medians, at most 1.03.
- Event loop: the longest gap that the service's own heartbeat saw since it started, less than 50 ms. Beside
  it the longest one of a process that does nothing else, in the same time: what the machine makes of it.
- Memory: resident size over 500 jobs, see `benchmarks.service_memory`.
- Kills: the service is killed at random moments under load; nothing that was answered is lost.

Run it on a machine that does nothing else. The last line on stdout is JSON; the exit code is 1 when a goal
is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import service_kills, service_load, service_memory
from benchmarks.machine import machine
from benchmarks.service_bare import bare
from benchmarks.service_process import Running, idling, running
from benchmarks.verdicts import Costs, Goal

RESULT = Path(__file__).parent / "results" / "service.json"
CLIENTS = 4
OVERHEAD, STALL_MS = 1.03, 50.0


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured.

    Attributes:
        steps: Of each video.
        launches: That are timed.
        rounds: Of the throughput.
        seconds: Of the latencies.
        videos: Of the overhead.
        jobs: Of the memory.
        kills: How often the service is killed.
    """

    steps: int = 25
    launches: int = 30
    rounds: int = 3
    seconds: float = 20
    videos: int = 24
    jobs: int = 500
    kills: int = 20


WHOLE = Extent()
QUICK = Extent(steps=4, launches=6, rounds=1, seconds=3, videos=2, jobs=40, kills=2)


def limits_of(costs: Costs) -> dict[str, Any]:
    """What the engines' own times allow, as JSON."""
    return {
        "cores": costs.cores,
        "batch": costs.batch,
        "video_seconds": round(costs.video[0], 4),
        "video_cpu_seconds": round(costs.video[1], 4),
        "launch_ms": round(1000 * costs.one[0], 3),
        "full_launch_ms": round(1000 * costs.full[0], 3),
        "cores_busy": round(costs.busy, 3),
        "launch_gain": round(costs.launch_gain, 3),
        "throughput_bound": round(costs.bound, 3),
    }


def about(limits: dict[str, Any]) -> str:
    """The same in words, before anything else is measured."""
    return (
        f"a launch takes {limits['launch_ms']:.1f} ms with one video and {limits['full_launch_ms']:.1f} ms "
        f"with {limits['batch']}: {limits['launch_gain']:.2f} times less per video\n"
        f"a video alone takes {limits['video_seconds']:.2f} s and keeps {100 * limits['cores_busy']:.0f} % "
        f"of {limits['cores']} cores busy, so videos at once are made at most "
        f"{limits['throughput_bound']:.2f} times faster than one after the other"
    )


def measure(engines: Path, extent: Extent, folder: Path, told: Callable[[str], None]) -> dict[str, Any]:
    """Everything, for JSON."""
    result: dict[str, Any] = {"benchmark": "service"}
    with ExitStack() as open_ones:
        runtime = open_ones.enter_context(bare(engines))
        batch = min(CLIENTS, runtime.slots)
        result["limits"] = limits_of(runtime.costs(extent.steps, batch, extent.launches, folder))
        told(about(result["limits"]))
        idle = open_ones.enter_context(idling())
        batched = open_ones.enter_context(running(engines, folder / "batched", slots=CLIENTS))
        with running(engines, folder / "single", slots=1) as single:
            told("throughput")
            result["throughput"] = service_load.throughput(
                batched, single, folder, clients=CLIENTS, rounds=extent.rounds, steps=extent.steps
            )
        gaps = {"throughput": longest_gap(batched)}
        told("overhead")
        result["overhead"] = service_load.overhead(
            batched, runtime, folder, videos=extent.videos, steps=extent.steps
        )
        gaps["overhead"] = longest_gap(batched)
        told("latency")
        result["latency"] = service_load.latencies(
            batched, folder, clients=CLIENTS, seconds=extent.seconds, steps=extent.steps
        )
        gaps["latency"] = longest_gap(batched)
    result["latency"]["event_loop"]["longest_gap_ms_up_to"] = gaps
    result["latency"]["event_loop"]["longest_gap_of_an_idle_process_ms"] = round(1000 * idle.longest, 2)
    told("memory")
    result["memory"] = service_memory.measure(folder, extent.jobs)
    result["kills"] = service_kills.measure(engines, folder / "killed", extent.kills, 0, told)
    return result


def longest_gap(service: Running) -> float:
    """The longest gap of its event loop since it started, in milliseconds."""
    return round(1000 * service.figures()["reelrt_event_loop_longest_gap_seconds"], 2)


def goals(result: dict[str, Any], kills: int) -> list[Goal]:
    """What was wanted, and what is."""
    killed = result["kills"]
    stall = result["latency"]["event_loop"]["longest_gap_ms"]
    return [
        Goal("overhead over the bare runtime", result["overhead"]["ratio"], OVERHEAD),
        Goal("longest gap of the event loop", stall, STALL_MS, "ms", strict=True),
        *service_memory.goals(result["memory"]),
        Goal("wrong after the kills", len(killed["wrong"]), 0),
        Goal("kills that did not happen", kills - killed["kills"], 0),
    ]


def show(result: dict[str, Any], wanted: list[Goal], console: Console) -> None:
    """Tables for people."""
    median, limits, killed = result["throughput"]["median"], result["limits"], result["kills"]
    console.print(
        f"{CLIENTS} clients at once: {median['clients_at_once']:.1f} videos/minute; one at a time, no "
        f"batching: {median['one_at_a_time']:.1f}; ratio {result['throughput']['ratio']:.2f} of at most "
        f"{limits['throughput_bound']:.2f} ({limits['cores']} cores)"
    )
    table = Table("latency", "count", "p50", "p95", "p99", "largest")
    latency = result["latency"]
    rows = {
        "create, under load": latency["create"],
        "status, under load": latency["status"],
        "delete, under load": latency["delete"],
        "video, beside those": latency["video"],
        f"video, {CLIENTS} clients at once": result["throughput"]["video"]["clients_at_once"],
        "video, one at a time": result["throughput"]["video"]["one_at_a_time"],
    }
    for name, row in rows.items():
        times = [f"{row[key]:.1f} ms" for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms")]
        table.add_row(name, str(row["count"]), *times)
    console.print(table)
    console.print(
        f"{killed['kills']} kills: {killed['accepted']} jobs accepted, {killed['answers_lost_in_a_kill']} "
        f"answers lost in a kill, {killed['deleted']} deleted; in the end {killed['outcomes']}"
    )
    beats = latency["event_loop"]
    console.print(
        f"event loop: {beats['gaps_over_50_ms']} of {beats['beats']} gaps under load over 50 ms; the longest "
        f"one of an idle process was {beats['longest_gap_of_an_idle_process_ms']:.0f} ms"
    )
    for fault in killed["wrong"][:20]:
        console.print(fault)
    table = Table("goal", "measured", "at most", "reached")
    for goal in wanted:
        most = f"{'less than ' if goal.strict else ''}{goal.most:g} {goal.unit}"
        table.add_row(goal.name, f"{goal.value:g} {goal.unit}", most, "yes" if goal.reached else "NO")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engines", type=Path, help="an engine set")
    parser.add_argument(
        "--quick", action="store_true", help="a little of everything; only the kills are judged"
    )
    parser.add_argument("--kills", type=int, help=f"by default {WHOLE.kills}")
    options = parser.parse_args()
    extent = QUICK if options.quick else WHOLE
    if options.kills is not None:
        extent = Extent(**{**asdict(extent), "kills": options.kills})
    console, began = Console(stderr=True), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="reelrt-service-") as name:
        result = measure(options.engines.resolve(), extent, Path(name), console.print)
    wanted = goals(result, extent.kills)
    result["goals"] = [{**asdict(goal), "reached": goal.reached} for goal in wanted]
    result["extent"] = asdict(extent)
    result["seconds"] = round(time.monotonic() - began, 1)
    result["load_average"] = round(os.getloadavg()[0], 2)
    result["machine"] = machine("onnxruntime", "av", "uvicorn", "fastapi", "starlette", "httpx")
    show(result, wanted, console)
    if not options.quick:
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    judged = wanted[-2:] if options.quick else wanted
    return int(not all(goal.reached for goal in judged))


if __name__ == "__main__":
    sys.exit(main())
