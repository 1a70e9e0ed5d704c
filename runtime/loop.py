"""The step loop: which request is in which row of the batch, and when it is done.

A slot is a row of the batch. Active slots stay contiguous, so that a launch covers rows 0 to n-1:
when one leaves, the last one moves into its row. Requests join and leave between any two launches.
Knows nothing of prompts, solvers, backends or pictures, and does no arithmetic on tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from reelrt.runtime.device_array import DeviceArray
from reelrt.runtime.ranges import span
from reelrt.runtime.session import Array, Float32, GpuStepSession, StepSession


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What the step engine needs to denoise one video.

    Attributes:
        table: Schedule rows, float32 [S, K]; S launches finish the request.
        text: Prompt embeddings [2, L, D], unconditional first, in the engine's dtype.
        latents: Starting latents at the schedule's scale, float32 [C, F, h, w]; on a GPU also an array
            there. Or the state [R, C, F, h, w] of a request that had come to the table's first row.
    """

    table: Float32
    text: Array
    latents: Float32 | DeviceArray


@dataclass(slots=True, eq=False)
class Slot:
    """A request in the batch: the row it occupies and how many launches it has seen."""

    row: int
    total: int
    done: int = 0

    @property
    def finished(self) -> bool:
        """Whether its table is at its end."""
        return self.done == self.total


class StepLoop:
    """Requests of one latent shape on their way through the step engine.

    Args:
        session: Buffers and launches; owned by this loop while it lives.
    """

    def __init__(self, session: StepSession) -> None:
        self._session = session
        self._slots: list[Slot] = []

    @property
    def active(self) -> Sequence[Slot]:
        """The slots in use, in the order of their rows."""
        return tuple(self._slots)

    @property
    def free(self) -> int:
        """How many more requests fit."""
        return self._session.capacity - len(self._slots)

    def admit(self, request: Request) -> Slot:
        """Let a request join the batch at the next launch.

        Raises:
            ValueError: No slot is free, or the table is empty or longer than the session takes.
        """
        if not self.free:
            raise ValueError(f"all {self._session.capacity} slots are taken")
        if not 0 < len(request.table) <= self._session.table_rows:
            raise ValueError(f"a table has 1 to {self._session.table_rows} rows, not {len(request.table)}")
        slot = Slot(len(self._slots), len(request.table))
        self._session.write(slot.row, request.table, request.text, request.latents)
        self._slots.append(slot)
        return slot

    def step(self) -> None:
        """Advance every active slot by one launch; none when nothing is active.

        Raises:
            ValueError: A finished slot was not released; its table has no further row.
            BackendError: The engine failed; clear the loop before using it again.
        """
        for slot in self._slots:
            if slot.finished:
                raise ValueError(f"the slot in row {slot.row} is finished; release it first")
        if self._slots:
            with span("step"):
                self._session.launch(len(self._slots))
        for slot in self._slots:
            slot.done += 1

    def latents(self, slot: Slot) -> Float32:
        """A copy of a slot's current latents, float32 [C, F, h, w]."""
        return self._session.read(slot.row)

    def state(self, slot: Slot) -> Float32:
        """A copy of all that a request needs to go on from here, float32 [R, C, F, h, w]."""
        return self._session.read_state(slot.row)

    def view(self, slot: Slot) -> DeviceArray:
        """A slot's current latents where they lie on the GPU, until the next launch; only there."""
        return cast("GpuStepSession", self._session).view(slot.row)

    def release(self, slot: Slot) -> None:
        """Take a slot out of the batch, finished or not; the last one moves into its row.

        Raises:
            ValueError: The slot is not in this loop, or no longer.
        """
        if slot not in self._slots:
            raise ValueError("this slot was released before")
        last = self._slots.pop()
        if last is slot:
            return
        self._session.move(last.row, slot.row)
        self._slots[slot.row] = last
        last.row = slot.row

    def clear(self) -> None:
        """Take every slot out of the batch."""
        self._slots.clear()
