"""`reelrt evaluate quality` on bundles of a tiny random model: alike, damaged, interrupted, impossible."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reelrt.bundle.manifest import Bundle
from reelrt.bundle.schedule import Schedule, Schedules
from reelrt.calibration.comparison import Run
from reelrt.calibration.pairs import Asked, Kept, Pair, measure_pair, numbered
from reelrt.calibration.quality import evaluate_quality
from reelrt.calibration.sides import Side
from reelrt.engines.gate import check_quality
from reelrt.errors import BackendError, InputError, IntegrityError, QualityError, RangeError
from tests.commands import reelrt as run_reelrt
from tests.commands import tree
from tests.copies import copied, noise, with_manifest, with_precision, with_weights
from tests.reports import report as made_report

pytestmark = pytest.mark.timeout(600)  # the first test exports the model
SAME = "<b>odd & bold"
"""Name of the copy that is the same; as hard on a page as a name can be."""
QUICK: dict[str, Any] = {"prompts": 2, "steps": (2, 1), "adherence": True, "guidance": 4.0}


@pytest.fixture(scope="module")
def place(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `fp32`, `near`, `damaged` and one as it is: a bundle, and copies of it."""
    folder = tmp_path_factory.mktemp("quality")
    for name in ("fp32", SAME, "near", "damaged"):
        copied(work / "bundle", folder, name)
    with_weights(folder / "near", noise(1e-3))
    with_weights(folder / "damaged", noise(0.5))
    for name in ("near", "damaged"):
        with_precision(folder / name, {"step": "int8"})
    return folder


def measured(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    return found


def without_seconds(found: dict[str, Any]) -> dict[str, Any]:
    """A report but for what depends on the clock."""
    for run in found["runs"]:
        for name in ("speed", "denoise_seconds"):
            del run[name]
        for video in run["videos"]:
            del video["denoise_seconds"]
    return found


def test_equal_bundles_are_equal_in_everything(place: Path, tmp_path: Path) -> None:
    found = evaluate_quality(place / "fp32", place / SAME, tmp_path / "out", **QUICK)
    report = measured(tmp_path / "out")
    assert report["passed"] is True
    assert [run["steps"] for run in report["runs"]] == [2, 1]
    for run in report["runs"]:
        assert run["ssim"] == {"mean": 1, "percentile_5": 1, "worst": 1}
        assert run["psnr_db"]["worst"] == 100
        assert [step["worst"] for step in run["latent_error"]["per_step"]] == [0] * run["steps"]
        assert run["roughness"]["candidate_over_reference"] == 1
        for score in run["adherence"].values():
            assert (score["lost"], score["won"], score["difference_points"]) == (0, 0, 0)
        assert [video["seed"] for video in run["videos"]] == [0, 1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".quality",
        "quality-1.png",
        "quality-2.png",
        "quality-adherence.png",
        "quality-latents.png",
        "quality-ssim.png",
        "quality.html",
        "quality.json",
    ]
    assert measured(place / SAME) == report
    assert found.files[-1] == place / SAME / "quality.json"
    Bundle.load(place / SAME)
    assert not (place / "fp32" / "quality.json").exists()
    with Image.open(tmp_path / "out" / "quality-2.png") as sheet:
        assert sheet.height > 2 * 64, "two frames above each other"
    _check_page((tmp_path / "out" / "quality.html").read_text(encoding="utf-8"))


def _check_page(page: str) -> None:
    """It names the bundle as text, and holds every picture itself: 3 plots in 2 themes, 2 sheets."""
    assert "&lt;b&gt;odd &amp; bold" in page
    assert "<b>odd" not in page
    sources = re.findall(r"""(?:src|srcset|href)=["']([^"']*)""", page)
    assert len(sources) == 3 * 2 + 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "://" not in page
    assert "prefers-color-scheme: dark" in page


def test_latents_are_those_after_each_step(place: Path) -> None:
    """With split guidance a step is two launches; the last latents are the video's own."""
    side = Side.open(place / "fp32")
    for guidance in (4.0, 1.0):
        video, latents = side.generate("a red circle", seed=5, steps=4, guidance=guidance, solver="ddim")
        assert len(latents) == 4
        np.testing.assert_array_equal(latents[-1], video.latents[0])
        assert all(np.abs(a - b).max() > 1e-3 for a, b in pairwise(latents))


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        (
            [1.2] * 12,
            "is slower than the reference on here: denoising a video in 2 steps took 1.20 s against",
        ),
        ([0.5] * 12, "is faster than the reference"),
        ([0.5, 1.5] * 6, "is neither clearly slower nor faster than the reference"),
        ([1.5] * 5, "too few videos to say"),
    ],
)
def test_a_slower_candidate_is_said_to_be_if_the_pairs_agree(ratios: list[float], words: str) -> None:
    figures = {
        "ssim": 1.0,
        "psnr_db": 100.0,
        "latent_errors": [0.0, 0.0],
        "seen": None,
        "roughness": {"reference": None, "candidate": None},
    }
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    pairs = [
        Pair(
            Asked("a cat", seed, None),
            {**figures, "denoise_seconds": {"reference": 1.0, "candidate": ratio}},
            frames,
            frames,
        )
        for seed, ratio in enumerate(ratios)
    ]
    assert words in Run(2, pairs).document("here")["speed"]


