"""UNet3DConditionModel written for export: the same weights and arithmetic, in fewer operations.

Each class takes the diffusers module it stands for and shares its parameters; the original stays
usable beside it. What differs, all of it exact:

- Per-frame copies of the time and text embeddings are broadcasts, so nothing is repeated.
- Text keys and values are computed once per sample, not once per frame.
- A Conv3d of kernel (3, 1, 1) is a Conv2d of kernel (3, 1) over [B, C, F, h * w].
- A linear layer's weight is stored the way MatMul reads it.
- An upsampling goes to its skip connection's size, which is the double or one less.

Knows nothing of ONNX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from reelrt.export import operators


class Projection(nn.Module):
    """A linear layer as `x @ weight + bias`, weight [in, out]."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Project the last dimension."""
        return operators.project(x, self.weight, self.bias)


class Convolution(nn.Module):
    """A convolution of stride 1 that keeps the size; a kernel of (3, 1, 1) becomes (3, 1)."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        weight = conv.weight.detach()
        self.weight = nn.Parameter(weight.squeeze(-1) if weight.ndim == 5 else weight, requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [N, C, h, w]."""
        return operators.convolve(x, self.weight, self.bias)


class GroupNorm(nn.Module):
    """Group normalisation of [N, C, h, w], with SiLU after it if asked."""

    def __init__(self, norm: Any, silu: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(value.detach()[:, None, None], requires_grad=False)
            for value in (norm.weight, norm.bias)
        )
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return operators.group_norm(x, self.weight, self.bias, self.groups, self.eps, self.silu)


class LayerNorm(nn.Module):
    """Normalisation of the last dimension."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return operators.layer_norm(x, self.weight, self.bias, self.eps)


WIDE = 1024
"""A hidden layer of fewer values per token is computed whole: a small model's fits anywhere."""

REPLACEMENTS: dict[type, Any] = {nn.Linear: Projection, nn.LayerNorm: LayerNorm, nn.GroupNorm: GroupNorm}


def lean(module: nn.Module) -> nn.Module:
    """Replace every linear and normalisation layer inside a module, in place."""
    for name, child in module.named_children():
        replacement = REPLACEMENTS.get(type(child))
        if replacement is None:
            lean(child)
        else:
            setattr(module, name, replacement(child))
    return module


class Attention(nn.Module):
    """Attention among the tokens [N, T, D] of each row, or to one context per group of rows."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads, self.scale = attention.heads, attention.scale
        self.to_q, self.to_k, self.to_v = map(Projection, (attention.to_q, attention.to_k, attention.to_v))
        self.to_out = Projection(attention.to_out[0])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Attend within each row; or from all frames of a sample [B * F, T, D] to its [B, L, E]."""
        source = x if context is None else context
        query, key, value = self.to_q(x), self.to_k(source), self.to_v(source)
        grouped = context is not None
        return self.to_out(operators.attend(query, key, value, self.heads, self.scale, grouped))


