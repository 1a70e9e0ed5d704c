"""diffusers' schedulers become recurrences; one that is none is refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest

from reelrt.errors import ModelError
from reelrt.export.schedules import SOLVERS, compile_schedules, make_scheduler, own_solver, replay
from tests.models import default_scheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

TRAILING = default_scheduler().config
LEADING = default_scheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    set_alpha_to_one=False,
    steps_offset=1,
    prediction_type="epsilon",
    timestep_spacing="leading",
).config
HISTORY = {"ddim": (1, 1), "euler": (1, 1), "dpmpp_2m": (2, 2), "unipc": (3, 3), "deis": (1, 2)}
"""The samples and outputs that each solver looks back to when the network predicts the noise."""


@pytest.mark.parametrize(
    ("config", "counts"),
    [(TRAILING, range(1, 101)), (LEADING, range(1, 101, 9))],
    ids=["trailing", "leading"],
)
def test_every_step_count_is_there(config, counts):
    schedules = compile_schedules(config, solvers=["ddim"], steps=counts)
    for steps in counts:
        schedule = schedules.get("ddim", steps)
        assert schedule.steps == steps
        assert (np.diff(schedule.timesteps) < 0).all()
        assert 0 <= schedule.timesteps[-1] <= schedule.timesteps[0] < 1000


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_schedule_has_the_shortest_history_that_is_exact(solver):
    schedules = compile_schedules(LEADING, solvers=[solver], steps=[1, 2, 3, 10])
    x_rows, m_rows = HISTORY[solver]
    for steps in (1, 2, 3, 10):
        schedule = schedules.get(solver, steps)
        assert schedule.samples.shape == (steps, x_rows)
        assert schedule.outputs.shape == (steps, m_rows)
        assert not schedule.samples[0, 1:].any()  # nothing came before the first step
        assert not schedule.outputs[0, 1:].any()
        for cfg, factor in (("split", 2), ("batched", 1)):
            rows = x_rows + m_rows - 1 + (cfg == "split")
            table = schedule.table(7.5, cfg, rows)
            assert table.shape == (factor * steps, 3 + rows * (rows + 1))
            assert np.isfinite(table).all()


def trajectory(solver, schedule):
    """A clean sample, noise, and the network that knows both: where a run starts, and its outputs."""
    clean, noise = np.random.default_rng(0).normal(size=(2, 50))
    products = np.asarray(default_scheduler().alphas_cumprod, np.float64)[schedule.timesteps.astype(int)]
    alpha, sigma = np.sqrt(products)[:, None], np.sqrt(1 - products)[:, None]
    start = alpha[0] * clean + sigma[0] * noise
    if solver == "euler":
        start /= alpha[0]
    return clean, start, alpha * noise - sigma * clean


# DDIMScheduler steps back by 1000 // steps whatever the spacing, DEIS ends at the smallest sigma.
@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [("ddim", 0.15), ("euler", 1e-4), ("dpmpp_2m", 1e-4), ("unipc", 1e-4), ("deis", 0.03)],
)
def test_a_perfect_network_gives_the_clean_sample_at_any_step_count(solver, tolerance):
    # At 61 steps diffusers' own "trailing" timesteps end with a -1, which no network knows.
    counts = [1, 2, 3, 7, 25, 61]
    schedules = compile_schedules(TRAILING, solvers=[solver], steps=counts)
    for steps in counts:
        schedule = schedules.get(solver, steps)
        clean, start, outputs = trajectory(solver, schedule)
        assert np.abs(replay(schedule, start, outputs)[-1] - clean).max() < tolerance, steps
        ends = np.append(schedule.timesteps + 1, 0)
        assert (np.abs(np.diff(ends) + 1000 / steps) <= 1).all(), steps


def test_dropping_the_step_too_many_changes_no_other():
    sixty_one = compile_schedules(TRAILING, solvers=["dpmpp_2m"], steps=[61]).get("dpmpp_2m", 61)
    scheduler = make_scheduler("dpmpp_2m", TRAILING)
    scheduler.set_timesteps(61)
    assert scheduler.timesteps.tolist() == [*sixty_one.timesteps, -1]


def test_epsilon_and_v_prediction_give_different_schedules_of_the_same_timesteps():
    tables = [
        compile_schedules({**TRAILING, "prediction_type": kind}, solvers=["unipc"], steps=[5]).get("unipc", 5)
        for kind in ("epsilon", "v_prediction")
    ]
    assert np.array_equal(tables[0].timesteps, tables[1].timesteps)
    assert np.abs(tables[0].outputs - tables[1].outputs).max() > 0.01


def test_euler_scales_what_the_network_sees_and_where_it_starts():
    schedule = compile_schedules(LEADING, solvers=["euler"], steps=[10]).get("euler", 10)
    assert schedule.init_noise_sigma > 5
    assert 0 < schedule.input_scale[0] < schedule.input_scale[-1] <= 1


@pytest.mark.parametrize(("name", "solver"), SOLVERS.items())
def test_a_model_s_own_scheduler_is_found_by_its_class(name, solver):
    assert own_solver(solver.scheduler) == name
    assert type(make_scheduler(name, TRAILING)).__name__ == solver.scheduler


@pytest.mark.parametrize(
    "scheduler", ["PNDMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "DDPMScheduler"]
)
def test_a_scheduler_we_cannot_compile_is_refused_by_name(scheduler):
    with pytest.raises(ModelError, match=f"scheduler {scheduler} cannot be compiled") as refused:
        own_solver(scheduler)
    assert "DDIMScheduler" in refused.value.remedy
    assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clip_sample": True}, "DDIMScheduler with clip_sample=true is not linear"),
        ({"thresholding": True}, "DDIMScheduler with thresholding=true is not linear"),
        ({"eta": 0.5}, "DDIMScheduler with eta=0.5 draws noise in every step"),
    ],
    ids=str,
)
def test_non_linear_and_stochastic_configurations_are_refused(changes, sentence):
    with pytest.raises(ModelError, match=sentence) as refused:
        compile_schedules({**TRAILING, "_class_name": "DDIMScheduler", **changes})
    assert "scheduler_config.json" in refused.value.remedy


def test_a_stochastic_solver_is_refused():
    config = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++").config
    with pytest.raises(ModelError, match=r"algorithm_type=sde-dpmsolver\+\+ draws noise"):
        compile_schedules({**config, "_class_name": "DPMSolverMultistepScheduler"})


def test_a_configuration_that_a_scheduler_refuses_is_one_sentence():
    with pytest.raises(ModelError, match="DDIMScheduler cannot take this model's configuration"):
        compile_schedules({**TRAILING, "beta_schedule": "wavy"}, steps=[5])


@pytest.mark.parametrize(
    "bent",
    [lambda x: x.clamp(-1.05, 1.05), lambda x: x + 1e-3 * x**2],
    ids=["clamped", "squared"],
)
def test_a_scheduler_that_is_not_linear_is_found_out(bent, monkeypatch):
    straight = diffusers.DDIMScheduler.step

    def step(*arguments):
        return SimpleNamespace(prev_sample=bent(straight(*arguments).prev_sample))

    monkeypatch.setattr(diffusers.DDIMScheduler, "step", step)
    with pytest.raises(ModelError, match="DDIMScheduler at 6 steps is n"):
        compile_schedules(TRAILING, solvers=["ddim"], steps=[6])


def test_a_history_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("reelrt.export.schedules.HISTORIES", ((1, 1), (1, 2)))
    with pytest.raises(ModelError, match="UniPCMultistepScheduler at 10 steps is no short linear recurrence"):
        compile_schedules(TRAILING, solvers=["unipc"], steps=[10])


def test_a_step_count_that_a_scheduler_cannot_do_is_left_out(monkeypatch):
    straight = diffusers.DDIMScheduler.set_timesteps

    def set_timesteps(self, steps):
        if steps == 3:
            raise ValueError("three")
        straight(self, steps)

    monkeypatch.setattr(diffusers.DDIMScheduler, "set_timesteps", set_timesteps)
    schedules = compile_schedules(TRAILING, solvers=["ddim"], steps=[2, 3, 4])
    assert [steps for steps in (2, 3, 4) if ("ddim", steps) in schedules._by_key] == [2, 4]
    with pytest.raises(ModelError, match="DDIMScheduler gives no schedule"):
        compile_schedules(TRAILING, solvers=["ddim"], steps=[3])


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_schedule_has_more_steps_than_the_model_has_timesteps(solver):
    config = default_scheduler(num_train_timesteps=10, beta_start=0.01, beta_end=0.9).config
    assert compile_schedules(config, solvers=[solver], steps=range(1, 15)).counts(solver)[-1] == 10


def test_progress_counts_every_schedule_and_ends():
    told: list[tuple[str, int, int]] = []
    compile_schedules(
        TRAILING, solvers=["ddim", "euler"], steps=[1, 2, 3], progress=lambda *event: told.append(event)
    )
    assert told == [*(("schedules", done, 6) for done in range(6)), ("schedules", 1, 1)]
