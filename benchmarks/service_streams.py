"""A hostile client that opens 10,000 event streams, and how quick `/health` stays meanwhile.

    python -m benchmarks.service_streams ENGINES            a minute; writes results/service-streams.json
    python -m benchmarks.service_streams ENGINES --quick    500 streams; whether it all works

`reelrt serve` makes videos all the while, on one core. One process opens the streams of a video that waits,
as fast as it is answered and never more than 800 at once, keeps those that are accepted, and counts what
the others are told. Another one asks `/health` every 50 ms on a new connection, however long the answers
before take: before the attack, during it, while the accepted streams stay open, and after they are closed.

Wanted: no more streams than the limit, every other one refused with a 429, every `/health` answered, and
its p99 during the attack less than 50 ms over the one before. Run it on a machine that does nothing else.
The last line on stdout is JSON; the exit code is 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.service_process import ROOT, Running, running
from benchmarks.verdicts import Goal, percentiles
from reelrt.client import Client

RESULT = Path(__file__).parent / "results" / "service-streams.json"
COUNT, LIMIT, AT_ONCE = 10_000, 64, 800
EVERY, PATIENCE, PHASE_SECONDS = 0.05, 30.0, 10.0
MORE_MS = 50.0
WAITING = 60
"""Videos asked for beforehand: the last one still waits when all is over."""


async def ask(host: str, port: int, path: str) -> tuple[str, asyncio.StreamWriter]:
    """The status of an answer, and its connection, which stays open."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
    except BaseException:
        writer.transport.abort()
        raise
    return head.split(b" ", 2)[1].decode(), writer


async def told(host: str, port: int, path: str) -> tuple[str, asyncio.StreamWriter | None]:
    """The same, or what went wrong and no connection."""
    try:
        status, writer = await asyncio.wait_for(ask(host, port, path), PATIENCE)
    except asyncio.TimeoutError:
        return "no answer", None
    except (OSError, asyncio.IncompleteReadError):
        return "closed", None
    return status, writer


