"""Sample from the training's checkpoints and judge what they show, while the training runs.

Prints how many videos have each attribute right, and writes a contact sheet. Plain torch and
diffusers: no export, no engines.

    python -m models.evaluate_checkpoint --work build/train --count 24 --frames 16
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from models.moving_shapes import (
    TOKENS,
    make_scheduler,
    make_text_encoder,
    make_unet,
    make_vae,
    speed_up,
)
from reelrt.calibration.judge import ATTRIBUTES, judge
from reelrt.calibration.prompts import pick_scenes
from reelrt.calibration.sheet import Row, contact_sheet, small_frames


def load(module: nn.Module, state: dict[str, Any]) -> None:
    module.load_state_dict(state)
    module.eval().requires_grad_(False)


def load_text(work: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and text encoder of a work folder."""
    folder = work / "tokenizer"
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENS
    )
    encoder = make_text_encoder(len(tokenizer))
    load(encoder, torch.load(work / "text.pt", weights_only=True)["encoder"])
    return tokenizer, encoder


def load_vae(work: Path, size: int) -> tuple[AutoencoderKL, float]:
    """The VAE of a work folder, and the standard deviation of its latents."""
    vae = make_vae(size)
    load(vae, torch.load(work / "vae.pt", weights_only=True)["vae"])
    return vae, torch.load(work / "latents.pt", weights_only=True).std().item()


def load_unet(work: Path, size: int) -> tuple[UNet3DConditionModel, int]:
    """The averaged UNet of a work folder, and the training step it is from."""
    state = torch.load(work / "unet.pt", weights_only=True)
    unet = make_unet(size)
    load(unet, state["ema"])
    return unet, int(state["step"])


@torch.no_grad()
def sample(
    unet: UNet3DConditionModel,
    text: torch.Tensor,
    shape: tuple[int, ...],
    steps: int,
    guidance: float,
    seed: int,
) -> torch.Tensor:
    """Latents [N, C, F, h, w] by DDIM with classifier-free guidance.

    Args:
        unet: The network.
        text: Embeddings of the empty prompt, then of N prompts, float32 [1 + N, L, D].
        shape: (N, C, F, h, w).
        steps: Denoising steps.
        guidance: 1 is none.
        seed: Of the starting noise.
    """
    scheduler, attention, count = make_scheduler(), speed_up(unet), shape[0]
    scheduler.set_timesteps(steps)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    guided = guidance != 1
    attention.videos = 2 * count if guided else count
    context = torch.cat([text[:1].expand(count, -1, -1), text[1:]]) if guided else text[1:]
    for timestep in scheduler.timesteps:
        output = unet(torch.cat([latents] * 2) if guided else latents, timestep, context).sample
        if guided:
            free, prompted = output.chunk(2)
            output = free + guidance * (prompted - free)
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> list[np.ndarray]:
    """Videos, each uint8 [F, H, W, 3], of latents [N, C, F, h, w] at the VAE's own scale."""
    videos = []
    for each in latents:
        pictures = vae.decode(each.transpose(0, 1)).sample.permute(0, 2, 3, 1)
        videos.append(((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    return videos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/train"), help="the training's checkpoints")
    parser.add_argument("--count", type=int, default=24, help="videos")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--frames", type=int, default=16, help="evenly spread over the motion")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began, work, size = time.monotonic(), options.work, options.size
    scenes = pick_scenes(options.count, options.seed)
    tokenizer, encoder = load_text(work)
    prompts = ["", *(scene.prompt for scene in scenes)]
    tokens = tokenizer(
        prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        text = encoder(tokens).last_hidden_state
    vae, deviation = load_vae(work, size)
    unet, step = load_unet(work, size)
    shape = (len(scenes), 4, options.frames, size // 8, size // 8)
    latents = sample(unet, text, shape, options.steps, options.guidance, options.seed)
    videos = decode(vae, latents * deviation)
    rows, right = [], dict.fromkeys(ATTRIBUTES, 0)
    for scene, video in zip(scenes, videos, strict=True):
        verdict = judge(video).right(scene)
        for name in ATTRIBUTES:
            right[name] += verdict[name]
        rows.append(Row(small_frames(video), scene.prompt, [n for n in ATTRIBUTES if not verdict[n]]))
    sheet = work / "sheet.png"
    contact_sheet(rows).save(sheet)
    counts = "  ".join(f"{name} {right[name]}/{len(rows)}" for name in ATTRIBUTES)
    print(
        f"step {step}, {options.frames} frames, guidance {options.guidance:g}: {counts}  "
        f"({time.monotonic() - began:.0f} s, {sheet})",
        flush=True,
    )


if __name__ == "__main__":
    main()