def test_a_damaged_candidate_is_found_and_cannot_be_built(place: Path, tmp_path: Path) -> None:
    words = ("--prompts", 2, "--steps", 2, "--adherence")
    made = run_reelrt(
        *("evaluate", "quality", "--reference", place / "fp32", "--candidate", place / "damaged"),
        *("-o", tmp_path / "out", *words),
    )
    assert made.returncode == 8, made.stderr
    assert re.search(r"Missed: mean SSIM at 2 steps is 0\.\d+ \(at least 0\.95000\)\.", made.stderr)
    assert "a target is missed" in made.stdout
    report = measured(tmp_path / "out")
    assert report["passed"] is False
    assert report["runs"][0]["latent_error"]["last_step"]["mean"] > 0.05
    _as_of(place / "damaged", 200)
    with pytest.raises(QualityError, match="misses what int8 has to reach: mean SSIM at 2 steps"):
        check_quality(Bundle.load(place / "damaged"))


def _as_of(bundle: Path, prompts: int) -> None:
    """Let a bundle's report say so many prompts: measuring as many takes long."""
    report = measured(bundle)
    report["settings"]["prompts"] = prompts
    (bundle / "quality.json").write_text(json.dumps(report), encoding="utf-8")


def test_a_near_candidate_passes_and_can_be_built(place: Path, tmp_path: Path) -> None:
    words = ("--prompts", 2, "--steps", 2, "--adherence", "--json")
    made = run_reelrt(
        *("evaluate", "quality", "--reference", place / "fp32", "--candidate", place / "near"),
        *("-o", tmp_path / "out", *words),
    )
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert told["passed"] is True
    assert 0 < told["runs"][0]["latent_error"]["last_step"]["mean"] < 0.05
    assert "The targets are stated for 200 prompts; this is 2." in told["notes"]
    assert "too few videos to say whether it is slower than the reference on onnxruntime" in made.stderr
    with pytest.raises(QualityError, match="over 2 prompts; 16 are the least"):
        check_quality(Bundle.load(place / "near"))
    _as_of(place / "near", 16)
    assert check_quality(Bundle.load(place / "near")).summary["prompts"] == 16


