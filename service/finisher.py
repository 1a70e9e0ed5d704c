"""From final latents to files: decoding, encoding, and the commit that makes a job completed.

Decoding has a thread per model and encoding one for all, so that neither stalls a step loop. A file is
on the disk under its name before the job is completed; a job that was ended meanwhile leaves none.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from reelrt.runtime.formats import Frames
from reelrt.runtime.memory import peak_memory
from reelrt.runtime.pipeline import check_finite
from reelrt.runtime.session import Float32
from reelrt.runtime.video import Video
from reelrt.service import pictures
from reelrt.service.board import DEADLINE, Board
from reelrt.service.results import PICTURES, Results
from reelrt.service.task import Task
from reelrt.service.worker import Worker

DECODED_AHEAD = 2
"""Videos whose frames may wait for the encoder."""


class Finisher:
    """Threads that turn latents into files.

    Args:
        board: The live tasks.
        results: Where the files go.
    """

    def __init__(self, board: Board, results: Results) -> None:
        self._board, self._results = board, results
        self._decoders: dict[str, ThreadPoolExecutor] = {}
        self._encoder = ThreadPoolExecutor(1, "reelrt-encode")
        self._room = threading.Semaphore(DECODED_AHEAD)
        self._lock, self._stop = threading.Lock(), False
        self._pending: Counter[str] = Counter()
        self._previewer = ThreadPoolExecutor(1, "reelrt-preview")
        self._shown: set[str] = set()

    @property
    def pending(self) -> int:
        """Tasks that are being finished."""
        return self._pending.total()

    def pending_of(self, worker: Worker) -> int:
        """Tasks of one model that are being finished."""
        return self._pending[worker.name]

    def take(self, worker: Worker, task: Task, latents: Float32) -> None:
        """Take over a task; returns at once."""
        with self._lock:
            self._pending[worker.name] += 1
        if worker.name not in self._decoders:
            self._decoders[worker.name] = ThreadPoolExecutor(1, f"reelrt-decode-{worker.name}")
        self._decoders[worker.name].submit(self._decode, worker, task, latents)

    def _done(self, worker: Worker) -> None:
        with self._lock:
            self._pending[worker.name] -= 1
        worker.wake()

    def _gone(self, task: Task) -> bool:
        return task.over or self._stop

    def _decode(self, worker: Worker, task: Task, latents: Float32) -> None:
        while not self._room.acquire(timeout=0.1):
            if self._stop:
                return
        handed_on = False
        try:
            with self._board.failing(task):
                check_finite(latents)
                parts = []
                with worker.turns.stage():
                    began = time.perf_counter()
                    for part in worker.pipe.decode(latents[None]):
                        parts.append(part)
                        if self._gone(task):
                            return
                frames = np.concatenate(parts)
                task.timings["decode"] = time.perf_counter() - began
                self._encoder.submit(self._encode, worker, task, frames, latents)
                handed_on = True
        finally:
            if not handed_on:
                self._room.release()
                self._done(worker)

    def _encode(self, worker: Worker, task: Task, frames: Frames, latents: Float32) -> None:
        try:
            if not self._gone(task):
                with self._board.failing(task):
                    self._write(worker, task, frames, latents)
        finally:
            self._room.release()
            self._done(worker)

    def _write(self, worker: Worker, task: Task, frames: Frames, latents: Float32) -> None:
        assert task.prepared is not None
        began, asked = time.perf_counter(), task.job.request
        metadata = worker.pipe.metadata(task.prepared.plan, task.prepared.cut)
        video = Video(frames, latents[None], metadata, task.timings, peak_memory())
        with self._results.writing(task.job.id) as folder:
            video.save(folder / f"video.{asked.format}", fps=asked.fps)
            (folder / PICTURES["thumbnail"]).write_bytes(pictures.thumbnail(frames))
            (folder / PICTURES["spritesheet"]).write_bytes(pictures.spritesheet(frames))
        task.timings["encode"] = time.perf_counter() - began
        completed = False
        try:
            if task.expires is not None and task.expires <= time.time():
                self._board.end(task, "failed", DEADLINE)
            else:
                completed = self._board.end(task, "completed", files=self._results.files(task.job.id))
        finally:
            if not completed:  # cancelled or deleted meanwhile, too late, or not to be written down
                self._results.remove(task.job.id)

    def show(self, worker: Worker, task: Task, latents: Float32) -> None:
        """Make a preview of a task, unless its last one is still being made; returns at once."""
        if task.job.id not in self._shown:
            self._shown.add(task.job.id)
            self._previewer.submit(self._preview, worker, task, latents)

    def _preview(self, worker: Worker, task: Task, latents: Float32) -> None:
        try:
            if not self._gone(task) and np.isfinite(latents).all():
                frames = worker.pipe.engines.engines["vae_decoder"].profile["frames"].min
                begin = (latents.shape[1] - frames) // 2
                part = np.ascontiguousarray(latents[None, :, begin : begin + frames])
                decoded = worker.pipe.sessions.run("vae_decoder", {"latents": part})["frames"][0]
                self._board.tell(task, pictures.preview(decoded))
        finally:
            self._shown.discard(task.job.id)

    def close(self) -> None:
        """Stop after what is being done; tasks that are not finished are left on the board."""
        self._stop = True
        pools: list[Callable[..., None]] = [each.shutdown for each in self._decoders.values()]
        for shutdown in (*pools, self._encoder.shutdown, self._previewer.shutdown):
            shutdown(wait=True, cancel_futures=True)
