"""States in the middle of a trajectory, on disk, so that a remix goes on from there.

    trajectories/ID/STEP.npy    of finished jobs, up to a number of bytes; the ones unused longest go
    inputs/ID.npy               what an accepted remix starts from; it is its own until it is over

Losing one costs a remix, never a video. Knows nothing of solvers: a state is an array.
"""

from __future__ import annotations

import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from reelrt.errors import StorageError
from reelrt.runtime.session import Float32
from reelrt.service.disk import log, refused, unusable
from reelrt.service.results import link, synchronise


class Trajectories:
    """Stored states, bounded in bytes.

    Args:
        folder: The service's folder.
        limit: Most bytes; 0 keeps none.

    Raises:
        StorageError: The folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._kept, self._inputs, self.limit = folder / "trajectories", folder / "inputs", limit
        self._lock = threading.Lock()
        self._sizes: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._bytes = 0
        try:
            for each in (self._kept, self._inputs):
                each.mkdir(parents=True, exist_ok=True)
            found = [(path.stat().st_mtime, path) for path in self._kept.glob("*/*.npy")]
        except OSError as error:
            raise unusable(folder, error) from error
        for _, path in sorted(found):
            if path.stem.isdecimal():
                self._count(path.parent.name, int(path.stem), path.stat().st_size)
            else:
                path.unlink()
        self._trim()

    @property
    def bytes(self) -> int:
        """Size of all stored states."""
        return self._bytes

    def steps(self, job_id: str) -> list[int]:
        """The steps at which there is a state of a job."""
        with self._lock:
            return sorted(step for each, step in self._sizes if each == job_id)

    def keep(self, job_id: str, step: int, state: Float32) -> None:
        """Store a state, float32 [R, C, F, h, w]; the ones unused longest make room.

        Raises:
            OSError: The disk is full.
        """
        if state.nbytes > self.limit:
            return
        path = self._path(job_id, step)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        try:
            np.save(partial, state)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        with self._lock:
            self._count(job_id, step, state.nbytes)
        self._trim()

    def _count(self, job_id: str, step: int, size: int) -> None:
        self._bytes += size - self._sizes.pop((job_id, step), 0)
        self._sizes[job_id, step] = size

    def _trim(self) -> None:
        while True:
            with self._lock:
                if self._bytes <= self.limit:
                    return
                (job_id, step), size = self._sizes.popitem(last=False)
                self._bytes -= size
            self._path(job_id, step).unlink(missing_ok=True)

    def _path(self, job_id: str, step: int) -> Path:
        return self._kept / job_id / f"{step}.npy"

    def give(self, job_id: str, step: int, other: str) -> bool:
        """Make a job's state at a step the input of another one; whether it was there.

        Raises:
            StorageError: The disk is full.
        """
        source, target = self._path(job_id, step), self._inputs / f"{other}.npy"
        with self._lock:
            if (job_id, step) not in self._sizes:
                return False
            self._sizes.move_to_end((job_id, step))
        try:
            link(source, target)
            for path in (target, self._inputs):
                synchronise(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise refused("the state to go on from cannot be kept", target, error) from error
        return True

    def input(self, job_id: str) -> Float32:
        """What a remix starts from.

        Raises:
            StorageError: It is not there, or damaged.
        """
        path = self._inputs / f"{job_id}.npy"
        try:
            state: Float32 = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            log.warning("%s: %s", path, error)
            text = "the state that this remix goes on from cannot be read."
            raise StorageError(text, "Submit the remix again.") from error
        return state

    def forget_input(self, job_id: str) -> None:
        """A remix is over."""
        (self._inputs / f"{job_id}.npy").unlink(missing_ok=True)

    def remove(self, job_id: str) -> None:
        """Remove all of a job."""
        self._forget_states(job_id)
        self.forget_input(job_id)

    def _forget_states(self, job_id: str) -> None:
        with self._lock:
            for key in [key for key in self._sizes if key[0] == job_id]:
                self._bytes -= self._sizes.pop(key)
        shutil.rmtree(self._kept / job_id, ignore_errors=True)

    def keep_only(self, completed: Iterable[str], live: Iterable[str]) -> None:
        """Remove the states of jobs that are not completed, and the inputs of those that are over."""
        kept, needed = set(completed), set(live)
        for folder in self._kept.iterdir():
            if folder.name not in kept:
                self._forget_states(folder.name)
        for path in self._inputs.iterdir():
            if path.stem not in needed:
                path.unlink(missing_ok=True)
