"""rope_append: split heads, normalise queries and keys, rotate, write keys and values into the cache."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from starflow_ext._check import require
from starflow_ext.norm import norm

Pairing = Literal["interleaved", "half"]


class Rotation(NamedTuple):
    """Cosines and sines of rotary angles, each (tokens, head_dim / 2) or (batch, tokens, head_dim / 2), float32."""

    cos: Tensor
    sin: Tensor


class Cache(NamedTuple):
    """Key and value buffers of one layer, each (batch, kv_heads, capacity, head_dim). Keys are stored rotated."""

    keys: Tensor
    values: Tensor


def rotate(x: Tensor, rotation: Rotation, pairing: Pairing) -> Tensor:
    """Rotate pairs of elements: ``(u, v) -> (u cos - v sin, v cos + u sin)``.

    Args:
        x: (batch, heads, tokens, head_dim).
        rotation: cosines and sines by plane; plane k pairs elements (2k, 2k + 1) when "interleaved" and
            (k, k + head_dim / 2) when "half".
        pairing: "interleaved" or "half".

    Returns:
        (batch, heads, tokens, head_dim), dtype of ``x``; computed in float32.

    Raises:
        RuntimeError: if ``pairing`` is unknown or the tables do not fit ``x``.

    Reference:
        Su et al., RoFormer (2021), section 3.4.
    """
    require(pairing in ("interleaved", "half"), "rope_append", "pairing is", f'"{pairing}"', '"interleaved" or "half"')
    table = [x.shape[2], x.shape[3] // 2]
    require(
        list(rotation.cos.shape[-2:]) == table,
        "rope_append",
        "rotation has shape",
        list(rotation.cos.shape),
        f"[..., {table[0]}, {table[1]}] for {table[0]} tokens of head_dim {x.shape[3]}",
    )
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(dtype).unsqueeze(-3) for t in rotation)
    pairs = x.to(dtype).unflatten(-1, (-1, 2) if pairing == "interleaved" else (2, -1))
    axis = -1 if pairing == "interleaved" else -2
    u, v = pairs.unbind(axis)
    return torch.stack([u * cos - v * sin, v * cos + u * sin], axis).flatten(-2).to(x.dtype)


def rope_append(
    qkv: Tensor,
    *,
    heads: int,
    kv_heads: int,
    query_rotation: Rotation | None = None,
    key_rotation: Rotation | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    pairing: Pairing = "interleaved",
    cache: Cache | None = None,
    start: int | Tensor = 0,
    final: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the fused projection into rotated queries, keys and values; with a cache, write keys and values into it.

    Plain torch on every device; there is no native kernel yet.

    Args:
        qkv: (batch, tokens, (heads + 2 * kv_heads) * head_dim): queries, keys, values, head-major.
        heads, kv_heads: numbers of heads.
        query_rotation, key_rotation: angles of the tokens; None leaves them unrotated (learned positions).
        query_norm, key_norm: RMSNorm weights (head_dim,), offsets from one; applied before the rotation.
        pairing: which elements form a plane.
        cache: buffers that tokens are written to, at slots ``start .. start + tokens``; not differentiable.
        start: first slot, one number or one for each sample (batch,).
        final: (batch,) slots below it keep what they hold, whatever the tokens are; None writes all.

    Returns:
        q (batch, heads, tokens, head_dim), and k, v: (batch, kv_heads, tokens, head_dim) without a cache; with one,
        its first ``max(start) + tokens`` slots.

    Raises:
        RuntimeError: if the channels do not split into the heads, or the cache is too short.

    Reference:
        Su et al., RoFormer (2021); Henry et al., Query-Key Normalization for Transformers (2020).
    """
    batch, tokens, width = qkv.shape
    parts = heads + 2 * kv_heads
    require(width % parts == 0, "rope_append", "qkv has channels", width, f"a multiple of {parts} (heads + 2 kv_heads)")
    q, k, v = qkv.unflatten(-1, (parts, -1)).transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    if query_norm is not None:
        q = norm(q, query_norm, kind="rms_norm").to(v.dtype)
    if key_norm is not None:
        k = norm(k, key_norm, kind="rms_norm").to(v.dtype)
    if query_rotation is not None:
        q = rotate(q, query_rotation, pairing)
    if key_rotation is not None:
        k = rotate(k, key_rotation, pairing)
    if cache is None:
        return q, k, v
    end = (int(start.max()) if isinstance(start, Tensor) else start) + tokens
    require(end <= cache.keys.shape[2], "rope_append", "cache holds", f"{cache.keys.shape[2]} slots", f"at least {end}")
    if isinstance(start, Tensor) or final is not None:
        rows = torch.arange(batch, device=qkv.device)[:, None]
        first = start[:, None] if isinstance(start, Tensor) else torch.full_like(rows, start)
        slots = first + torch.arange(tokens, device=qkv.device)
        for buffer, new in ((cache.keys, k), (cache.values, v)):
            written = new.transpose(1, 2).to(buffer.dtype)
            if final is not None:
                written = torch.where((slots < final[:, None])[..., None, None], buffer[rows, :, slots], written)
            buffer[rows, :, slots] = written
    else:
        cache.keys[:, :, start:end] = k
        cache.values[:, :, start:end] = v
    return q, cache.keys[:, :, :end], cache.values[:, :, :end]
