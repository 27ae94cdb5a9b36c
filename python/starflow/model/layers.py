"""Norm, attention, MLP, layer, and the stack of layers that every network of the model is.

All of them keep a float32 residual stream whatever the dtype of the weights: the error of the Jacobi iteration cannot
fall below the noise that rounding the stream would add. Every op goes through `starflow_ext.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from starflow.config import FlowConfig
from starflow_ext import ops
from starflow_ext.block_attention import FrameMask
from starflow_ext.linear import InputNorm
from starflow_ext.linear_pack import PackedWeight
from starflow_ext.norm import NormKind
from starflow_ext.rope_append import Cache, Rotation

MLP_EXPANSION = 4

# Packed weights of linear layers (see `starflow.model.pack_linears`).
Weights = Mapping[nn.Module, PackedWeight]
_HALF_TYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Attending:
    """Options of one pass through a network, the same for all its layers.

    Args:
        query_rotation, key_rotation: angles of the tokens of this pass; None without rotary positions.
        causal: tokens see the tokens before them; otherwise all, or those of `frames`.
        frames: frame-causal mask.
        caches: K/V buffers by layer; keys and values of this pass are written from slot `start` on, and its queries
            also read the slots before.
        start: first cache slot, one number or one for each sample.
        final: first slot of each sample that may be written; those below keep their keys and values.
        temperature: divides the attention logits, one number or one for each row of the batch.
        weights: packed weights of all linear layers, for a pass without gradients; None takes the modules' own.
    """

    query_rotation: Rotation | None = None
    key_rotation: Rotation | None = None
    causal: bool = True
    frames: FrameMask | None = None
    caches: tuple[Cache, ...] | None = None
    start: int | Tensor = 0
    final: Tensor | None = None
    temperature: float | Tensor = 1.0
    weights: Weights | None = None


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
        """(out_features, in_features) float32, computed at each access."""
        return self.weight_int8 * self.weight_scale[:, None]


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The two buffers of `Int8Linear` for a weight (out_features, in_features): integers, and the size of a step."""
    scale = weight.float().abs().amax(1) / 127
    steps = weight.float() / torch.where(scale > 0, scale, 1.0)[:, None]
    return steps.round().to(torch.int8), scale


def _multiply(
    linear: nn.Linear | Int8Linear,
    x: Tensor,
    weights: Weights | None,
    *,
    norm: nn.Module | None = None,
    residual: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`linear` of the normalised `x`, in one native call where its weight is packed; options as of `ops.linear`."""
    if weights is None:
        normed = x if norm is None else norm(x)
        return ops.linear(normed, linear.weight, linear.bias, residual=residual, **options)
    packed = weights[linear]
    fused = InputNorm(norm.weight, norm.bias, norm.kind) if isinstance(norm, Norm) else None
    out = ops.linear(x, packed, linear.bias, norm=fused, residual=residual, **options)
    return out if residual is not None else out.to(_HALF_TYPES.get(packed.storage, torch.float32))


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
        weights = attending.weights
        qkv = _multiply(self.qkv, h, weights, norm=self.norm)
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
            return _multiply(self.proj, out, weights, residual=h)
        branch: Tensor = self.post_norm(_multiply(self.proj, out, weights))
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

    def forward(self, h: Tensor, weights: Weights | None = None) -> Tensor:
        """(batch, tokens, width) to the same."""
        if self.gate is None:
            x = _multiply(self.up, h, weights, norm=self.norm, epilogue="gelu")
        else:
            x = self.norm(h)
            up = _multiply(self.up, x, weights)
            x = _multiply(self.gate, x, weights, epilogue="gelu_tanh", multiply=up)
        if self.post_norm is None:
            return _multiply(self.down, x, weights, residual=h)
        branch: Tensor = self.post_norm(_multiply(self.down, x, weights))
        return h + branch


class Layer(nn.Module):
    """One transformer layer: attention, then MLP."""

    def __init__(self, config: FlowConfig, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention = Attention(config, width, heads, kv_heads)
        self.mlp = MLP(config, width)

    def forward(self, h: Tensor, attending: Attending, cache: Cache | None) -> Tensor:
        """(batch, tokens, width) to the same."""
        out: Tensor = self.mlp(self.attention(h, attending, cache), attending.weights)
        return out


class Transformer(nn.Module):
    """Projection in, layers, final norm, projection out: the only loop over layers.

    Args:
        config: options shared by all networks of a flow.
        width, heads, kv_heads, layers: of this network.
        out_channels: channels that it puts out for each grid token.
        text_dim: width of the text that it reads; 0 reads none.
        frame_dim: width of the vectors of frames that it reads; 0 reads none.
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
        frame_dim: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, config.head_dim
        self.checkpoint_every = config.use_checkpoint
        # Whether each process holds a piece of the weights alone, so that no kernel can take them as they are.
        self.in_pieces = False
        self.proj_in = nn.Linear(config.token_channels, width)
        self.proj_text = nn.Linear(text_dim, width) if text_dim else None
        self.proj_frame = nn.Linear(frame_dim, width) if frame_dim else None
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

    def embed_text(self, text: Tensor, weights: Weights | None = None) -> Tensor:
        """Text features (batch, text tokens, text_dim) to the residual stream."""
        assert self.proj_text is not None
        return _stream(_multiply(self.proj_text, text, weights))

    def embed(self, tokens: Tensor, weights: Weights | None = None) -> Tensor:
        """Grid tokens (batch, tokens, channels) to the residual stream."""
        return _stream(_multiply(self.proj_in, tokens, weights))

    def embed_frames(self, frame_conditions: Tensor | None, weights: Weights | None = None) -> Tensor | None:
        """Vectors of frames (batch, frames, frame_dim) to what is added to the tokens of each (batch, frames, width).

        Zeros for a frame whose vector is NaN (none is given); None where the network reads no such vectors.
        """
        if self.proj_frame is None or frame_conditions is None:
            return None
        given = frame_conditions.isfinite().all(-1, keepdim=True)
        rows = _stream(_multiply(self.proj_frame, torch.where(given, frame_conditions, 0.0), weights))
        return torch.where(given, rows, 0.0)

    def run(self, h: Tensor, attending: Attending) -> Tensor:
        """All layers and the final norm over the residual stream (batch, tokens, width)."""
        recompute = self.checkpoint_every if torch.is_grad_enabled() and attending.caches is None else 0
        for index, layer in enumerate(self.layers):
            cache = attending.caches[index] if attending.caches is not None else None
            h = _recomputed(layer, h, attending) if recompute and index % recompute == 0 else layer(h, attending, cache)
        return h if self.final_norm is None else self.final_norm(h)

    def put_out(self, h: Tensor, weights: Weights | None = None) -> Tensor:
        """Residual stream to the output (batch, tokens, out_channels)."""
        return _multiply(self.proj_out, h, weights)


def _stream(h: Tensor) -> Tensor:
    return h.to(torch.promote_types(h.dtype, torch.float32))


def _recomputed(layer: nn.Module, *args: Any) -> Tensor:
    out: Tensor = checkpoint(layer, *args, None, use_reentrant=False)
    return out
