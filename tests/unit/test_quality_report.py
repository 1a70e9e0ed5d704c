"""What a quality report has to say to be believed: targets as they were promised, and honest gaps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reelrt.bundle.report import Report, coarsest
from reelrt.errors import IntegrityError
from tests.reports import report


def read(**figures) -> Report:
    return Report.from_json(report("ab", **figures))


@pytest.mark.parametrize(
    ("precision", "ssim", "points", "passed"),
    [
        ("int8", 0.95, -2.0, True),
        ("int8", 0.9499, 0.0, False),
        ("int8", 1.0, -2.1, False),
        ("int8-weights", 0.95, -2.0, True),
        ("int8-weights", 0.94, 0.0, False),
        ("fp16", 0.99, -2.0, True),
        ("fp16", 0.97, 0.0, False),
        ("fp16", 1.0, -3.0, False),
        ("fp32", 0.97, 0.0, False),
        ("int8", float("nan"), 0.0, False),
        ("int8", 0.97, None, True),
        ("int8", 1.0, 5.0, True),
    ],
)
def test_the_targets(precision, ssim, points, passed):
    assert read(precision=precision, ssim=ssim, points=points).passed is passed


def test_every_number_of_steps_has_to_reach_them():
    data = report("ab", steps=(25, 10))
    data["runs"][1]["ssim"]["mean"] = 0.9
    (missed,) = Report.from_json(data).missed
    assert str(missed) == "mean SSIM at 10 steps is 0.90000 (at least 0.95000)"


def test_a_missed_attribute_is_named_with_its_points():
    assert [str(check) for check in read(points=-3.5, steps=(10,)).missed] == [
        "shape adherence at 10 steps is -3.5 points (at least -2.0 points)"
    ]


def test_everything_is_no_attribute():
    data = report("ab")
    data["runs"][0]["adherence"]["everything"] = {"difference_points": -9.0}
    assert Report.from_json(data).passed is True


def test_another_reference_than_fp32_tests_nothing():
    found = read(against="int8", ssim=1.0)
    assert found.passed is None
    assert found.checks == ()


def test_a_bundle_answers_for_its_coarsest_stage():
    assert coarsest(["fp32", "int8", "fp16"]) == "int8"
    assert coarsest(["fp32", "fp16"]) == "fp16"
    assert coarsest(["int4", "int8"]) == "int4"
    assert read(precision="int4").passed is None


def test_a_summary_holds_the_worst_of_all_step_counts():
    data = report("ab", steps=(25, 10))
    data["runs"][1]["ssim"]["mean"] = 0.96
    data["runs"][1]["adherence"]["shape"]["difference_points"] = -1.5
    assert Report.from_json(data).summary() == {
        "passed": True,
        "reference": "reference (fp32)",
        "prompts": 200,
        "steps": [25, 10],
        "ssim": 0.96,
        "adherence_points": {"shape": -1.5},
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({**report("ab"), "schema": 2}),
        json.dumps({**report("ab"), "kind": "bundle"}),
        json.dumps({**report("ab"), "runs": []}),
        json.dumps({**report("ab"), "runs": [{"steps": 3}]}),
        json.dumps({**report("ab"), "settings": {"prompts": "many"}}),
    ],
)
def test_what_is_no_report_is_named(tmp_path: Path, text: str):
    (tmp_path / "quality.json").write_text(text, encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"quality\.json is no quality report"):
        Report.load(tmp_path / "quality.json")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(IntegrityError, match="No such file"):
        Report.load(tmp_path / "quality.json")
