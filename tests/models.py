"""Small random text-to-video models as diffusers folders, for tests.

Their weights mean nothing; their architecture, files and sizes are what matters. Every network
output has unit variance, so that a solver has something to do and differences are visible.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from models.moving_shapes import make_tokenizer
from reelrt.export import schedules
from reelrt.export.families import FAMILIES, UNET3D

if TYPE_CHECKING:
    import pytest

CARD = "---\nlicense: apache-2.0\n---\n\n# A random model\n\nMade by a test.\n"


def small_model(folder: Path, scheduler: Any = None, dtype: torch.dtype = torch.float32) -> Path:
    """The bundled model's architecture with fewer channels: 2 blocks, 64 x 64 pixels, 16 frames.

    Args:
        folder: Where to write it; made if missing.
        scheduler: A diffusers scheduler; `default_scheduler()` when none.
        dtype: Type of the stored weights.

    Returns:
        The folder.
    """
    unet = UNet3DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=16,
        norm_num_groups=8,
    )
    return _save(folder, unet, _vae((8, 8, 16, 16), attention=False), 32, scheduler, dtype)


def odd_model(folder: Path, scheduler: Any = None, dtype: torch.dtype = torch.float32) -> Path:
    """Sizes nothing is tuned for: 3 blocks, 3, 5 and 7 heads, a non-square picture, a block
    without attention, VAE with attention, 4 pixels per latent cell.

    A latent size that is no multiple of 4 goes through the network's upsample-size path.

    Args:
        folder: Where to write it; made if missing.
        scheduler: A diffusers scheduler; `default_scheduler()` when none.
        dtype: Type of the stored weights.

    Returns:
        The folder.
    """
    unet = UNet3DConditionModel(
        sample_size=(10, 14),
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(24, 40, 56),
        layers_per_block=2,
        cross_attention_dim=20,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return _save(folder, unet, _vae((8, 12, 16), attention=True), 20, scheduler, dtype)


def tiny_model(folder: Path) -> Path:
    """One block without attention: the least that can be exported, in the least time.

    Args:
        folder: Where to write it; made if missing.

    Returns:
        The folder.
    """
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


def shorten(model: Path) -> Path:
    """Make a written model's diffusion one of 10 timesteps: it has few schedules, which are soon compiled."""
    file = model / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "num_train_timesteps": 10}), encoding="utf-8")
    return model


def only(monkeypatch: pytest.MonkeyPatch, *stages: str) -> None:
    """Have an export write these stages and no others."""
    family = replace(UNET3D, stages={stage: UNET3D.stages[stage] for stage in stages})
    monkeypatch.setitem(FAMILIES, family.pipeline, family)


def few_steps(monkeypatch: pytest.MonkeyPatch, *counts: int) -> None:
    """Have an export compile schedules of these step counts and no others, which takes long."""
    monkeypatch.setattr(schedules, "compile_schedules", partial(schedules.compile_schedules, steps=counts))


def default_scheduler(**changes: Any) -> DDIMScheduler:
    """The bundled model's scheduler, v-prediction, with some entries of its config changed."""
    config = {
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    return DDIMScheduler(**{**config, **changes})


MODELS: dict[str, Callable[..., Path]] = {"small": small_model, "odd": odd_model}


def _vae(channels: tuple[int, ...], attention: bool) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=attention,
    )


def _text_encoder(vocabulary: int, width: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


@torch.no_grad()
def _randomise(encoder: CLIPTextModel, unet: UNet3DConditionModel, vae: AutoencoderKL) -> None:
    """No parameter is zero (each path through a network counts), and outputs have unit variance."""
    for parameter in [*encoder.parameters(), *unet.parameters(), *vae.parameters()]:
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    out = unet(torch.randn(1, 4, 4, 12, 12), 500, torch.randn(1, 77, encoder.config.hidden_size)).sample
    unet.conv_out.weight /= out.std()
    unet.conv_out.bias /= out.std()
    picture = vae.decode(torch.randn(1, 4, 8, 8) / vae.config.scaling_factor).sample
    vae.decoder.conv_out.weight /= 2 * picture.std()
    vae.decoder.conv_out.bias /= 2 * picture.std()


def _save(
    folder: Path,
    unet: UNet3DConditionModel,
    vae: AutoencoderKL,
    text_width: int,
    scheduler: Any,
    dtype: torch.dtype,
) -> Path:
    torch.manual_seed(0)
    for module in [*unet.modules(), *vae.modules()]:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    tokenizer = make_tokenizer(folder / "tokenizer")
    encoder = _text_encoder(len(tokenizer), text_width)
    _randomise(encoder.eval(), unet.eval(), vae.eval())
    pipeline = TextToVideoSDPipeline(
        vae=vae.to(dtype),
        text_encoder=encoder.to(dtype),
        tokenizer=tokenizer,
        unet=unet.to(dtype),
        scheduler=scheduler or default_scheduler(),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder
