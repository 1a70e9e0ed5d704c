"""The loop's bookkeeping: rows stay contiguous, counters are per slot, slots are reused."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from reelrt.runtime.loop import Request, StepLoop


class Tally:
    """Stands for a device: a launch adds each row's next table entry to its latents."""

    def __init__(self, capacity=3, table_rows=8):
        self.capacity, self.table_rows = capacity, table_rows
        self.latents = np.zeros((capacity, 1, 1, 1, 1), np.float32)
        self.tables = np.zeros((capacity, table_rows), np.float32)
        self.steps = np.zeros(capacity, np.int64)
        self.launches = []
        self.moves = []

    def write(self, row, table, text, latents):
        self.tables[row, : len(table)] = table[:, 0]
        self.latents[row], self.steps[row] = latents, 0

    def move(self, source, target):
        self.moves.append((source, target))
        for buffer in (self.latents, self.tables, self.steps):
            buffer[target] = buffer[source]

    def launch(self, active):
        self.launches.append(active)
        for row in range(active):
            self.latents[row] += self.tables[row, self.steps[row]]
            self.steps[row] += 1

    def read_state(self, row):
        return self.latents[row][None].copy()

    def read(self, row):
        return self.latents[row].copy()


def request(*entries, start=0.0):
    table = np.array(entries, np.float32)[:, None]
    return Request(table, np.zeros((2, 1, 1), np.float32), np.full((1, 1, 1, 1), start, np.float32))


def test_each_slot_walks_its_own_table():
    loop = StepLoop(Tally())
    long, short = loop.admit(request(1, 10, 100)), loop.admit(request(2, 20, start=0.5))
    loop.step()
    assert (long.done, short.done) == (1, 1)
    loop.step()
    assert short.finished and not long.finished
    assert loop.latents(short).item() == 22.5
    loop.release(short)
    loop.step()
    assert long.finished
    assert loop.latents(long).item() == 111


def test_last_slot_moves_into_the_freed_row():
    device = Tally()
    loop = StepLoop(device)
    a, b, c = (loop.admit(request(*[base] * 4)) for base in (1, 2, 3))
    loop.step()
    loop.release(a)
    assert device.moves == [(2, 0)]
    assert (c.row, b.row) == (0, 1)
    assert loop.active == (c, b)
    loop.step()
    assert device.launches == [3, 2]
    assert loop.latents(c).item() == 6
    assert loop.latents(b).item() == 4


def test_releasing_the_last_row_moves_nothing():
    device = Tally()
    loop = StepLoop(device)
    a, b = loop.admit(request(1)), loop.admit(request(1))
    loop.release(b)
    loop.release(a)
    assert device.moves == []
    assert (loop.active, loop.free) == ((), 3)


def test_a_joining_request_starts_at_its_first_row():
    loop = StepLoop(Tally(capacity=2))
    first = loop.admit(request(1, 1, 1))
    loop.step()
    loop.step()
    late = loop.admit(request(5, 7))
    loop.step()
    loop.release(first)
    loop.step()
    assert late.finished
    assert loop.latents(late).item() == 12


def test_misuse_is_refused_and_harmless():
    loop = StepLoop(Tally(capacity=1, table_rows=2))
    for bad in (request(1, 1, 1), Request(np.zeros((0, 1), np.float32), *[np.zeros(1, np.float32)] * 2)):
        with pytest.raises(ValueError, match="1 to 2 rows"):
            loop.admit(bad)
    slot = loop.admit(request(1))
    with pytest.raises(ValueError, match="slots are taken"):
        loop.admit(request(1))
    loop.step()
    with pytest.raises(ValueError, match="release it first"):
        loop.step()
    loop.release(slot)
    with pytest.raises(ValueError, match="released before"):
        loop.release(slot)
    loop.admit(request(1))
    with pytest.raises(ValueError, match="released before"):
        loop.release(slot)
    assert len(loop.active) == 1


def test_clear_frees_every_slot():
    loop = StepLoop(Tally())
    loop.admit(request(1, 1))
    loop.step()
    loop.clear()
    assert loop.free == 3
    loop.step()
    slot = loop.admit(request(4))
    loop.step()
    assert loop.latents(slot).item() == 4


def test_random_comings_and_goings_keep_every_result():
    rng = np.random.default_rng(0)
    device = Tally(capacity=4)
    loop, running, finished = StepLoop(device), {}, 0
    while finished < 200:
        while loop.free and rng.random() < 0.7:
            entries = rng.integers(1, 1000, size=rng.integers(1, 9))
            running[loop.admit(request(*entries))] = entries
        loop.step()
        for slot in list(running):
            assert loop.latents(slot).item() == running[slot][: slot.done].sum()
            if slot.finished or rng.random() < 0.05:
                finished += 1
                loop.release(slot)
                del running[slot]
        assert [slot.row for slot in loop.active] == list(range(len(loop.active)))
    assert max(device.launches) == 4


def test_a_step_allocates_no_buffer():
    loop = StepLoop(Tally())
    for _ in range(3):
        loop.admit(request(*[1] * 8))
    loop.step()
    tracemalloc.start()
    loop.step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4096
