"""A running service as its users have it: a process of its own, a port of its own, a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.commands import ENVIRONMENT

KEYS = ("first-key-of-the-tests", "second-key-of-the-tests")
START_SECONDS, STOP_SECONDS, VIDEO_SECONDS = 60, 60, 60
SMALL: dict[str, Any] = {"num_frames": 2, "num_inference_steps": 2}
"""What makes a request of the tiniest model quick."""


@dataclass(frozen=True, slots=True)
class Served:
    """A running service: its address, its process, its folder, and its log."""

    url: str
    process: subprocess.Popen[bytes]
    data: Path
    log: Path

    def files(self, video_id: str) -> list[str]:
        """The paths of a video's files in its folder."""
        every = (path.relative_to(self.data).as_posix() for path in self.data.rglob("*") if path.is_file())
        return sorted(path for path in every if video_id.removeprefix("video_") in path)


@contextmanager
def serving(engines: Path, data: Path, **settings: object) -> Iterator[Served]:
    """`reelrt serve` with some settings, until the block ends; then it has to stop in good order."""
    variables = {f"REELRT_{name.upper()}": str(value) for name, value in settings.items()}
    clean = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("REELRT_")}
    log, told = data.with_suffix(".log"), data.with_suffix(".json")
    command = [sys.executable, "-m", "reelrt", "serve", str(engines), "--port", "0", "--data", str(data)]
    with log.open("w") as errors, told.open("w") as output:
        process = subprocess.Popen(
            [*command, "--json"],
            env={**clean, **variables, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=errors,
        )
        try:
            yield Served(_address(process, told, log), process, data, log)
            process.terminate()
            assert process.wait(STOP_SECONDS) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], told: Path, log: Path) -> str:
    ends = time.monotonic() + START_SECONDS
    while not (text := told.read_text()).endswith("}\n"):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < ends, "the service did not start"
        time.sleep(0.05)
    return str(json.loads(text)["http"])


def http(served: Served, key: str | None = None) -> httpx.Client:
    """A client of a running service."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=served.url, headers=headers, timeout=30)


def make(client: httpx.Client, prompt: str, **fields: Any) -> dict[str, Any]:
    """Ask for a small video."""
    answer = client.post("/v1/videos", json={"prompt": prompt, **SMALL, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def finished(client: httpx.Client, video: Mapping[str, Any]) -> dict[str, Any]:
    """The same when it is over."""
    ends = time.monotonic() + VIDEO_SECONDS
    while True:
        found: dict[str, Any] = client.get(f"/v1/videos/{video['id']}").json()
        if found["status"] not in ("queued", "in_progress"):
            return found
        assert time.monotonic() < ends, found
        time.sleep(0.05)


def events_of(client: httpx.Client, video_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A video's events until the stream ends."""
    with client.stream("GET", f"/v1/videos/{video_id}/events") as answer:
        assert answer.status_code == 200, answer.read()
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))
