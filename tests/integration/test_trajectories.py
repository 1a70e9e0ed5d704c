"""Trajectories of real prompts through the real loop: what is kept, what it costs, and going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reelrt.bundle.manifest import Bundle
from reelrt.calibration.recording import estimate_bytes, record, stratified
from reelrt.calibration.sensitivity import final_latents
from reelrt.calibration.trajectories import Trajectories
from reelrt.errors import InputError, IntegrityError
from reelrt.runtime.ort import open_engine
from reelrt.runtime.unbuilt import open_pipeline

PROMPTS = ["a red circle moving right", "a blue square growing"]


@pytest.fixture(scope="module")
def recorded(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    folder = tmp_path_factory.mktemp("trajectories")
    return record(work / "bundle", PROMPTS, folder, steps=6, samples_per_prompt=3, seed=5)


def test_a_recording_ends_where_the_loop_ends(work: Path, recorded: Trajectories) -> None:
    pipe = open_pipeline(work / "bundle")
    for number, prompt in enumerate(PROMPTS):
        video = pipe.generate(prompt, steps=6, seed=5 + number)
        np.testing.assert_allclose(recorded.latents(number), video.latents[0], atol=1e-4)
        np.testing.assert_array_equal(recorded.noise(number), pipe.starting_latents(5 + number)[0])


def test_samples_cover_the_schedule_with_and_without_the_prompt(recorded: Trajectories) -> None:
    for number, prompt in enumerate(PROMPTS):
        samples = list(recorded.samples(number))
        steps = sorted({sample.index for sample in samples})
        assert [step // 2 for step in steps] == [0, 1, 2]  # one of each third of six steps
        for step in steps:
            assert [s.conditional for s in samples if s.index == step] == [False, True]
        timesteps = [sample.timestep for sample in samples]
        assert timesteps == sorted(timesteps, reverse=True)
        assert {sample.prompt for sample in samples} == {prompt}
    assert len(recorded) == len(list(recorded)) == 2 * 3 * 2


def test_a_sample_is_what_the_graph_reads(work: Path, recorded: Trajectories) -> None:
    """Running the graph on the unconditional sample gives the state of the conditional one."""
    session = open_engine(work / "bundle" / "step.onnx", 1)
    first, second = list(recorded.samples(0))[2:4]
    following = session.run(["state_next"], dict(first.inputs))[0]
    np.testing.assert_allclose(following, second.inputs["state"], atol=1e-4)


def test_the_estimate_is_what_is_written(work: Path, recorded: Trajectories) -> None:
    bundle = Bundle.load(work / "bundle")
    written = sum(path.stat().st_size for path in recorded.folder.glob("*.safetensors"))
    assert estimate_bytes(bundle.pipeline, 2, 3) == pytest.approx(written, rel=0.02)


def test_a_recording_goes_on_where_it_was_stopped(work: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"steps": 2, "samples_per_prompt": 1}
    with pytest.raises(KeyboardInterrupt):
        record(work / "bundle", PROMPTS, tmp_path, **options, progress=stop)
    with pytest.raises(IntegrityError, match="prompt-0001.safetensors is missing"):
        Trajectories.load(tmp_path)
    first = (tmp_path / "prompt-0000.safetensors").stat().st_mtime_ns
    told: list[tuple[int, int]] = []
    record(
        work / "bundle",
        PROMPTS,
        tmp_path,
        **options,
        progress=lambda _, done, total: told.append((done, total)),
    )
    assert told == [(1, 2), (2, 2)]
    assert (tmp_path / "prompt-0000.safetensors").stat().st_mtime_ns == first
    assert len(Trajectories.load(tmp_path)) == 4


def test_another_recording_in_the_folder_is_named(work: Path, recorded: Trajectories) -> None:
    with pytest.raises(InputError, match="holds trajectories with other prompts, steps"):
        record(work / "bundle", PROMPTS[:1], recorded.folder, steps=5, samples_per_prompt=3, seed=5)


def test_trajectories_of_another_bundle_are_refused(work: Path, recorded: Trajectories) -> None:
    bundle = Bundle.load(work / "bundle")
    recorded.check(bundle)
    other = Trajectories.load(recorded.folder)
    object.__setattr__(other.settings, "bundle", "0" * 64)
    with pytest.raises(InputError, match="was recorded with another bundle of model"):
        other.check(bundle)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there are no prompts"),
        (
            PROMPTS,
            {"steps": 3, "samples_per_prompt": 4},
            "4 samples per prompt are not possible",
        ),
        (PROMPTS, {"seed": -1}, "seed"),
        (PROMPTS, {"steps": 5000}, "steps 5000 is not available"),
    ],
)
def test_what_cannot_be_recorded(work: Path, tmp_path: Path, prompts, options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        record(work / "bundle", prompts, tmp_path / "folder", **options)


def test_a_few_prompts_cover_every_step() -> None:
    covered = {step for number in range(16) for step in stratified(25, 4, number)}
    assert covered == set(range(25))
    assert stratified(4, 4, 9) == [0, 1, 2, 3]


def test_a_small_size_is_recorded_and_remembered(work: Path, tmp_path: Path) -> None:
    """Ranges of a model that is slow at its own size."""
    small: dict[str, Any] = {"steps": 2, "samples_per_prompt": 1, "size": (32, 16), "frames": 2}
    made = record(work / "bundle", PROMPTS, tmp_path / "small", **small)
    bundle = Bundle.load(work / "bundle")
    channels, scale = bundle.pipeline.geometry.latent_channels, bundle.pipeline.geometry.spatial_scale
    assert made.latents(0).shape == (channels, 2, 16 // scale, 32 // scale)
    assert Trajectories.load(tmp_path / "small").settings == made.settings
    written = sum(path.stat().st_size for path in made.folder.glob("*.safetensors"))
    assert estimate_bytes(bundle.pipeline, len(PROMPTS), 1, size=(32, 16), frames=2) == pytest.approx(
        written, rel=0.1
    )
    found = final_latents(bundle, None, made, 2, 1)
    np.testing.assert_array_equal(found[0], made.latents(0))
    with pytest.raises(InputError, match="trajectories with other size"):
        record(work / "bundle", PROMPTS, tmp_path / "small", **{**small, "size": (16, 16)})