def test_an_interrupted_evaluation_goes_on_where_it_was(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_quality(place / "fp32", place / "near", tmp_path / "whole", **QUICK)
    before = tree(place)

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("videos at 1 step", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_quality(place / "fp32", place / "near", tmp_path / "out", progress=stop, **QUICK)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".quality"]
    assert tree(place) == before
    kept = sorted((tmp_path / "out" / ".quality").iterdir())
    assert len(kept) == 3
    kept[0].write_bytes(b"cut off")  # is measured again
    made = []

    def counted(*args: Any, **options: Any) -> Any:
        made.append(options["steps"])
        return measure_pair(*args, **options)

    monkeypatch.setattr("reelrt.calibration.comparison.measure_pair", counted)
    resumed = evaluate_quality(place / "fp32", place / "near", tmp_path / "out", **QUICK)
    assert len(made) == 2
    assert resumed.kept_bytes > 0
    larger = evaluate_quality(
        place / "fp32", place / "near", tmp_path / "out", **{**QUICK, "steps": (2, 1, 3)}, forget=True
    )
    assert made[2:] == [3, 3], "what was measured before is not made again"
    assert [run["steps"] for run in larger.document["runs"]] == [2, 1, 3]
    assert larger.kept_bytes == 0
    assert not (tmp_path / "out" / ".quality").exists()
    assert without_seconds(dict(resumed.document)) == without_seconds(dict(whole.document))


def test_what_was_kept_of_other_bundles_or_settings_is_not_used(place: Path, tmp_path: Path) -> None:
    sides = {name: Side.open(place / name) for name in ("fp32", "near", SAME)}
    settings = {"guidance": 4.0, "solver": "ddim", "adherence": True}
    one, two = numbered(2, seed=0)

    def path(
        reference: str = "fp32", candidate: str = "near", asked: Asked = one, steps: int = 2, **changes: Any
    ):
        return Kept(tmp_path, sides[reference], sides[candidate], {**settings, **changes}).path(asked, steps)

    others = [
        path(candidate=SAME),
        path(reference="near", candidate="fp32"),
        path(asked=two),
        path(asked=Asked(one.prompt, 1, one.scene)),
        path(steps=3),
        path(guidance=2.0),
        path(solver="unipc"),
        path(adherence=False),
    ]
    assert len({path(), *others}) == 1 + len(others)
    assert path(reference=SAME) == path(), "the same bytes are the same bundle"


def test_prompts_of_a_file(place: Path, tmp_path: Path) -> None:
    lines = '# mine\n\n a cat on a "sofa" \na red circle moving right on a black background\n'
    (tmp_path / "prompts.txt").write_text(lines, encoding="utf-8")
    options = {**QUICK, "adherence": None, "prompts": tmp_path / "prompts.txt", "seed": 7}
    report = evaluate_quality(place / "fp32", place / SAME, tmp_path / "out", **options).document
    videos = report["runs"][0]["videos"]
    assert [(video["prompt"], video["seed"]) for video in videos] == [
        ('a cat on a "sofa"', 7),
        ("a red circle moving right on a black background", 8),
    ]
    assert report["runs"][0]["adherence"] is None
    assert "the judge knows moving shapes only" in report["settings"]["adherence_left_out"]
    assert "Adherence was not measured, so nothing was tested of it." in report["notes"]
    assert not (tmp_path / "out" / "quality-adherence.png").exists()
    assert "Not measured: the judge knows" in (tmp_path / "out" / "quality.html").read_text(encoding="utf-8")


def test_an_engine_set_is_measured_and_left_alone(work: Path, place: Path, tmp_path: Path) -> None:
    before = tree(work / "engines")
    report = evaluate_quality(place / "fp32", work / "engines", tmp_path / "out", **QUICK).document
    assert report["candidate"]["kind"] == "engines"
    assert report["candidate"]["bundle_sha256"] == report["reference"]["sha256"]
    assert report["passed"] is True
    assert tree(work / "engines") == before


def test_what_a_comparison_does_not_show_is_said(place: Path, tmp_path: Path) -> None:
    half = with_precision(copied(place / "fp32", tmp_path, "half"), {"vae_decoder": "fp16"})
    report = evaluate_quality(half, half, tmp_path / "out", **QUICK).document
    assert report["passed"] is None
    for words in (
        "nothing was tested",
        "not what FP16 arithmetic on a GPU",
        "for 200 prompts; this is 2",
        "for 25 and 10 steps as well",
    ):
        assert any(words in note for note in report["notes"])
    with pytest.raises(InputError, match="vae_decoder of .*half has FP16 graphs"):
        evaluate_quality(place / "fp32", half, tmp_path / "other", emulate_fp16=True, **QUICK)
    assert not (half / "quality.json").exists(), "it would take the place of one that the gate can use"


def _other_model(data: dict[str, Any]) -> None:
    data["pipeline"]["model"]["sha256"] = "cd" * 32


def _other_frames(data: dict[str, Any]) -> None:
    data["pipeline"]["geometry"]["frames"] = 8


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_other_model, r"come from different models: model \(\w{12}\) and model \(cdcdcdcdcdcd\)"),
        (_other_frames, "differ in their frames: 16 and 8"),
    ],
)
def test_two_that_are_not_alike_are_refused(
    place: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    other = with_manifest(copied(place / "fp32", tmp_path, "other"), change)
    with pytest.raises(InputError, match=sentence):
        evaluate_quality(place / "fp32", other, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_other_schedules_are_refused(place: Path, tmp_path: Path) -> None:
    other = copied(place / "fp32", tmp_path, "other")
    loaded = Bundle.load(other)
    steps = {count: loaded.schedules.get("ddim", count) for count in (1, 2)}
    steps[2] = Schedule(
        **{
            **{name: getattr(steps[2], name) for name in Schedule.__slots__},
            "timesteps": steps[2].timesteps + 1,
        }
    )
    Schedules(steps.values()).save(other / "schedules.safetensors")
    loaded.save(loaded.version)
    with pytest.raises(InputError, match="different schedules of ddim at 2 steps"):
        evaluate_quality(place / "fp32", other, tmp_path / "out", **QUICK)


def test_numbers_that_are_none_name_the_side_and_the_request(place: Path, tmp_path: Path) -> None:
    broken = with_weights(copied(place / "fp32", tmp_path, "broken"), lambda values: values * np.nan)
    with pytest.raises(BackendError, match=r"broken failed at 2 steps, seed 0, 'a .*not finite"):
        evaluate_quality(place / "fp32", broken, tmp_path / "out", **QUICK)
    assert not (broken / "quality.json").exists()


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"prompts": 0}, InputError, "prompts 0 is not possible"),
        ({"prompts": 10_001}, InputError, "prompts 10001 is not possible"),
        ({"prompts": Path("nowhere.txt")}, InputError, "'nowhere.txt' cannot be read: No such file"),
        ({"steps": (101,)}, RangeError, "steps 101"),
        ({"steps": (0,)}, RangeError, "steps 0"),
        ({"steps": ()}, InputError, "no number of steps"),
        ({"guidance": float("nan")}, InputError, "guidance nan"),
        ({"seed": -1}, InputError, "seed -1"),
        ({"seed": 2**63 - 1}, InputError, "seed 9223372036854775808"),
        ({"solver": "magic"}, RangeError, "magic"),
        ({"adherence": None}, InputError, "'model' is not known to show moving shapes.*--prompts FILE"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_impossible_options_are_refused_before_work(
    place: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        evaluate_quality(place / "fp32", place / SAME, tmp_path / "out", **{**QUICK, **changes})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "sentence"), [("\n# only this\n", "holds 0 prompts"), (None, "no UTF-8")])
