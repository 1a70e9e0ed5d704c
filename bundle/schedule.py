"""A compiled sampling schedule and the table the step graph reads.

A deterministic sampler is a linear recurrence over the last samples `x` and model outputs `m`:

    x[i+1] = sum_k a[i, k] x[i-k] + sum_k b[i, k] m[i-k]

This module knows how the coefficients become rows of a table. Where they come from is
`reelrt.export.schedules`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from reelrt.bundle.spec import TABLE_COLUMNS
from reelrt.errors import IntegrityError, RangeError

Cfg = Literal["split", "batched"]
"""How guidance is computed: two rows of the table one after the other, or one batch of two."""
CFGS: tuple[str, ...] = get_args(Cfg)

MAX_GUIDANCE = 1000
"""Largest guidance scale; larger ones leave float32's range."""

ORDERS = "orders"
"""Key of a schedule file's metadata: by solver, how many samples and outputs it looks back to."""

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Schedule:
    """One solver at one step count.

    Attributes:
        solver: `ddim`, `euler`, `dpmpp_2m`, `unipc` or `deis`.
        timesteps: What the network is told, float64 [N].
        input_scale: Factor on the sample before the network sees it, float64 [N].
        samples: Coefficients a of the recurrence, float64 [N, h_x], newest first.
        outputs: Coefficients b of the recurrence, float64 [N, h_m], newest first.
        init_noise_sigma: Standard deviation of the starting latents.
    """

    solver: str
    timesteps: Float64
    input_scale: Float64
    samples: Float64
    outputs: Float64
    init_noise_sigma: float

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.timesteps)

    @property
    def history_rows(self) -> int:
        """State rows the recurrence needs: the samples and the older outputs."""
        return int(self.samples.shape[1] + self.outputs.shape[1] - 1)

    def rows(self, guidance: npt.ArrayLike, cfg: Cfg) -> int:
        """Number of table rows, which is the number of launches of the step graph."""
        guided = np.broadcast_to(np.asarray(guidance, np.float64), self.steps) != 1
        return self.steps + (int(guided.sum()) if cfg == "split" else 0)

    def table(self, guidance: npt.ArrayLike, cfg: Cfg, state_rows: int) -> Float32:
        """The rows that drive the step graph through this schedule.

        A row is: timestep, input scale, text, then W [R, R+1] in row-major order, so that
        `state_next = W @ [state; m]`. The text column holds the prompt's row (0 unconditional,
        1 conditional) for split guidance and the guidance scale for batched guidance.

        State rows are x[i], x[i-1] ... then m[i-1], m[i-2] ...; with split guidance the last
        row accumulates the unconditional output.

        Args:
            guidance: Classifier-free guidance scale, one number or one per step. A step at 1
                needs the conditional output only.
            cfg: `split` or `batched`, as the bundle was exported.
            state_rows: R of the exported step graph.

        Returns:
            float32 [S, 3 + R (R+1)].

        Raises:
            ValueError: R is too small for this recurrence.
        """
        needed = self.history_rows + (cfg == "split")
        if state_rows < needed:
            raise ValueError(f"{self.solver} needs {needed} state rows, the step graph has {state_rows}")
        scales = np.broadcast_to(np.asarray(guidance, np.float64), self.steps)
        rows = []
        for index, scale in enumerate(scales):
            head = [self.timesteps[index], self.input_scale[index]]
            if cfg == "batched":
                rows.append([*head, scale, *self._advance(index, state_rows, 1.0, None).ravel()])
                continue
            if scale != 1:
                rows.append([*head, 0, *_accumulate(state_rows, 1 - scale).ravel()])
            accumulated = None if scale == 1 else state_rows - 1
            rows.append([*head, 1, *self._advance(index, state_rows, scale, accumulated).ravel()])
        table = np.asarray(rows, np.float32)
        assert table.shape[1] == TABLE_COLUMNS + state_rows * (state_rows + 1)
        return table

    def _advance(self, index: int, state_rows: int, scale: float, accumulated: int | None) -> Float64:
        """W of a row that ends a step; the guided output is `scale * m` plus the accumulated row."""
        x_rows, m_rows = self.samples.shape[1], self.outputs.shape[1]
        output = np.zeros(state_rows + 1)
        output[-1] = scale
        if accumulated is not None:
            output[accumulated] = 1
        matrix = np.zeros((state_rows, state_rows + 1))
        matrix[0, :x_rows] = self.samples[index]
        matrix[0] += self.outputs[index, 0] * output
        matrix[0, x_rows : x_rows + m_rows - 1] += self.outputs[index, 1:]
        for row in range(1, x_rows):
            matrix[row, row - 1] = 1
        for row in range(x_rows, x_rows + m_rows - 1):
            matrix[row] = output if row == x_rows else np.eye(state_rows + 1)[row - 1]
        return matrix


