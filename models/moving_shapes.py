"""The networks of the moving-shapes model, and how they are made to train faster.

Knows the sizes of each part; nothing of data or of training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import TemporalConvLayer
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from reelrt.calibration.shapes import all_captions, all_scenes

TOKENS = 77
"""CLIP's sentence length."""


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level CLIP vocabulary whose merges cover the captions' words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    sentences = sorted({text for scene in all_scenes() for text in all_captions(scene)})
    bpe.train_from_iterator(sentences, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    symbols += [left + right for left, right in merges]
    symbols = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENS
    )


def make_text_encoder(vocab_size: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            hidden_act="quick_gelu",
            projection_dim=128,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
    )


def make_vae(size: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
    )


def make_unet(size: int) -> UNet3DConditionModel:
    return UNet3DConditionModel(
        sample_size=size // 8,
        down_block_types=("CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=16,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Linear betas up to 0.02: the last step is all but pure noise, as sampling assumes."""
    return DDIMScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


class PerVideoAttention:
    """Attention whose text keys and values are computed once per video, not once per frame."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        batch, tokens = hidden_states.shape[:2]
        query = attn.to_q(hidden_states)
        if encoder_hidden_states is None:
            context, groups = hidden_states, batch
        else:
            groups = self.videos
            context = encoder_hidden_states[:: batch // groups]
            query = query.reshape(groups, -1, query.shape[-1])
        key, value = attn.to_k(context), attn.to_v(context)
        query, key, value = (
            x.reshape(groups, x.shape[1], attn.heads, -1).transpose(1, 2) for x in (query, key, value)
        )
        scores = (query @ key.transpose(-1, -2)) * attn.scale  # beats fused attention on short rows
        out = scores.softmax(-1).to(value.dtype) @ value
        out = out.transpose(1, 2).reshape(batch, tokens, -1)
        return attn.to_out[0](out.to(hidden_states.dtype))

    videos = 1


def speed_up(unet: UNet3DConditionModel) -> PerVideoAttention:
    """Swap in `PerVideoAttention`, and run each (3, 1, 1) convolution as a 2-D one."""
    attention = PerVideoAttention()
    unet.set_attn_processor(attention)

    def as_conv2d(conv: nn.Conv3d) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            batch, channels, frames, height, width = x.shape
            flat = x.reshape(batch, channels, frames, height * width)
            out = functional.conv2d(flat, conv.weight[..., 0], conv.bias, padding=(1, 0))
            return out.reshape(batch, -1, frames, height, width)

        return forward

    for module in unet.modules():
        if isinstance(module, TemporalConvLayer):
            for conv in module.modules():
                if isinstance(conv, nn.Conv3d):
                    conv.forward = as_conv2d(conv)  # type: ignore[method-assign, assignment]
    return attention
