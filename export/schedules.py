"""Compiles diffusers' schedulers into recurrences.

A scheduler is run once on unit vectors instead of latents: sample i then *is* the list of its
coefficients over the starting sample and the model outputs. A linear recurrence over a short
history is read off, row by row, with the smallest history that is exact, and compared with the
scheduler on random data. No solver is implemented here, and none is known but by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from reelrt.bundle.manifest import MAX_STEPS
from reelrt.bundle.schedule import Schedule, Schedules
from reelrt.errors import ModelError
from reelrt.progress import Progress, silent
from reelrt.wording import counted

Float64 = npt.NDArray[np.float64]

HISTORIES = ((1, 1), (1, 2), (2, 2), (2, 3), (3, 3))
"""Numbers of samples and outputs a recurrence may look back to, smallest first."""

FIT = 1e-6
"""Largest residual of a row's fit; the schedulers' own float32 leaves up to 2e-8."""

AGREEMENT = 1e-4
"""Largest difference from the scheduler over a whole run on random data, relative to its scale."""

RANDOM_COLUMNS = 8


@dataclass(frozen=True)
class Solver:
    """A diffusers scheduler under the name that requests use.

    Attributes:
        scheduler: The diffusers class.
        options: What its configuration must say.
        defaults: What its configuration says when the model's says nothing.
    """

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


SOLVERS: dict[str, Solver] = {
    "ddim": Solver("DDIMScheduler", defaults={"clip_sample": False}),
    "euler": Solver("EulerDiscreteScheduler"),
    "dpmpp_2m": Solver("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": Solver("UniPCMultistepScheduler", {"solver_order": 2}),
    "deis": Solver("DEISMultistepScheduler", {"solver_order": 2}),
}

NON_LINEAR = ("thresholding", "clip_sample")
STOCHASTIC = ("sde-dpmsolver", "sde-dpmsolver++")
"""Algorithms of the multistep schedulers that draw noise in every step."""


def own_solver(scheduler: str) -> str:
    """The name of a model's own solver.

    A multistep scheduler of another order or algorithm counts as the solver of its class.

    Raises:
        ModelError: The scheduler is none that can be compiled.
    """
    for name, solver in SOLVERS.items():
        if solver.scheduler == scheduler:
            return name
    known = ", ".join(solver.scheduler for solver in SOLVERS.values())
    raise ModelError(
        f"the model's scheduler {scheduler} cannot be compiled.", f"Save the model with one of {known}."
    )


def compile_schedules(
    config: Mapping[str, Any],
    *,
    solvers: Sequence[str] = tuple(SOLVERS),
    steps: Sequence[int] = range(1, MAX_STEPS + 1),
    progress: Progress = silent,
) -> Schedules:
    """Compile a model's schedulers at every step count.

    A step count at which a scheduler itself fails or gives no finite numbers is left out, and one
    beyond the timesteps of the model's training, where some schedulers would only repeat timesteps.

    Args:
        config: The configuration of the model's own scheduler, `scheduler.config`.
        solvers: Which of `SOLVERS` to compile.
        steps: Step counts.
        progress: Told of each step count.

    Raises:
        ModelError: The configuration makes a scheduler non-linear or stochastic; a scheduler cannot
            take the configuration, or is no recurrence that the step graph can run.
    """
    _refuse(config)
    schedules: list[Schedule] = []
    for index, name in enumerate(solvers):
        scheduler = make_scheduler(name, config)
        found = []
        for done, count in enumerate(steps):
            progress("schedules", index * len(steps) + done, len(solvers) * len(steps))
            schedule = _compile(name, scheduler, count)
            if schedule is not None:
                found.append(schedule)
        if not found:
            raise ModelError(f"{SOLVERS[name].scheduler} gives no schedule for this model's configuration.")
        schedules += _same_history(found)
    progress("schedules", 1, 1)
    return Schedules(schedules)


def _refuse(config: Mapping[str, Any]) -> None:
    name = config.get("_class_name", "the scheduler")
    for option in NON_LINEAR:
        if config.get(option):
            raise ModelError(
                f"{name} with {option}=true is not linear and cannot be compiled.",
                f"Set {option} to false in scheduler_config.json.",
            )
    if config.get("algorithm_type") in STOCHASTIC:
        raise ModelError(
            f"{name} with algorithm_type={config['algorithm_type']} draws noise in every step and cannot be "
            "compiled.",
            "Set algorithm_type to dpmsolver++ in scheduler_config.json.",
        )
    if config.get("eta"):
        raise ModelError(
            f"{name} with eta={config['eta']} draws noise in every step and cannot be compiled.",
            "Set eta to 0 in scheduler_config.json.",
        )


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A solver's diffusers scheduler in a model's configuration.

    Raises:
        ModelError: The scheduler cannot take the configuration.
    """
    import diffusers

    solver = SOLVERS[name]
    try:
        merged = {**solver.defaults, **config, **solver.options}
        return getattr(diffusers, solver.scheduler).from_config(merged)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"{solver.scheduler} cannot take this model's configuration: {error}.") from error


def set_timesteps(scheduler: Any, steps: int) -> None:
    """Start a diffusers scheduler anew at a step count.

    "trailing" spacing rounds `np.arange(1000, 0, -1000 / steps)`, which for 61 steps has 62 entries;
    the last becomes timestep -1, which no network knows, and is dropped here.
    """
    scheduler.set_timesteps(steps)
    if len(scheduler.timesteps) == steps + 1 and scheduler.timesteps[-1] < 0:
        scheduler.num_inference_steps = steps
        scheduler.timesteps = scheduler.timesteps[:-1]
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = torch.cat([scheduler.sigmas[:steps], scheduler.sigmas[-1:]])


