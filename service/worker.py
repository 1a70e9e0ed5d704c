"""A model at work: the thread that owns its step loop, and the one that prepares tasks for it.

Tasks join and leave the running batch between launches. Between two launches nothing is done that waits
for a disk, a decoder or a client. Knows nothing of files.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from reelrt.errors import BackendError, DeviceMemoryError, StorageError
from reelrt.runtime.loop import Request, Slot, StepLoop
from reelrt.runtime.pipeline import TextToVideo
from reelrt.runtime.session import Float32, GpuSessions
from reelrt.service.board import DEADLINE, Board
from reelrt.service.line import Line
from reelrt.service.options import ServiceOptions
from reelrt.service.requests import point_step, replan, rows_per_step
from reelrt.service.task import Prepared, Task
from reelrt.service.turns import Turns

log = logging.getLogger("reelrt")

GUESS = 1.0
"""Seconds of a launch before one was measured."""


class Worker:
    """One model's line, batch and threads.

    Attributes:
        name: The model's name.
        pipe: The model.
        slots: Most tasks in its batch.
        turns: Who may use the engines now.

    Args:
        name: The model's name.
        pipe: The model.
        board: The live tasks.
        options: How the service is set up.
        finish: Takes over a task with its final latents; returns at once.
        congested: Whether so many of its tasks are being finished that none should start.
        show: Takes latents to make a preview of; returns at once.
    """

    def __init__(
        self,
        name: str,
        pipe: TextToVideo,
        board: Board,
        options: ServiceOptions,
        *,
        finish: Callable[[Worker, Task, Float32], None],
        congested: Callable[[Worker], bool],
        show: Callable[[Worker, Task, Float32], None],
    ) -> None:
        self.name, self.pipe = name, pipe
        self.slots = min(options.slots, pipe.engines.engines["step"].profile["batch"].max)
        self._board, self._options = board, options
        self._finish, self._congested, self._show = finish, congested, show
        self._line = Line(options.overtakes)
        # Where stages take turns with the step, a preview would stop every video that is being made.
        self._overlaps = not isinstance(pipe.sessions, GpuSessions) or pipe.sessions.overlaps
        self.turns = Turns(self._overlaps)
        self._batch: dict[Slot, Task] = {}
        self._loop: tuple[tuple[int, ...], StepLoop] | None = None
        self._wake = threading.Condition()
        self._news = self._paused = self._stop = False
        self._threads = [
            threading.Thread(target=target, name=f"reelrt-{kind}-{name}", daemon=True)
            for target, kind in ((self._drive, "step"), (self._prepare_all, "text"))
        ]

    def start(self) -> None:
        """Begin to work."""
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether its threads run."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def waiting(self) -> int:
        """Tasks in the line."""
        with self._wake:
            return len(self._line)

    @property
    def running(self) -> int:
        """Tasks in the batch."""
        return len(self._batch)

    def add(self, task: Task) -> None:
        """Let a task wait for its turn."""
        with self._wake:
            self._line.add(task)
            self._board.tell(task)
            self._notify()

    def forget(self, task: Task) -> None:
        """A task is over: it leaves the line now, or the batch before the next launch."""
        with self._wake:
            self._line.remove(task)
            self._notify()

    def position(self, task: Task) -> int | None:
        """How many are before a task in the line."""
        with self._wake:
            return self._line.position(task)

    def wake(self) -> None:
        """Look again whether a task may start."""
        with self._wake:
            self._notify()

    def _notify(self) -> None:
        self._news = True
        self._wake.notify_all()

    def pause(self) -> None:
        """Start no further task."""
        with self._wake:
            self._paused = True

    def stop(self) -> None:
        """End both threads; what runs is put back before the next launch."""
        with self._wake:
            self._stop = True
            self._notify()
        for thread in self._threads:
            thread.join()

    def seconds_to_next(self) -> float:
        """How long until a task that waits can start, by the launches measured lately."""
        launch = self._board.meter.recent(self.name) or GUESS
        left = [task.launches - task.done for task in tuple(self._batch.values())]
        if len(left) < self.slots:
            return launch
        return launch * max(min(left), 1)

    def overdue(self, now: float) -> list[Task]:
        """Tasks in the line whose deadline is over."""
        with self._wake:
            return [task for task in self._line if task.expires is not None and task.expires <= now]

    def _drive(self) -> None:
        while True:
            with self._wake:
                if not self._batch:
                    self._wake.wait_for(lambda: self._news or self._stop)
                if self._stop:
                    break
                self._news = False
            try:
                self._drop()
                while (task := self._next()) is not None:
                    self._join(task)
                if self._batch:
                    self._advance()
            except Exception as error:  # noqa: BLE001 (the service outlives every engine)
                self._failed(error)
        for task in self._batch.values():
            self._board.put_back(task)
        self._batch.clear()
        self._loop = None

    def _next(self) -> Task | None:
        """The next task that joins the batch now, taken out of the line."""
        with self._wake:
            if self._paused or len(self._batch) >= self.slots or self._congested(self):
                return None
            task = self._line.take(self._fits)
            if task is not None:
                for behind in self._line:
                    self._board.tell(behind)
            return task

    def _fits(self, task: Task) -> bool:
        if task.prepared is None or task.over:
            return False
        batch = self._batch.values()
        return not batch or (
            not task.alone and all(each.shape == task.shape and not each.alone for each in batch)
        )

    def _join(self, task: Task) -> None:
        with self._board.failing(task):
            self._admit(task)

    def _admit(self, task: Task) -> None:
        assert task.prepared is not None
        try:
            if self._loop is None or self._loop[0] != task.shape:
                self._loop = None  # its buffers go before the new ones come
                self._loop = task.shape, StepLoop(self.pipe.sessions.open_step(task.shape))
            with self.turns.step():
                slot = self._loop[1].admit(task.prepared.request)
        except BackendError:
            if not self._batch:
                raise
            task.alone = True  # there was no room for one more, say
            self.add(task)
            return
        self._batch[slot] = task
        now = time.time()
        task.timings["queue"], task.joined = now - task.job.created_at, time.perf_counter()
        self._board.started(task, now)

    def _drop(self) -> None:
        """Take tasks that are over, or too late, out of the batch."""
        now = time.time()
        for slot, task in tuple(self._batch.items()):
            late = task.expires is not None and task.expires <= now
            if not (late or task.over):
                continue
            self._leave(slot)
            if late and not task.over:
                self._board.clerk.do(lambda task=task: self._board.end(task, "failed", DEADLINE))  # type: ignore[misc]

    def _leave(self, slot: Slot) -> Task:
        assert self._loop is not None
        self._loop[1].release(slot)
        return self._batch.pop(slot)

    def _advance(self) -> None:
        """One launch, and what it brought each task."""
        assert self._loop is not None
        loop, began = self._loop[1], time.perf_counter()
        with self.turns.step():
            loop.step()
        self._board.meter.launched(self.name, len(self._batch), time.perf_counter() - began)
        for slot, task in tuple(self._batch.items()):
            task.done += 1
            if slot.finished:
                latents = loop.latents(slot)
                self._leave(slot)
                task.timings["denoise"] = time.perf_counter() - task.joined
                self._finish(self, task, latents)
            else:
                self._look_at(loop, slot, task)
            self._board.tell(task)

    def _look_at(self, loop: StepLoop, slot: Slot, task: Task) -> None:
        """Keep a state for remixes, and show a preview, where it is time to."""
        assert task.prepared is not None
        step = task.prepared.points.get(task.done)
        if step is not None:
            job_id, state, keep = task.job.id, loop.state(slot), self._board.trajectories.keep
            self._board.clerk.do(
                lambda: keep(job_id, step, state) if task.outcome in (None, "completed") else None
            )
        every = self._options.preview_every if self._overlaps else 0
        if every and task.done % every == 0 and self._board.hub.wanted(task.job.id, previews=True):
            self._show(self, task, loop.latents(slot))

    def _failed(self, error: Exception) -> None:
        """The engine failed: a task that was alone fails; of several, each is tried again, alone."""
        tasks = [task for task in self._batch.values() if not task.over]
        self._batch.clear()
        self._loop = None
        log.warning("%s failed with %d in its batch: %s", self.name, len(tasks), error)
        if len(tasks) == 1:
            self._board.fail(tasks[0], error)
            return
        if tasks and isinstance(error, DeviceMemoryError):
            self.slots = max(1, len(tasks) - 1)
        with self._wake:
            for task in tasks:
                task.alone = True
                self._board.put_back(task)
                self._line.add(task)
            self._notify()

    def _prepare_all(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stop or self._unprepared() is not None)
                task = self._unprepared()
                if self._stop or task is None:
                    return
                task.preparing = True
            with self._board.failing(task):
                task.prepared = self._prepare(task)
            self.wake()

    def _unprepared(self) -> Task | None:
        """The first task that has to be prepared: of as many as could start soon."""
        ahead = 2 * self.slots + self._options.overtakes
        near = (task for index, task in enumerate(self._line) if index < ahead)
        return next((task for task in near if not task.preparing), None)

    def _prepare(self, task: Task) -> Prepared:
        """Encode the prompts and draw the noise, or load what a remix goes on from."""
        began, asked = time.perf_counter(), task.job.request
        plan = replan(asked, self.pipe)
        hits, misses = self.pipe.text.hits, self.pipe.text.misses
        with self.turns.stage():
            request, cut = self.pipe.encode(plan)
        missed = self.pipe.text.misses - misses
        self._board.meter.count("hit", "prompt", self.pipe.text.hits - hits)
        self._board.meter.count("miss", "prompt", missed)
        reused = task.job.reused if missed else (*task.job.reused, "prompt")
        start, rows = 0, rows_per_step(plan)
        if asked.remix_of is not None and asked.remix_from is not None:
            start = point_step(asked.remix_from, plan.steps)
            state = self._board.trajectories.input(task.job.id)
            if state.shape[1:] != plan.shape or len(state) != self.pipe.limits.geometry.state_rows:
                raise StorageError(f"the state to go on from has another shape {state.shape}.")
            request = Request(request.table[start * rows :], request.text, state)
        points = {}
        if self._options.trajectory_bytes:
            steps = (point_step(point, plan.steps) for point in self._options.remix_points)
            points = {(step - start) * rows: step for step in steps if start < step < plan.steps}
        task.timings["text"] = time.perf_counter() - began
        return Prepared(plan, request, cut, tuple(dict.fromkeys(reused)), points)
