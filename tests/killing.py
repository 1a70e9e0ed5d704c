"""A job service that is killed at random moments under load, and the proof that nothing was lost.

The service runs in a process of its own, which says on standard output what it is about to ask of it and
what was answered; `SIGKILL` ends it. Everything it said is kept, and compared with what is there at the end.

    python -m tests.killing ENGINES FOLDER SEED FIRST    is that process
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reelrt.errors import ConflictError, NotFoundError, QueueFullError
from reelrt.runtime.video import read_metadata
from reelrt.service.jobs import VARIANTS, VideoRequest
from reelrt.service.jobservice import VideoService, open_service
from reelrt.service.options import ServiceOptions

ROOT = Path(__file__).parents[1]
DELAY = 0.1
"""Seconds that a service lives on after the last deed that is waited for, at most."""
PROMPTS = ("red circle", "blue square", "red square", "a red circle moving right on a black background")


def options(folder: Path) -> ServiceOptions:
    return ServiceOptions(folder, queue_size=12, jobs_per_owner=0, reserve=0, remix_points=(0.5,), threads=1)


def said(what: str, **values: Any) -> None:
    os.write(1, (json.dumps({"what": what, **values}) + "\n").encode())


def digest(service: VideoService, job_id: str) -> str:
    return hashlib.sha256(service.file(job_id).read_bytes()).hexdigest()


def load(engines: Path, folder: Path, seed: int, first: int) -> None:
    """Be the process that is killed: ask for this and that until the end."""
    chance, number = random.Random(seed), first
    with open_service([engines], options(folder), check=False) as service:
        (model,) = service.models()
        sizes = [(64, 64), (model.limits["width"][0], model.limits["height"][0])]
        frames = model.limits["frames"]
        said("ready")
        while True:
            known = service.list(limit=100, order=chance.choice(["asc", "desc"]))[0]
            job = chance.choice(known) if known else None
            deed = chance.random()
            if deed < 0.4 or job is None:
                width, height = chance.choice(sizes)
                request = VideoRequest(
                    chance.choice(PROMPTS),
                    width=width,
                    height=height,
                    frames=min(max(4, frames[0]), frames[1]),
                    steps=chance.randint(2, 8),
                    seed=chance.randint(0, 9) if chance.random() < 0.5 else None,
                    format=chance.choice(["mp4", "mp4", "webm"]),
                    priority=chance.randint(-2, 2),
                )
                if job is not None and job.status == "completed" and chance.random() < 0.2:
                    request = VideoRequest("blue", remix_of=job.id)
                key, number = f"k{number}", number + 1
                said("asking", key=key, request=request.to_json())
                try:
                    said("accepted", key=key, id=service.submit(request, "", key).id)
                except (QueueFullError, ConflictError, NotFoundError) as error:
                    said("refused", key=key)
                    time.sleep(0.05 if isinstance(error, QueueFullError) else 0)
            elif deed < 0.9:
                if not job.live:
                    with suppress(NotFoundError):
                        sha = digest(service, job.id) if job.status == "completed" else ""
                        said("seen", id=job.id, status=job.status, at=job.completed_at, sha=sha)
            elif deed < 0.95:
                said("cancelling", id=job.id)
                done = service.cancel(job.id)
                said("cancelled", id=job.id, status=done.status)
            else:
                said("deleting", id=job.id)
                service.delete(job.id)
                said("deleted", id=job.id)
            time.sleep(chance.random() * 0.02)


@dataclass
class Ledger:
    """Everything that was said, and what was found after each kill."""

    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    accepted: dict[str, str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    deleting: set[str] = field(default_factory=set)
    deleted: set[str] = field(default_factory=set)
    ends: dict[str, tuple[str, float, str]] = field(default_factory=dict)
    kills: int = 0
    killed_while: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def hear(self, line: dict[str, Any]) -> None:
        """Keep what was said."""
        what, job_id = line["what"], line.get("id", "")
        if what == "asking":
            self.asked[line["key"]] = line["request"]
        elif what == "accepted":
            self.accepted[line["key"]] = job_id
        elif what == "refused":
            self.refused.add(line["key"])
        elif what in ("deleting", "deleted"):
            {"deleting": self.deleting, "deleted": self.deleted}[what].add(job_id)
        elif what == "seen":
            end = line["status"], line["at"], line["sha"]
            if self.ends.setdefault(job_id, end) != end:
                self.faults.append(f"{job_id} ended as {self.ends[job_id]} and again as {end}")
        elif what == "cancelled" and line["status"] in ("queued", "in_progress"):
            self.faults.append(f"{job_id} was cancelled and is {line['status']}")


def kill_once(engines: Path, folder: Path, ledger: Ledger, seed: int, deeds: int) -> None:
    """Start the service on a folder, kill it after up to so many deeds, and look at what it left."""
    chance = random.Random(seed)
    command = [
        sys.executable,
        "-m",
        "tests.killing",
        str(engines),
        str(folder),
        str(seed),
        str(len(ledger.asked)),
    ]
    errors = folder.parent / "stderr.txt"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr)
        assert process.stdout is not None
        try:
            if (first := process.stdout.readline()) != b'{"what": "ready"}\n':
                ledger.faults.append(f"it did not start: {first!r} {errors.read_text()[-2000:]}")
                return
            text = b"".join(process.stdout.readline() for _ in range(chance.randint(1, deeds)))
            time.sleep(chance.random() * DELAY)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        text += process.stdout.read()
        process.stdout.close()
    if process.returncode != -signal.SIGKILL:
        ledger.faults.append(f"it ended by itself: {errors.read_text()[-2000:]}")
    for line in text.split(b"\n")[:-1]:
        ledger.hear(json.loads(line))
    ledger.kills += 1
    ledger.killed_while.update(left_behind(folder))


def left_behind(folder: Path) -> Iterator[str]:
    """What a killed service was in the middle of."""
    connection = sqlite3.connect(f"file:{folder / 'jobs.sqlite'}?mode=ro", uri=True)
    status = dict(connection.execute("SELECT id, status FROM jobs"))
    connection.close()
    for name in ("queued", "in_progress"):
        if name in status.values():
            yield f"jobs {name}"
    for path in (folder / "partial").iterdir():
        yield "files half-written" if list(path.iterdir()) else "a folder for files made"
    if any(status.get(path.name) != "completed" for path in (folder / "results").iterdir()):
        yield "files finished and the job not"


def prove(engines: Path, folder: Path, ledger: Ledger, patience: float = 120) -> Counter[str]:
    """Start the service once more, let it finish, and compare what is there with what was said.

    Returns:
        Status, or reason of a failure, to jobs; what is wrong is added to the ledger's faults.
    """
    wrong = ledger.faults.append
    with open_service([engines], options(folder), check=False) as service:
        ids = dict(ledger.accepted)
        for key in ledger.asked.keys() - ids.keys() - ledger.refused:  # the answer was lost
            with suppress(QueueFullError, ConflictError, NotFoundError):
                ids[key] = service.submit(VideoRequest(**ledger.asked[key]), "", key).id
        end = time.monotonic() + patience
        jobs = {job.id: job for job in listed(service)}
        while any(job.live for job in jobs.values()) and time.monotonic() < end:
            time.sleep(0.05)
            jobs = {job.id: job for job in listed(service)}
        for key, job_id in ids.items():
            if job_id in ledger.deleted:
                if job_id in jobs:
                    wrong(f"{job_id} was deleted and is there")
            elif job_id not in jobs and job_id not in ledger.deleting:
                wrong(f"{job_id} was accepted and is not there")
            elif job_id in jobs and service.submit(VideoRequest(**ledger.asked[key]), "", key).id != job_id:
                wrong(f"{key} is another job than {job_id}")
        if stray := jobs.keys() - set(ids.values()):
            wrong(f"nobody asked for {stray}")
        if len(set(ids.values())) != len(ids):
            wrong("two keys are one job")
        outcomes = Counter(job.error.code if job.error else job.status for job in jobs.values())
        for job in jobs.values():
            if job.live:
                wrong(f"{job.id} is {job.status} after {patience} s")
            elif job.status == "completed":
                check_files(service, job, ledger)
            if job.id in ledger.ends and ledger.ends[job.id][:2] != as_seen(job, ledger.ends[job.id][1]):
                wrong(f"{job.id} had ended as {ledger.ends[job.id]} and is {job.status}, {job.completed_at}")
        completed = {job.id for job in jobs.values() if job.status == "completed"}
        if (found := {path.name for path in (folder / "results").iterdir()}) != completed:
            wrong(f"results of {found ^ completed} are there or missing")
        if list((folder / "partial").iterdir()):
            wrong("something half-written is left")
    return outcomes


def as_seen(job: Any, at: float) -> tuple[str, float]:
    """How a job has ended, as whoever saw it was told: over HTTP in whole seconds, without `cancelled`."""
    if isinstance(at, int):
        return "failed" if job.status == "cancelled" else job.status, int(job.completed_at)
    return job.status, job.completed_at


def listed(service: VideoService) -> Iterator[Any]:
    """All jobs of a service."""
    after, more = None, True
    while more:
        page, more = service.list(after=after, limit=100, order="asc")
        yield from page
        after = page[-1].id if page else None


def check_files(service: VideoService, job: Any, ledger: Ledger) -> None:
    """A completed job's files: whole, its own, and the ones that were seen before."""
    import av
    from PIL import Image

    try:
        with av.open(str(service.file(job.id))) as container:
            frames = sum(1 for _ in container.decode(video=0))
        made = read_metadata(service.file(job.id))
        for variant in VARIANTS[1:]:
            with Image.open(service.file(job.id, "", variant)) as picture:
                picture.load()
    except Exception as error:  # noqa: BLE001 (whatever a damaged file makes of it)
        ledger.faults.append(f"{job.id} cannot be read: {error!r}")
        return
    asked = job.request
    if frames != asked.frames or (made["prompt"], made["seed"]) != (asked.prompt, asked.seed):
        ledger.faults.append(f"{job.id} holds something else: {frames} frames, {made}")
    if {name: service.file(job.id, "", name).stat().st_size for name in VARIANTS} != job.files:
        ledger.faults.append(f"{job.id} has files of other sizes than {job.files}")
    if job.id in ledger.ends and ledger.ends[job.id][2] != digest(service, job.id):
        ledger.faults.append(f"{job.id} is another file than before")


if __name__ == "__main__":
    load(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