async def attack(host: str, port: int, path: str, count: int) -> None:
    """Open streams, print what they were told, and keep the accepted ones until standard input ends."""
    answers: Counter[str] = Counter()
    kept: list[asyncio.StreamWriter] = []
    numbers = iter(range(count))

    async def opener() -> None:
        for _ in numbers:
            status, writer = await told(host, port, path)
            answers[status] += 1
            if writer is not None and status == "200":
                kept.append(writer)
            elif writer is not None:
                writer.transport.abort()

    began = time.monotonic()
    await asyncio.gather(*(opener() for _ in range(AT_ONCE)))
    print(json.dumps({"began": began, "ended": time.monotonic(), "answers": answers}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for writer in kept:
        writer.transport.abort()


async def probe(host: str, port: int) -> list[tuple[float, float, str]]:
    """Ask `/health` until standard input ends; when each was asked, seconds, and the answer."""
    found: list[tuple[float, float, str]] = []

    async def one() -> None:
        began = time.monotonic()
        status, writer = await told(host, port, "/health")
        found.append((began, time.monotonic() - began, status))
        if writer is not None:
            writer.transport.abort()

    over = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
    asked, due = [], time.monotonic()
    while not over.done():
        asked.append(asyncio.ensure_future(one()))
        due += EVERY
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    await asyncio.gather(*asked)
    return found


def open_files(wanted: int) -> int:
    """How many files a process may open, after asking for as many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def helper(*words: str) -> subprocess.Popen[str]:
    """This module in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.service_streams", *words]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def measure(service: Running, count: int, seconds: float) -> dict[str, Any]:
    """Before, during, while held, after; for JSON."""
    host, port = service.url.removeprefix("http://").split(":")
    with Client(service.url) as client:
        for number in range(WAITING):
            video = client.create("a red circle moving right", num_inference_steps=100, seed=number)
    ends: dict[str, float] = {}
    prober = helper("--probe", host, port)
    time.sleep(1)
    begins = {"before": time.monotonic()}
    time.sleep(seconds)
    attacker = helper("--attack", host, port, f"/v1/videos/{video['id']}/events", "--count", str(count))
    assert attacker.stdout is not None
    said = json.loads(attacker.stdout.readline())
    begins["during"], ends["before"], ends["during"] = said["began"], said["began"], said["ended"]
    begins["held"] = said["ended"]
    time.sleep(seconds)
    ends["held"] = time.monotonic()
    watchers = service.figures()["reelrt_watchers"]
    attacker.communicate(timeout=60)
    begins["after"] = time.monotonic()
    time.sleep(seconds)
    ends["after"] = time.monotonic()
    asked = json.loads(prober.communicate(timeout=60)[0])
    latency = {
        phase: percentiles([took for began, took, _ in asked if begin <= began < ends[phase]])
        for phase, begin in begins.items()
    }
    wrong = Counter(status for *_, status in asked if status != "200")
    figures = service.figures()
    return {
        "streams": count,
        "limit": LIMIT,
        "at_once": AT_ONCE,
        "answers": said["answers"],
        "attack_seconds": round(said["ended"] - said["began"], 2),
        "streams_open_while_held": int(watchers),
        "streams_open_after": int(figures["reelrt_watchers"]),
        "streams_refused_by_the_service": int(figures["reelrt_event_streams_refused_total"]),
        "health": latency,
        "health_not_answered": dict(wrong),
        "longest_gap_of_the_event_loop_ms": round(1000 * figures["reelrt_event_loop_longest_gap_seconds"], 2),
    }


def goals(result: dict[str, Any]) -> list[Goal]:
    """What was wanted, and what is."""
    answers, health = result["answers"], result["health"]
    accepted, refused = answers.get("200", 0), answers.get("429", 0)
    more = health["during"]["p99_ms"] - health["before"]["p99_ms"]
    return [
        Goal("streams accepted", accepted, result["limit"]),
        Goal("streams neither accepted nor refused with a 429", result["streams"] - accepted - refused, 0),
        Goal("/health without a 200", sum(result["health_not_answered"].values()), 0),
        Goal("p99 of /health during the attack, over the one before", round(more, 2), MORE_MS, "ms"),
        Goal("streams left over", result["streams_open_after"], 0),
    ]


def show(result: dict[str, Any], wanted: list[Goal], console: Console) -> None:
    """Tables for people."""
    answers = ", ".join(f"{count} x {name}" for name, count in sorted(result["answers"].items()))
    console.print(f"{result['streams']} streams in {result['attack_seconds']} s: {answers}")
    table = Table("/health", "count", "p50", "p95", "p99", "largest")
    for phase, row in result["health"].items():
        times = [f"{row[key]:.1f} ms" for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms")]
        table.add_row(phase, str(row["count"]), *times)
    console.print(table)
    table = Table("goal", "measured", "at most", "reached")
    for goal in wanted:
        table.add_row(goal.name, f"{goal.value:g}", f"{goal.most:g}", "yes" if goal.reached else "NO")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engines", type=Path, nargs="?", help="an engine set")
    parser.add_argument("--quick", action="store_true", help="500 streams, and nothing is written")
    parser.add_argument("--count", type=int, default=COUNT, help=argparse.SUPPRESS)
    parser.add_argument("--attack", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    files = open_files(COUNT + 1000)
    if options.attack:
        host, port, path = options.attack
        asyncio.run(attack(host, int(port), path, options.count))
        return 0
    if options.probe:
        print(json.dumps(asyncio.run(probe(options.probe[0], int(options.probe[1])))))
        return 0
    console = Console(stderr=True)
    if files < COUNT:
        console.print(f"this machine lets a process open {files} files; more streams than that are closed")
    count, seconds = (500, 2.0) if options.quick else (COUNT, PHASE_SECONDS)
    with tempfile.TemporaryDirectory(prefix="reelrt-streams-") as name:
        settings = {"streams": LIMIT, "threads": 1, "queue": 2 * WAITING}
        with running(options.engines.resolve(), Path(name) / "data", **settings) as service:
            result = {"benchmark": "service streams", **measure(service, count, seconds)}
    wanted = goals(result)
    result["goals"] = [{**asdict(goal), "reached": goal.reached} for goal in wanted]
    result["open_files"] = files
    result["load_average"] = round(os.getloadavg()[0], 2)
    result["machine"] = machine("onnxruntime", "uvicorn", "starlette")
    show(result, wanted, console)
    if not options.quick:
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return int(not all(goal.reached for goal in wanted))


if __name__ == "__main__":
    sys.exit(main())
