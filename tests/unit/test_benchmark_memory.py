"""The memory benchmark counts every buffer and says what it misses."""

from __future__ import annotations

from benchmarks.memory import buffer_bytes, missed
from reelrt.bundle.spec import Geometry, Range, step_spec, vae_decoder_spec
from reelrt.engines.profiles import profiles

GEOMETRY = Geometry(4, 8, 8, 77, 1024, 4, 16, 480, 832)
RANGES = profiles(GEOMETRY, 832, 480, 16, 1)


def test_the_step_holds_its_state_and_counter_twice():
    state = 4 * 4 * 16 * 60 * 104 * 4
    table, text = 200 * GEOMETRY.table_columns * 4, 2 * 77 * 1024 * 2
    assert buffer_bytes(step_spec(GEOMETRY), RANGES["step"]) == 2 * (state + 8) + table + text


def test_the_decoder_holds_the_whole_latents_and_one_chunk():
    profile = {**RANGES["vae_decoder"], "frames": Range(1, 2, 2)}
    latents, pixels = 4 * 60 * 104 * 4, 480 * 832 * 3
    assert buffer_bytes(vae_decoder_spec(GEOMETRY), profile) == (16 + 2) * latents + 2 * pixels


def test_every_missed_goal_is_named():
    met = {"seconds": 900, "host_peak_bytes": 16 * 2**30}
    assert missed({"peak_gb": {"fp16": 4.2, "int8": 2.8}, "host": {"export": met}}) == []
    over = {"seconds": 901, "host_peak_bytes": 17 * 2**30}
    assert missed({"peak_gb": {"fp16": 4.25, "int8": 2.8}, "host": {"build int8": over}}) == [
        "fp16: 4.25 GB, goal 4.2 GB",
        "build int8: 17.0 GiB, goal 16 GiB",
        "build int8: 901 s, goal 900 s",
    ]
