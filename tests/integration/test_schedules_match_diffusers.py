"""A table, driven as the step graph drives it, ends where diffusers' own scheduler loop ends.

The network is a formula here: what is compared is the schedule, at more step counts and predictions
than a network could be run for. test_parity.py does the same with real graphs at a few.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from reelrt.export.schedules import SOLVERS, compile_schedules, make_scheduler
from tests.models import default_scheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

STEPS = (1, 2, 3, 7, 25, 50, 100)
GUIDANCE = 7.5
TOLERANCE = 1e-4
CONFIGS = {
    "trailing": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    "leading": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
}
"""Timestep spacing to the rest of the configuration: ours, and that of ms-1.7b and zeroscope."""


@cache
def compiled(solver, spacing, prediction):
    config = default_scheduler(
        **CONFIGS[spacing], timestep_spacing=spacing, prediction_type=prediction
    ).config
    return config, compile_schedules(config, solvers=[solver], steps=STEPS)


def network(sample, timestep, text):
    """A prediction of some [4, 5] numbers from themselves, the time and the prompt; text 0 is empty."""
    return np.tanh(0.9 * sample + sample[::-1] * 0.3 + 0.2 * text) * (1 + timestep / 2000)


def by_diffusers(scheduler, steps, start):
    scheduler.set_timesteps(steps)
    latents = torch.from_numpy(start * float(scheduler.init_noise_sigma))[None]
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep)[0].numpy()
        empty, prompted = (network(seen, float(timestep), text) for text in (0, 1))
        output = torch.from_numpy(empty + GUIDANCE * (prompted - empty))[None]
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents[0].numpy()


def by_table(schedule, cfg, start):
    """What the step graph does, in float32 as it does it."""
    rows = schedule.history_rows + (cfg == "split")
    state = np.zeros((rows, *start.shape), np.float32)
    state[0] = start * schedule.init_noise_sigma
    for timestep, scale, text, *weights in schedule.table(GUIDANCE, cfg, rows):
        seen = state[0] * scale
        if cfg == "split":
            output = network(seen, timestep, text)
        else:
            empty, prompted = (network(seen, timestep, which) for which in (0, 1))
            output = empty + text * (prompted - empty)
        matrix = np.reshape(weights, (rows, rows + 1))
        state = np.tensordot(matrix, np.concatenate([state, output[None]]), 1).astype(np.float32)
    return state[0]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", CONFIGS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_where_diffusers_ends(solver, spacing, prediction, steps):
    config, schedules = compiled(solver, spacing, prediction)
    start = np.random.default_rng(steps).normal(size=(4, 5)).astype(np.float32)
    expected = by_diffusers(make_scheduler(solver, config), steps, start)
    for cfg in ("split", "batched"):
        found = by_table(schedules.get(solver, steps), cfg, start)
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        assert difference < TOLERANCE, cfg
