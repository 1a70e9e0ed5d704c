"""Wrong input: one sentence that names it, the documented exit code, and nothing changed on disk."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import reelrt, tree

pytestmark = pytest.mark.timeout(600)  # the first test exports the model

LONG = " ".join(["red"] * 80)


def changed(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def other_pipeline(folder: Path) -> None:
    changed(folder / "model_index.json", lambda data: data.update(_class_name="FluxPipeline"))


def without_weights(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    cut(folder / "vae" / "diffusion_pytorch_model.safetensors")


def cut_graph(folder: Path) -> None:
    cut(folder / "step.onnx")


def without_schedules(folder: Path) -> None:
    (folder / "schedules.safetensors").unlink()


def broken_manifest(folder: Path) -> None:
    cut(folder / "manifest.json")
    cut(folder / "manifest.json")


def another_version(folder: Path) -> None:
    changed(folder / "manifest.json", lambda data: data.update(backend_version="1.2.3"))


def another_gpu(folder: Path) -> None:
    rtx = {"backend": "tensorrt_rtx", "target": "rtx3060", "compute_capability": "3.0"}
    changed(folder / "manifest.json", lambda data: data.update(rtx))


def with_a_file_elsewhere(folder: Path) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    data["files"]["../../a"] = "00"
    (folder / "manifest.json").write_text(json.dumps(data))


def with_an_unlisted_engine(folder: Path) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    del data["files"]["step.onnx"]
    (folder / "manifest.json").write_text(json.dumps(data))


SPOILED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "other-pipeline": ("model", other_pipeline),
    "without-weights": ("model", without_weights),
    "cut-weights": ("model", cut_weights),
    "cut-bundle": ("bundle", cut_graph),
    "manifest-cut": ("bundle", broken_manifest),
    "cut-engines": ("engines", cut_graph),
    "without-schedules": ("engines", without_schedules),
    "another-version": ("engines", another_version),
    "another-gpu": ("engines", another_gpu),
    "elsewhere": ("bundle", with_a_file_elsewhere),
    "unlisted": ("engines", with_an_unlisted_engine),
}


@pytest.fixture(scope="module")
def place(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole and spoiled copies of a model, a bundle and an engine set, and a folder of photos."""
    folder = tmp_path_factory.mktemp("bad-input")
    for kind in ("model", "bundle", "engines"):
        shutil.copytree(work / kind, folder / kind)
    for name, (kind, spoil) in SPOILED.items():
        spoil(Path(shutil.copytree(work / kind, folder / name)))
    (folder / "photos").mkdir()
    (folder / "photos" / "a.jpg").write_bytes(b"photo")
    return folder


def generate(
    *options: str, engines: str = "engines", prompt: str = "x", output: str = "a.mp4"
) -> tuple[str, ...]:
    return "generate", engines, prompt, "-o", output, *options


