"""Watchers: the newest of each kind in order, the end last, and nobody is held up."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

from reelrt.service.board import Board
from reelrt.service.events import Hub
from reelrt.service.jobs import Event, Job, VideoRequest
from reelrt.service.task import Task

JOB = Job("video_1", "", VideoRequest("red"), status="in_progress", started_at=1.0)


def progress(number):
    return Event("progress", JOB.but(progress=number))


def test_the_newest_of_each_kind_is_kept_in_order():
    hub = Hub()
    subscription = hub.subscribe(JOB.id, None, previews=True)
    for event in (
        progress(1),
        Event("preview", JOB.but(progress=1), b"a"),
        progress(2),
        Event("completed", JOB),
        progress(3),
    ):
        subscription.put(event)
    events = subscription.take()
    assert [event.kind for event in events] == ["preview", "progress", "completed"]
    assert events[1].job.progress == 2
    assert subscription.take() == []
    hub.close()


def test_what_was_overtaken_on_its_way_is_dropped():
    hub = Hub()
    subscription = hub.subscribe(JOB.id, None, previews=True)
    queued = Event("queued", JOB.but(status="queued", started_at=None))
    seen = []
    for event in (queued, progress(3), Event("preview", JOB.but(progress=2), b"a"), queued, progress(2)):
        subscription.put(event)
        seen += subscription.take()
    assert [(event.kind, event.job.progress) for event in seen] == [("queued", 0), ("progress", 3)]
    again = JOB.but(started_at=JOB.started_at + 1)
    for event in (Event("progress", again), Event("failed", JOB)):
        subscription.put(event)
    assert [event.kind for event in subscription.take()] == ["progress", "failed"], "it started again"
    hub.close()


def test_how_things_were_does_not_take_the_place_of_what_happened_since():
    hub = Hub()
    subscription = hub.subscribe(JOB.id, None, previews=True)
    first, second = (Event("queued", JOB.but(status="queued", queue_position=place)) for place in (1, 2))
    subscription.put(first)
    subscription.begin(second)
    assert subscription.take() == [first]
    subscription.begin(progress(1))
    subscription.begin(Event("completed", JOB))
    assert [event.kind for event in subscription.take()] == ["progress", "completed"]
    hub.close()


def test_a_preview_that_takes_its_time_does_not_turn_progress_back():
    """The engine goes on while another thread has looked how far it is, and has not told it yet."""
    hub, looked, told = Hub(), threading.Event(), threading.Event()
    board = Board(SimpleNamespace(), SimpleNamespace(), hub, SimpleNamespace(), retention=1)
    task = Task(JOB, (0, 0), (4, 2, 8, 8), launches=10, started_at=1.0, done=2)
    subscription = hub.subscribe(JOB.id, None, previews=True)
    now = board.now

    def slow(task):
        job = now(task)
        if threading.current_thread() is previewer:
            looked.set()
            assert told.wait(20)
        return job

    board.now = slow
    previewer = threading.Thread(target=board.tell, args=(task, b"a picture"))
    previewer.start()
    assert looked.wait(20)
    task.done = 3
    board.tell(task)
    told.set()
    previewer.join()
    board.clerk.close()
    hub.close()  # delivers all
    assert [event.job.progress for event in subscription.take()] == [30]


def test_whoever_wants_no_previews_gets_none():
    hub = Hub()
    plain, other = (hub.subscribe(JOB.id, None, previews=wanted) for wanted in (False, True))
    assert hub.wanted(JOB.id) and hub.wanted(JOB.id, previews=True) and not hub.wanted("video_2")
    hub.publish(Event("preview", JOB, b"a"))
    assert [event.image for event in other.wait(5)] == [b"a"]
    assert plain.take() == []
    other.close()
    assert not hub.wanted(JOB.id, previews=True) and len(hub) == 1
    hub.close()


def test_publishing_never_waits_and_what_piles_up_is_bounded():
    """A watcher that takes its time: a thousand events later there is one of each kind."""
    hub, go, calls = Hub(), threading.Event(), []

    def slow():
        calls.append(1)
        go.wait(20)

    subscription = hub.subscribe(JOB.id, slow, previews=True)
    began = time.perf_counter()
    for number in range(1000):
        hub.publish(progress(number))
    hub.publish(Event("completed", JOB))
    assert time.perf_counter() - began < 5 and len(hub._pending) <= 2
    go.set()
    kinds = []
    while "completed" not in kinds:
        events = subscription.wait(5)
        kinds += [event.kind for event in events]
    assert len(calls) <= 3 and kinds[-1] == "completed"
    hub.close()


def test_closing_wakes_whoever_waits():
    hub = Hub()
    subscription = hub.subscribe(JOB.id, None, previews=True)
    threading.Timer(0.05, hub.close).start()
    began = time.monotonic()
    assert subscription.wait(30) == []
    assert time.monotonic() - began < 10
