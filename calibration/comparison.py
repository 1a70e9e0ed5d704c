"""A candidate compared with a reference over many prompts: every pair measured, then summed up.

Knows the two sides and the pairs; writes nothing but the pairs it keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reelrt import __version__
from reelrt.bundle.report import KIND, PROMPTS, REFERENCE, SCHEMA, TARGETS, Report
from reelrt.calibration.adherence import EVERYTHING, SCORED
from reelrt.calibration.fidelity import median_interval, paired_difference, spread
from reelrt.calibration.pairs import Asked, Kept, Pair, measure_pair
from reelrt.calibration.sides import Side
from reelrt.progress import Progress, silent
from reelrt.wording import counted


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """All pairs at one number of steps.

    Attributes:
        steps: Denoising steps.
        pairs: One per prompt, in their order.
    """

    steps: int
    pairs: Sequence[Pair]

    @property
    def worst_first(self) -> list[Pair]:
        """The pairs by SSIM, the least alike first."""
        return sorted(self.pairs, key=lambda pair: float(pair.figures["ssim"]))

    def values(self, name: str) -> list[float]:
        """A figure of every pair."""
        return [pair.figures[name] for pair in self.pairs]

    @property
    def latent_errors(self) -> npt.NDArray[np.float64]:
        """Relative error of the latents, float64 [pairs, steps]."""
        return np.array(self.values("latent_errors"), np.float64).reshape(len(self.pairs), self.steps)

    def document(self, backend: str) -> dict[str, Any]:
        """The run as plain JSON values.

        Args:
            backend: Of the candidate, for the sentence about speed.
        """
        seconds = _by_side([pair.figures["denoise_seconds"] for pair in self.pairs], np.median)
        ratios = [_ratio(pair.figures["denoise_seconds"]) for pair in self.pairs]
        ratio, interval = float(np.median(ratios)), median_interval(ratios)
        return {
            "steps": self.steps,
            "ssim": spread(self.values("ssim"), high_is_good=True),
            "psnr_db": spread(self.values("psnr_db"), high_is_good=True),
            "latent_error": {
                "last_step": spread(self.latent_errors[:, -1].tolist(), high_is_good=False),
                "per_step": _per_step(self.latent_errors),
            },
            "roughness": self._roughness(),
            "adherence": self._adherence(),
            "denoise_seconds": {**seconds, "candidate_over_reference": ratio, "interval": interval},
            "speed": _speed(seconds, interval, self.steps, backend),
            "videos": [pair.document() for pair in self.pairs],
        }

    def _roughness(self) -> dict[str, float | None] | None:
        """Mean of either side, and the candidate's beside the reference's; None below 3 frames."""
        each = [pair.figures["roughness"] for pair in self.pairs]
        if any(one[side] is None for one in each for side in one):
            return None
        means = _by_side(each, np.mean)
        return {**means, "candidate_over_reference": _ratio(means) if means["reference"] else None}

    def _adherence(self) -> dict[str, dict[str, Any]] | None:
        """Attribute to both shares and their difference; None when videos were not judged."""
        if any(pair.figures["seen"] is None for pair in self.pairs):
            return None
        sides = {side: [pair.right(side) for pair in self.pairs] for side in ("reference", "candidate")}
        for rights in sides.values():
            for right in rights:
                right[EVERYTHING] = all(right.values())
        return {
            name: paired_difference(*([right[name] for right in rights] for rights in sides.values()))
            for name in SCORED
        }


def compare(
    reference: Side,
    candidate: Side,
    asked: Sequence[Asked],
    *,
    steps: Sequence[int],
    guidance: float,
    solver: str,
    judged: bool,
    kept: Kept,
    progress: Progress = silent,
) -> list[Run]:
    """Measure every request at every number of steps; what is kept already is not made again.

    Args:
        reference: One side.
        candidate: The other; see `sides.check_alike`.
        asked: The requests.
        steps: Denoising steps, one run each.
        guidance: Guidance scale.
        solver: Sampler.
        judged: Whether to judge the videos as moving shapes.
        kept: Where measured pairs are found and kept.
        progress: Told of the videos that are done, two per pair, for each number of steps.

    Raises:
        BackendError: An engine failed or produced numbers that are none.
        OSError: A pair cannot be kept.
    """
    runs = []
    for count in steps:
        what, pairs = f"videos at {counted(count, 'step')}", list[Pair]()
        progress(what, 0, 2 * len(asked))
        for index, each in enumerate(asked):
            pair = kept.find(each, count)
            if pair is None:
                pair = measure_pair(
                    reference,
                    candidate,
                    each,
                    steps=count,
                    guidance=guidance,
                    solver=solver,
                    judged=judged,
                    candidate_first=index % 2 == 1,
                )
                kept.keep(pair, count)
            pairs.append(pair)
            progress(what, 2 * len(pairs), 2 * len(asked))
        runs.append(Run(count, pairs))
    return runs


def summed_up(
    reference: Side,
    candidate: Side,
    settings: Mapping[str, Any],
    runs: Sequence[Run],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole report as plain JSON values.

    Args:
        reference: One side.
        candidate: The other.
        settings: How the videos were made; `prompts` is their number.
        runs: One per number of steps, at least one.
        machine: What it was measured on.
    """
    both = {"reference": reference.document(), "candidate": candidate.document()}
    body = {
        "schema": SCHEMA,
        "kind": KIND,
        "reelrt": __version__,
        **both,
        "settings": dict(settings),
        "machine": dict(machine),
        "runs": [run.document(both["candidate"]["backend"]) for run in runs],
    }
    report = Report.from_json(body)
    verdict = {
        "passed": report.passed,
        "notes": _notes(report, candidate),
        "targets": [
            {
                "name": check.name,
                "steps": check.steps,
                "measured": check.measured,
                "least": check.least,
                "unit": check.unit,
                "passed": check.passed,
            }
            for check in report.checks
        ],
    }
    return {
        **{name: value for name, value in body.items() if name != "runs"},
        **verdict,
        "runs": body["runs"],
    }


