"""Who starts next: the order, and that nobody is overtaken for ever."""

from __future__ import annotations

import random

import pytest

from reelrt.service.jobs import Job, VideoRequest
from reelrt.service.line import Line
from reelrt.service.task import Task

SMALL, LARGE = (4, 4, 4, 4), (4, 16, 32, 32)
AGEING = 30.0


def task(number, shape=SMALL, at=None, priority=0):
    job = Job(f"video_{number}", "", VideoRequest("red"))
    return Task(job, ((number if at is None else at) - priority * AGEING, number), shape, 4)


def starts(line, shape):
    """As a batch of a size that has room would."""
    return line.take(lambda each: each.shape == shape)


def take(line, batch):
    """As a batch does: when it is empty, whoever is first."""
    return line.take(lambda each: not batch or each.shape == batch[0].shape)


def test_first_come_first_served_within_a_size():
    line, tasks = Line(4), [task(number) for number in range(5)]
    for each in reversed(tasks):
        line.add(each)
    assert [line.position(each) for each in tasks] == [0, 1, 2, 3, 4]
    assert [starts(line, SMALL) for _ in tasks] == tasks
    assert starts(line, SMALL) is None and len(line) == 0
    assert line.position(tasks[0]) is None


@pytest.mark.parametrize(("waiting", "stream"), [(LARGE, SMALL), (SMALL, LARGE)])
def test_a_stream_of_one_size_does_not_starve_another(waiting, stream):
    """However many of the batch's own size come, four of them overtake; then the batch runs empty."""
    line = Line(4)
    line.add(late := task(10, waiting))
    started = []
    for number in range(11, 100):
        line.add(task(number, stream))
        started.append(starts(line, stream))
    assert started.index(None) == 4 and set(started[4:]) == {None}
    assert line.take(lambda _: True) is late  # what an empty batch takes


def test_overtaking_counts_for_everybody_who_was_passed():
    line = Line(1)
    first, second = task(1, LARGE), task(2, (4, 8, 8, 8))
    for each in (first, second, task(3), task(4)):
        line.add(each)
    assert starts(line, SMALL).job.id == "video_3"
    assert starts(line, SMALL) is None
    assert starts(line, first.shape) is first
    assert starts(line, SMALL) is None  # the second was overtaken as well
    assert starts(line, second.shape) is second
    assert starts(line, SMALL).job.id == "video_4"


def test_a_point_of_priority_is_worth_its_time_and_no_more():
    line = Line(4)
    urgent, patient, later = task(1, at=100, priority=2), task(2, at=45), task(3, at=39)
    for each in (urgent, patient, later):
        line.add(each)
    assert [starts(line, SMALL) for _ in range(3)] == [later, urgent, patient]


def test_nobody_is_overtaken_more_often_than_that():
    """Random arrivals of random sizes and priorities, three slots; counted from what started when."""
    chance, line = random.Random(7), Line(4)
    batch: list[Task] = []
    arrived: dict[Task, int] = {}
    started: list[Task] = []
    for number in range(3000):
        if number < 2900 and len(line) < 30:
            new = task(number, chance.choice([SMALL, LARGE, (4, 2, 2, 2)]), priority=chance.randint(-3, 3))
            line.add(new)
            arrived[new] = len(started)
        batch = [each for each in batch if chance.random() > 0.3]
        while len(batch) < 3 and (taken := take(line, batch)) is not None:
            batch.append(taken)
            started.append(taken)
    assert len(started) > 900 and len(line) == 0
    for index, each in enumerate(started):
        overtakers = [other for other in started[arrived[each] : index] if other.order > each.order]
        assert len(overtakers) <= 4
