"""Sessions whose launches a test lets through one by one, and makes fail. What runs is the real engine."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any


class Gate:
    """Stands between a pipeline and its sessions.

    Attributes:
        batches: The number of active rows of every launch.
        faults: Stage (`step`, `text_encoder`, `vae_decoder`) to errors that its next runs raise.
        shapes: Latents' shapes of the step loops that were opened.
        waiting: Set while a launch waits to be let through.
    """

    def __init__(self, sessions: Any, is_open: bool = True) -> None:
        self._sessions = sessions
        self._permits = threading.Semaphore(0)
        self.is_open = is_open
        self.waiting = threading.Event()
        self.batches: list[int] = []
        self.shapes: list[tuple[int, ...]] = []
        self.faults: dict[str, list[Exception]] = {"step": [], "text_encoder": [], "vae_decoder": []}

    def let(self, launches: int) -> None:
        """Let so many more launches through."""
        self._permits.release(launches)

    def open(self) -> None:
        """Let everything through from now on."""
        self.is_open = True
        self._permits.release(1000)

    def shut(self) -> None:
        """Let nothing more through."""
        self.is_open = False
        with suppress(ValueError):
            while self._permits.acquire(blocking=False):
                pass

    def run(self, stage: str, inputs: Any) -> Any:
        self._fault(stage)
        return self._sessions.run(stage, inputs)

    def open_step(self, latents: Any) -> Any:
        self.shapes.append(latents)
        return _Step(self, self._sessions.open_step(latents))

    def passes(self, active: int) -> None:
        self.waiting.set()
        while not self.is_open and not self._permits.acquire(timeout=0.02):
            pass
        self.waiting.clear()
        self.batches.append(active)
        self._fault("step")

    def _fault(self, stage: str) -> None:
        if self.faults[stage]:
            raise self.faults[stage].pop(0)


class _Step:
    def __init__(self, gate: Gate, session: Any) -> None:
        self._gate, self._session = gate, session

    def launch(self, active: int) -> None:
        self._gate.passes(active)
        self._session.launch(active)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)
