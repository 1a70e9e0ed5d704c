"""The self-advancing step: the torch module whose graph reads its own row of the schedule.

A row is timestep, input scale, text, then W [R, R + 1] in row-major order; see
`reelrt.bundle.schedule`. Knows the row's layout and no solver.
"""

from __future__ import annotations

from torch import Tensor, nn, where

from reelrt.bundle.schedule import Cfg
from reelrt.bundle.spec import TABLE_COLUMNS


class Step(nn.Module):
    """One row of the schedule: denoise, form the next state, advance the counter.

    Table, counter and state arithmetic are float32 whatever the network's precision. The state
    is formed by plain multiplications and additions: a MatMul might run in TF32 on a GPU.

    Args:
        network: `(sample [N, C, F, h, w], timestep [N], text [N, L, E]) -> [N, C, F, h, w]`.
        cfg: `split` runs it on the text that the row names, `batched` on both texts at once.
    """

    def __init__(self, network: nn.Module, cfg: Cfg) -> None:
        super().__init__()
        self.network, self.cfg = network, cfg

    def forward(self, state: Tensor, table: Tensor, step: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Run one row for each sample.

        Args:
            state: float32 [B, R, C, F, h, w].
            table: float32 [B, S, 3 + R (R + 1)].
            step: int64 [B], each at most S - 1.
            text: [B, 2, L, E] in the network's dtype; unconditional, conditional.

        Returns:
            The next state and `step + 1`.
        """
        index = step.reshape(-1, 1, 1).expand(-1, 1, table.shape[2])
        row = table.gather(1, index).squeeze(1)
        timestep = row.select(1, 0)
        sample = (state.select(1, 0) * _column(row, 1, 5)).to(text.dtype)
        if self.cfg == "split":
            chosen = where(_column(row, 2, 3) > 0.5, text.select(1, 1), text.select(1, 0))
            output = self.network(sample, timestep, chosen).float()
        else:
            both = self.network(_twice(sample), _twice(timestep), text.flatten(0, 1)).float()
            unconditional, conditional = both.unflatten(0, (-1, 2)).unbind(1)
            output = unconditional + _column(row, 2, 5) * (conditional - unconditional)
        return _advance(row, state, output), step + 1


def _column(row: Tensor, index: int, dimensions: int) -> Tensor:
    """One column of the row, shaped to broadcast over a tensor of so many dimensions."""
    return row.select(1, index).reshape(-1, *[1] * (dimensions - 1))


def _twice(x: Tensor) -> Tensor:
    return x.unsqueeze(1).expand(-1, 2, *x.shape[1:]).flatten(0, 1)


def _advance(row: Tensor, state: Tensor, output: Tensor) -> Tensor:
    """W @ [state; output], unrolled over the columns of W."""
    rows = state.shape[1]
    weights = row.narrow(1, TABLE_COLUMNS, rows * (rows + 1)).reshape(-1, rows, rows + 1, 1, 1, 1, 1)
    result = weights.select(2, rows) * output.unsqueeze(1)
    for column in range(rows):
        result = result + weights.select(2, column) * state.narrow(1, column, 1)
    return result
