"""Norm, attention, MLP, layer, and the stack of layers that every network of the model is.

All of them keep a float32 residual stream whatever the dtype of the weights: a rounded residual is noise that the
Jacobi iteration never gets under. Every op goes through `starflow_ext.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from starflow.config import FlowConfig
from starflow_ext import ops
from starflow_ext.block_attention import FrameMask
from starflow_ext.norm import NormKind
from starflow_ext.rope_append import Cache, Rotation

MLP_EXPANSION = 4


@dataclass(frozen=True)
class Attending:
    """What the attention of a pass needs to know, the same for all layers.

    Args:
        query_rotation, key_rotation: angles of the tokens of this pass; None without rotary positions.
        causal: tokens see the tokens before them; otherwise all, or those of `frames`.
        frames: frame-causal mask.
        caches: K/V buffers by layer; tokens are written at `start` and read what is cached before them.
        start: first cache slot, one number or one for each sample.
        final: slots of each sample below it are not written.
        temperature: divides the attention logits, one number or one for each row of the batch.
    """

    query_rotation: Rotation | None = None
    key_rotation: Rotation | None = None
    causal: bool = True
    frames: FrameMask | None = None
    caches: tuple[Cache, ...] | None = None
    start: int | Tensor = 0
    final: Tensor | None = None
    temperature: float | Tensor = 1.0


class Norm(nn.Module):
    """LayerNorm or RMSNorm in float32 (see `starflow_ext.ops.norm`); RMSNorm's weight is an offset from one."""

    def __init__(self, channels: int, kind: NormKind) -> None:
        super().__init__()
        self.kind: NormKind = kind
        layer = kind == "layer_norm"
        self.weight = nn.Parameter(torch.ones(channels) if layer else torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if layer else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to (..., channels)."""
        return ops.norm(x, self.weight, self.bias, kind=self.kind)


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept in 255 steps an output channel; made by conversion, read like `nn.Linear`.

    Args:
        in_features, out_features, bias: as of `nn.Linear`.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight_int8", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.weight_int8: Tensor
        self.weight_scale: Tensor

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features) float32, made anew each time."""
        return self.weight_int8 * self.weight_scale[:, None]


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The two buffers of `Int8Linear` for a weight (out_features, in_features): integers and what a step is worth."""
    scale = weight.float().abs().amax(1) / 127
    steps = weight.float() / torch.where(scale > 0, scale, 1.0)[:, None]
    return steps.round().to(torch.int8), scale


def _pre_norm(config: FlowConfig, width: int) -> nn.Module:
    return nn.Identity() if config.norm_type == "none" else Norm(width, config.norm_type)


class Attention(nn.Module):
    """Pre-normed self-attention branch with its residual."""

    def __init__(self, config: FlowConfig, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, config.head_dim
        self.half_pairs = config.hf_style_rope
        self.norm = _pre_norm(config, width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * config.head_dim, bias=config.use_bias)
        self.proj = nn.Linear(heads * config.head_dim, width, bias=config.use_bias)
        self.query_norm = Norm(config.head_dim, "rms_norm") if config.use_qk_norm else None
        self.key_norm = Norm(config.head_dim, "rms_norm") if config.use_qk_norm else None
        self.post_norm = Norm(width, "rms_norm") if config.use_post_norm else None

    def forward(self, h: Tensor, attending: Attending, cache: Cache | None) -> Tensor:
        """(batch, tokens, width) to the same."""
        qkv = ops.linear(self.norm(h), self.qkv.weight, self.qkv.bias)
        q, k, v = ops.rope_append(
            qkv,
            heads=self.heads,
            kv_heads=self.kv_heads,
            query_rotation=attending.query_rotation,
            key_rotation=attending.key_rotation,
            query_norm=None if self.query_norm is None else self.query_norm.weight,
            key_norm=None if self.key_norm is None else self.key_norm.weight,
            pairing="half" if self.half_pairs else "interleaved",
            cache=cache,
            start=attending.start,
            final=attending.final,
        )
        out = ops.block_attention(
            q,
            k,
            v,
            causal=attending.causal,
            q_start=None if cache is None else attending.start,
            frames=attending.frames,
            temperature=attending.temperature,
        )
        out = out.transpose(1, 2).flatten(2)
        if self.post_norm is None:
            return ops.linear(out, self.proj.weight, self.proj.bias, residual=h)
        branch: Tensor = self.post_norm(ops.linear(out, self.proj.weight, self.proj.bias))
        return h + branch


class MLP(nn.Module):
    """Pre-normed MLP branch with its residual; exact GELU, or a tanh-GELU gate."""

    def __init__(self, config: FlowConfig, width: int) -> None:
        super().__init__()
        hidden = MLP_EXPANSION * width
        self.norm = _pre_norm(config, width)
        self.gate = nn.Linear(width, hidden, bias=config.use_bias) if config.use_swiglu else None
        self.up = nn.Linear(width, hidden, bias=config.use_bias)
        self.down = nn.Linear(hidden, width, bias=config.use_bias)
        self.post_norm = Norm(width, "rms_norm") if config.use_post_norm else None

    def forward(self, h: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        x = self.norm(h)
        if self.gate is None:
            x = ops.linear(x, self.up.weight, self.up.bias, epilogue="gelu")
        else:
            up = ops.linear(x, self.up.weight, self.up.bias)
            x = ops.linear(x, self.gate.weight, self.gate.bias, epilogue="gelu_tanh", multiply=up)
        if self.post_norm is None:
            return ops.linear(x, self.down.weight, self.down.bias, residual=h)
        branch: Tensor = self.post_norm(ops.linear(x, self.down.weight, self.down.bias))
        return h + branch


class Layer(nn.Module):
    """One transformer layer: attention, then MLP."""

    def __init__(self, config: FlowConfig, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention = Attention(config, width, heads, kv_heads)
        self.mlp = MLP(config, width)

    def forward(self, h: Tensor, attending: Attending, cache: Cache | None) -> Tensor:
        """(batch, tokens, width) to the same."""
        out: Tensor = self.mlp(self.attention(h, attending, cache))
        return out


class Transformer(nn.Module):
    """Projection in, layers, final norm, projection out: the only loop over layers.

    Args:
        config: options shared by all networks of a flow.
        width, heads, kv_heads, layers: of this network.
        out_channels: channels that it puts out for each grid token.
        text_dim: width of the text that it reads; 0 reads none.
    """

    def __init__(
        self,
        config: FlowConfig,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        layers: int,
        out_channels: int,
        text_dim: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, config.head_dim
        self.checkpoint_every = config.use_checkpoint
        self.proj_in = nn.Linear(config.token_channels, width)
        self.proj_text = nn.Linear(text_dim, width) if text_dim else None
        self.layers = nn.ModuleList(Layer(config, width, heads, kv_heads) for _ in range(layers))
        self.final_norm = Norm(width, "rms_norm") if config.use_final_norm else None
        self.proj_out = nn.Linear(width, out_channels)
        nn.init.zeros_(self.proj_out.weight)

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.proj_in.out_features

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.proj_in.weight.dtype

    def embed_text(self, text: Tensor) -> Tensor:
        """Text features (batch, text tokens, text_dim) to the residual stream."""
        assert self.proj_text is not None
        return _stream(ops.linear(text, self.proj_text.weight, self.proj_text.bias))

    def embed(self, tokens: Tensor) -> Tensor:
        """Grid tokens (batch, tokens, channels) to the residual stream."""
        return _stream(ops.linear(tokens, self.proj_in.weight, self.proj_in.bias))

    def run(self, h: Tensor, attending: Attending) -> Tensor:
        """All layers and the final norm over the residual stream (batch, tokens, width)."""
        recompute = self.checkpoint_every if torch.is_grad_enabled() and attending.caches is None else 0
        for index, layer in enumerate(self.layers):
            cache = attending.caches[index] if attending.caches is not None else None
            h = _recomputed(layer, h, attending) if recompute and index % recompute == 0 else layer(h, attending, cache)
        return h if self.final_norm is None else self.final_norm(h)

    def put_out(self, h: Tensor) -> Tensor:
        """Residual stream to the output (batch, tokens, out_channels)."""
        return ops.linear(h, self.proj_out.weight, self.proj_out.bias)


def _stream(h: Tensor) -> Tensor:
    return h.to(torch.promote_types(h.dtype, torch.float32))


def _recomputed(layer: nn.Module, *args: Any) -> Tensor:
    out: Tensor = checkpoint(layer, *args, None, use_reentrant=False)
    return out