class FeedForward(nn.Module):
    """GEGLU and the projection back, in pieces where the hidden layer is wide."""

    def __init__(self, feed_forward: Any) -> None:
        super().__init__()
        proj, self.out = feed_forward.net[0].proj, Projection(feed_forward.net[2])
        self.value, self.gate = (
            nn.Parameter(half.t(), requires_grad=False) for half in proj.weight.detach().chunk(2)
        )
        self.value_bias, self.gate_bias = (
            nn.Parameter(half, requires_grad=False) for half in proj.bias.detach().chunk(2)
        )
        self.hidden, self.pieces = self.value.shape[1], 1

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token."""
        out: Tensor = operators.feed_forward(
            x,
            self.value,
            self.value_bias,
            self.gate,
            self.gate_bias,
            self.out.weight,
            self.out.bias,
            self.pieces,
        )
        return out


class TransformerBlock(nn.Module):
    """Self-attention, attention to a context (or to itself again) and a feed-forward layer."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = map(LayerNorm, (block.norm1, block.norm2, block.norm3))
        self.attn1, self.attn2 = Attention(block.attn1), Attention(block.attn2)
        self.ff = FeedForward(block.ff)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Transform tokens [N, T, D]."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """What spatial and temporal transformers share: a norm, projections and blocks."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.norm = GroupNorm(transformer.norm)
        self.proj_in, self.proj_out = Projection(transformer.proj_in), Projection(transformer.proj_out)
        self.blocks = nn.ModuleList(map(TransformerBlock, transformer.transformer_blocks))

    def transform(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """Run the blocks over [N, T, C]."""
        tokens = self.proj_in(tokens)
        for block in self.blocks:
            tokens = block(tokens, context)
        out: Tensor = self.proj_out(tokens)
        return out


class SpatialTransformer(Transformer):
    """Attention among the cells of each frame, and to the text."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Transform [B * F, C, h, w]; text is [B, L, E]."""
        tokens = operators.cells_to_tokens(self.norm(x))
        return operators.add_cells(x, self.transform(tokens, text))


class TemporalTransformer(Transformer):
    """Attention among the frames of each cell."""

    def forward(self, x: Tensor, sample: Tensor) -> Tensor:
        """Transform [B * F, C, h, w]; the sample [B, _, F, _, _] says how many frames."""
        volume = self.norm(operators.to_volume(x, sample))
        tokens = self.transform(operators.volume_to_tokens(volume))
        return operators.add_volume(x, operators.tokens_to_volume(tokens, volume))


class TemporalConv(nn.Module):
    """Four convolutions along the frames, and the input added."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        stages = (layer.conv1, layer.conv2, layer.conv3, layer.conv4)
        self.norms = nn.ModuleList(GroupNorm(stage[0], silu=True) for stage in stages)
        self.convs = nn.ModuleList(Convolution(stage[-1]) for stage in stages)

    def forward(self, x: Tensor, sample: Tensor) -> Tensor:
        """Convolve [B * F, C, h, w]; the sample [B, _, F, _, _] says how many frames."""
        volume = operators.to_volume(x, sample)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            volume = conv(norm(volume))
        return operators.add_volume(x, volume)


class ResBlock(nn.Module):
    """Two convolutions per frame with the time embedding between them."""

    def __init__(self, resnet: Any) -> None:
        super().__init__()
        silu = isinstance(resnet.nonlinearity, nn.SiLU)
        self.norm1, self.norm2 = (GroupNorm(norm, silu) for norm in (resnet.norm1, resnet.norm2))
        self.activation = nn.Identity() if silu else resnet.nonlinearity
        self.conv1, self.conv2 = Convolution(resnet.conv1), Convolution(resnet.conv2)
        self.time = Projection(resnet.time_emb_proj)
        self.shortcut = None if resnet.conv_shortcut is None else Convolution(resnet.conv_shortcut)
        self.divisor = resnet.output_scale_factor

    def forward(self, x: Tensor, time: Tensor, sample: Tensor) -> Tensor:
        """Convolve [B * F, C, h, w]; time is the activated embedding [B, T]."""
        out = operators.add_per_sample(self.conv1(self.activation(self.norm1(x))), self.time(time), sample)
        out = self.conv2(self.activation(self.norm2(out)))
        out = (x if self.shortcut is None else self.shortcut(x)) + out
        return out if self.divisor == 1 else out / self.divisor


class Layer(nn.Module):
    """A ResBlock, a temporal convolution and, where the block has them, both transformers."""

    def __init__(self, resnet: Any, conv: Any, spatial: Any, temporal: Any) -> None:
        super().__init__()
        self.resnet, self.conv = ResBlock(resnet), TemporalConv(conv)
        self.spatial = None if spatial is None else SpatialTransformer(spatial)
        self.temporal = None if temporal is None else TemporalTransformer(temporal)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, sample: Tensor) -> Tensor:
        """Transform [B * F, C, h, w]."""
        x = self.conv(self.resnet(x, time, sample), sample)
        if self.spatial is None or self.temporal is None:
            return x
        return self.temporal(self.spatial(x, text), sample)


def _layers(block: Any) -> nn.ModuleList:
    resnets, convs = list(block.resnets), list(block.temp_convs)
    spatial = list(getattr(block, "attentions", []))
    temporal = list(getattr(block, "temp_attentions", []))
    missing = len(resnets) - len(spatial)  # the middle block's last layer, or a block without any
    spatial, temporal = [*spatial, *[None] * missing], [*temporal, *[None] * missing]
    return nn.ModuleList(map(Layer, resnets, convs, spatial, temporal))


class DownBlock(nn.Module):
    """The layers of one resolution, and the way down to the next."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.layers, self.samplers = _layers(block), nn.ModuleList(block.downsamplers or [])

    def forward(self, x: Tensor, time: Tensor, text: Tensor, sample: Tensor) -> list[Tensor]:
        """Transform [B * F, C, h, w]; each result is a skip connection, the last goes on."""
        results = []
        for layer in self.layers:
            x = layer(x, time, text, sample)
            results.append(x)
        for sampler in self.samplers:
            x = sampler(x)
            results.append(x)
        return results


class UpBlock(nn.Module):
    """The layers of one resolution, and the way up to the next."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.layers = _layers(block)
        self.convs = nn.ModuleList(Convolution(sampler.conv) for sampler in block.upsamplers or [])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, text: Tensor, sample: Tensor) -> Tensor:
        """Transform [B * F, C, h, w]; uses up skip connections from the end of the list."""
        for layer in self.layers:
            x = layer(torch.cat([x, skips.pop()], dim=1), time, text, sample)
        for conv in self.convs:
            x = conv(functional.interpolate(x, size=skips[-1].shape[2:], mode="nearest"))
        return x


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
        self.conv_in = Convolution(unet.conv_in)
        self.transformer_in = TemporalTransformer(unet.transformer_in)
        self.down = nn.ModuleList(map(DownBlock, unet.down_blocks))
        self.middle = _layers(unet.mid_block)
        self.up = nn.ModuleList(map(UpBlock, unet.up_blocks))
        self.norm_out = None if unet.conv_norm_out is None else GroupNorm(unet.conv_norm_out, silu=True)
        self.conv_out = Convolution(unet.conv_out)
        _divide(self, unet.config.block_out_channels[0])

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
        skips = [self.transformer_in(self.conv_in(sample.transpose(1, 2).flatten(0, 1)), sample)]
        for block in self.down:
            skips += block(skips[-1], time, text, sample)
        x = skips[-1]
        for layer in self.middle:
            x = layer(x, time, text, sample)
        for block in self.up:
            x = block(x, skips, time, text, sample)
        if self.norm_out is not None:
            x = self.norm_out(x)
        out: Tensor = self.conv_out(x)
        return out.reshape(batch, frames, -1, height, width).transpose(1, 2)


def _divide(network: LeanUNet3D, width: int) -> None:
    """Let no feed-forward layer's hidden values take more memory than the network's first activation.

    Each level down has a quarter of the cells. The result does not depend on the number of pieces.
    """
    deepest = len(network.down) - 1
    blocks: list[tuple[int, nn.Module]] = [(0, network.transformer_in), (deepest, network.middle)]
    blocks += [*enumerate(network.down), *enumerate(reversed(network.up))]
    for level, block in blocks:
        for layer in block.modules():
            if isinstance(layer, FeedForward) and layer.hidden >= WIDE:
                layer.pieces = max(1, -(-2 * layer.hidden // (width * 4**level)))
