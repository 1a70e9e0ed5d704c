"""A bundle that is run as it is makes the same videos as the engines that are built of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import reelrt
from reelrt.errors import IntegrityError
from reelrt.runtime.unbuilt import open_pipeline
from tests.commands import PROMPT


def test_a_bundle_and_its_engines_make_the_same_video(work: Path) -> None:
    videos = [
        open_pipeline(work / kind).generate(PROMPT, steps=3, seed=7, guidance=4.0)
        for kind in ("bundle", "engines")
    ]
    latents = [video.latents for video in videos]
    assert np.abs(latents[0] - latents[1]).max() <= 1e-4 * np.abs(latents[1]).max()
    apart = np.abs(videos[0].frames.astype(int) - videos[1].frames.astype(int))
    assert apart.max() <= 1
    assert videos[0].metadata == videos[1].metadata


def test_a_folder_that_is_neither_is_named(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="has no manifest.json"):
        open_pipeline(tmp_path)


def test_what_passes_can_be_looked_at(work: Path) -> None:
    seen: list[str] = []

    class Seen:
        def __init__(self, inner) -> None:
            self.inner = inner

        def run(self, stage, inputs):
            seen.append(stage)
            return self.inner.run(stage, inputs)

        def open_step(self, latents):
            return self.inner.open_step(latents)

    pipe = open_pipeline(work / "bundle", wrap=Seen)
    assert isinstance(pipe, reelrt.TextToVideo)
    pipe.generate(PROMPT, steps=1, seed=1)
    assert set(seen) == {"text_encoder", "vae_decoder"}
