"""The plots of a quality report, as PNG files in a light and a dark theme.

Read the report's document and nothing else.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reelrt.bundle.report import TARGETS
from reelrt.wording import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 144
WIDTH, HEIGHT = 9.0, 3.4
"""Of a whole plot, in inches."""
BINS = 24


@dataclass(frozen=True, slots=True)
class Theme:
    """The colours of a plot.

    Attributes:
        name: `light` or `dark`.
        paper: Behind everything.
        ink: Text and axes.
        grid: Lines behind the data, and the reference.
        reference: The reference's data.
        candidate: The candidate's data.
        limit: Targets and worst cases.
    """

    name: str
    paper: str
    ink: str
    grid: str
    reference: str
    candidate: str
    limit: str


THEMES = (
    Theme("light", "#ffffff", "#1f2328", "#d8dee4", "#8c959f", "#0969da", "#cf222e"),
    Theme("dark", "#161b22", "#e6edf3", "#30363d", "#768390", "#58a6ff", "#ff7b72"),
)

Document = Mapping[str, Any]


def plots(report: Document, theme: Theme) -> dict[str, bytes]:
    """Draw a report's plots.

    Args:
        report: What `quality.json` holds.
        theme: Its colours.

    Returns:
        Name to PNG: `latents`, `ssim`, and `adherence` when that was measured.
    """
    drawn = {"latents": _latents, "ssim": _ssim}
    if all(run["adherence"] for run in report["runs"]):
        drawn["adherence"] = _adherence
    return {name: _png(draw, report, theme) for name, draw in drawn.items()}


def _png(draw: Callable[[Sequence[Axes], Document, Theme], None], report: Document, theme: Theme) -> bytes:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {
        **dict.fromkeys(inked, theme.ink),
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "legend.facecolor": theme.paper,
        "legend.edgecolor": theme.grid,
        "grid.color": theme.grid,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
    }
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(1, len(report["runs"]), sharey=True, squeeze=False)
        draw(grid[0], report, theme)
        for axes, run in zip(grid[0], report["runs"], strict=True):
            axes.set_title(counted(run["steps"], "step"), fontsize=11)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return _saved(figure)


def _saved(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _latents(grid: Sequence[Axes], report: Document, theme: Theme) -> None:
    """Relative error of the latents after each step: median, 95th percentile, worst."""
    from matplotlib.ticker import MaxNLocator

    lines = {
        "median": (theme.candidate, "-", "median"),
        "percentile_95": (theme.candidate, "--", "95th percentile"),
        "worst": (theme.limit, ":", "worst"),
    }
    top = max(step["worst"] for run in report["runs"] for step in run["latent_error"]["per_step"])
    for axes, run in zip(grid, report["runs"], strict=True):
        steps = run["latent_error"]["per_step"]
        for name, (color, style, label) in lines.items():
            values = [100 * each[name] for each in steps]
            axes.plot([each["step"] for each in steps], values, style, color=color, label=label)
        axes.set_xlabel("denoising step")
        axes.set_xlim(0.5, run["steps"] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 100 * top * 1.08 or 1)
    grid[0].set_ylabel("relative error of the latents, %")


def _ssim(grid: Sequence[Axes], report: Document, theme: Theme) -> None:
    """How many videos have which SSIM, with the mean and the target."""
    from matplotlib.ticker import MaxNLocator

    target = TARGETS.get(report["candidate"]["precision"])
    every = [video["ssim"] for run in report["runs"] for video in run["videos"]]
    low = min(every)
    width = (1 - low) / BINS or 1e-4
    edges = low - width + width * np.arange(BINS + 2)
    for axes, run in zip(grid, report["runs"], strict=True):
        axes.hist([video["ssim"] for video in run["videos"]], bins=edges.tolist(), color=theme.candidate)
        axes.axvline(run["ssim"]["mean"], color=theme.ink, linewidth=1.5, label="mean")
        if target:
            outside = ", left of this plot" if target.ssim < edges[0] else ""
            label = f"target for the mean: {target.ssim:g}{outside}"
            axes.axvline(target.ssim, color=theme.limit, linestyle="--", label=label)
        axes.set_xlabel(f"SSIM of a video's frames; mean {run['ssim']['mean']:.5f}")
        axes.set_xlim(edges[0], edges[-1] + width)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter("{x:.7g}")
    grid[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0].set_ylabel("videos")


def _adherence(grid: Sequence[Axes], report: Document, theme: Theme) -> None:
    """Share of videos that are right, by attribute and side, with the difference above."""
    sides = (("reference", theme.reference, -0.2), ("candidate", theme.candidate, 0.2))
    for axes, run in zip(grid, report["runs"], strict=True):
        scores = run["adherence"]
        places = np.arange(len(scores))
        for side, color, shift in sides:
            shares = [each[f"{side}_percent"] for each in scores.values()]
            label = f"{side} ({report[side]['precision']})"
            axes.bar(places + shift, shares, 0.38, color=color, label=label)
        for place, each in zip(places, scores.values(), strict=True):
            top = max(each["reference_percent"], each["candidate_percent"])
            axes.text(
                float(place),
                top + 2,
                f"{each['difference_points']:+.1f}",
                ha="center",
                va="bottom",
                fontsize=9,
            )
        axes.set_xticks(places, list(scores), rotation=25, ha="right", rotation_mode="anchor")
        axes.set_ylim(0, 112)
        axes.set_yticks(range(0, 101, 20))
        axes.grid(visible=False, axis="x")
    grid[0].set_ylabel("videos that are right, %")
