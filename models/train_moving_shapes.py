"""Train the bundled text-to-video model from drawn videos, from a seed, resumable.

Four parts, each checkpointed in the work folder: a CLIP tokenizer, a CLIP text encoder (taught to
name a scene's attributes), a VAE (single frames) and a 3-D UNet (v-prediction; single frames
first, then clips of more and more frames). The result is a plain diffusers folder.
bfloat16 is faster on a GPU and on CPUs that have it, and ten times slower on others.

    python -m models.train_moving_shapes --work build/train --out models/moving-shapes
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from models.moving_shapes import (
    TOKENS,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
    speed_up,
)
from reelrt.calibration.shapes import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    SHAPES,
    Scene,
    all_captions,
    all_scenes,
    caption,
    draw,
    sample_track,
)

ATTRIBUTES = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "background": tuple(BACKGROUNDS),
}


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on; the defaults made the shipped weights."""

    seed: int = 0
    size: int = 64
    frames: int = 16
    renderings: int = 8
    text_steps: int = 400
    vae_steps: int = 1200
    vae_batch: int = 16
    clips: str = "1:200,4:700,8:300,16:500"
    frames_per_batch: int = 128
    learning_rate: float = 1e-3
    ema: float = 0.995
    empty_captions: float = 0.1
    precision: str = "float32"

    @property
    def lessons(self) -> list[tuple[int, int]]:
        """Frames per clip and number of steps, in the order they are taught."""
        return [
            (int(frames), int(steps)) for frames, steps in (part.split(":") for part in self.clips.split(","))
        ]


class Progress:
    """Prints a step, its smoothed loss and the time left, every so often."""

    def __init__(self, name: str, total: int, start: int) -> None:
        self.name, self.total, self.start = name, total, start
        self.began, self.loss = time.monotonic(), math.nan

    def __call__(self, step: int, loss: float) -> None:
        self.loss = loss if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss
        if step % 50 and step != self.total:
            return
        each = (time.monotonic() - self.began) / max(step - self.start, 1)
        left = each * (self.total - step) / 60
        print(
            f"{self.name} {step}/{self.total}  loss {self.loss:.4f}  {each:.2f} s/step  {left:.0f} min left",
            flush=True,
        )


def cosine(step: int, total: int, peak: float, warmup: int = 50) -> float:
    """Learning rate at a step: linear warm-up, then a half cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def stable_then_decay(step: int, total: int, decay: int, peak: float, warmup: int = 50) -> float:
    """Learning rate at a step: warm-up, constant, then linear to zero over the last `decay` steps."""
    return peak * min((step + 1) / warmup, 1, (total - step) / decay)


class Checkpoint:
    """One resumable training part: its modules, its optimiser and the step it is at."""

    def __init__(self, path: Path, optimizer: torch.optim.Optimizer, **modules: nn.Module) -> None:
        self.path, self.optimizer, self.modules = path, optimizer, modules

    def load(self) -> int:
        """Restore the latest state; the step to go on from (0 when there is none)."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        return int(state["step"])

    def save(self, step: int) -> None:
        state = {name: module.state_dict() for name, module in self.modules.items()}
        partial = self.path.with_suffix(".partial")
        torch.save({**state, "optimizer": self.optimizer.state_dict(), "step": step}, partial)
        partial.replace(self.path)


def batches(seed: int, start: int, total: int) -> Iterator[tuple[int, np.random.Generator]]:
    """Step numbers with a generator each, so that a resumed run sees what a whole one would."""
    for step in range(start, total):
        torch.manual_seed(seed * 1_000_003 + step)
        yield step, np.random.default_rng([seed, step])


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], device: torch.device) -> torch.Tensor:
    encoded = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids.to(device)


