"""UNet3DConditionModel written for export: the same weights and arithmetic, in fewer operations.

Each class takes the diffusers module it stands for and shares its parameters; the original stays
usable beside it. What differs, all of it exact:

- Per-frame copies of the time and text embeddings are broadcasts, so nothing is repeated.
- Text keys and values are computed once per sample, not once per frame.
- A Conv3d of kernel (3, 1, 1) is a Conv2d of kernel (3, 1) over [B, C, F, H*W].
- A linear layer's weight is stored the way MatMul reads it.
- An upsampling goes to its skip connection's size, which is the double or one less.

Knows nothing of ONNX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Projection(nn.Module):
    """A linear layer as `x @ weight + bias`, weight [in, out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Project the last dimension."""
        out = x @ self.weight
        return out if self.bias is None else out + self.bias


def project(module: nn.Module) -> nn.Module:
    """Replace every linear layer inside a module, in place, by a `Projection`."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, Projection(child))
        else:
            project(child)
    return module


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
    """Attention in plain MatMul and Softmax, over [B, T, heads * d] each."""
    query, key, value = (
        x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query * scale, key, value)
    )
    out = (query @ key.transpose(-1, -2)).softmax(-1) @ value
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention among the tokens [N, T, D] of each row."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads, self.scale = attention.heads, attention.scale
        self.to_q, self.to_k, self.to_v = map(Projection, (attention.to_q, attention.to_k, attention.to_v))
        self.to_out = Projection(attention.to_out[0])

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each row."""
        return self.to_out(attend(self.to_q(x), self.to_k(x), self.to_v(x), self.heads, self.scale))


class TextAttention(SelfAttention):
    """Attention from the tokens [B * F, T, D] of all frames to one text [B, L, E] per sample."""

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        """Attend to the text; keys and values are computed once per sample."""
        assert text is not None
        query = self.to_q(x).reshape(text.shape[0], -1, self.to_q.weight.shape[1])
        out = attend(query, self.to_k(text), self.to_v(text), self.heads, self.scale)
        return self.to_out(out.reshape(x.shape[0], x.shape[1], -1))


class FeedForward(nn.Module):
    """GEGLU and the projection back."""

    def __init__(self, feed_forward: Any) -> None:
        super().__init__()
        self.proj = Projection(feed_forward.net[0].proj)
        self.out = Projection(feed_forward.net[2])

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * functional.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, attention to text (or to itself again) and a feed-forward layer."""

    def __init__(self, block: Any, text: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn1 = SelfAttention(block.attn1)
        self.attn2 = TextAttention(block.attn2) if text else SelfAttention(block.attn2)
        self.ff = FeedForward(block.ff)

    def forward(self, x: Tensor, *text: Tensor) -> Tensor:
        """Transform tokens [N, T, D]."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), *text)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Attention among the cells of each frame, and to the text."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.norm = transformer.norm
        self.proj_in, self.proj_out = Projection(transformer.proj_in), Projection(transformer.proj_out)
        self.blocks = nn.ModuleList(TransformerBlock(block, True) for block in transformer.transformer_blocks)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Transform [B * F, C, h, w]; text is [B, L, E]."""
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            tokens = block(tokens, text)
        return x + self.proj_out(tokens).transpose(1, 2).reshape(x.shape)


class TemporalTransformer(nn.Module):
    """Attention among the frames of each cell."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.norm = transformer.norm
        self.proj_in, self.proj_out = Projection(transformer.proj_in), Projection(transformer.proj_out)
        self.blocks = nn.ModuleList(TransformerBlock(block, False) for block in transformer.transformer_blocks)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """Transform [B * F, C, h, w]."""
        frames, cells = x.shape[0] // batch, x.shape[2] * x.shape[3]
        volume = x.reshape(batch, frames, x.shape[1], cells)
        normed = self.norm(volume.transpose(1, 2))  # [B, C, F, cells]
        tokens = self.proj_in(normed.permute(0, 3, 2, 1).reshape(batch * cells, frames, -1))
        for block in self.blocks:
            tokens = block(tokens)
        out = self.proj_out(tokens).reshape(batch, cells, frames, -1).permute(0, 2, 3, 1)
        return x + out.reshape(x.shape)


class TemporalConv(nn.Module):
    """Four convolutions along the frames, and the input added."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        stages = (layer.conv1, layer.conv2, layer.conv3, layer.conv4)
        self.norms = nn.ModuleList(stage[0] for stage in stages)
        self.weights = nn.ParameterList(
            nn.Parameter(stage[-1].weight.detach().squeeze(-1), requires_grad=False) for stage in stages
        )
        self.biases = nn.ParameterList(stage[-1].bias for stage in stages)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """Convolve [B * F, C, h, w]."""
        frames, cells = x.shape[0] // batch, x.shape[2] * x.shape[3]
        volume = x.reshape(batch, frames, x.shape[1], cells).transpose(1, 2)
        out = volume
        for norm, weight, bias in zip(self.norms, self.weights, self.biases, strict=True):
            out = functional.conv2d(functional.silu(norm(out)), weight, bias, padding=(1, 0))
        return (volume + out).transpose(1, 2).reshape(x.shape)


class ResBlock(nn.Module):
    """Two convolutions per frame with the time embedding between them."""

    def __init__(self, resnet: Any) -> None:
        super().__init__()
        self.norm1, self.conv1 = resnet.norm1, resnet.conv1
        self.norm2, self.conv2 = resnet.norm2, resnet.conv2
        self.time = Projection(resnet.time_emb_proj)
        self.shortcut = resnet.conv_shortcut
        self.activation = resnet.nonlinearity
        self.divisor = resnet.output_scale_factor

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Convolve [B * F, C, h, w]; time is the activated embedding [B, T]."""
        out = self.conv1(self.activation(self.norm1(x)))
        shift = self.time(time)[:, None, :, None, None]
        out = (out.reshape(time.shape[0], -1, *out.shape[1:]) + shift).reshape(out.shape)
        out = self.conv2(self.activation(self.norm2(out)))
        out = out + (x if self.shortcut is None else self.shortcut(x))
        return out if self.divisor == 1 else out / self.divisor


class Layer(nn.Module):
    """A ResBlock, a temporal convolution and, where the block has them, both transformers."""

    def __init__(self, resnet: Any, conv: Any, spatial: Any, temporal: Any) -> None:
        super().__init__()
        self.resnet, self.conv = ResBlock(resnet), TemporalConv(conv)
        self.spatial = None if spatial is None else SpatialTransformer(spatial)
        self.temporal = None if temporal is None else TemporalTransformer(temporal)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """Transform [B * F, C, h, w]."""
        x = self.conv(self.resnet(x, time), time.shape[0])
        if self.spatial is None or self.temporal is None:
            return x
        return self.temporal(self.spatial(x, text), time.shape[0])


def _layers(block: Any) -> nn.ModuleList:
    resnets, convs = list(block.resnets), list(block.temp_convs)
    spatial = list(getattr(block, "attentions", []))
    temporal = list(getattr(block, "temp_attentions", []))
    missing = len(resnets) - len(spatial)  # the middle block's last layer, or a block without any
    spatial, temporal = [*spatial, *[None] * missing], [*temporal, *[None] * missing]
    return nn.ModuleList(map(Layer, resnets, convs, spatial, temporal))


class LeanUNet3D(nn.Module):
    """The denoiser of a `UNet3DConditionModel`, for export.

    Args:
        unet: The diffusers module; its parameters are shared, its forward stays as it is.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.time_proj = unet.time_proj
        self.time1 = Projection(unet.time_embedding.linear_1)
        self.time2 = Projection(unet.time_embedding.linear_2)
        self.activation = unet.time_embedding.act
        self.time_activation = unet.mid_block.resnets[0].nonlinearity
        self.conv_in, self.transformer_in = unet.conv_in, TemporalTransformer(unet.transformer_in)
        self.down = nn.ModuleList(map(_layers, unet.down_blocks))
        self.shrink = nn.ModuleList(
            nn.ModuleList(block.downsamplers or []) for block in unet.down_blocks
        )
        self.middle = _layers(unet.mid_block)
        self.up = nn.ModuleList(map(_layers, unet.up_blocks))
        self.grow = nn.ModuleList(
            nn.ModuleList([sampler.conv for sampler in block.upsamplers or []]) for block in unet.up_blocks
        )
        self.norm_out, self.act_out, self.conv_out = unet.conv_norm_out, unet.conv_act, unet.conv_out

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Predict.

        Args:
            sample: [B, C, F, h, w].
            timestep: float32 [B].
            text: [B, L, E].

        Returns:
            [B, C, F, h, w].
        """
        batch, _, frames, height, width = sample.shape
        time = self.time2(self.activation(self.time1(self.time_proj(timestep).to(sample.dtype))))
        time = self.time_activation(time)  # what every ResBlock would do again
        x = self.conv_in(sample.transpose(1, 2).flatten(0, 1))
        x = self.transformer_in(x, batch)
        skips = [x]
        for layers, samplers in zip(self.down, self.shrink, strict=True):
            for layer in layers:
                x = layer(x, time, text)
                skips.append(x)
            for sampler in samplers:
                x = sampler(x)
                skips.append(x)
        for layer in self.middle:
            x = layer(x, time, text)
        for layers, convs in zip(self.up, self.grow, strict=True):
            for layer in layers:
                x = layer(torch.cat([x, skips.pop()], dim=1), time, text)
            for conv in convs:
                size = skips[-1].shape[2:]
                x = conv(functional.interpolate(x, size=(size[0], size[1]), mode="nearest"))
        if self.norm_out is not None:
            x = self.act_out(self.norm_out(x))
        out = self.conv_out(x)
        return out.reshape(batch, frames, -1, height, width).transpose(1, 2)
