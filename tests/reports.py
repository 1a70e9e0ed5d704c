"""A quality report's document with given figures, as `reelrt evaluate quality` would write it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def report(
    bundle: str,
    *,
    precision: str = "int8",
    against: str = "fp32",
    ssim: float = 0.97,
    points: float | None = -1.0,
    prompts: int = 200,
    steps: Sequence[int] = (25, 10),
) -> dict[str, Any]:
    """The entries that anything depends on.

    Args:
        bundle: SHA-256 of the candidate's manifest.
        precision: The candidate's.
        against: The reference's.
        ssim: Mean, at every number of steps.
        points: Difference of the shape's adherence; None when adherence was not measured.
        prompts: Number of prompts.
        steps: Denoising steps.
    """
    adherence = None if points is None else {"shape": {"difference_points": points}}
    return {
        "schema": 1,
        "kind": "quality",
        "candidate": {"folder": "candidate", "bundle_sha256": bundle, "precision": precision},
        "reference": {"folder": "reference", "bundle_sha256": "ff" * 32, "precision": against},
        "settings": {"prompts": prompts},
        "runs": [{"steps": count, "ssim": {"mean": ssim}, "adherence": adherence} for count in steps],
    }
