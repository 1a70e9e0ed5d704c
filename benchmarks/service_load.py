"""The phases of the load test: throughput, latencies, overhead. Each gives plain values for JSON.

Every video has a prompt and a seed of its own, lest a cache answers. Knows no goals.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.service_bare import Bare
from benchmarks.service_process import Running
from benchmarks.verdicts import per_minute, percentiles, ratio
from reelrt.client import Client
from reelrt.runtime.video import read_metadata

PAUSE = 0.05
"""Seconds between the requests of whoever measures latencies."""
_numbers = itertools.count(1)


def fresh() -> dict[str, Any]:
    """A prompt and a seed that nobody has asked for yet."""
    number = next(_numbers)
    return {"prompt": f"a red circle moving right, number {number}", "seed": number}


def make(client: Client, path: Path, asked: dict[str, Any], **fields: Any) -> float:
    """Ask for a video, wait for its events, download it; seconds of all that.

    Raises:
        SystemExit: It was not completed.
    """
    began = time.perf_counter()
    video = client.create(**asked, **fields)
    video = client.wait(video["id"])
    if video["status"] != "completed":
        raise SystemExit(f"{video['id']} is {video['status']}: {video['error']}")
    client.download(video["id"], path)
    return time.perf_counter() - began


def crowd(url: str, folder: Path, clients: int, videos: int, steps: int) -> tuple[float, list[float]]:
    """Clients at once, each making videos one after the other; seconds of all, and of each video."""

    def one(number: int) -> list[float]:
        with Client(url) as client:
            path = folder / f"{number}.mp4"
            return [make(client, path, fresh(), num_inference_steps=steps) for _ in range(videos)]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(one, range(clients)))
    return time.perf_counter() - began, [seconds for each in found for seconds in each]


def throughput(
    batched: Running, single: Running, folder: Path, *, clients: int, rounds: int, steps: int
) -> dict[str, Any]:
    """Videos per minute of clients at once against one at a time, in alternating order.

    Args:
        batched: A service with as many slots as clients.
        single: One with a single slot.
        folder: Where the downloads go.
        clients: At once; each makes two videos a round, and the single one as many as all of them.
        rounds: How often each side is measured.
        steps: Of each video.
    """
    sides: dict[str, list[float]] = {"clients_at_once": [], "one_at_a_time": []}
    alone: list[float] = []
    together: list[float] = []
    for each in (batched, single):
        crowd(each.url, folder, 1, 1, steps)  # warms up

    def at_once() -> None:
        seconds, videos = crowd(batched.url, folder, clients, 2, steps)
        sides["clients_at_once"].append(per_minute(len(videos), seconds))
        together.extend(videos)

    def one_by_one() -> None:
        seconds, videos = crowd(single.url, folder, 1, clients, steps)
        sides["one_at_a_time"].append(per_minute(len(videos), seconds))
        alone.extend(videos)

    for number in range(rounds):
        for measure in (at_once, one_by_one) if number % 2 == 0 else (one_by_one, at_once):
            measure()
    launches = batched.figures()
    sizes = {
        name.split()[1]: int(value)
        for name, value in launches.items()
        if name.startswith("reelrt_launches_total ")
    }
    return {
        "clients": clients,
        "rounds": rounds,
        "steps": steps,
        "videos_per_minute": {name: [round(value, 2) for value in values] for name, values in sides.items()},
        "median": {name: round(statistics.median(values), 2) for name, values in sides.items()},
        "ratio": round(ratio(sides["clients_at_once"], sides["one_at_a_time"]), 3),
        "launches_by_batch": sizes,
        "video": {"clients_at_once": percentiles(together), "one_at_a_time": percentiles(alone)},
    }


@contextmanager
def probing(url: str) -> Iterator[dict[str, list[float]]]:
    """Measure POST, GET and DELETE in a thread while the block runs; seconds of each, from sending to 2xx.

    What it asks for waits at the lowest priority and is deleted at once, so that little of it is ever made.

    Raises:
        SystemExit: An answer was none of success.
    """
    stop, found = (
        threading.Event(),
        {"create": list[float](), "status": list[float](), "delete": list[float]()},
    )
    failures: list[str] = []

    def probe() -> None:
        with httpx.Client(base_url=url, timeout=30) as http:

            def timed(kind: str, method: str, path: str, **fields: Any) -> dict[str, Any]:
                began = time.perf_counter()
                answer = http.request(method, path, **fields).raise_for_status()
                found[kind].append(time.perf_counter() - began)
                told: dict[str, Any] = answer.json()
                return told

            while not stop.is_set():
                body = {**fresh(), "num_inference_steps": 2, "num_frames": 4, "priority": -10}
                path = f"/v1/videos/{timed('create', 'POST', '/v1/videos', json=body)['id']}"
                for _ in range(3):
                    timed("status", "GET", path)
                timed("delete", "DELETE", path)
                stop.wait(PAUSE)

    def guarded() -> None:
        try:
            probe()
        except httpx.HTTPError as error:
            failures.append(str(error))

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
    if failures:
        raise SystemExit(f"a request failed under load: {failures[0]}")


def latencies(service: Running, folder: Path, *, clients: int, seconds: float, steps: int) -> dict[str, Any]:
    """Latencies of requests while clients make videos, and what the event loop's heartbeat saw."""
    before, ends, videos = service.figures(), time.monotonic() + seconds, list[float]()
    with probing(service.url) as found:
        while not videos or time.monotonic() < ends:
            videos += crowd(service.url, folder, clients, 1, steps)[1]
    after = service.figures()

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0)

    beats, late = grew("reelrt_event_loop_gap_seconds_count"), "reelrt_event_loop_gap_seconds_bucket 0.05"
    return {
        **{kind: percentiles(each) for kind, each in found.items()},
        "video": percentiles(videos),
        "event_loop": {
            "beats": int(beats),
            "mean_gap_ms": round(1000 * grew("reelrt_event_loop_gap_seconds_sum") / beats, 2),
            "gaps_over_50_ms": int(beats - grew(late)),
            "longest_gap_ms": round(1000 * after["reelrt_event_loop_longest_gap_seconds"], 2),
        },
    }