CASES = [
    # The model folder.
    (("export", "nothing", "-o", "new"), 3, "nothing is not a folder"),
    (("export", "photos", "-o", "new"), 3, "photos has no model_index.json"),
    (("export", "other-pipeline", "-o", "new"), 3, "is a FluxPipeline.*Supported is TextToVideoSDPipeline"),
    (("export", "without-weights", "-o", "new"), 3, "unet has no safetensors weights"),
    (("export", "cut-weights", "-o", "bundle"), 3, r"vae.*safetensors is damaged: it has \d+ bytes"),
    # A bundle or engine set that is missing, damaged or another thing.
    (("build", "nothing", "-o", "new"), 4, "there is no folder nothing.*reelrt export"),
    (("build", "engines", "-o", "new"), 4, "engines holds 'engines', where 'bundle' is needed"),
    (("build", "cut-bundle", "-o", "engines"), 4, "step.onnx is damaged: its SHA-256 is"),
    (("build", "manifest-cut", "-o", "engines"), 4, "manifest.json cannot be read"),
    (("inspect", "photos"), 4, "photos has no manifest.json.*reelrt export.*reelrt build"),
    (("inspect", "nothing"), 4, "there is no folder nothing.*Check the name.*reelrt build"),
    (("plan", "nothing"), 4, "there is no folder nothing.*Check the name"),
    (generate(engines="nothing"), 4, "there is no folder nothing.*reelrt build"),
    (generate(engines="bundle"), 4, "bundle holds 'bundle', where 'engines' is needed"),
    (generate(engines="cut-engines"), 4, "step.onnx is damaged: its SHA-256 is"),
    (generate(engines="without-schedules"), 4, "schedules.safetensors is missing"),
    # Engines for something else.
    (generate(engines="another-version"), 5, r"built by ONNX Runtime 1\.2\.3; [\d.]+ is installed"),
    (generate(engines="another-gpu"), 5, r"for rtx3060, compute capability 3\.0; this machine has"),
    (("build", "bundle", "-o", "new", "--target", "toaster"), 2, "target 'toaster' is not known.*rtx3060"),
    (("build", "bundle", "-o", "new", "--target", "orin-agx"), 2, "orin-agx must be built on the device"),
    # Numbers outside what the engines take, which is named.
    (generate("--steps", "0"), 2, "steps 0 is not available: ddim takes 1 to 100"),
    (generate("--steps", "101"), 2, "steps 101 is not available: ddim takes 1 to 100"),
    (generate("--size", "63x64"), 2, "width 63 is not a multiple of 2 pixels"),
    (generate("--size", "32x64"), 2, "height 64 is not available: these engines take 4 to 32"),
    (generate("--size", "wide"), 2, "size 'wide' is not WIDTHxHEIGHT"),
    (generate("--frames", "999"), 2, "frames 999 is not available: these engines take 2 to 16"),
    (generate("--guidance", "-1"), 2, "guidance -1.0 is not possible: give a number from 0"),
    (generate("--seed", "-1"), 2, "seed -1 is not possible: give a whole number from 0"),
    (generate("--fps", "0"), 2, "fps 0.0 is not possible"),
    (
        ("build", "bundle", "-o", "new", "--size", "33x32"),
        2,
        "width 33 is not available.*The nearest is 32 or 34",
    ),
    (
        ("build", "bundle", "-o", "new", "--frames", "1"),
        2,
        "frames 1 is not available: this model takes 2 to 1024",
    ),
    (("build", "bundle", "-o", "new", "--batch", "0"), 2, "batch 0 is not available: engines take 1 to 64"),
    (
        ("build", "bundle", "-o", "new", "--size", "100000x32"),
        2,
        "width 100000 is not available: this model takes multiples of 2 pixels from 4 to 32768",
    ),
    (generate("--steps", "abc"), 2, "Invalid value for '--steps'.*See `reelrt generate --help`"),
    (("build", "bundle", "-o", "new", "--backend", "foo"), 2, "'foo' is not one of 'auto'"),
    (("generate",), 2, "Missing argument 'ENGINES'"),
    (("paint",), 2, "No such command 'paint'"),
    # Prompts and outputs.
    (generate(prompt=" "), 2, "the prompt ' ' is empty"),
    (generate(output="a.avi"), 2, r"unknown extension '\.avi'; choose one of \.mp4, \.webm, \.gif, \.png"),
    (generate(output="a"), 2, r"unknown extension ''; choose one of \.mp4"),
    (generate(output="/proc/nowhere/a.mp4"), 7, "cannot write to /proc"),
    (("export", "model", "-o", "/proc/nowhere/new"), 7, "cannot write to /proc"),
    (("build", "bundle", "-o", "/proc/nowhere/new"), 7, "cannot write to /proc"),
    (("export", "model", "-o", "photos"), 2, "photos exists and is not a bundle to replace"),
    (("build", "bundle", "-o", "photos"), 2, "photos exists and is not an engine set to replace"),
    (("build", "bundle", "-o", "photos/a.jpg"), 2, "a.jpg is a file, where a folder"),
    (
        ("build", "bundle", "-o", "bundle"),
        2,
        "bundle exists .'bundle'. and is not an engine set",
    ),
    (("export", "model", "-o", "engines"), 2, "engines exists .'engines'. and is not a bundle"),
    (("build", "bundle", "-o", "."), 2, "is in use.*Name a folder in it"),
    (("build", "elsewhere", "-o", "new"), 4, "'../../a' is not a file in this folder"),
    (generate(engines="unlisted"), 4, "'step.onnx' has no hash"),
    (("video-info", "photos/a.jpg"), 2, "unknown extension '.jpg'"),
]


@pytest.mark.parametrize(("words", "code", "sentence"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_one_sentence_and_nothing_changed(
    place: Path, words: tuple[str, ...], code: int, sentence: str
) -> None:
    before = tree(place)
    result = reelrt(*words, folder=place)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    last = result.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith("Error: ")
    assert re.search(sentence, last), last
    assert "Traceback" not in result.stderr
    assert tree(place) == before


def test_an_error_is_a_json_document_when_asked(place: Path) -> None:
    result = reelrt("build", "cut-bundle", "-o", "new", "--json", folder=place)
    told = json.loads(result.stdout)["error"]
    wrong = json.loads(reelrt(*generate("--steps", "abc", "--json"), folder=place).stdout)["error"]
    assert (wrong["exit_code"], wrong["type"]) == (2, "InputError")
    assert (result.returncode, told["exit_code"], told["type"]) == (4, 4, "IntegrityError")
    assert "step.onnx" in told["message"]
    assert told["remedy"] == "Build this folder again."


def test_a_damaged_engine_is_mended_by_building_again(place: Path) -> None:
    wanted = tree(place / "engines")
    folder = Path(shutil.copytree(place / "cut-engines", place / "mended"))
    assert reelrt(*generate(engines="mended"), folder=place).returncode == 4
    built = reelrt("build", "bundle", "-o", "mended", "--backend", "onnxruntime", folder=place)
    assert built.returncode == 0, built.stderr
    assert re.search(r"step is rebuilt: \S*step\.onnx is damaged", built.stderr)
    assert "text_encoder" not in built.stderr
    assert tree(folder).keys() == wanted.keys()
    shutil.rmtree(folder)


def test_an_over_long_prompt_is_made_all_the_same_and_what_was_cut_is_said(
    place: Path, tmp_path: Path
) -> None:
    prompt = f"{LONG} and a blue square"
    result = reelrt(*generate("--steps", "1", prompt=prompt, output=str(tmp_path / "a.gif")), folder=place)
    assert result.returncode == 0, result.stderr
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("Warning")]
    assert re.search(r"longer than the model's 77 tokens; \d+ words were cut: '", warning)
    told = json.loads(reelrt("video-info", tmp_path / "a.gif", "--json").stdout)
    assert (told["prompt"], told["cut"].endswith("and a blue square")) == (prompt, True)
