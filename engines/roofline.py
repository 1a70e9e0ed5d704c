"""The least time a video can take on a board: arithmetic over peak, bytes over bandwidth.

A bound, never a prediction: no engine reaches both peaks, and nothing here says how far below them one
stays. Knows boards and costs; measures nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from reelrt.engines.graph_cost import Cost
from reelrt.engines.memory import Plan, precision_of
from reelrt.jetson.boards import Board

FP32_SHARE = 0.5
"""TF32 tensor cores run at half the FP16 rate at best; FP32 without them is slower still."""


@dataclass(frozen=True, slots=True)
class StageBound:
    """The least time of one stage.

    Attributes:
        launches: How often it runs for the batch.
        flops: Of one launch: Conv, MatMul, Gemm and attention, two per multiplication and addition.
        bytes: Of one launch, which no cache can save: its weights once, its inputs and outputs once.
        kernel_bytes: Of one launch, if each kernel reads and writes memory; for comparison, not in the bound.
        seconds: Of all launches.
        limit: `arithmetic` or `memory`, whichever takes longer.
    """

    launches: int
    flops: int
    bytes: int
    kernel_bytes: int
    seconds: float
    limit: str


def peak_flops(board: Board, precision: str) -> float:
    """Dense operations per second of a board's tensor cores in a precision."""
    if precision == "int8":
        return board.int8_tops * 1e12
    return board.fp16_tflops * 1e12 * (FP32_SHARE if precision == "fp32" else 1)


def bounds(plan: Plan, board: Board, launches: int) -> dict[str, StageBound]:
    """The least time of each stage of a plan.

    Args:
        plan: The plan.
        board: Where it shall run.
        launches: Rows of the schedule's table, which is how often the step runs.
    """
    video = plan.video
    runs = {
        "text_encoder": 1,  # both prompts, and every request of the batch, in one call at best
        "step": launches,
        "vae_decoder": video.batch * math.ceil(video.frames / min(video.decoder_frames, video.frames)),
    }
    return {
        name: _bound(need.cost, board, precision_of(name, video.precision), runs[name])
        for name, need in plan.stages.items()
        if need.cost is not None
    }


def _bound(cost: Cost, board: Board, precision: str, launches: int) -> StageBound:
    moved = cost.weight_bytes + cost.boundary_bytes
    arithmetic, memory = cost.flops / peak_flops(board, precision), moved / (board.bandwidth_gbs * 1e9)
    limit = "arithmetic" if arithmetic >= memory else "memory"
    return StageBound(
        launches, cost.flops, moved, cost.kernel_bytes, launches * max(arithmetic, memory), limit
    )
