"""Who is told what happens to a job.

One thread of its own hands events to subscribers, however many there are: whoever publishes one never
waits. Knows nothing of how jobs are done or how events reach a client.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable

from reelrt.service.jobs import Event, EventKind

log = logging.getLogger("reelrt")


class Subscription:
    """Events of one job: a mailbox that keeps the newest of each kind, so a slow reader costs nothing.

    Several threads tell of a job; an event that another one overtook on its way is dropped, so that
    progress never goes back but for a job that starts again.

    Use it from one thread or event loop. A closed one takes no more; `with` closes it.

    Args:
        notify: Called whenever `take` has something.
        leave: Called once when it is closed.
        previews: Whether its reader wants images.
    """

    def __init__(
        self,
        notify: Callable[[], None] | None = None,
        leave: Callable[[Subscription], None] | None = None,
        previews: bool = True,
    ) -> None:
        self.previews = previews
        self._notify, self._leave = notify, leave
        self._arrived = threading.Condition()
        self._box: dict[EventKind, Event] = {}
        self._furthest = (0.0, 0)
        self._ended = False

    def take(self) -> list[Event]:
        """The events since the last call, in order; empty when there is none. Never waits."""
        with self._arrived:
            events = list(self._box.values())
            self._box.clear()
        return events

    def wait(self, timeout: float | None = None) -> list[Event]:
        """Wait for events, at most `timeout` seconds; empty when none came or it is closed."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._box or self._ended, timeout)
        return self.take()

    def put(self, event: Event) -> None:
        """Take an event in; what comes after the last one or was overtaken is dropped."""
        with self._arrived:
            if self._ended or (event.kind == "preview" and not self.previews):
                return
            reached = (event.job.started_at or 0.0, event.job.progress)
            if not event.last and reached < self._furthest:
                return
            self._furthest = reached
            self._box.pop(event.kind, None)
            self._box[event.kind] = event
            self._ended = event.last
            self._arrived.notify_all()
        if self._notify is not None:
            try:
                self._notify()
            except Exception:  # its reader is gone, an event loop that was closed, say
                log.warning("a watcher is gone", exc_info=True)
                self.close()

    def begin(self, event: Event) -> None:
        """Take in how things are, unless it was told the same kind of thing since they were looked at."""
        with self._arrived:
            known = event.kind in self._box
        if not known:
            self.put(event)

    def close(self) -> None:
        """Stop; may be called twice."""
        with self._arrived:
            self._ended = True
            self._arrived.notify_all()
        leave, self._leave = self._leave, None
        if leave is not None:
            leave(self)

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Hub:
    """All subscriptions, by job."""

    def __init__(self) -> None:
        self._subscriptions: dict[str, set[Subscription]] = defaultdict(set)
        self._changed = threading.Condition()
        self._pending: dict[tuple[str, EventKind], Event] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._deliver, name="reelrt-events", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._subscriptions.values()))

    def subscribe(self, job_id: str, notify: Callable[[], None] | None, previews: bool) -> Subscription:
        """A subscription that is told of everything from now on."""
        subscription = Subscription(notify, lambda left: self._leave(job_id, left), previews)
        with self._changed:
            self._subscriptions[job_id].add(subscription)
        return subscription

    def wanted(self, job_id: str, *, previews: bool = False) -> bool:
        """Whether anybody listens, or looks at previews."""
        with self._changed:
            return any(each.previews or not previews for each in self._subscriptions.get(job_id, ()))

    def publish(self, event: Event) -> None:
        """Hand an event to all who subscribed to its job; it takes the place of an older one of its kind."""
        key = event.job.id, event.kind
        with self._changed:
            if event.job.id in self._subscriptions:
                self._pending.pop(key, None)
                self._pending[key] = event
                self._changed.notify()

    def _leave(self, job_id: str, subscription: Subscription) -> None:
        with self._changed:
            left = self._subscriptions.get(job_id, set())
            left.discard(subscription)
            if not left:
                self._subscriptions.pop(job_id, None)

    def _deliver(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if not self._pending:
                    return
                event = self._pending.pop(next(iter(self._pending)))
                told = tuple(self._subscriptions.get(event.job.id, ()))
            for subscription in told:
                subscription.put(event)

    def close(self) -> None:
        """Deliver what was published, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        with self._changed:
            left = [each for subscriptions in self._subscriptions.values() for each in subscriptions]
        for subscription in left:
            subscription.close()
