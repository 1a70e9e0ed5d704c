"""A schedule table drives any network through the recurrence and guidance it was made from."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from reelrt.bundle.schedule import Schedule, Schedules
from reelrt.errors import IntegrityError, RangeError

STEPS = 6
ORDERS = [(1, 1), (1, 2), (2, 2), (3, 3), (2, 1)]


def make_schedule(x_rows=2, m_rows=2, solver="s", steps=STEPS, sigma=1.0):
    rng = np.random.default_rng([x_rows, m_rows, steps])
    return Schedule(
        solver,
        timesteps=np.linspace(999, 0, steps),
        input_scale=rng.uniform(0.5, 1, steps),
        samples=rng.uniform(-0.7, 0.7, (steps, x_rows)),
        outputs=rng.uniform(-0.7, 0.7, (steps, m_rows)),
        init_noise_sigma=sigma,
    )


def network(x, timestep, text):
    """Any nonlinear function of what a network sees; text 0 is the unconditional prompt."""
    return np.tanh(x * (1.5 if text else -0.8) + timestep / 1000) + 0.1 * text


def reference(schedule, start, scales):
    """The recurrence as it is written down, in float64."""
    xs, ms = [start], []
    for i in range(schedule.steps):
        seen = xs[0] * schedule.input_scale[i]
        negative, positive = (network(seen, schedule.timesteps[i], text) for text in (0, 1))
        ms.insert(0, negative + scales[i] * (positive - negative))
        following = sum(a * x for a, x in zip(schedule.samples[i], xs, strict=False))
        following = following + sum(b * m for b, m in zip(schedule.outputs[i], ms, strict=False))
        xs.insert(0, following)
    return xs[0]


def drive(table, cfg, state_rows, start):
    """What the step graph does with a table, row by row."""
    state = np.zeros((state_rows, *start.shape))
    state[0] = start
    for timestep, scale, text, *weights in table.astype(np.float64):
        seen = state[0] * scale
        if cfg == "split":
            output = network(seen, timestep, text)
        else:
            negative, positive = (network(seen, timestep, which) for which in (0, 1))
            output = negative + text * (positive - negative)
        matrix = np.reshape(weights, (state_rows, state_rows + 1))
        state = np.tensordot(matrix, np.concatenate([state, output[None]]), 1)
    return state[0]


@pytest.mark.parametrize("extra_rows", [0, 2])
@pytest.mark.parametrize("cfg", ["split", "batched"])
@pytest.mark.parametrize(("x_rows", "m_rows"), ORDERS)
@pytest.mark.parametrize("guidance", [1.0, 7.5, 0.0, [1, 3, 3, 1, 1, 2]])
def test_table_is_the_recurrence(x_rows, m_rows, cfg, guidance, extra_rows):
    schedule = make_schedule(x_rows, m_rows)
    start = np.random.default_rng(1).normal(size=(3, 5))
    rows = schedule.history_rows + (cfg == "split") + extra_rows
    table = schedule.table(guidance, cfg, rows)
    assert table.dtype == np.float32
    assert table.shape == (schedule.rows(guidance, cfg), 3 + rows * (rows + 1))
    expected = reference(schedule, start, np.broadcast_to(guidance, STEPS))
    result = drive(table, cfg, rows, start)
    assert np.abs(result - expected).max() <= 2e-5 * max(1, np.abs(expected).max())


def test_number_of_launches():
    schedule = make_schedule()
    assert schedule.rows(7.5, "split") == 2 * STEPS
    assert schedule.rows(7.5, "batched") == STEPS
    assert schedule.rows(1.0, "split") == STEPS
    assert schedule.rows([1, 1, 5, 5, 1, 1], "split") == STEPS + 2


def test_too_few_state_rows_are_refused():
    schedule = make_schedule(3, 3)
    with pytest.raises(ValueError, match="needs 6 state rows, the step graph has 5"):
        schedule.table(7.5, "split", 5)
    schedule.table(7.5, "batched", 5)


def test_saved_schedules_come_back(tmp_path):
    saved = Schedules(
        [
            make_schedule(3, 3, "unipc", 10, sigma=14.6),
            make_schedule(1, 1, "ddim", 3),
            make_schedule(1, 1, "ddim", 10),
        ]
    )
    saved.save(tmp_path / "schedules.safetensors")
    loaded = Schedules.load(tmp_path / "schedules.safetensors")
    assert loaded.solvers == ("unipc", "ddim")
    assert (loaded.history_rows, loaded.max_steps) == (5, 10)
    for solver, steps in (("ddim", 3), ("ddim", 10), ("unipc", 10)):
        one, two = saved.get(solver, steps), loaded.get(solver, steps)
        assert one.init_noise_sigma == two.init_noise_sigma
        for field in ("timesteps", "input_scale", "samples", "outputs"):
            assert np.array_equal(getattr(one, field), getattr(two, field)), field


def test_the_same_schedules_are_the_same_bytes(tmp_path):
    made = [make_schedule(1, 1, solver, 2) for solver in ("a", "b", "c", "d", "e", "f", "g")]
    for name in ("one", "two"):
        Schedules(made).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"x": np.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(IntegrityError, match="holds no schedules of this version"):
        Schedules.load(tmp_path / "other.safetensors")


def test_saved_schedules_are_as_readable_as_any_file(tmp_path):
    Schedules([make_schedule()]).save(tmp_path / "schedules.safetensors")
    (tmp_path / "any").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_what_was_not_compiled_is_named():
    schedules = Schedules([make_schedule(1, 1, "ddim", steps) for steps in (1, 2, 3)])
    with pytest.raises(RangeError, match="solver 'euler' is not available: choose one of ddim"):
        schedules.get("euler", 2)
    with pytest.raises(RangeError, match="steps 4 is not available: ddim takes 1 to 3"):
        schedules.get("ddim", 4)
