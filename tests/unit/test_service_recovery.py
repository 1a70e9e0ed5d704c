"""What a service makes of a folder that another one left in any state."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from reelrt.errors import StorageError
from reelrt.service.jobs import Job, VideoRequest
from reelrt.service.recovery import recover
from reelrt.service.results import Results
from reelrt.service.store import JobStore
from reelrt.service.trajectories import Trajectories

REQUEST = VideoRequest("red", model="toy", width=64, height=64, frames=4, steps=4, seed=1)
STATE = np.ones((3, 4, 4, 8, 8), np.float32)


class Left:
    """A folder as a killed service leaves it, with its parts."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.store = JobStore(folder / "jobs.sqlite")
        self.results = Results(folder, 1 << 30, 0)
        self.trajectories = Trajectories(folder, 1 << 30)

    def add(self, name, status="queued", starts=0, files=()):
        self.store.add(Job(name, "", REQUEST, created_at=time.time()), name, "asked", None)
        for _ in range(starts):
            self.store.started(name, time.time())
        if files:
            with self.results.writing(name) as partial:
                for file in files:
                    (partial / file).write_bytes(b"x" * 10)
        if status not in ("queued", "in_progress"):
            job = self.store.get(name)
            self.store.finish(job.but(status=status, completed_at=5.0, files=self.results.files(name)))

    def recover(self, **changes):
        values = {"models": ["toy"], "attempts": 3, "retention": 100.0, **changes}
        return [job.id for job in recover(self.store, self.results, self.trajectories, **values)]


@pytest.fixture
def left(tmp_path):
    return Left(tmp_path / "state")


def test_what_was_not_over_waits_again_in_its_order(left):
    for number in range(3):
        left.add(f"video_{number}", starts=number)
    assert left.recover() == ["video_0", "video_1", "video_2"]
    assert [left.store.get(f"video_{number}").status for number in range(3)] == ["queued"] * 3
    assert left.store.get("video_2").attempts == 2


def test_files_of_a_job_that_was_not_committed_go_and_it_is_done_again(left):
    left.add("video_1", starts=1, files=["video.mp4"])
    (left.folder / "partial" / "video_2").mkdir()
    (left.folder / "partial" / "video_2" / "video.mp4").write_bytes(b"half")
    (left.folder / "results" / "stray.txt").write_bytes(b"?")
    assert left.recover() == ["video_1"]
    assert not list((left.folder / "results").iterdir()) and not list((left.folder / "partial").iterdir())
    assert left.results.bytes == 0


def test_what_is_completed_stays_and_a_lost_file_is_told(left):
    for name in ("video_1", "video_2", "video_3"):
        left.add(name, "completed", files=["video.mp4", "thumbnail.jpg"])
    shutil.rmtree(left.folder / "results" / "video_2")
    (left.folder / "results" / "video_3" / "video.mp4").write_bytes(b"short")
    assert left.recover() == []
    assert left.store.get("video_1").status == "completed" and left.results.path("video_1", "video").is_file()
    for name in ("video_2", "video_3"):
        job = left.store.get(name)
        assert (job.status, job.error.code, job.files) == ("failed", "file_lost", {})
        assert left.results.path(name, "video") is None


def test_a_job_that_ended_the_service_too_often_fails(left):
    left.add("video_1", starts=3)
    left.add("video_2", starts=3)
    left.store.put_back("video_2")  # stopped in good order
    assert left.recover() == ["video_2"]
    job = left.store.get("video_1")
    assert (job.status, job.error.code) == ("failed", "interrupted") and "3 times" in job.error.message
    assert job.expires_at == pytest.approx(time.time() + 100, abs=5)
    assert left.recover() == ["video_2"]
    assert left.store.get("video_1") == job


def test_a_model_that_is_gone_fails_its_jobs(left):
    left.add("video_1")
    assert left.recover(models=["other"]) == []
    assert left.store.get("video_1").error.code == "model_gone"


