"""The commands as a user runs them: a tiny random model becomes a bundle, engines and videos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands import PROMPT, reelrt, tree

pytestmark = pytest.mark.timeout(600)  # the first test exports the model


def test_generate_writes_a_video_that_tells_how_it_was_made(work: Path, tmp_path: Path) -> None:
    words = ("--steps", 4, "--guidance", 3, "--seed", 7, "--solver", "unipc", "--negative-prompt", "blue")
    made = reelrt("generate", work / "engines", PROMPT, "-o", tmp_path / "out" / "red.mp4", *words, "--json")
    assert made.returncode == 0, made.stderr
    result = json.loads(made.stdout)
    assert result["videos"][0]["path"] == str(tmp_path / "out" / "red.mp4")
    assert {"load", "text", "denoise", "decode", "encode"} <= set(result["seconds"])
    assert result["peak_memory_bytes"] > 1 << 20
    read = reelrt("video-info", tmp_path / "out" / "red.mp4", "--json")
    told = json.loads(read.stdout)
    wanted = {
        "prompt": PROMPT,
        "negative_prompt": "blue",
        "steps": 4,
        "guidance": 3,
        "seed": 7,
        "solver": "unipc",
    }
    assert wanted.items() <= told.items()
    manifest = json.loads((work / "bundle" / "manifest.json").read_text(encoding="utf-8"))
    assert told["model_sha256"] == manifest["pipeline"]["model"]["sha256"]


def test_people_see_where_the_video_is_seconds_and_memory(work: Path, tmp_path: Path) -> None:
    made = reelrt("generate", work / "engines", PROMPT, "-o", tmp_path / "seen.gif", "--steps", 2)
    assert made.returncode == 0, made.stderr
    for word in ("denoise", "decode", " s", "peak memory", "MiB", "seen.gif"):
        assert word in made.stdout


def test_several_prompts_write_several_videos(work: Path, tmp_path: Path) -> None:
    words = (
        "a red circle",
        'it\'s $HOME "quoted" `x`',
        "-o",
        tmp_path / "two.webm",
        "--steps",
        2,
        "--seed",
        5,
        "--json",
    )
    made = reelrt("generate", work / "engines", *words)
    assert made.returncode == 0, made.stderr
    first, second = json.loads(made.stdout)["videos"]
    assert (first["path"], second["path"]) == (str(tmp_path / "two-1.webm"), str(tmp_path / "two-2.webm"))
    assert (first["seed"], second["seed"]) == (5, 6)
    assert second["prompt"] == 'it\'s $HOME "quoted" `x`'
    assert Path(second["path"]).is_file()


def test_exporting_and_building_again_changes_nothing(work: Path) -> None:
    before = tree(work / "bundle"), tree(work / "engines")
    bundle_time = (work / "bundle" / "manifest.json").stat().st_mtime_ns
    again = reelrt("export", work / "model", "-o", work / "bundle", "--json")
    assert json.loads(again.stdout)["up_to_date"] is True
    assert (
        reelrt("build", work / "bundle", "-o", work / "engines", "--backend", "onnxruntime").returncode == 0
    )
    assert (tree(work / "bundle"), tree(work / "engines")) == before
    assert (work / "bundle" / "manifest.json").stat().st_mtime_ns == bundle_time


@pytest.mark.parametrize("kind", ["bundle", "engines"])
def test_inspect_tells_what_it_is_to_people_and_programs(work: Path, kind: str) -> None:
    told = json.loads(reelrt("inspect", work / kind, "--json").stdout)
    assert "step" in json.dumps(told)
    shown = reelrt("inspect", work / kind)
    assert shown.returncode == 0
    assert "vae_decoder" in shown.stdout


def test_doctor_names_what_works_here() -> None:
    told = json.loads(reelrt("doctor", "--json").stdout)
    assert "onnxruntime" in json.dumps(told).lower().replace(" ", "")
    assert reelrt("doctor").returncode == 0
