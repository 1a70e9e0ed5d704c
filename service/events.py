"""Who is told what happens to a job."""

from __future__ import annotations

from reelrt.service.jobs import Event


class Subscription:
    """Events of one job: a mailbox that keeps the newest of each kind, so a slow reader costs nothing.

    Use it from one thread or event loop. A closed one takes no more; `with` closes it.
    """

    def take(self) -> list[Event]:
        """The events since the last call, in order; empty when there is none. Never waits."""
        raise NotImplementedError

    def wait(self, timeout: float | None = None) -> list[Event]:
        """Wait for events, at most `timeout` seconds; empty when none came or it is closed."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop; may be called twice."""
        raise NotImplementedError