def test_states_are_kept_for_what_is_completed_and_what_waits(left):
    left.add("video_1", "completed", files=["video.mp4"])
    left.add("video_2", starts=1)
    for name in ("video_1", "video_2", "video_3"):
        left.trajectories.keep(name, 2, STATE)
    assert left.trajectories.give("video_1", 2, "video_2")
    assert left.trajectories.give("video_1", 2, "video_9")
    assert left.recover() == ["video_2"]
    again = Trajectories(left.folder, 1 << 30)
    assert (again.steps("video_1"), again.steps("video_2"), again.steps("video_3")) == ([2], [], [])
    assert again.input("video_2").tobytes() == STATE.tobytes()
    with pytest.raises(StorageError, match="cannot be read"):
        again.input("video_9")


def test_states_are_bounded_and_the_ones_unused_longest_go(left):
    small = Trajectories(left.folder, int(STATE.nbytes * 2.5))
    for step in (1, 2):
        small.keep("video_1", step, STATE)
    assert small.give("video_1", 1, "video_2")  # used again
    small.keep("video_1", 3, STATE)
    assert small.steps("video_1") == [1, 3] and small.bytes <= small.limit
    assert len(list((left.folder / "trajectories").rglob("*.npy"))) == 2
    assert not small.give("video_1", 2, "video_3")
    small.keep("video_1", 4, np.zeros((9, *STATE.shape), np.float32))
    assert small.steps("video_1") == [1, 3]


def test_the_first_end_is_the_only_one(left):
    left.add("video_1", starts=1)
    job = left.store.get("video_1")
    assert left.store.finish(job.but(status="cancelled", completed_at=1.0))
    assert not left.store.finish(job.but(status="completed", completed_at=2.0))
    left.store.started("video_1", 3.0)
    left.store.put_back("video_1")
    assert left.store.get("video_1").status == "cancelled"
    assert left.store.remove("video_1") and not left.store.remove("video_1")
    assert not left.store.finish(job.but(status="failed", completed_at=2.0))


def test_what_is_accepted_is_on_the_disk(left):
    """Another connection, and a copy of the files as they are now, both have it."""
    left.add("video_1")
    for folder in (left.folder, shutil.copytree(left.folder, left.folder.with_name("copy"))):
        connection = sqlite3.connect(folder / "jobs.sqlite")
        assert connection.execute("SELECT id FROM jobs").fetchall() == [("video_1",)]
        connection.close()
    (mode,) = left.store._connection.execute("PRAGMA journal_mode").fetchone()
    (synchronous,) = left.store._connection.execute("PRAGMA synchronous").fetchone()
    assert (mode, synchronous) == ("wal", 2)


@pytest.mark.parametrize("damage", ["garbage", "version", "folder"])
def test_a_database_that_cannot_be_used_says_so(left, damage):
    left.store.close()
    path = left.folder / "jobs.sqlite"
    if damage == "garbage":
        path.write_bytes(b"this is no database at all" * 100)
    elif damage == "version":
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 9")
        connection.close()
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(StorageError, match=r"jobs\.sqlite"):
        JobStore(path)


def test_a_file_whose_folder_is_not_synchronised_still_counts(left, monkeypatch):
    def fails(path):
        if path == left.folder / "results":
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("reelrt.service.results.synchronise", fails)
    with pytest.raises(StorageError, match="Input/output error"):
        left.add("video_1", files=["video.mp4"])
    assert left.results.bytes == 10
    left.results.remove("video_1")
    assert left.results.bytes == 0


def test_what_two_remove_at_once_is_taken_off_once(left):
    for name in ("video_1", "video_2"):
        left.add(name, "completed", files=["video.mp4", "thumbnail.jpg"])
    assert left.results.bytes == 40
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(left.results.remove, ["video_1"] * 16))
    assert left.results.bytes == 20
    assert Results(left.folder, 1 << 30, 0).bytes == 20
