"""Whether engines may be built of a bundle: an INT8 one needs a quality report that it passes.

Reads the report that `reelrt evaluate quality` put beside the bundle; measures nothing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from reelrt.bundle.manifest import Bundle
from reelrt.bundle.report import (
    LEAST_PROMPTS,
    PROMPTS,
    QUALITY,
    REFERENCE,
    REFUSED,
    Report,
    coarsest,
    is_int8,
)
from reelrt.errors import IntegrityError, QualityError
from reelrt.wording import counted

log = logging.getLogger("reelrt")

NOT_MEASURED = "not measured: --no-quality-gate"
WITHOUT = "To build without knowing, say `--no-quality-gate`."


@dataclass(frozen=True, slots=True)
class Passed:
    """What the gate let through.

    Attributes:
        summary: What the engine set's manifest says of its quality; empty when nothing is known and
            nothing has to be.
        attached: Whether the bundle's report goes into the engine set.
    """

    summary: dict[str, Any]
    attached: bool


def check_quality(bundle: Bundle, gate: bool = True) -> Passed:
    """Look at a bundle's quality report before anything is built.

    Args:
        bundle: The bundle.
        gate: Whether an INT8 bundle without a good report is refused. Bundles of other precisions
            need none; a report that belongs to one is kept all the same.

    Raises:
        QualityError: The report is missing, belongs to another bundle, is not against FP32, leaves out
            what could be measured, has too few prompts or misses a target.
        IntegrityError: The report cannot be read.
    """
    precision = coarsest(stage.precision for stage in bundle.stages.values())
    needed = is_int8(precision)
    report = _attached(bundle, needed and gate)
    if needed and gate:
        _check(bundle, report, precision)
    if report is None:
        if needed:
            log.warning("the quality of %s is not known: it was built with --no-quality-gate", bundle.folder)
        return Passed({"measured": NOT_MEASURED} if needed else {}, attached=False)
    if report.prompts < PROMPTS:
        log.warning(
            "the quality of %s was measured over %s; the targets are stated for %d",
            bundle.folder,
            counted(report.prompts, "prompt"),
            PROMPTS,
        )
    if left_out := report.steps_left_out:
        log.warning(
            "the quality of %s was not measured at %s steps, which the targets are stated for as well",
            bundle.folder,
            " and ".join(map(str, left_out)),
        )
    if not all(each.adherence for each in report.figures):
        log.warning("adherence to the prompts was not measured for %s", bundle.folder)
    return Passed(report.summary(), attached=True)


def _attached(bundle: Bundle, strict: bool) -> Report | None:
    """The report beside a bundle; one that is of no use is None unless the gate needs to name it."""
    path = bundle.folder / QUALITY
    if not path.is_file():
        return None
    try:
        report = Report.load(path)
    except IntegrityError as error:
        if strict:
            raise
        log.warning("%s is left out: %s", path, error.message)
        return None
    if not strict and not report.belongs_to(bundle):
        log.warning("%s is left out: it belongs to another bundle", path)
        return None
    return report


def _check(bundle: Bundle, report: Report | None, precision: str) -> None:
    measure = f"Measure it: `reelrt evaluate quality --reference FP32_BUNDLE --candidate {bundle.folder}`."
    if report is None:
        raise QualityError(
            f"{bundle.folder} holds {precision} stages, and no {QUALITY} says how good it is.",
            f"{measure} {WITHOUT}",
        )
    if not report.belongs_to(bundle):
        own = f"{bundle.sha256[:12]}..."
        raise QualityError(
            f"{bundle.folder / QUALITY} belongs to another bundle: it was measured on {report.candidate} "
            f"({report.bundle[:12]}...), and this is {own}.",
            f"{measure} {WITHOUT}",
        )
    if report.precision != precision:
        raise QualityError(
            f"{bundle.folder / QUALITY} is about {report.precision}, and the bundle is {precision}.",
            f"{measure} {WITHOUT}",
        )
    if report.passed is None:
        raise QualityError(
            f"{bundle.folder / QUALITY} tests no target: its reference {report.reference} is "
            f"{report.against}, and the targets are against {REFERENCE}.",
            f"{measure} {WITHOUT}",
        )
    if report.prompts < LEAST_PROMPTS:
        raise QualityError(
            f"{bundle.folder / QUALITY} was measured over {counted(report.prompts, 'prompt')}; "
            f"{LEAST_PROMPTS} are the least, and the targets are stated for {PROMPTS}.",
            f"{measure} {WITHOUT}",
        )
    if report.left_out == REFUSED:
        raise QualityError(
            f"{bundle.folder / QUALITY} was measured with {REFUSED}, and this model's adherence can be.",
            f"{measure} {WITHOUT}",
        )
    if report.missed:
        misses = "; ".join(map(str, report.missed))
        raise QualityError(
            f"{bundle.folder} misses what {precision} has to reach: {misses}.",
            f"Calibrate it again with fewer layers in INT8. {WITHOUT}",
        )