def train_text_encoder(
    recipe: Recipe, work: Path, tokenizer: CLIPTokenizer, device: torch.device
) -> CLIPTextModel:
    """Teach every token from the end of the sentence on to name the scene's attributes."""
    torch.manual_seed(recipe.seed)
    encoder = make_text_encoder(len(tokenizer)).to(device)
    heads = nn.ModuleDict({name: nn.Linear(128, len(words)) for name, words in ATTRIBUTES.items()}).to(device)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    checkpoint = Checkpoint(work / "text.pt", optimizer, encoder=encoder, heads=heads)
    start, scenes = checkpoint.load(), all_scenes()
    progress = Progress("text", recipe.text_steps, start)
    for step, rng in batches(recipe.seed + 1, start, recipe.text_steps):
        picked = [scenes[i] for i in rng.integers(len(scenes), size=64)]
        tokens = tokenize(tokenizer, [caption(scene, rng) for scene in picked], device)
        hidden = encoder(tokens).last_hidden_state
        after = (tokens == tokenizer.eos_token_id).float()
        after = after / after.sum(1, keepdim=True)
        loss = torch.zeros((), device=device)
        for name, words in ATTRIBUTES.items():
            target = torch.tensor([words.index(getattr(s, name)) for s in picked], device=device)
            logits = heads[name](hidden)
            each = functional.cross_entropy(
                logits.transpose(1, 2), target[:, None].expand(-1, TOKENS), reduction="none"
            )
            loss = loss + (each * after).sum(1).mean()
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, recipe.text_steps, 1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1, loss.item())
        if (step + 1) % 200 == 0 or step + 1 == recipe.text_steps:
            checkpoint.save(step + 1)
    return encoder.eval().requires_grad_(False)


def draw_frames(scenes: list[Scene], count: int, size: int, rng: np.random.Generator) -> torch.Tensor:
    """Single frames of random scenes, float32 [N, 3, H, W] in -1..1."""
    frames = []
    for index in rng.integers(len(scenes), size=count):
        track = sample_track(scenes[index].motion, 16, rng)
        at = int(rng.integers(16))
        still = type(track)(track.x[at : at + 1], track.y[at : at + 1], track.radius[at : at + 1])
        frames.append(draw(scenes[index], still, (size, size))[0])
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(recipe: Recipe, work: Path, device: torch.device) -> AutoencoderKL:
    """Pixels to latents and back; the sampled posterior makes the decoder forgive small errors."""
    torch.manual_seed(recipe.seed)
    vae = make_vae(recipe.size).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    checkpoint = Checkpoint(work / "vae.pt", optimizer, vae=vae)
    start, scenes = checkpoint.load(), all_scenes()
    progress = Progress("vae", recipe.vae_steps, start)
    for step, rng in batches(recipe.seed + 2, start, recipe.vae_steps):
        pictures = draw_frames(scenes, recipe.vae_batch, recipe.size, rng).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            posterior = vae.encode(pictures).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        loss = functional.mse_loss(decoded, pictures) + 0.1 * functional.l1_loss(decoded, pictures)
        loss = loss + 2e-4 * posterior.kl().float().mean() / posterior.mean[0].numel()
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, recipe.vae_steps, 2e-3)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, loss.item())
        if (step + 1) % 250 == 0 or step + 1 == recipe.vae_steps:
            checkpoint.save(step + 1)
    vae.eval().requires_grad_(False)
    pictures = draw_frames(scenes, 256, recipe.size, np.random.default_rng([recipe.seed, 10**6])).to(device)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
    psnr = 10 * math.log10(4 / functional.mse_loss(decoded, pictures).item())
    print(f"vae: {psnr:.1f} dB PSNR on 256 unseen frames", flush=True)
    return vae


def encode_dataset(
    recipe: Recipe, work: Path, vae: AutoencoderKL, device: torch.device
) -> tuple[torch.Tensor, list[Scene]]:
    """Latents of every scene in several renderings, float32 [N, C, F, h, w], scaled to unit variance."""
    path, scenes = work / "latents.pt", all_scenes() * recipe.renderings
    if not path.exists():
        latents, began = [], time.monotonic()
        for index, scene in enumerate(scenes):
            rng = np.random.default_rng([recipe.seed, 3, index])
            video = draw(scene, sample_track(scene.motion, recipe.frames, rng), (recipe.size, recipe.size))
            pixels = torch.from_numpy(video).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
            with torch.no_grad():
                latents.append(vae.encode(pixels).latent_dist.mean.cpu().transpose(0, 1))
            if index % 500 == 0:
                print(f"latents {index}/{len(scenes)}  {time.monotonic() - began:.0f} s", flush=True)
        torch.save(torch.stack(latents), path)
    latents = torch.load(path, weights_only=True)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return latents * vae.config.scaling_factor, scenes


