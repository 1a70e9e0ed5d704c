"""A request gives the same bytes whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest

from reelrt.runtime.loop import Request, StepLoop
from reelrt.runtime.request import plan

pytestmark = pytest.mark.timeout(900)  # the first test exports the models

PROMPTS = [
    "a red circle moving right on a black background",
    "a blue square growing on a gray background",
    "a green triangle moving up on a black background",
    "a white circle shrinking on a gray background",
    "a purple square moving down on a black background",
]
FRAMES, SIZE = 4, (48, 32)


def make_request(pipe, prompt, seed, steps, guidance=7.5, solver="ddim"):
    (job,) = plan(
        pipe._limits,
        [prompt],
        negative_prompt="",
        steps=steps,
        guidance=guidance,
        seed=seed,
        frames=FRAMES,
        size=SIZE,
        solver=solver,
        latents=None,
    )
    text = np.stack([pipe._text("")[0], pipe._text(prompt)[0]])
    return Request(job.table, text, job.latents)


def run(loop, slot):
    while not slot.finished:
        loop.step()
    return loop.latents(slot)


@pytest.fixture
def loop(small_pipe):
    return StepLoop(small_pipe._sessions.open_step((4, 4, 4, 6)))


def test_joining_a_running_batch_at_step_9(small_pipe, loop):
    """Others started before, have other schedules, and one leaves while it runs."""
    request = make_request(small_pipe, PROMPTS[0], seed=7, steps=10)
    slot = loop.admit(request)
    alone = run(loop, slot)
    loop.release(slot)

    first = loop.admit(make_request(small_pipe, PROMPTS[1], seed=1, steps=8, solver="unipc"))
    second = loop.admit(make_request(small_pipe, PROMPTS[2], seed=2, steps=20, solver="dpmpp_2m", guidance=3))
    for _ in range(9):
        loop.step()
    late = loop.admit(request)
    assert (late.row, late.done) == (2, 0)
    while not first.finished:
        loop.step()
    loop.release(first)  # the late one moves into its row
    assert late.row == 0
    joined = run(loop, late)
    assert not second.finished
    assert joined.tobytes() == alone.tobytes()


def test_more_prompts_than_slots(small_pipe):
    assert small_pipe.engines.engines["step"].profile["batch"].max < len(PROMPTS)
    options = {"steps": 3, "frames": FRAMES, "size": SIZE}
    together = small_pipe.generate(PROMPTS, seed=20, **options)
    assert [video.metadata["prompt"] for video in together] == PROMPTS
    for index, video in enumerate(together):
        alone = small_pipe.generate(PROMPTS[index], seed=20 + index, **options)
        assert video.latents.tobytes() == alone.latents.tobytes()
        assert video.frames.tobytes() == alone.frames.tobytes()


def test_cancelling_one_leaves_the_others_alone(small_pipe, loop):
    requests = [make_request(small_pipe, text, seed, 4) for seed, text in enumerate(PROMPTS[:3])]
    expected = []
    for request in requests:
        slot = loop.admit(request)
        expected.append(run(loop, slot))
        loop.release(slot)
    slots = [loop.admit(request) for request in requests]
    loop.step()
    loop.step()
    loop.release(slots[0])
    for slot, latents in zip(slots[1:], expected[1:], strict=True):
        assert run(loop, slot).tobytes() == latents.tobytes()
        loop.release(slot)
