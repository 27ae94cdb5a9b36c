"""A decoder-only transformer with rotary positions, grouped heads and a cache: in plain torch, and on `starflow_ext`.

    python examples/decoder_cache.py

`ops.rope_append` rotates queries and keys and writes keys and values into the cache; `ops.block_attention` reads the
cache under a rule for the mask, so that a chunk of the prompt needs no mask in memory. Both models put out the same
logits; the speed-up is printed.

Reference: Vaswani et al., Attention Is All You Need (2017); Su et al., RoFormer (2021); Ainslie et al., GQA (2023).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from starflow_ext import ops
from starflow_ext.rope_append import Cache, Rotation


class Layer(nn.Module):
    """Attention over the cache, then an MLP; pre-normed."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        head_dim = width // heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * head_dim, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, h: Tensor, rotation: Rotation, cache: Cache, start: int) -> Tensor:
        """Run the layer on tokens (batch, tokens, width) at the positions from `start` on."""
        seen = self.attend(self.qkv(self.attention_norm(h)), rotation, cache, start)
        h = h + self.proj(seen.transpose(1, 2).flatten(2))
        out: Tensor = h + self.down(F.gelu(self.up(self.mlp_norm(h))))
        return out

    def attend(self, qkv: Tensor, rotation: Rotation, cache: Cache, start: int) -> Tensor:
        """Writes keys and values into the cache and attends to what it holds, (batch, heads, tokens, head_dim)."""
        tokens, end = qkv.shape[1], start + qkv.shape[1]
        parts = qkv.unflatten(-1, (self.heads + 2 * self.kv_heads, -1)).transpose(1, 2)
        q, k, v = parts.split([self.heads, self.kv_heads, self.kv_heads], 1)
        cache.keys[:, :, start:end] = _rotated(k, rotation)
        cache.values[:, :, start:end] = v
        mask = None
        if tokens > 1:
            mask = torch.arange(end) <= torch.arange(start, end)[:, None]
        return F.scaled_dot_product_attention(
            _rotated(q, rotation), cache.keys[:, :, :end], cache.values[:, :, :end], attn_mask=mask, enable_gqa=True
        )


def _rotated(x: Tensor, rotation: Rotation) -> Tensor:
    u, v = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation
    return torch.stack([u * cos - v * sin, v * cos + u * sin], -1).flatten(-2)


class FastLayer(Layer):
    """The same layer on two ops of `starflow_ext`."""

    def attend(self, qkv: Tensor, rotation: Rotation, cache: Cache, start: int) -> Tensor:
        """Attend as the plain layer does."""
        q, k, v = ops.rope_append(
            qkv,
            heads=self.heads,
            kv_heads=self.kv_heads,
            query_rotation=rotation,
            key_rotation=rotation,
            cache=cache,
            start=start,
        )
        return ops.block_attention(q, k, v, q_start=start)


class Decoder(nn.Module):
    """Maps token numbers to logits of the next token."""

    def __init__(
        self, layer: type[Layer], words: int, width: int, heads: int, kv_heads: int, layers: int, capacity: int
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList(layer(width, heads, kv_heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, words, bias=False)
        head_dim = width // heads
        angles = torch.arange(capacity)[:, None] * 10000.0 ** (-torch.arange(head_dim // 2) * 2.0 / head_dim)
        self.rotation = Rotation(angles.cos(), angles.sin())
        self.shape = (kv_heads, capacity, head_dim)

    def caches(self, batch: int) -> list[Cache]:
        """Empty caches of all layers."""
        return [Cache(torch.zeros(batch, *self.shape), torch.zeros(batch, *self.shape)) for _ in self.layers]

    def forward(self, tokens: Tensor, caches: list[Cache], start: int) -> Tensor:
        """Logits (batch, tokens, words) of the token after each of `tokens` (batch, tokens) at `start ..`."""
        h = self.embed(tokens)
        rotation = Rotation(*(table[start : start + tokens.shape[1]] for table in self.rotation))
        for layer, cache in zip(self.layers, caches, strict=True):
            h = layer(h, rotation, cache, start)
        logits: Tensor = self.head(self.norm(h))
        return logits


@dataclass(frozen=True)
class Outcome:
    """Largest difference of the logits over their largest value, and seconds (plain, fast)."""

    error: float
    prompt_seconds: tuple[float, float]
    generate_seconds: tuple[float, float]


@torch.inference_mode()
def compare(
    prompt: int = 4096, new: int = 64, chunk: int = 64, width: int = 256, layers: int = 2, batch: int = 1
) -> Outcome:
    """Reads a prompt chunk by chunk and generates greedily, by both models with the same weights.

    Both models read the tokens that the plain one chose, so that a near tie cannot make them differ.
    """
    torch.manual_seed(0)
    sizes = (1000, width, width // 64, max(width // 256, 1), layers, prompt + new)
    plain, fast = Decoder(Layer, *sizes).eval(), Decoder(FastLayer, *sizes).eval()
    fast.load_state_dict(plain.state_dict())
    given = torch.randint(1000, (batch, prompt))
    seconds, logits = [], []
    chosen: list[Tensor] = []
    for model in (plain, fast):
        caches = model.caches(batch)
        begin = time.perf_counter()
        out = torch.cat([model(given[:, s : s + chunk], caches, s) for s in range(0, prompt, chunk)], 1)
        middle = time.perf_counter()
        steps = [out[:, -1:]]
        for index in range(new):
            if model is plain:
                chosen.append(steps[-1].argmax(-1))
            steps.append(model(chosen[index], caches, prompt + index))
        seconds.append((middle - begin, time.perf_counter() - middle))
        logits.append(torch.cat([out, *steps[1:]], 1))
    error = float((logits[1] - logits[0]).abs().max() / logits[0].abs().max())
    return Outcome(error, (seconds[0][0], seconds[1][0]), (seconds[0][1], seconds[1][1]))


def main() -> None:
    """Compare, check and print."""
    compare(prompt=128, new=4)  # the first calls of a process are slow
    done = compare()
    assert done.error < 1e-4, f"logits differ by {done.error:.1e} of their size"
    for what, (plain, fast) in (("prompt", done.prompt_seconds), ("generation", done.generate_seconds)):
        print(f"{what}: {plain * 1e3:.0f} ms in plain torch, {fast * 1e3:.0f} ms with ops: {plain / fast:.2f}x")


if __name__ == "__main__":
    main()
