"""What a quality report says, and whether it is good enough: figures, targets, whose they are.

`reelrt evaluate quality` writes `quality.json` and puts it beside the bundle it measured; `reelrt build`
reads it there. The file is not in the bundle's manifest, so a bundle is the same with and without it.
Knows only the few figures that the targets are about; how they are measured stands in calibration.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelrt.bundle.manifest import Bundle
from reelrt.errors import IntegrityError
from reelrt.wording import counted

QUALITY = "quality.json"
KIND = "quality"
SCHEMA = 1

REFERENCE = "fp32"
"""The precision that the targets are against."""
PROMPTS = 200
"""How many prompts the targets are stated for."""
STEPS = (25, 10)
"""And for how many denoising steps."""
LEAST_PROMPTS = 16
"""Over fewer, a report is no ground to build on."""
REFUSED = "--no-adherence"
"""Why adherence was left out when it could have been measured."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a candidate has to reach at every number of steps.

    Attributes:
        ssim: Least mean SSIM of its frames against the reference's at equal seeds.
        adherence: Least difference of each attribute's adherence from the reference's, in points
            (percent of the videos).
    """

    ssim: float
    adherence: float


TARGETS: Mapping[str, Target] = {
    "int8": Target(ssim=0.95, adherence=-2.0),
    "int8-weights": Target(ssim=0.95, adherence=-2.0),
    "fp16": Target(ssim=0.99, adherence=-2.0),
    "fp32": Target(ssim=0.99, adherence=-2.0),
}
"""Precision to target, the coarsest first; a candidate answers for the coarsest of its stages."""


def coarsest(precisions: Iterable[str]) -> str:
    """The precision of several that is held to the lowest target; one without a target comes first."""
    order = list(TARGETS)
    return min(precisions, key=lambda name: order.index(name) if name in order else -1)


def is_int8(precision: str) -> bool:
    """Whether a bundle of this precision needs a report before engines are built of it."""
    return precision.startswith("int8")


@dataclass(frozen=True, slots=True)
class Check:
    """One figure beside its target.

    Attributes:
        name: `mean SSIM`, or an attribute and `adherence`.
        steps: Denoising steps it was measured at.
        measured: The figure.
        least: What it has to reach.
        unit: Of both; empty for a plain number.
    """

    name: str
    steps: int
    measured: float
    least: float
    unit: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is reached; a figure that is no number never is."""
        return self.measured >= self.least

    def __str__(self) -> str:
        number = "{:.5f}" if not self.unit else "{:+.1f} " + self.unit
        measured, least = number.format(self.measured), number.format(self.least)
        return f"{self.name} at {counted(self.steps, 'step')} is {measured} (at least {least})"


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured at one number of steps.

    Attributes:
        steps: Denoising steps.
        ssim: Mean over the prompts.
        adherence: Attribute to the candidate's share minus the reference's, in points; empty when
            adherence was not measured.
    """

    steps: int
    ssim: float
    adherence: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Report:
    """A quality report, as far as anything depends on it.

    Attributes:
        bundle: SHA-256 of the manifest of the candidate's bundle.
        candidate: The candidate's folder name.
        reference: The reference's folder name.
        precision: The candidate's; see `coarsest`.
        against: The reference's precision.
        prompts: Number of prompts.
        figures: One entry per number of steps, at least one.
        left_out: Why adherence was not measured; empty when it was.
    """

    bundle: str
    candidate: str
    reference: str
    precision: str
    against: str
    prompts: int
    figures: tuple[Figures, ...]
    left_out: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """Read what `reelrt evaluate quality` wrote.

        Raises:
            KeyError: An entry is missing.
            TypeError: An entry is of another kind.
            ValueError: Another kind of document or schema, or no measurement in it.
        """
        if data["kind"] != KIND or data["schema"] != SCHEMA:
            raise ValueError(f"it is {data['kind']!r} of schema {data['schema']}, not {KIND!r} of {SCHEMA}")
        figures = tuple(
            Figures(
                int(run["steps"]),
                float(run["ssim"]["mean"]),
                {name: float(each["difference_points"]) for name, each in (run["adherence"] or {}).items()},
            )
            for run in data["runs"]
        )
        if not figures:
            raise ValueError("it holds no measurement")
        candidate, reference = data["candidate"], data["reference"]
        return cls(
            bundle=str(candidate["bundle_sha256"]),
            candidate=str(candidate["folder"]),
            reference=str(reference["folder"]),
            precision=str(candidate["precision"]),
            against=str(reference["precision"]),
            prompts=int(data["settings"]["prompts"]),
            figures=figures,
            left_out=str(data["settings"].get("adherence_left_out", "")),
        )

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a report's file.

        Raises:
            IntegrityError: It is missing, unreadable or no quality report.
        """
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (
            OSError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            fault = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise IntegrityError(
                f"{path} is no quality report that can be read ({fault}).",
                "Measure again with `reelrt evaluate quality`.",
            ) from error

    @property
    def checks(self) -> tuple[Check, ...]:
        """Every figure that has a target; none when the reference is not FP32."""
        target = TARGETS.get(self.precision) if self.against == REFERENCE else None
        if target is None:
            return ()
        return tuple(check for figures in self.figures for check in _checks(figures, target))

    @property
    def missed(self) -> tuple[Check, ...]:
        """The targets that are missed."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def passed(self) -> bool | None:
        """Whether every target is reached; None when there is none for this comparison."""
        return not self.missed if self.checks else None

    @property
    def steps_left_out(self) -> tuple[int, ...]:
        """The numbers of steps that the targets are stated for and nothing was measured at."""
        return tuple(steps for steps in STEPS if steps not in {each.steps for each in self.figures})

    def belongs_to(self, bundle: Bundle) -> bool:
        """Whether it was measured on this very bundle."""
        return self.bundle == bundle.sha256

    def summary(self) -> dict[str, Any]:
        """What an engine set's manifest keeps of it, as plain JSON values."""
        differences = {
            name: min(each.adherence[name] for each in self.figures if name in each.adherence)
            for name in dict.fromkeys(name for each in self.figures for name in each.adherence)
        }
        return {
            "passed": self.passed,
            "reference": f"{self.reference} ({self.against})",
            "prompts": self.prompts,
            "steps": [each.steps for each in self.figures],
            "ssim": min(each.ssim for each in self.figures),
            "adherence_points": differences or None,
        }


def _checks(figures: Figures, target: Target) -> Iterable[Check]:
    yield Check("mean SSIM", figures.steps, figures.ssim, target.ssim)
    for name, points in figures.adherence.items():
        if name != "everything":
            yield Check(f"{name} adherence", figures.steps, points, target.adherence, "points")
