"""The service killed through its HTTP door: clients ask, the process dies, and nothing answered is lost.

The clients keep what they sent and what was answered in a `tests.killing.Ledger`; its `prove` compares that
with what is there in the end. Whatever was accepted is completed with whole files or failed with a reason
by then, once, and what waits at a kill is found among them.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.service_process import running
from reelrt.service.schemas import CreateVideo
from tests.killing import PROMPTS, Ledger, left_behind, prove

CLIENTS = 4
LONGEST = 1.5
"""Seconds under load before a kill, at most."""
SETTINGS: dict[str, object] = {"queue": 12, "per_key": 0, "remix_points": "0.5"}


@dataclass
class Load:
    """What the clients of one start share.

    Attributes:
        ledger: What was said so far.
        known: Ids of videos that were accepted and that nobody has begun to delete, of every start so far.
        prefix: Of the idempotency keys of this start.
        unexpected: Answers that no client should get.
    """

    ledger: Ledger
    known: list[str]
    prefix: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)
    unexpected: list[str] = field(default_factory=list)

    def hear(self, what: str, **values: Any) -> None:
        """Keep what was said."""
        with self.lock:
            self.ledger.hear({"what": what, **values})


def client(url: str, load: Load, number: int, seed: int) -> None:
    """Ask for this and that until the service is gone."""
    chance, count = random.Random(seed), 0
    with httpx.Client(base_url=url, timeout=30) as http:
        try:
            while not load.stop.is_set():
                deed = chance.random()
                with load.lock:
                    video_id = chance.choice(load.known) if load.known and deed > 0.5 else None
                    if video_id and deed > 0.92:
                        load.known.remove(video_id)
                if video_id is None:
                    count += 1
                    create(http, load, chance, f"{load.prefix}.{number}.{count}")
                elif deed > 0.92:
                    load.hear("deleting", id=video_id)
                    if said(http.delete(f"/v1/videos/{video_id}"), load, 200):
                        load.hear("deleted", id=video_id)
                else:
                    look_at(http, load, video_id)
                time.sleep(chance.random() * 0.03)
        except httpx.TransportError:
            return  # what was answered is in the ledger


def said(answer: httpx.Response, load: Load, *expected: int) -> bool:
    """Whether it is a success; other answers than those expected are kept."""
    if answer.status_code not in expected:
        words = f"{answer.request.method} {answer.url.path}: {answer.status_code} {answer.text}"
        load.unexpected.append(words)
    return answer.is_success


def create(http: httpx.Client, load: Load, chance: random.Random, key: str) -> None:
    """Ask for a video."""
    body = {
        "prompt": chance.choice(PROMPTS),
        "num_inference_steps": chance.randint(2, 8),
        "num_frames": 4,
        "seed": chance.randint(0, 9) if chance.random() < 0.5 else None,
        "format": chance.choice(["mp4", "mp4", "webm"]),
        "priority": chance.randint(-2, 2),
    }
    load.hear("asking", key=key, request=CreateVideo.model_validate(body).request().to_json())
    answer = http.post("/v1/videos", json=body, headers={"Idempotency-Key": key})
    if not said(answer, load, 200, 429):
        load.hear("refused", key=key)
        return
    video_id = str(answer.json()["id"])
    load.hear("accepted", key=key, id=video_id)
    with load.lock:
        load.known.append(video_id)


def look_at(http: httpx.Client, load: Load, video_id: str) -> None:
    """Keep how a video has ended, if it has, and what its file was."""

    def got(path: str) -> httpx.Response | None:
        answer = http.get(f"/v1/videos/{video_id}{path}")
        if answer.status_code == 404 and video_id in load.ledger.deleting:
            return None
        return answer if said(answer, load, 200) else None

    answer = got("")
    if answer is None or (video := answer.json())["status"] in ("queued", "in_progress"):
        return
    sha = ""
    if video["status"] == "completed":
        if (content := got("/content")) is None:
            return
        sha = hashlib.sha256(content.content).hexdigest()
    load.hear("seen", id=video_id, status=video["status"], at=video["completed_at"], sha=sha)


def kill_once(engines: Path, folder: Path, ledger: Ledger, known: list[str], seed: int) -> list[str]:
    """Start the service on a folder, kill it at a random moment under load, and look at what it left.

    Returns:
        Answers that no client should get.
    """
    chance, load = random.Random(seed), Load(ledger, known, f"k{seed}")
    with running(engines, folder, **SETTINGS) as service:
        clients = [
            threading.Thread(target=client, args=(service.url, load, number, chance.randrange(2**32)))
            for number in range(CLIENTS)
        ]
        for thread in clients:
            thread.start()
        try:
            time.sleep(0.05 + LONGEST * chance.random())
            service.kill()
        finally:
            load.stop.set()
            for thread in clients:
                thread.join()
    ledger.kills += 1
    ledger.killed_while.update(left_behind(folder))
    return load.unexpected


def measure(
    engines: Path, folder: Path, kills: int, seed: int, told: Callable[[str], None]
) -> dict[str, Any]:
    """Kill the service so many times, then prove that nothing was lost; what was found, for JSON."""
    ledger, known, unexpected, began = Ledger(), list[str](), list[str](), time.monotonic()
    for number in range(kills):
        told(f"kill {number + 1} of {kills}")
        unexpected += kill_once(engines, folder, ledger, known, seed + number)
    outcomes: Counter[str] = prove(engines, folder, ledger)
    return {
        "kills": ledger.kills,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "requests": len(ledger.asked),
        "accepted": len(ledger.accepted),
        "refused": len(ledger.refused),
        "answers_lost_in_a_kill": len(ledger.asked) - len(ledger.accepted) - len(ledger.refused),
        "deleted": len(ledger.deleted),
        "ends_seen": len(ledger.ends),
        "killed_with": dict(sorted(ledger.killed_while.items())),
        "outcomes": dict(sorted(outcomes.items())),
        "wrong": [*ledger.faults, *unexpected],
    }