def test_a_file_of_no_prompts_is_refused(
    place: Path, tmp_path: Path, text: str | None, sentence: str
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xff\xfe" if text is None else text.encode())
    with pytest.raises(InputError, match=sentence):
        evaluate_quality(place / "fp32", place / SAME, tmp_path / "out", **{**QUICK, "prompts": file})


def test_adherence_of_prompts_that_are_no_shapes_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat", encoding="utf-8")
    options = {**QUICK, "prompts": tmp_path / "prompts.txt"}
    with pytest.raises(InputError, match="'a cat' is no sentence about moving shapes"):
        evaluate_quality(place / "fp32", place / SAME, tmp_path / "out", **options)


def test_missing_folders_are_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="there is no folder .*nowhere.* Check the name"):
        evaluate_quality(place / "fp32", tmp_path / "nowhere", tmp_path / "out", **QUICK)
    with pytest.raises(IntegrityError, match="there is no folder .*nowhere.* Check the name"):
        evaluate_quality(tmp_path / "nowhere", place / "fp32", tmp_path / "out", **QUICK)


@pytest.mark.parametrize("file", ["schedules.safetensors", "step.onnx.data"])
def test_damaged_files_are_named(place: Path, tmp_path: Path, file: str) -> None:
    damaged = copied(place / "fp32", tmp_path, "other")
    (damaged / file).write_bytes(b"cut off")
    with pytest.raises(IntegrityError, match=rf"{file} is damaged"):
        evaluate_quality(place / "fp32", damaged, tmp_path / "out", **QUICK)


def test_a_report_over_more_prompts_stays(place: Path, tmp_path: Path, caplog) -> None:
    """What may have taken days is not lost to a quick look."""
    candidate = copied(place / "fp32", tmp_path, "candidate")
    attached, options = candidate / "quality.json", {**QUICK, "prompts": 1, "steps": (1,)}
    for prompts, digest, stays in (
        (200, Bundle.load(candidate).sha256, True),
        (200, "ab" * 32, False),
        (1, Bundle.load(candidate).sha256, False),
    ):
        attached.write_text(json.dumps(made_report(digest, prompts=prompts)), encoding="utf-8")
        before = attached.read_bytes()
        found = evaluate_quality(place / "fp32", candidate, tmp_path / "out", **options)
        assert ((attached.read_bytes() == before), (attached in found.files)) == (stays, not stays)
    assert caplog.text.count("is over more prompts and stays") == 1


@pytest.mark.parametrize("output", ["near", "near/quality", "fp32"])
def test_an_output_in_what_is_compared_is_refused(place: Path, output: str) -> None:
    before = tree(place)
    with pytest.raises(InputError, match="which is compared"):
        evaluate_quality(place / "fp32", place / "near", place / output, **QUICK)
    assert tree(place) == before


def test_an_output_that_cannot_be_written_is_named_before_work(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to .*file"):
        evaluate_quality(place / "fp32", place / SAME, tmp_path / "file", **QUICK)


@pytest.mark.parametrize("package", ["matplotlib", "skimage", "jinja2"])
def test_what_is_not_installed_is_named_with_the_remedy(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "reelrt.calibration.quality.find_spec", lambda name: None if name == package else object()
    )
    name = {"skimage": "scikit-image"}.get(package, package)
    with pytest.raises(BackendError, match=rf"needs {name}.*pip install 'reelrt\[calibration\]'"):
        evaluate_quality(tmp_path, tmp_path, tmp_path / "out", **QUICK)
