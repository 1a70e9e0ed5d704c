"""The event loop's heartbeat notices what holds the loop up."""

from __future__ import annotations

import asyncio
import time

from reelrt.service.heartbeat import SECONDS, Heartbeat

STALL = 0.1


def test_a_stall_is_no_shorter_than_it_was() -> None:
    gaps: list[float] = []

    async def held_up() -> None:
        heart = Heartbeat(gaps.append)
        heart.start()
        await asyncio.sleep(10 * SECONDS)
        assert gaps, "it does not beat"
        gaps.clear()
        time.sleep(STALL)
        await asyncio.sleep(10 * SECONDS)
        heart.stop()
        beats = len(gaps)
        await asyncio.sleep(10 * SECONDS)
        assert len(gaps) == beats, "it goes on after its end"

    asyncio.run(held_up())
    assert max(gaps) >= STALL
    assert min(gaps) >= 0.9 * SECONDS