def _accumulate(state_rows: int, weight: float) -> Float64:
    """W of a row that only adds the weighted unconditional output to the last state row."""
    matrix = np.eye(state_rows, state_rows + 1)
    matrix[-1, -2:] = 0, weight
    return matrix


def first_passes(table: Float32) -> npt.NDArray[np.bool_]:
    """Which rows of a split-guidance table only add the unconditional output to the last state row, [S].

    The row after such a one has its timestep and input scale, starts from the same sample, and is the
    only one to use that sum.
    """
    first: npt.NDArray[np.bool_] = table[:, 2] == 0
    return first


def accumulated_weights(row: Float32, state_rows: int) -> Float32:
    """The factors [R] with which a table's row adds the last state row to each row of the next state."""
    weights: Float32 = row[TABLE_COLUMNS:].reshape(state_rows, state_rows + 1)[:, state_rows - 1]
    return weights


class Schedules:
    """Every schedule a bundle offers, by solver and step count.

    Args:
        schedules: At most one for each solver and step count.
    """

    def __init__(self, schedules: Iterable[Schedule]) -> None:
        self._by_key = {(schedule.solver, schedule.steps): schedule for schedule in schedules}

    @property
    def solvers(self) -> tuple[str, ...]:
        """The solvers' names, in the order they were compiled."""
        return tuple(dict.fromkeys(solver for solver, _ in self._by_key))

    @property
    def history_rows(self) -> int:
        """State rows that serve every schedule."""
        return max(schedule.history_rows for schedule in self._by_key.values())

    @property
    def max_steps(self) -> int:
        """The largest step count of any solver."""
        return max(steps for _, steps in self._by_key)

    def counts(self, solver: str) -> list[int]:
        """The step counts of a solver; empty when there is no such solver."""
        return [count for name, count in self._by_key if name == solver]

    def get(self, solver: str, steps: int) -> Schedule:
        """One schedule.

        Raises:
            RangeError: The solver or the step count was not compiled; the message says what was.
        """
        schedule = self._by_key.get((solver, steps))
        if schedule is not None:
            return schedule
        counts = self.counts(solver)
        if not counts:
            raise RangeError("solver", repr(solver), f"choose one of {', '.join(self.solvers)}")
        raise RangeError("steps", steps, f"{solver} takes {min(counts)} to {max(counts)}")

    def save(self, path: Path) -> None:
        """Write one float64 tensor per schedule: timestep, input scale, samples, outputs.

        The same schedules give the same bytes: safetensors keeps no order among several entries of
        metadata, so there is one.
        """
        tensors, orders = {}, {}
        for (solver, steps), schedule in self._by_key.items():
            columns = [schedule.timesteps[:, None], schedule.input_scale[:, None]]
            tensors[f"{solver}/{steps}"] = np.hstack([*columns, schedule.samples, schedule.outputs])
            tensors[f"{solver}/{steps}/init_noise_sigma"] = np.array([schedule.init_noise_sigma])
            orders[solver] = schedule.samples.shape[1], schedule.outputs.shape[1]
        # Not `save_file`, which hides the file from other users.
        path.write_bytes(save(tensors, metadata={ORDERS: json.dumps(orders)}))

    @classmethod
    def load(cls, path: Path) -> Schedules:
        """The inverse of `save`.

        Raises:
            IntegrityError: The file holds no schedules.
        """
        schedules = []
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if ORDERS not in metadata:
                raise IntegrityError(f"{path} holds no schedules of this version.", "Export the model again.")
            orders = json.loads(metadata[ORDERS])
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                solver, steps, *rest = name.split("/")
                if rest:
                    continue
                x_rows, m_rows = orders[solver]
                columns = file.get_tensor(name)
                sigma = file.get_tensor(f"{name}/init_noise_sigma")[0]
                samples, outputs = columns[:, 2 : 2 + x_rows], columns[:, 2 + x_rows :]
                assert columns.shape == (int(steps), 2 + x_rows + m_rows)
                schedules.append(
                    Schedule(solver, columns[:, 0], columns[:, 1], samples, outputs, float(sigma))
                )
        return cls(sorted(schedules, key=lambda each: (list(orders).index(each.solver), each.steps)))
