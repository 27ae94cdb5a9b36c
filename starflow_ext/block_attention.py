"""block_attention: softmax attention whose mask is a rule with parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow_ext._check import require


@dataclass(frozen=True)
class FrameMask:
    """Which keys a query sees when whole frames are visible: a causal mask over frames with a look-ahead.

    Tokens are ``prefix`` always-visible ones (text) and then frames of ``frame_tokens`` each. With f the frame of a
    grid token (for a prefix query, ``(q - prefix) // frame_tokens``, negative), key k is seen by query q when k is in
    the prefix, or ``f(q) + look_ahead - 1 - window <= f(k) <= max(f(q), 0) + look_ahead - 1``.

    Args:
        prefix: number of always-visible tokens.
        frame_tokens: tokens of a frame.
        look_ahead: A; 1 sees up to the own frame, 2 one frame ahead.
        window: G, frames seen behind the furthest one; None is all.
    """

    prefix: int
    frame_tokens: int
    look_ahead: int
    window: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("prefix", 0), ("frame_tokens", 1), ("look_ahead", 1)):
            value = getattr(self, name)
            require(value >= least, "block_attention", f"frames.{name} is", value, f"at least {least}")
        require(
            self.window is None or self.window >= self.look_ahead - 1,
            "block_attention",
            "frames.window is",
            self.window,
            f"at least look_ahead - 1 = {self.look_ahead - 1}, so that a frame sees itself",
        )

    def runs(self, tokens: int) -> list[tuple[slice, slice]]:
        """Runs of queries that see the same grid keys: (queries, keys of the grid), the prefix being seen by all."""
        frames = (tokens - self.prefix) // self.frame_tokens
        runs = []
        for frame in range(-1 if self.prefix else 0, frames):
            behind = 0 if self.window is None else max(frame + self.look_ahead - 1 - self.window, 0)
            ahead = min(max(frame, 0) + self.look_ahead, frames)
            first = self.prefix + frame * self.frame_tokens
            queries = slice(max(first, 0) if frame >= 0 else 0, first + self.frame_tokens)
            keys = slice(self.prefix + behind * self.frame_tokens, self.prefix + ahead * self.frame_tokens)
            runs.append((queries, keys))
        return runs

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Boolean (queries, keys) for token indices ``queries`` and ``keys``."""
        frame_q = torch.div(queries - self.prefix, self.frame_tokens, rounding_mode="floor")[:, None]
        frame_k = torch.div(keys - self.prefix, self.frame_tokens, rounding_mode="floor")[None, :]
        seen = frame_k <= frame_q.clamp(min=0) + self.look_ahead - 1
        if self.window is not None:
            seen &= frame_k >= frame_q + self.look_ahead - 1 - self.window
        return seen | (keys < self.prefix)[None, :]


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    q_start: int | Tensor | None = None,
    frames: FrameMask | None = None,
) -> Tensor:
    """Compute ``softmax(q k^T / sqrt(head_dim)) v`` over the visible keys.

    Plain torch on every device; there is no native kernel yet.

    Args:
        q: (batch, heads, queries, head_dim).
        k, v: (batch, kv_heads, keys, head_dim); key head j serves query heads ``j * r .. j * r + r - 1``.
        causal: query i sees the keys up to its own position.
        q_start: position of the first query among the keys, one number or one for each sample (batch,); None is
            ``keys - queries`` (the queries are the last tokens). Only with ``causal``.
        frames: a frame-causal mask over ``queries == keys`` tokens instead of the causal one.

    Returns:
        (batch, heads, queries, head_dim), dtype of ``q``.

    Raises:
        RuntimeError: if shapes or numbers of heads do not fit, or the options contradict each other.

    Reference:
        Vaswani et al., Attention Is All You Need (2017), section 3.2; Ainslie et al., GQA (2023).
    """
    op = "block_attention"
    require(q.shape[-1] == k.shape[-1], op, "k has head_dim", k.shape[-1], f"{q.shape[-1]} like q")
    require(q.shape[0] == k.shape[0], op, "k has batch", k.shape[0], f"{q.shape[0]} like q")
    require(v.shape == k.shape, op, "v has shape", list(v.shape), f"{list(k.shape)} like k")
    require(q.shape[1] % k.shape[1] == 0, op, "k has heads", k.shape[1], f"a divisor of the {q.shape[1]} heads of q")
    require(frames is None or not causal, op, "causal is", causal, "False together with frames")
    require(q_start is None or causal, op, "q_start is", "given", "None without causal")
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    k, v = k.to(q.dtype), v.to(q.dtype)
    if frames is not None:
        return _by_frame(q, k, v, frames, grouped=grouped)
    mask: Tensor | None = None
    square = False
    if causal:
        start: int | Tensor = keys - queries if q_start is None else q_start
        square = isinstance(start, int) and start == 0 and queries == keys
        if not square and not (queries == 1 and isinstance(start, int) and start == keys - 1):
            position = torch.arange(queries, device=q.device)
            last = (start[:, None, None] if isinstance(start, Tensor) else start) + position[:, None]
            mask = torch.arange(keys, device=q.device) <= last
            if mask.dim() == 3:
                mask = mask.unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, enable_gqa=grouped)


def _by_frame(q: Tensor, k: Tensor, v: Tensor, frames: FrameMask, *, grouped: bool) -> Tensor:
    """Frame by frame over the keys that it sees: no mask in memory, and work only for the visible part."""
    tokens, prefix = q.shape[2], frames.prefix
    require(
        k.shape[2] == tokens and (tokens - prefix) % frames.frame_tokens == 0,
        "block_attention",
        "k has tokens",
        k.shape[2],
        f"{tokens} like q: {prefix} of the prefix and whole frames of {frames.frame_tokens}",
    )
    out = []
    for queries, keys in frames.runs(tokens):
        if keys.start <= prefix:
            seen_k, seen_v = k[:, :, : keys.stop], v[:, :, : keys.stop]
        else:
            seen_k, seen_v = (torch.cat([t[:, :, :prefix], t[:, :, keys]], 2) for t in (k, v))
        out.append(F.scaled_dot_product_attention(q[:, :, queries], seen_k, seen_v, enable_gqa=grouped))
    return torch.cat(out, 2)