class TextTable:
    """The text encoder's output for every caption, computed once."""

    def __init__(
        self, scenes: list[Scene], encoder: CLIPTextModel, tokenizer: CLIPTokenizer, device: torch.device
    ) -> None:
        texts = ["", *sorted({text for scene in scenes for text in all_captions(scene)})]
        with torch.no_grad():
            rows = [
                encoder(tokenize(tokenizer, texts[i : i + 256], device)).last_hidden_state.bfloat16()
                for i in range(0, len(texts), 256)
            ]
        self.rows, self.index = torch.cat(rows), {text: row for row, text in enumerate(texts)}

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return self.rows[[self.index[text] for text in texts]].float()


def clip(latents: torch.Tensor, frames: int, rng: np.random.Generator) -> torch.Tensor:
    """Frames spread evenly from first to last; a single one is any, for each video [N, C, F, h, w]."""
    if frames == 1:
        at = torch.from_numpy(rng.integers(latents.shape[2], size=len(latents)))
        return latents[torch.arange(len(latents)), :, at, None]
    return latents[:, :, torch.linspace(0, latents.shape[2] - 1, frames).round().long()]


def train_unet(
    recipe: Recipe,
    work: Path,
    latents: torch.Tensor,
    scenes: list[Scene],
    text: TextTable,
    device: torch.device,
) -> UNet3DConditionModel:
    """v-prediction, from single frames to whole videos: captions are learnt on few frames, cheaply."""
    torch.manual_seed(recipe.seed)
    unet, ema = make_unet(recipe.size).to(device), make_unet(recipe.size).to(device)
    ema.load_state_dict(unet.state_dict())
    attention = speed_up(unet.eval())  # no dropout: the data are endless
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    checkpoint = Checkpoint(work / "unet.pt", optimizer, unet=unet, ema=ema)
    lengths = [frames for frames, steps in recipe.lessons for _ in range(steps)]
    start, total, decay = checkpoint.load(), len(lengths), recipe.lessons[-1][1]
    alphas = make_scheduler().alphas_cumprod.to(device)
    progress = Progress("unet", total, start)
    for step, rng in batches(recipe.seed + 4, start, total):
        frames = lengths[step]
        count = recipe.frames_per_batch // frames
        picked = rng.integers(len(scenes), size=count)
        texts = ["" if rng.random() < recipe.empty_captions else caption(scenes[i], rng) for i in picked]
        clean = clip(latents[picked], frames, rng).to(device)
        noise = torch.randn(clean.shape).to(device)
        timestep = torch.randint(1000, (count,)).to(device)
        signal = alphas[timestep].sqrt().view(-1, 1, 1, 1, 1)
        spread = (1 - alphas[timestep]).sqrt().view(-1, 1, 1, 1, 1)
        attention.videos = count
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            predicted = unet(signal * clean + spread * noise, timestep, text(texts)).sample
        loss = functional.mse_loss(predicted.float(), signal * noise - spread * clean)
        for group in optimizer.param_groups:
            group["lr"] = stable_then_decay(step, total, decay, recipe.learning_rate)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        share = max(1 - recipe.ema, 9 / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(unet.parameters()), share)
        progress(step + 1, loss.item())
        if (step + 1) % 100 == 0 or step + 1 == total:
            checkpoint.save(step + 1)
    return ema.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/train"), help="checkpoints; rerun to resume")
    parser.add_argument("--out", type=Path, default=Path("models/moving-shapes"), help="diffusers folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    work, out, device = options.pop("work"), options.pop("out"), torch.device(options.pop("device"))
    recipe = Recipe(**options)
    work.mkdir(parents=True, exist_ok=True)
    os.nice(10)

    tokenizer = make_tokenizer(work / "tokenizer")
    encoder = train_text_encoder(recipe, work, tokenizer, device)
    vae = train_vae(recipe, work, device)
    latents, scenes = encode_dataset(recipe, work, vae, device)
    text = TextTable(all_scenes(), encoder, tokenizer, device)
    unet = train_unet(recipe, work, latents, scenes, text, device)
    save(out, tokenizer, encoder, vae, unet)


def save(
    out: Path,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    vae: AutoencoderKL,
    unet: UNet3DConditionModel,
) -> None:
    """Write the diffusers folder, weights in float16 to halve what the repository carries.

    The text encoder keeps float32: transformers loads a file in the type it has, diffusers in float32.
    """
    from diffusers import TextToVideoSDPipeline

    pipeline = TextToVideoSDPipeline(
        vae=vae.half(),
        text_encoder=encoder.half().float(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=make_scheduler(),
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    print(f"saved {out}", flush=True)


if __name__ == "__main__":
    main()