def overhead(service: Running, bare: Bare, folder: Path, *, videos: int, steps: int) -> dict[str, Any]:
    """Videos one after the other through HTTP and in the bare runtime, in alternating order."""
    sides: dict[str, list[float]] = {"service": [], "bare": []}
    with Client(service.url) as client:

        def through(asked: dict[str, Any]) -> float:
            return make(client, folder / "service.mp4", asked, num_inference_steps=steps)

        def direct(asked: dict[str, Any]) -> float:
            return bare.video(asked["prompt"], asked["seed"], steps, folder / "bare.mp4")["seconds"]

        calls: dict[str, Callable[[dict[str, Any]], float]] = {"service": through, "bare": direct}
        for number in range(-1, videos):  # the first pair warms up
            asked = fresh()
            for name in sides if number % 2 else reversed(sides):
                taken = calls[name](asked)
                if number >= 0:
                    sides[name].append(taken)
    if read_metadata(folder / "service.mp4") != read_metadata(folder / "bare.mp4"):
        raise SystemExit("the service made another video than the bare runtime")
    differences = [ours - theirs for ours, theirs in zip(sides["service"], sides["bare"], strict=True)]
    return {
        "videos": videos,
        "steps": steps,
        "seconds": {name: [round(value, 4) for value in values] for name, values in sides.items()},
        "median_seconds": {name: round(statistics.median(values), 4) for name, values in sides.items()},
        "median_difference_ms": round(1000 * statistics.median(differences), 2),
        "ratio": round(ratio(sides["service"], sides["bare"]), 4),
    }
