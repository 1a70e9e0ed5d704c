"""From a diffusers folder to a video file, as a user goes: export, build, load, generate, save."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import numpy as np
import pytest

import reelrt
from reelrt.errors import CompatibilityError, IntegrityError

pytestmark = pytest.mark.timeout(900)  # the first test exports the models

PROMPT = "a red circle moving right on a black background"


def test_a_prompt_becomes_a_file(small_pipe, tmp_path):
    video = small_pipe.generate(PROMPT, steps=4, seed=7)
    assert video.frames.shape == (16, 64, 64, 3)
    assert video.frames.dtype == np.uint8
    assert video.latents.shape == (1, 4, 16, 8, 8)
    path = video.save(tmp_path / "red.mp4", fps=8)
    assert reelrt.read_metadata(path) == dict(video.metadata)
    assert video.metadata["model_sha256"] == small_pipe.engines.pipeline.model.sha256


def test_same_seed_same_bytes_in_another_process(small_engines, small_pipe, tmp_path):
    script = (
        "import sys, reelrt\n"
        "video = reelrt.load(sys.argv[1]).generate(sys.argv[2], steps=3, seed=7)\n"
        "video.save(sys.argv[3])\n"
        "import hashlib; print(hashlib.sha256(video.latents.tobytes()).hexdigest())\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'polygraphy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    digests, files = [], []
    for name in ("a.mp4", "b.mp4"):
        command = [sys.executable, "-c", script, str(small_engines), PROMPT, str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout)
        files.append((tmp_path / name).read_bytes())
    assert digests[0] == digests[1]
    assert files[0] == files[1]


def test_prompt_negative_prompt_seed_and_solver_matter(small_pipe):
    options = {"steps": 3, "seed": 7}
    base = small_pipe.generate(PROMPT, **options).latents
    others = [
        small_pipe.generate("a blue square growing on a gray background", **options),
        small_pipe.generate(PROMPT, negative_prompt="blue", **options),
        small_pipe.generate(PROMPT, steps=3, seed=8),
        small_pipe.generate(PROMPT, guidance=1.5, **options),
        small_pipe.generate(PROMPT, solver="euler", **options),
    ]
    for other in others:
        assert np.abs(other.latents - base).max() > 1e-3


def test_smaller_videos_than_the_engines_were_tuned_for(small_pipe):
    video = small_pipe.generate(PROMPT, steps=2, seed=1, frames=5, size=(48, 32))
    assert video.frames.shape == (5, 32, 48, 3)
    assert np.array_equal(
        video.latents, small_pipe.generate(PROMPT, steps=2, seed=1, frames=5, size=(48, 32)).latents
    )


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_every_step_count_runs(small_pipe, steps):
    """One hundred steps without guidance on the smallest video."""
    video = small_pipe.generate(PROMPT, steps=steps, guidance=1, seed=1, frames=2, size=(16, 16))
    assert np.isfinite(video.latents).all()


def test_engine_sets_of_another_machine_or_version_are_refused(small_engines, tmp_path):
    def changed(name, change):
        folder = tmp_path / name
        folder.mkdir()
        for path in small_engines.iterdir():
            (folder / path.name).symlink_to(path)
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    def other_cpu(manifest):
        for engine in manifest["engines"].values():
            assert engine["key_fields"]["cpu"].startswith(platform.machine())
            engine["key_fields"]["cpu"] = "x86_64 mmx"

    reelrt.load(changed("same", lambda manifest: None))
    with pytest.raises(CompatibilityError, match=r"1\.2\.3"):
        reelrt.load(changed("version", lambda manifest: manifest.update(backend_version="1.2.3")))
    with pytest.raises(CompatibilityError, match="optimised for a CPU with x86_64 mmx"):
        reelrt.load(changed("cpu", other_cpu))
    with pytest.raises(IntegrityError, match="missing"):
        reelrt.load(changed("file", lambda manifest: manifest["files"].update({"more.onnx": "0" * 64})))
