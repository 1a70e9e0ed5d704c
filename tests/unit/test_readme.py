"""What the papers say is there: the README's figures come from their JSON files, its links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import readme, roofline

ROOT = Path(__file__).parents[2]
PAPERS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "models/*/*.md")
    for path in ROOT.glob(pattern)
)


def test_the_figures_are_those_of_the_json_files() -> None:
    text = readme.README.read_text(encoding="utf-8")
    between = text.split(readme.BEGIN)[1].split(readme.END)[0]
    assert between.strip() == readme.block()


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(paper: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", paper.read_text(encoding="utf-8"))
    assert [link for link in links if not (paper.parent / link).exists()] == []


def test_every_make_target_that_is_named_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for paper in PAPERS:
        named = re.findall(r"(?:^|`|    )make ([a-z-]+)\b", paper.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(named) <= targets, paper


def test_no_speed_is_claimed_without_its_bound() -> None:
    """Every line of our papers that says how many times faster something is, says the least time too."""
    claims = [
        (paper.name, line)
        for paper in PAPERS
        for line in paper.read_text(encoding="utf-8").splitlines()
        if re.search(r"\d(\.\d+)?×\**\s*(faster|slower)", line)
    ]
    assert claims, "the README compares itself with diffusers"
    assert [claim for claim in claims if "no FP32 runtime" not in claim[1]] == []


def test_the_bound_is_work_over_rate_and_nothing_beats_it() -> None:
    loop, least = (
        json.loads((readme.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("loop-cpu", "roofline-cpu")
    )
    found = roofline.bound(loop, least["flops_per_second"], least["cores"])
    assert {name: least[name] for name in found} == found
    assert least["passes"] == 2 * loop["settings"]["steps"]
    ours = readme._rivals(loop["diffusers"]["awake"])[0]
    assert 0 < least["least_seconds"] < ours
    measured = [
        each["flop"] / each["seconds"] for each in loop["pass"]["operators"].values() if "flop" in each
    ]
    assert least["flops_per_second"] >= max(measured)
