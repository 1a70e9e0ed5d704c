"""`reelrt serve` as a process of its own, for the load test: its start, its figures, its end.

    python -m benchmarks.service_process    beats like its event loop, until standard input ends

The latter says how long this machine lets a process wait that does nothing else.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
START_SECONDS, STOP_SECONDS = 120, 60


@dataclass(frozen=True, slots=True)
class Running:
    """A running service.

    Attributes:
        url: Its address.
        process: Its process.
        log: What it said on standard error.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """End it with SIGKILL.

        Raises:
            SystemExit: It had ended by itself.
        """
        if self.process.poll() is not None:
            raise SystemExit(f"the service ended by itself: {self.log.read_text()[-2000:]}")
        self.process.kill()
        self.process.wait()

    def figures(self) -> dict[str, float]:
        """The samples of its `/metrics`: name and labels to value."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).raise_for_status().text
        return {
            sample.name + "".join(f" {value}" for _, value in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@contextmanager
def running(engines: Path, data: Path, **settings: object) -> Iterator[Running]:
    """Start the service on a free port of 127.0.0.1; it stops with the block, if it was not killed.

    Args:
        engines: An engine set.
        data: Folder of its jobs and results.
        **settings: As docs/service.md lists them.

    Raises:
        SystemExit: It does not start.
    """
    variables = {f"REELRT_{name.upper()}": str(value) for name, value in settings.items()}
    ours = {name: value for name, value in os.environ.items() if not name.startswith("REELRT_")}
    log, told = data.with_suffix(".log"), data.with_suffix(".json")
    words = ["serve", str(engines), "--port", "0", "--data", str(data), "--json"]
    with log.open("wb") as errors, told.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "reelrt", *words],
            cwd=ROOT,
            env={**ours, **variables},
            stdout=output,
            stderr=errors,
        )
        try:
            yield Running(_address(process, told, log), process, log)
            process.terminate()
            process.wait(STOP_SECONDS)
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], told: Path, log: Path) -> str:
    ends = time.monotonic() + START_SECONDS
    while not (text := told.read_text(encoding="utf-8")).endswith("}\n"):
        if process.poll() is not None or time.monotonic() > ends:
            raise SystemExit(f"the service did not start: {log.read_text()[-2000:]}")
        time.sleep(0.02)
    return str(json.loads(text)["http"])


class Idle:
    """The longest gap of a loop that has nothing else to do.

    Attributes:
        longest: In seconds; 0 until the block has ended.
    """

    longest = 0.0


@contextmanager
def idling() -> Iterator[Idle]:
    """Let a process of its own beat during the block."""
    command, idle = [sys.executable, "-m", "benchmarks.service_process"], Idle()
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield idle
    finally:
        said, _ = process.communicate()
    idle.longest = float(said)


async def beat() -> float:
    """The longest gap until standard input ends, in seconds."""
    from reelrt.service.heartbeat import Heartbeat

    gaps = [0.0]
    heart = Heartbeat(lambda seconds: gaps.append(max(gaps.pop(), seconds)))
    heart.start()
    await asyncio.to_thread(sys.stdin.read)
    heart.stop()
    return gaps[0]


if __name__ == "__main__":
    print(asyncio.run(beat()))
