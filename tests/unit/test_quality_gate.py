"""`reelrt build` and the quality of an INT8 bundle: refused without a good report, and remembered."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from reelrt.bundle.manifest import Bundle, EngineSet
from reelrt.bundle.report import coarsest
from reelrt.engines.builder import build_engines
from reelrt.engines.gate import NOT_MEASURED, check_quality
from reelrt.engines.inspection import describe
from reelrt.errors import IntegrityError, QualityError
from tests.commands import reelrt
from tests.copies import with_precision
from tests.graphs import tiny_bundle
from tests.reports import report


@pytest.fixture
def fp32(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "fp32")


@pytest.fixture(params=["int8", "int8-weights"])
def int8(request, tmp_path: Path) -> Path:
    return with_precision(tiny_bundle(tmp_path / "int8"), {"step": request.param})


def attach(bundle: Path, **figures) -> Path:
    made = Bundle.load(bundle)
    own = coarsest(stage.precision for stage in made.stages.values())
    data = report(made.sha256, **{"precision": own, **figures})
    (bundle / "quality.json").write_text(json.dumps(data), encoding="utf-8")
    return bundle


def test_a_report_changes_nothing_of_what_a_bundle_is(fp32):
    before = Bundle.load(fp32).sha256
    assert Bundle.load(attach(fp32)).sha256 == before


def test_int8_without_a_report_is_refused(int8, tmp_path):
    with pytest.raises(QualityError, match=r"no quality\.json.*reelrt evaluate quality.*--no-quality-gate"):
        build_engines(int8, tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


def test_a_report_of_another_bundle_is_refused(int8, tmp_path):
    (int8 / "quality.json").write_text(json.dumps(report("cd" * 32)), encoding="utf-8")
    with pytest.raises(QualityError, match=r"belongs to another bundle: it was measured on candidate \(cdcd"):
        build_engines(int8, tmp_path / "engines")


def test_a_report_of_an_older_state_of_the_bundle_is_refused(int8):
    attach(int8)
    assert check_quality(Bundle.load(int8)).attached
    loaded = Bundle.load(int8)
    (int8 / "README.md").write_text("changed", encoding="utf-8")
    loaded.save("0.2.0")
    with pytest.raises(QualityError, match="belongs to another bundle"):
        check_quality(Bundle.load(int8))


def test_a_missed_target_is_refused_with_its_figures(int8, tmp_path):
    attach(int8, ssim=0.9, points=-4.0)
    with pytest.raises(QualityError) as caught:
        build_engines(int8, tmp_path / "engines")
    assert "mean SSIM at 25 steps is 0.90000 (at least 0.95000)" in str(caught.value)
    assert "shape adherence at 10 steps is -4.0 points (at least -2.0 points)" in str(caught.value)


def test_a_report_against_something_else_than_fp32_is_refused(int8):
    attach(int8, against="int8", ssim=1.0)
    with pytest.raises(
        QualityError, match="its reference reference is int8, and the targets are against fp32"
    ):
        check_quality(Bundle.load(int8))


def test_a_report_for_other_targets_is_refused(int8):
    attach(int8, precision="fp16", ssim=0.999)
    with pytest.raises(QualityError, match="is about fp16, and the bundle is int8"):
        check_quality(Bundle.load(int8), gate=True)


def test_adherence_that_was_not_measured_is_said_aloud(int8, caplog):
    attach(int8, points=None)
    check_quality(Bundle.load(int8), gate=True)
    assert "adherence to the prompts was not measured" in caplog.text


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_a_report_that_cannot_be_read_is_refused(int8, text):
    (int8 / "quality.json").write_text(text, encoding="utf-8")
    with pytest.raises(IntegrityError, match="no quality report"):
        check_quality(Bundle.load(int8))


def test_a_good_report_lets_it_through_and_is_remembered(int8):
    passed = check_quality(Bundle.load(attach(int8)))
    assert passed.attached
    assert passed.summary["passed"] is True
    assert passed.summary["ssim"] == 0.97
    assert passed.summary["prompts"] == 200


def test_few_prompts_are_said_aloud(int8, caplog):
    attach(int8, prompts=16)
    with caplog.at_level(logging.WARNING, "reelrt"):
        check_quality(Bundle.load(int8))
    assert "over 16 prompts; the targets are stated for 200" in caplog.text


def test_steps_that_were_left_out_are_said_aloud(int8, caplog):
    """One step is easily alike; the targets are for the steps that videos are made with."""
    attach(int8, steps=(1, 25))
    with caplog.at_level(logging.WARNING, "reelrt"):
        check_quality(Bundle.load(int8))
    assert "was not measured at 10 steps" in caplog.text


@pytest.mark.parametrize("number", ["Infinity", "1e400", "NaN"])
@pytest.mark.parametrize("entry", ['"prompts": ', '"steps": '])
def test_a_report_of_impossible_numbers_is_damaged(int8, number, entry):
    path = attach(int8) / "quality.json"
    whole = {'"prompts": ': "200", '"steps": ': "25"}[entry]
    text = path.read_text(encoding="utf-8")
    assert entry + whole in text
    path.write_text(text.replace(entry + whole, entry + number), encoding="utf-8")
    with pytest.raises(IntegrityError, match="no quality report"):
        check_quality(Bundle.load(int8))


def test_too_few_prompts_are_refused(int8):
    attach(int8, prompts=15)
    with pytest.raises(QualityError, match="over 15 prompts; 16 are the least, and the targets are stated"):
        check_quality(Bundle.load(int8))
    assert check_quality(Bundle.load(int8), gate=False).summary["prompts"] == 15


def test_adherence_that_could_be_measured_must_be(int8, caplog):
    """A model that the judge cannot read is built with a warning; one that it can read is not spared."""
    attach(int8, points=None)
    path = int8 / "quality.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    for why, refused in (("the judge knows moving shapes only", False), ("--no-adherence", True)):
        data["settings"]["adherence_left_out"] = why
        path.write_text(json.dumps(data), encoding="utf-8")
        if refused:
            with pytest.raises(QualityError, match="measured with --no-adherence, and this model's"):
                check_quality(Bundle.load(int8))
        else:
            assert check_quality(Bundle.load(int8)).attached
            assert "adherence to the prompts was not measured" in caplog.text


@pytest.mark.parametrize("left", ["nothing", "rubbish", "another's"])
def test_without_the_gate_nothing_is_known_and_that_is_said(int8, left, caplog):
    texts = {"rubbish": "{", "another's": json.dumps(report("cd" * 32))}
    if left in texts:
        (int8 / "quality.json").write_text(texts[left], encoding="utf-8")
    passed = check_quality(Bundle.load(int8), gate=False)
    assert passed.summary == {"measured": NOT_MEASURED}
    assert not passed.attached
    assert "is not known" in caplog.text


def test_without_the_gate_a_missed_target_is_still_told(int8):
    passed = check_quality(Bundle.load(attach(int8, ssim=0.5)), gate=False)
    assert passed.summary["passed"] is False
    assert passed.attached


def test_other_precisions_need_no_report(fp32):
    assert check_quality(Bundle.load(fp32)).summary == {}
    half = with_precision(fp32, {"step": "fp16"})
    assert check_quality(Bundle.load(half)).summary == {}


def test_engines_keep_the_report_and_follow_it(fp32, tmp_path):
    build_engines(fp32, tmp_path / "engines")
    assert EngineSet.load(tmp_path / "engines").quality == {}
    step = (tmp_path / "engines" / "step.onnx").stat().st_ino
    attach(fp32, precision="fp32", ssim=0.999)
    build_engines(fp32, tmp_path / "engines")
    engines = EngineSet.load(tmp_path / "engines")
    assert engines.quality["ssim"] == 0.999
    assert "quality.json" in engines.files
    assert (tmp_path / "engines" / "step.onnx").stat().st_ino == step, "nothing had to be built again"
    before = (tmp_path / "engines" / "manifest.json").stat().st_mtime_ns
    build_engines(fp32, tmp_path / "engines")
    assert (tmp_path / "engines" / "manifest.json").stat().st_mtime_ns == before
    (fp32 / "quality.json").unlink()
    build_engines(fp32, tmp_path / "engines")
    assert EngineSet.load(tmp_path / "engines").quality == {}
    assert not (tmp_path / "engines" / "quality.json").exists()


def test_engine_sets_of_older_versions_open(fp32, tmp_path):
    build_engines(fp32, tmp_path / "engines")
    path = tmp_path / "engines" / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["quality"]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert EngineSet.load(tmp_path / "engines").quality == {}


def test_inspect_shows_it(fp32, tmp_path):
    attach(fp32, precision="fp32", ssim=0.9991, points=-0.5, prompts=24)
    build_engines(fp32, tmp_path / "engines")
    for folder in (fp32, tmp_path / "engines"):
        shown = reelrt("inspect", folder)
        assert shown.returncode == 0, shown.stderr
        assert (
            "every target reached: SSIM 0.99910, adherence -0.5 points at worst, against reference (fp32) "
            "over 24 prompts at 25 and 10 steps" in shown.stdout
        )
    assert describe(tmp_path / "engines")["quality"]["prompts"] == 24


def test_one_prompt_and_one_step_are_no_plurals(fp32, caplog):
    attach(fp32, precision="fp32", prompts=1, steps=(1,))
    assert re.search(r"over 1 prompt at 1 step\b", reelrt("inspect", fp32).stdout)
    with caplog.at_level(logging.WARNING, "reelrt"):
        check_quality(Bundle.load(fp32), gate=False)
    assert "over 1 prompt; the targets are stated for 200" in caplog.text


def test_inspect_shows_no_report_of_another_bundle(fp32):
    (fp32 / "quality.json").write_text(json.dumps(report("cd" * 32)), encoding="utf-8")
    assert describe(fp32)["quality"] == {}


def test_the_command_ends_with_8_and_writes_nothing(int8, tmp_path):
    made = reelrt("build", int8, "-o", tmp_path / "engines", "--json")
    assert made.returncode == 8
    assert json.loads(made.stdout)["error"]["type"] == "QualityError"
    assert not (tmp_path / "engines").exists()
