"""The commands as a user runs them: a tiny random model becomes a bundle, engines and videos."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.models import _save, _vae

pytestmark = pytest.mark.timeout(600)
PROMPT = "a red circle moving right"
# The commands run in other folders, and must find this checkout where it is not installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def reelrt(*words: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reelrt", *map(str, words)]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def tree(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }


def tiny_model(folder: Path) -> Path:
    """One block without attention: the least that can be exported, in the least time."""
    import torch
    from diffusers import UNet3DConditionModel

    unet = UNet3DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock3D",),
        up_block_types=("UpBlock3D",),
        block_out_channels=(16,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return _save(folder, unet, _vae((8, 8), attention=False), 16, None, torch.float32)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `bundle` and `engines`, each made by the command of its own."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model(folder / "model")
    exported = reelrt("export", folder / "model", "-o", folder / "bundle", "--json")
    assert exported.returncode == 0, exported.stderr
    assert set(json.loads(exported.stdout)["stages"]) == {"text_encoder", "step", "vae_decoder"}
    built = reelrt("build", folder / "bundle", "-o", folder / "engines", "--backend", "onnxruntime", "--json")
    assert built.returncode == 0, built.stderr
    assert set(json.loads(built.stdout)["stages"]) == {"text_encoder", "step", "vae_decoder"}
    return folder


def test_generate_writes_a_video_that_tells_how_it_was_made(work: Path) -> None:
    words = ("--steps", 4, "--guidance", 3, "--seed", 7, "--solver", "unipc", "--negative-prompt", "blue")
    made = reelrt("generate", work / "engines", PROMPT, "-o", work / "out" / "red.mp4", *words, "--json")
    assert made.returncode == 0, made.stderr
    result = json.loads(made.stdout)
    assert result["videos"][0]["path"] == str(work / "out" / "red.mp4")
    assert {"load", "text", "denoise", "decode", "encode"} <= set(result["seconds"])
    assert result["peak_memory_bytes"] > 1 << 20
    read = reelrt("video-info", work / "out" / "red.mp4", "--json")
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


def test_people_see_where_the_video_is_seconds_and_memory(work: Path) -> None:
    made = reelrt("generate", work / "engines", PROMPT, "-o", work / "seen.gif", "--steps", 2)
    assert made.returncode == 0, made.stderr
    for word in ("denoise", "decode", " s", "peak memory", "MiB", "seen.gif"):
        assert word in made.stdout


def test_several_prompts_write_several_videos(work: Path) -> None:
    words = (
        "a red circle",
        'it\'s $HOME "quoted" `x`',
        "-o",
        work / "two.webm",
        "--steps",
        2,
        "--seed",
        5,
        "--json",
    )
    made = reelrt("generate", work / "engines", *words)
    assert made.returncode == 0, made.stderr
    first, second = json.loads(made.stdout)["videos"]
    assert (first["path"], second["path"]) == (str(work / "two-1.webm"), str(work / "two-2.webm"))
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


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("generate", "engines", "x", "-o", "a.avi"), 2, "'.avi'"),
        (("generate", "engines", "x", "-o", "a.mp4", "--steps", "101"), 2, "1 to 100"),
        (("generate", "engines", "x", "-o", "a.mp4", "--size", "63x64"), 2, "63"),
        (("generate", "engines", "x", "-o", "a.mp4", "--frames", "999"), 2, "frames 999"),
        (("generate", "engines", " ", "-o", "a.mp4"), 2, "prompt"),
        (("generate", "engines", "x", "-o", "/proc/nowhere/a.mp4"), 7, "/proc"),
        (("generate", "bundle", "x", "-o", "a.mp4"), 4, "bundle"),
        (("generate", "nothing", "x", "-o", "a.mp4"), 4, "manifest.json"),
        (("build", "nothing", "-o", "e"), 4, "manifest.json"),
        (("build", "bundle", "-o", "e", "--target", "toaster"), 2, "toaster"),
        (("build", "bundle", "-o", "e", "--size", "wide"), 2, "'wide'"),
        (("export", "nothing", "-o", "b"), 3, "nothing"),
        (("inspect", "model"), 4, "manifest.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(work, words, code, sentence) -> None:
    before = sorted(work.iterdir())
    result = reelrt(*words, folder=work)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(work.iterdir()) == before


def test_a_damaged_bundle_is_named(work: Path, tmp_path: Path) -> None:
    for path in (work / "bundle").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = next(path for path in tmp_path.iterdir() if path.name.startswith("step"))
    file.write_bytes(file.read_bytes()[:-1])
    result = reelrt("build", tmp_path, "-o", work / "never", "--json")
    told = json.loads(result.stdout)["error"]
    assert (result.returncode, told["exit_code"], told["type"]) == (4, 4, "IntegrityError")
    assert file.name in told["message"]
    assert not (work / "never").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_stopping_an_export_leaves_nothing_and_keeps_the_old_bundle(
    work: Path, number: int, code: int
) -> None:
    before, siblings = tree(work / "bundle"), sorted(work.iterdir())
    command = [sys.executable, "-m", "reelrt", "export", "model", "-o", "bundle", "--cfg", "batched"]
    process = subprocess.Popen(command, cwd=work, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while sorted(work.iterdir()) == siblings and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert sorted(work.iterdir()) == siblings
    assert tree(work / "bundle") == before


def test_a_file_that_cannot_grow_is_one_sentence_and_leaves_nothing(work: Path) -> None:
    siblings = sorted(work.iterdir())
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    code = f"{limit}; from reelrt.cli import main; main()"
    words = [work / "engines", PROMPT, "-o", work / "cut.mp4", "--steps", "1"]
    made = subprocess.run(
        [sys.executable, "-c", code, "generate", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (made.returncode, made.stdout) == (7, "")
    assert made.stderr.splitlines()[-1].startswith("Error: cannot write")
    assert sorted(work.iterdir()) == siblings
