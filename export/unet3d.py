"""The `unet3d` family: CLIP text encoder, UNet3DConditionModel, 2-D VAE per frame.

For each stage: the reference (what diffusers' TextToVideoSDPipeline computes with the untouched
modules) and the module that is exported. Knows nothing of ONNX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reelrt.bundle.schedule import Cfg
from reelrt.export import operators
from reelrt.export.rewrites import Attention, GroupNorm, LeanUNet3D, lean
from reelrt.export.step import Step


class TextEncoder(nn.Module):
    """Token ids [B, L] to the embeddings [B, L, E] that the denoiser attends to."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode."""
        out: Tensor = self.encoder(tokens).last_hidden_state
        return out


class UNetReference(nn.Module):
    """The diffusers denoiser with the signature that `Step` calls."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Predict."""
        out: Tensor = self.unet(sample, timestep, encoder_hidden_states=text).sample
        return out


class Decoder(nn.Module):
    """Latents [B, C, F, h, w] to uint8 frames [B, F, H, W, 3]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        self.scaling_factor = float(vae.config.scaling_factor)
        self.dtype: torch.dtype = vae.dtype

    def forward(self, latents: Tensor) -> Tensor:
        """Decode each frame."""
        batch, _, frames, _, _ = latents.shape
        x = (latents.transpose(1, 2).flatten(0, 1) * (1 / self.scaling_factor)).to(self.dtype)
        if self.post_quant_conv is not None:
            x = self.post_quant_conv(x)
        pixels = self.decoder(x).float()
        pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).unflatten(0, (batch, frames))


class DecoderReference(nn.Module):
    """`Decoder` through diffusers' own `decode` and `VideoProcessor`."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        from diffusers.video_processor import VideoProcessor

        self.vae, self.processor = vae, VideoProcessor(do_resize=False)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode each frame."""
        batch, _, frames, _, _ = latents.shape
        images = latents.transpose(1, 2).flatten(0, 1) / self.vae.config.scaling_factor
        video = self.vae.decode(images.to(self.vae.dtype)).sample.float()
        video = video.unflatten(0, (batch, frames)).transpose(1, 2)
        pixels = self.processor.postprocess_video(video, output_type="pt")
        return (pixels * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)


class DecoderAttention(nn.Module):
    """The decoder's self-attention over the cells of one frame, in place of diffusers' own."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.norm, self.attention = GroupNorm(attention.group_norm), Attention(attention)
        self.divisor = attention.rescale_output_factor

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """Attend among the cells of [N, C, h, w]."""
        tokens = operators.cells_to_tokens(self.norm(x))
        out = operators.add_cells(x, self.attention(tokens))
        return out if self.divisor == 1 else out / self.divisor


def reference(stage: str, component: Any, cfg: Cfg) -> nn.Module:
    """The stage as diffusers computes it; the component is not changed."""
    if stage == "step":
        return Step(UNetReference(component), cfg)
    return TextEncoder(component) if stage == "text_encoder" else DecoderReference(component)


def exported(stage: str, component: Any, cfg: Cfg) -> nn.Module:
    """The stage as it is exported; the component may be used up."""
    if stage == "step":
        return Step(LeanUNet3D(component), cfg)
    if stage == "text_encoder":
        return lean(TextEncoder(component))
    attentions = component.decoder.mid_block.attentions
    for index, attention in enumerate(attentions):
        if attention is not None:
            attentions[index] = DecoderAttention(attention)
    return lean(Decoder(component))
