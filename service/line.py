"""The line of waiting tasks: their order, and who may start next. Pure bookkeeping.

A batch holds videos of one size (the latents' shape). The rule:

1. The order is by time of submission, and a point of priority counts as so many seconds earlier. So
   whoever waits gains on everybody who comes later, and in the end is first whatever their priority.
2. The first of the line that fits the batch starts. It may overtake others of another size who are
   before it, but nobody is overtaken more than so many times: then nobody behind it starts, the batch
   runs empty, and it is its turn.

So a job waits for those before it, for a bounded number behind it, and for nobody else: neither do many
small videos starve a large one, nor the reverse.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator

from reelrt.service.task import Task


class Line:
    """Waiting tasks of one model. Its owner guards it with a lock.

    Args:
        overtakes: How often a task may be overtaken.
    """

    def __init__(self, overtakes: int) -> None:
        self._tasks: list[Task] = []
        self._overtakes = overtakes

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(tuple(self._tasks))

    def add(self, task: Task) -> None:
        """Let a task join, in its place."""
        insort(self._tasks, task, key=lambda each: each.order)

    def remove(self, task: Task) -> None:
        """Take a task out, if it is there."""
        if task in self._tasks:
            self._tasks.remove(task)

    def position(self, task: Task) -> int | None:
        """How many are before a task; None when it does not wait."""
        return self._tasks.index(task) if task in self._tasks else None

    def take(self, fits: Callable[[Task], bool]) -> Task | None:
        """Take the task that starts next out of the line.

        Args:
            fits: Whether a task can start now: it is ready, and of the batch's size.

        Returns:
            The task, or None when nobody may start.
        """
        for index, task in enumerate(self._tasks):
            if fits(task):
                for passed in self._tasks[:index]:
                    passed.overtaken += 1
                return self._tasks.pop(index)
            if task.overtaken >= self._overtakes:
                return None
        return None
