"""jacobi_sweep and jacobi_solve in plain torch: what their kernels are compared with, and what reference mode runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow_ext.jacobi_update import jacobi_update_reference
from starflow_ext.norm import NormKind, norm
from starflow_ext.rope_append import Rotation

if TYPE_CHECKING:
    from starflow_ext.jacobi_solve import SolveProgress
    from starflow_ext.jacobi_sweep import BlockState, BlockWeights, LayerWeights, PackedLinear

_WILD = 1e6  # provisional tokens beyond this are divergence, not data


def _columns(panels: Tensor, depth: int) -> Tensor:
    """View panels (..., elements) of a cache as (..., columns, depth); writing to it writes to the panels."""
    if panels.dtype == torch.bfloat16:
        pairs: Tensor = panels.unflatten(-1, (-1, depth // 2, 32, 2))
        return pairs.transpose(-3, -2)  # (..., panel, column, depth / 2, 2)
    cut: Tensor = panels.unflatten(-1, (-1, depth, 32))
    return cut.transpose(-2, -1)  # (..., panel, column, depth)


class _Heads:
    """Keys and values of one layer as (cache rows, kv_heads, slots, head_dim) in the dtype of the arithmetic."""

    def __init__(self, state: BlockState, layer: int, head_dim: int, dtype: torch.dtype) -> None:
        self._stored = (state.keys[layer], state.values[layer])
        self._panels = None
        if state.layout == "rows":
            self.keys, self.values = (stored.unflatten(-1, (-1, head_dim)).to(dtype) for stored in self._stored)
            return
        wide = -(-head_dim // 32) * 32
        slots = state.keys.shape[-1] // wide
        self._panels = (_columns(state.keys[layer], wide), _columns(state.values[layer], slots))
        keys = self._panels[0].flatten(-2) if state.keys.dtype == torch.bfloat16 else self._panels[0]
        values = self._panels[1].flatten(-2) if state.keys.dtype == torch.bfloat16 else self._panels[1]
        self.keys = keys.flatten(2, 3)[..., :head_dim].to(dtype)
        self.values = values.flatten(2, 3).transpose(-2, -1)[..., :head_dim].to(dtype)

    def write(self, k: Tensor, v: Tensor, slots: Tensor, kept: Tensor) -> None:
        """Put (cache rows, kv_heads, tokens, head_dim) at `slots` (cache rows, tokens), but where `kept`."""
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        head_dim = k.shape[-1]
        for own, new in ((self.keys, k), (self.values, v)):
            now = own[rows, :, slots]
            own[rows, :, slots] = torch.where(kept[..., None, None], now, new.transpose(1, 2).to(now.dtype))
        if self._panels is None:
            for stored, own in zip(self._stored, (self.keys, self.values), strict=True):
                stored.copy_(own.flatten(2))
        else:
            keys, values = self._panels
            wide = F.pad(self.keys, (0, keys[0, 0].flatten(2).shape[-1] - head_dim))
            keys.copy_(wide.reshape(keys.shape))
            columns = F.pad(self.values.transpose(-2, -1), (0, 0, 0, values.shape[2] * 32 - head_dim))
            values.copy_(columns.reshape(values.shape))
        # What is read is what was stored, rounded.
        dtype = self._stored[0].dtype
        self.keys, self.values = self.keys.to(dtype).to(k.dtype), self.values.to(dtype).to(v.dtype)


def _project(x: Tensor, linear: PackedLinear) -> Tensor:
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.unpack().to(x.dtype), bias)


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: NormKind | None) -> Tensor:
    if weight is None or kind is None:
        return x
    return norm(x, weight, bias if kind == "layer_norm" else None, kind=kind)


def _turn(x: Tensor, weight: Tensor | None, rotation: Rotation | None, slots: Tensor) -> Tensor:
    x = _normed(x, weight, None, "rms_norm")
    if rotation is None:
        return x
    cos, sin = (table[slots][:, None].to(x.dtype) for table in rotation)
    u, v = x.chunk(2, -1)
    return torch.cat([u * cos - v * sin, v * cos + u * sin], -1)


def jacobi_sweep_reference(
    weights: BlockWeights, state: BlockState, rows: Tensor, start: Tensor, keep: Tensor, text: bool
) -> Tensor:
    """Compute ``jacobi_sweep`` with products of float32; arguments as there."""
    start, keep = start.to(rows.device), keep.to(rows.device)
    slots = start[:, None] + torch.arange(rows.shape[1], device=rows.device)
    kept = slots < keep[:, None]
    h = rows
    if not text:
        if weights.start_token is not None:
            first = (slots == state.text_tokens)[..., None]
            h = torch.where(first, weights.start_token.to(h.dtype), h)
        h = _project(h, weights.proj_in)
        if state.position is not None:
            h = h + state.position[slots - state.text_tokens]
        if state.condition is not None:
            h = h + state.condition[:, None]
    for index, layer in enumerate(weights.layers):
        h = h + _attention(weights, layer, state, index, h, slots, kept)
        x = _normed(h, *layer.mlp_norm, weights.norm)
        x = _project(x, layer.up)
        if layer.gate is None:
            x = F.gelu(x)
        else:
            x = x * F.gelu(_project(_normed(h, *layer.mlp_norm, weights.norm), layer.gate), approximate="tanh")
        h = h + _normed(_project(x, layer.down), layer.mlp_post, None, "rms_norm")
    raw = _project(_normed(h, weights.final_norm, None, "rms_norm"), weights.proj_out)
    return raw[:, :0] if text else raw


def _attention(
    weights: BlockWeights,
    layer: LayerWeights,
    state: BlockState,
    index: int,
    h: Tensor,
    slots: Tensor,
    kept: Tensor,
) -> Tensor:
    x = _project(_normed(h, *layer.attention_norm, weights.norm), layer.qkv)
    heads, kv_heads = weights.heads, weights.kv_heads
    q, k, v = x.unflatten(-1, (-1, weights.head_dim)).transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
    q = _turn(q, layer.query_norm, state.query_rotation, slots)
    k = _turn(k, layer.key_norm, state.key_rotation, slots)
    cached = _Heads(state, index, weights.head_dim, h.dtype)
    cached.write(k, v, slots, kept)
    mask = torch.arange(cached.keys.shape[2], device=slots.device) <= slots[..., None]
    out = F.scaled_dot_product_attention(
        q / state.temperature.to(q.dtype)[:, None, None, None],
        cached.keys,
        cached.values,
        attn_mask=mask[:, None],
        enable_gqa=True,
    )
    return _normed(_project(out.transpose(1, 2).flatten(2), layer.proj), layer.attention_post, None, "rms_norm")


def jacobi_solve_reference(
    weights: BlockWeights,
    state: BlockState,
    progress: SolveProgress,
    z: Tensor,
    *,
    first: int,
    first_token: int,
    frame_tokens: int,
    window: int,
    tolerance: float,
    activation: str,
    soft_clip: float,
    guidance: float,
    guided: str,
    most_sweeps: int,
) -> tuple[int, tuple[int, ...], tuple[int, int] | None]:
    """Compute ``jacobi_solve``, a sample after the other in each sweep; arguments and result as there."""
    batch, total, channels = z.shape
    halves = progress.kept.shape[0]
    rows = 0
    accepted: list[int] = []
    annealed = "+" in guided

    def update(x: Tensor, noise: Tensor, raw: Tensor, tokens: Tensor) -> Tensor:
        """Overwrite x (tokens, channels) by its decoded value; raw (halves, tokens, out channels)."""
        weight = guidance
        if guidance > 0.0 and guided != "gaussian":
            by_token = guidance * (tokens / max(total - 1, 1) if annealed else torch.ones(len(tokens), device=x.device))
            moved = raw[0] + by_token[:, None] * (raw[0] - raw[1])
            parts = ["b"] if activation == "none" else ["a", "b"]
            pieces = zip(raw[0].split(channels, -1), moved.split(channels, -1), parts, strict=True)
            raw, weight = torch.cat([new if part in guided else old for old, new, part in pieces], -1)[None], 0.0
        return jacobi_update_reference(x[None], noise[None], raw, activation, soft_clip, weight)[0]

    while len(accepted) < most_sweeps and int(progress.frontier.min()) < total:
        accepted.append(0)
        for sample in range(batch):
            frontier = int(progress.frontier[sample])
            tokens = torch.arange(frontier, min(frontier + window, total), device=z.device)
            if len(tokens) == 0:
                continue
            x, noise, kept = progress.x[sample], z[sample], progress.kept[:, sample]
            fresh = int(progress.fresh[sample])
            source = tokens - ((tokens - fresh).div(frame_tokens, rounding_mode="floor") + 1) * frame_tokens
            wanted = (tokens >= fresh) & (source >= first)
            guess = z.new_zeros(int(wanted.sum()), channels)
            update(guess, noise[tokens[wanted]], kept[:, source[wanted]], tokens[wanted])
            x[tokens[wanted] + 1] = guess
            progress.fresh[sample] = max(fresh, int(tokens[-1]) + 1)
            wild = ~(x[tokens[1:]].abs() < _WILD)
            x[tokens[1:]] = torch.where(wild, noise[tokens[1:] - 1], x[tokens[1:]])
            caches = torch.arange(halves, device=z.device) * batch + sample
            slot = torch.full((halves,), frontier - first_token + state.text_tokens, device=z.device)
            raw = _evaluate(weights, state, caches, x[tokens].expand(halves, -1, -1), slot)
            kept[:, tokens] = raw
            moved = x[tokens + 1]
            change = update(moved, noise[tokens], raw, tokens)
            x[tokens + 1] = moved
            rows += halves * len(tokens)
            settled = int((change < tolerance).long().cumprod(0).sum())
            reached = min(settled + 1, len(tokens))
            progress.frontier[sample] += reached
            accepted[-1] += reached
            if not change[reached - 1].isfinite():
                return rows, tuple(accepted), (sample, frontier + reached - 1)
    return rows, tuple(accepted), None


def _evaluate(weights: BlockWeights, state: BlockState, caches: Tensor, x: Tensor, start: Tensor) -> Tensor:
    """Sweep over some rows of the caches alone."""
    own = _rows_of(state, caches)
    raw = jacobi_sweep_reference(weights, own, x, start, torch.zeros_like(start), False)
    state.keys[:, caches], state.values[:, caches] = own.keys, own.values
    return raw


def _rows_of(state: BlockState, rows: Tensor) -> BlockState:
    """Return copies of some rows of the caches, with what is added to them."""
    return type(state)(
        state.keys[:, rows],
        state.values[:, rows],
        state.slots,
        state.text_tokens,
        state.temperature[rows],
        state.position,
        None if state.condition is None else state.condition[rows],
        state.query_rotation,
        state.key_rotation,
        state.layout,
    )