def _notes(report: Report, candidate: Side) -> list[str]:
    """What a reader has to know before believing the verdict."""
    engines, notes = candidate.pipe.engines, []
    if candidate.emulated:
        notes.append(
            "FP16 is emulated here: each layer's inputs, weights and result are rounded to FP16 and its sums "
            "are FP32, which a GPU's kernels may do in another order. Its time says nothing of an engine's."
        )
    elif engines.backend == "onnxruntime" and "fp16" in candidate.precisions.values():
        notes.append(
            "ONNX Runtime computes FP16 graphs in FP32 on a CPU: this shows what rounding the weights to "
            "FP16 does, not what FP16 arithmetic on a GPU adds to it."
        )
    if report.precision not in TARGETS:
        notes.append(f"There are no targets for {report.precision}.")
    elif report.against != REFERENCE:
        notes.append(
            f"The targets are against an {REFERENCE.upper()} reference; this one is {report.against}, so "
            "nothing was tested."
        )
    if report.prompts < PROMPTS:
        notes.append(f"The targets are stated for {PROMPTS} prompts; this is {report.prompts}.")
    if left_out := report.steps_left_out:
        which = " and ".join(map(str, left_out))
        notes.append(f"The targets are stated for {which} steps as well; nothing was measured there.")
    if not report.figures[0].adherence:
        notes.append("Adherence was not measured, so nothing was tested of it.")
    return notes


def _by_side(each: Sequence[Mapping[str, float]], middle: Any) -> dict[str, float]:
    return {side: float(middle([one[side] for one in each])) for side in ("reference", "candidate")}


def _ratio(sides: Mapping[str, float]) -> float:
    return sides["candidate"] / sides["reference"]


def _per_step(errors: npt.NDArray[np.float64]) -> list[dict[str, float]]:
    names = {"mean": errors.mean(0), "median": np.median(errors, 0), "worst": errors.max(0)}
    names["percentile_95"] = np.percentile(errors, 95, axis=0)
    return [
        {"step": index + 1, **{name: float(values[index]) for name, values in names.items()}}
        for index in range(errors.shape[1])
    ]


def _speed(
    seconds: Mapping[str, float], interval: tuple[float, float] | None, steps: int, backend: str
) -> str:
    """Which of the two is slower, in a sentence, if the pairs of times agree on it."""
    verdict, certain = "neither clearly slower nor faster than", ""
    if interval is None:
        verdict = "measured over too few videos to say whether it is slower than"
    else:
        low, high = interval
        verdict = "slower than" if low > 1 else "faster than" if high < 1 else verdict
        certain = f"; its time is {low:.2f} to {high:.2f} times the reference's (95 % interval)"
    return (
        f"The candidate is {verdict} the reference on {backend}: denoising a video in "
        f"{counted(steps, 'step')} took "
        f"{seconds['candidate']:.2f} s against {seconds['reference']:.2f} s (medians){certain}."
    )
