"""The same latents and prompt give what diffusers gives, through every stage and to the pixel."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from diffusers import TextToVideoSDPipeline

import reelrt
from reelrt.export.schedules import make_scheduler

pytestmark = pytest.mark.timeout(900)  # the first test exports the models

PROMPT = "a red circle moving right on a black background"
NEGATIVE = "a blue square growing on a gray background"
LATENTS_TOLERANCE = 1e-3  # relative to the largest latent
PIXEL_TOLERANCE = 2  # of 255
# Model, solver, steps, guidance: 25 steps for each solver of the trained model, which has the small
# one's architecture, and what else may differ.
CASES = [
    ("small", "ddim", 6, 7.5),
    ("small", "dpmpp_2m", 6, 7.5),
    ("small", "unipc", 6, 7.5),
    ("small", "euler", 6, 3.0),
    ("small", "deis", 6, 3.0),
    ("small", "ddim", 4, 1.0),
    ("odd", "ddim", 25, 7.5),
    ("odd", "dpmpp_2m", 8, 7.5),
    ("odd", "unipc", 8, 7.5),
    ("moving-shapes", "ddim", 25, 7.5),
    ("moving-shapes", "dpmpp_2m", 25, 7.5),
    ("moving-shapes", "unipc", 25, 7.5),
]


@pytest.fixture(scope="module")
def pipelines(made):
    """By model: the reference and ours, loaded when first asked for."""

    @cache
    def load(name):
        model, engines = made(name)
        reference = TextToVideoSDPipeline.from_pretrained(model)
        reference.set_progress_bar_config(disable=True)
        return reference, reference.scheduler.config, reelrt.load(engines)

    return load


@pytest.mark.parametrize(("name", "solver", "steps", "guidance"), CASES)
def test_same_as_diffusers(pipelines, name, solver, steps, guidance):
    reference, config, pipe = pipelines(name)
    profile, scale = pipe.engines.engines["step"].profile, pipe.engines.pipeline.geometry.spatial_scale
    frames, width, height = profile["frames"].max, profile["width"].max * scale, profile["height"].max * scale
    noise = pipe.starting_latents(7, frames=frames, size=(width, height))
    reference.scheduler = make_scheduler(solver, config)
    expected = reference(
        PROMPT,
        negative_prompt=NEGATIVE,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.from_numpy(noise),
        output_type="latent",
    ).frames
    with torch.no_grad():
        pixels = reference.decode_latents(expected)
    pictures = ((pixels[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1) * 255).round().numpy()

    video = pipe.generate(
        PROMPT,
        negative_prompt=NEGATIVE,
        steps=steps,
        guidance=guidance,
        solver=solver,
        latents=noise,
    )

    expected = expected.numpy()
    assert video.latents.shape == expected.shape
    difference = np.abs(video.latents - expected).max() / np.abs(expected).max()
    print(f"{name} {solver} {steps} steps: latents differ by {difference:.1e}")
    assert difference < LATENTS_TOLERANCE
    assert video.frames.shape == (frames, height, width, 3)
    assert pictures.std() > 1  # the pictures show something
    assert np.abs(video.frames - pictures).max() <= PIXEL_TOLERANCE
