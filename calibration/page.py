"""A quality report as one HTML page that needs nothing beside it and asks no other host.

Reads the report's document and pictures; the page itself stands in `quality.html.jinja`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reelrt.bundle.report import KIND
from reelrt.calibration.fidelity import PSNR_CAP
from reelrt.wording import counted

TEMPLATE = Path(__file__).with_name("quality.html.jinja")
CAPTIONS = {
    "latents": "How far the candidate's latents are from the reference's after each denoising step.",
    "ssim": "How alike the frames of each video are.",
    "adherence": "How many videos show what was asked for; above each pair the difference in points.",
}


def render(
    report: Mapping[str, Any],
    light: Mapping[str, bytes],
    dark: Mapping[str, bytes],
    sheets: Mapping[str, bytes],
) -> str:
    """Write the page.

    Args:
        report: What `quality.json` holds.
        light: Plot name to PNG, for a light page.
        dark: The same for a dark one.
        sheets: One contact sheet per number of steps, as PNG, in the order of the report's runs.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=lambda share: f"{share:.1f} %",
        points=lambda value: f"{value:+.1f}",
        decibels=lambda value: f"{value:.1f} dB" if value < PSNR_CAP else "equal",
        error=lambda share: f"{100 * share:.3g} %",
        mebibytes=lambda count: f"{count / 2**20:,.1f} MiB",
        counted=counted,
        measured=lambda check, name: f"{check[name]:+.1f}" if check["unit"] else f"{check[name]:.5f}",
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        kind=KIND,
        plots=[(CAPTIONS[name], _address(png), _address(dark[name])) for name, png in light.items()],
        sheets=list(
            zip([run["steps"] for run in report["runs"]], map(_address, sheets.values()), strict=True)
        ),
    )


def _address(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
