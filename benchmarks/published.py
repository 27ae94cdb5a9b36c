"""The published sampler in eager torch, on the weights of our models: the competitor of sampling in targets.py.

It does in each call what the published code does, and no more: a buffer of keys before rotation, all of which are
rotated anew for each call; a boolean mask made by each layer; the rotation, RMSNorm and the affine step as chains of
torch's operators. Checks and dispatch of our own ops, in reference mode, would add a tenth to a third.

Reference: Gu et al., STARFlow-V (2025), and its released code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from starflow.model import Affine, Conditioner, Flow, FlowBlock, Layout
from starflow.model.layers import MLP, Attention, Norm
from starflow.model.tokens import patchify, to_grid, to_sequence
from starflow.schedules import Chunks, Sequential
from starflow.solver.loop import invert
from starflow_ext.rope_append import Rotation

_SOFTPLUS_OF_ONE = 0.541324854612918


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    if not isinstance(norm, Norm):
        return x
    if norm.kind == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + norm.weight.float())).type_as(x)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate planes of neighbouring elements."""
    u, v = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * angles.cos() + torch.stack((-v, u), -1).flatten(-2) * angles.sin()


def _angles(*tables: Rotation | None) -> Tensor | None:
    """One angle for each element, (tokens, head_dim), of tables that follow each other."""
    found = [torch.atan2(table.sin, table.cos).float() for table in tables if table is not None]
    return torch.cat(found).repeat_interleave(2, -1) if found else None


class PublishedMaps(Affine):
    """Affine maps whose inverse is the published chain of operators."""

    def decode(self, z: Tensor) -> Tensor:
        """Noise to data."""
        raw = self.raw
        if self.soft_clip > 0:
            raw = self.soft_clip * torch.tanh(raw / self.soft_clip)
        scale, shift = raw.chunk(2, -1)
        scale = F.softplus(scale + _SOFTPLUS_OF_ONE) if self.activation == "softplus" else scale.exp()
        return z * scale + shift


class PublishedDecoder:
    """What the solver inverts: a block with a start token, as the published code evaluates it; without guidance.

    Args:
        block: of the flow.
        layout: of the clip.
        rows: samples.
        context: text of the samples, or None for a block that reads none.
    """

    halves = 1
    native_window = None

    def __init__(self, block: FlowBlock, layout: Layout, rows: int, context: Tensor | None) -> None:
        assert isinstance(block.conditioner, Conditioner)
        assert block.conditioner.sos_embed is not None
        self.conditioner = c = block.conditioner
        self.tokens, self.frame_tokens, self.first_token = layout.tokens, layout.frame_tokens, 0
        self.text = c.text_tokens(context)
        self.query, self.key = _angles(layout.text, layout.query), _angles(layout.text, layout.key)
        self.position, self.condition = c.position_rows(layout), c.condition_rows(context, rows)
        shape = (2, rows, c.kv_heads, self.text + layout.tokens, c.head_dim)
        self.caches = [torch.zeros(shape) for _ in c.layers]
        if self.text:
            assert c.proj_text is not None
            self._layers(c.proj_text(context), 0)

    def initial_guess(self, z: Tensor) -> Tensor:
        """Chunks begin from the noise."""
        return z

    def default_window(self, batch: int, first: int) -> int:
        """The schedules of the published code have no window."""
        raise NotImplementedError

    def evaluate(self, previous: Tensor, start: int | Tensor, final: Tensor | None = None) -> PublishedMaps:
        """Affine maps of the tokens from `start` on; row i of `previous` is the token before token `start + i`."""
        assert isinstance(start, int)
        assert final is None
        c = self.conditioner
        assert c.sos_embed is not None
        if start == 0:
            previous = torch.cat([c.sos_embed.expand(previous.shape[0], -1, -1), previous[:, 1:]], 1)
        h = c.proj_in(previous)
        if self.position is not None:
            h = h + self.position[start : start + previous.shape[1]]
        if self.condition is not None:
            h = h + self.condition
        h = _normed(c.final_norm, self._layers(h, start + self.text))
        return PublishedMaps(c.proj_out(h), c.activation, c.soft_clip)

    def _layers(self, h: Tensor, slot: int) -> Tensor:
        for layer, cache in zip(self.conditioner.layers, self.caches, strict=True):
            h = h + self._attention(layer.attention, h, cache, slot)
            h = h + _mlp(layer.mlp, h)
        return h

    def _attention(self, a: Attention, h: Tensor, cache: Tensor, slot: int) -> Tensor:
        batch, tokens, _ = h.shape
        sizes = [a.heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim]
        parts = a.qkv(_normed(a.norm, h)).split(sizes, -1)
        q, k, v = (part.view(batch, tokens, -1, a.head_dim).transpose(1, 2) for part in parts)
        end = slot + tokens
        cache[0, :, :, slot:end], cache[1, :, :, slot:end] = _normed(a.key_norm, k), v
        q, k, v = _normed(a.query_norm, q), cache[0, :, :, :end], cache[1, :, :, :end]
        if self.query is not None and self.key is not None:
            q, k = _rotated(q, self.query[slot:end]), _rotated(k, self.key[:end])
        if a.kv_heads != a.heads:
            k, v = (t.repeat_interleave(a.heads // a.kv_heads, 1) for t in (k, v))
        mask = torch.tril(torch.ones(tokens, end, dtype=torch.bool), diagonal=slot) if slot else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return _normed(a.post_norm, a.proj(out.transpose(1, 2).reshape(batch, tokens, -1)))


def _mlp(mlp: MLP, h: Tensor) -> Tensor:
    x = _normed(mlp.norm, h)
    x = F.gelu(mlp.up(x)) if mlp.gate is None else F.gelu(mlp.gate(x), approximate="tanh") * mlp.up(x)
    return _normed(mlp.post_norm, mlp.down(x))


@torch.inference_mode()
def decode(flow: Flow, z: Tensor, y: Tensor | None, schedule: Chunks | Sequential) -> Tensor:
    """Noise to data (batch, frames, channels, height, width) by the published sampler, without guidance.

    Args:
        flow: with start tokens and interleaved rotary planes.
        z: noise like the data.
        y: text (batch, text tokens, text_dim), or None.
        schedule: the published chunks, or token by token.
    """
    grid = patchify(z, flow.config.patch_size)
    _, _, height, width, _ = grid.shape
    for block in flow.solving_order():
        context = y if flow.config.text_width(block.index) else None
        folded = block.fold(grid)
        layout = block.layout(folded.shape[1], height, width, context, image=False)
        decoder = PublishedDecoder(block, layout, folded.shape[0], context)
        x, _ = invert(decoder, to_sequence(folded, layout.order), schedule)
        grid = to_grid(x, layout.order, *folded.shape[1:4]).reshape(grid.shape)
    return flow.from_grid(grid)