@torch.inference_mode()
def run_scheduler(
    scheduler: Any, steps: int, start: Float64, output: Callable[[int], Float64]
) -> tuple[Float64, Float64, Float64]:
    """Run a diffusers scheduler on any row of numbers in place of latents.

    Args:
        scheduler: As from `make_scheduler`; it is started anew.
        steps: Step count.
        start: The starting sample [D].
        output: The model output [D] at step i.

    Returns:
        Timesteps [N], input scales [N], samples [N + 1, D].
    """
    set_timesteps(scheduler, steps)
    samples, scales = [start], []
    one = torch.ones(1, dtype=torch.float64)
    sample = torch.from_numpy(start)[None, :, None, None]
    for index, timestep in enumerate(scheduler.timesteps):
        scales.append(float(scheduler.scale_model_input(one, timestep)))
        model_output = torch.from_numpy(output(index))[None, :, None, None]
        sample = scheduler.step(model_output, timestep, sample).prev_sample.double()
        samples.append(sample[0, :, 0, 0].numpy())
    return scheduler.timesteps.double().numpy(), np.array(scales), np.array(samples)


def _compile(name: str, scheduler: Any, steps: int) -> Schedule | None:
    """One schedule; None when the scheduler itself cannot do this step count.

    One run serves both ends: the first N + 1 columns are the unit vectors over x[0] and
    m[0] ... m[N-1], the others are random data that the recurrence must reproduce.
    """
    if steps > scheduler.config.num_train_timesteps:
        return None
    noise = np.random.default_rng(steps).normal(size=(steps + 1, RANDOM_COLUMNS))
    columns = np.hstack([np.eye(steps + 1), noise])
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers calls numpy on tensors, of which numpy warns
            timesteps, scales, samples = run_scheduler(scheduler, steps, columns[0], lambda i: columns[i + 1])
    except (ValueError, IndexError, RuntimeError, ZeroDivisionError, AssertionError):
        return None
    if len(timesteps) != steps or not np.isfinite(samples).all():
        return None
    units = slice(0, steps + 1)
    x, m = _read_off(name, samples[:, units], columns[1:, units])
    schedule = Schedule(name, timesteps, scales, x, m, float(scheduler.init_noise_sigma))
    found = replay(schedule, columns[0, steps + 1 :], columns[1:, steps + 1 :])
    expected = samples[:, steps + 1 :]
    error = np.abs(found - expected).max() / np.abs(expected).max()
    if not error <= AGREEMENT:
        raise ModelError(
            f"{SOLVERS[name].scheduler} at {counted(steps, 'step')} is not linear: its recurrence is off by "
            f"{error:.1e}."
        )
    return schedule


def _read_off(name: str, samples: Float64, model_outputs: Float64) -> tuple[Float64, Float64]:
    """Coefficients of samples and outputs, each row with the smallest history that is exact.

    Least squares through the pseudo-inverse, which takes all rows at once.

    Args:
        name: The solver, for messages.
        samples: Samples over the unit vectors [N + 1, N + 1].
        model_outputs: Model outputs over the same [N, N + 1].
    """
    steps = len(model_outputs)
    past, seen = (np.zeros((steps, max(rows))) for rows in zip(*HISTORIES, strict=True))
    remaining = np.arange(steps)
    for x_rows, m_rows in HISTORIES:
        history = [*_delayed(samples[:-1], x_rows), *_delayed(model_outputs, m_rows)]
        basis, target = np.stack(history, axis=1)[remaining], samples[1:][remaining]
        fit = (target[:, None] @ np.linalg.pinv(basis))[:, 0]
        residual = np.abs((fit[:, None] @ basis)[:, 0] - target).max(axis=1)
        exact = residual <= FIT * np.abs(target).max(axis=1, initial=1)
        past[remaining[exact], :x_rows] = fit[exact, :x_rows]
        seen[remaining[exact], :m_rows] = fit[exact, x_rows:]
        remaining = remaining[~exact]
        if not len(remaining):
            return past, seen
    raise ModelError(f"{SOLVERS[name].scheduler} at {counted(steps, 'step')} is no short linear recurrence.")


def _delayed(rows: Float64, count: int) -> list[Float64]:
    """The rows [N, D], the same one step later, ...; zeros before the first."""
    return [np.vstack([np.zeros((delay, rows.shape[1])), rows])[: len(rows)] for delay in range(count)]


def replay(schedule: Schedule, start: Float64, model_outputs: Float64) -> Float64:
    """The recurrence's samples [N + 1, D] for given model outputs [N, D]."""
    samples = [start]
    for index in range(schedule.steps):
        past = zip(schedule.samples[index], samples[::-1], strict=False)
        seen = zip(schedule.outputs[index], model_outputs[index::-1], strict=False)
        samples.append(sum(a * x for a, x in past) + sum(b * m for b, m in seen))
    return np.array(samples)


def _same_history(schedules: Sequence[Schedule]) -> list[Schedule]:
    """Drop the history that none of a solver's schedules looks at."""
    x_rows = max(_used(schedule.samples) for schedule in schedules)
    m_rows = max(_used(schedule.outputs) for schedule in schedules)
    return [replace(s, samples=s.samples[:, :x_rows], outputs=s.outputs[:, :m_rows]) for s in schedules]


def _used(coefficients: Float64) -> int:
    return int(max(np.flatnonzero(coefficients.any(axis=0)), default=0)) + 1
