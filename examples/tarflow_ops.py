"""A TarFlow-like model in plain torch, and the ten lines that put its attention and its coupling on `starflow_ext.ops`.

    python examples/tarflow_ops.py

The same weights give the same likelihood and the same samples; the speed-up of both is printed, and that of sampling
by windows of tokens with `starflow.solve` in place of token by token.

Reference: Zhai et al., Normalizing Flows are Capable Generative Models (TarFlow), 2024.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import starflow
from starflow_ext import ops

Caches = list[list[Tensor]]

# -- a model as anybody would write it --------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention; with a cache the tokens follow those that it holds."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h: Tensor, cache: list[Tensor] | None) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache[:] = [torch.cat([old, new], 2) for old, new in zip(cache, (k, v), strict=True)]
        out: Tensor = self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return h + out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from queries that belong to the last keys: to all keys, or to one."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


class Block(nn.Module):
    """Standardises each token given the tokens before it; the first passes unchanged."""

    attention: type[Attention] = Attention

    def __init__(self, tokens: int, channels: int, width: int, heads: int, layers: int, *, flip: bool) -> None:
        super().__init__()
        self.flip, self.heads = flip, heads
        self.proj_in, self.norm = nn.Linear(channels, width), nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, 2 * channels)
        self.position = nn.Parameter(0.1 * torch.randn(tokens, width))
        self.attentions = nn.ModuleList(self.attention(width, heads) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )

    def predict(self, x: Tensor, start: int = 0, caches: Caches | None = None) -> Tensor:
        """Log-scale and shift of the token after each of x, (batch, tokens, 2 * channels)."""
        h = self.proj_in(x) + self.position[start : start + x.shape[1]]
        for index, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            h = attention(h, None if caches is None else caches[index])
            h = h + mlp(h)
        out: Tensor = self.proj_out(self.norm(h))
        return out

    def caches(self, batch: int) -> Caches:
        """Empty keys and values for each layer."""
        empty = self.position.new_empty(batch, self.heads, 0, self.proj_in.out_features // self.heads)
        return [[empty, empty] for _ in self.attentions]

    def couple(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise, and the log-determinant of each token."""
        log_scale, shift = F.pad(raw[:, :-1], (0, 0, 1, 0)).chunk(2, -1)
        return (x - shift) * torch.exp(-log_scale), -log_scale.sum(-1)

    def uncouple(self, z: Tensor, raw: Tensor) -> Tensor:
        """Noise to data."""
        log_scale, shift = raw.chunk(2, -1)
        return shift + torch.exp(log_scale) * z

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise, and the log-determinant of each sample."""
        x = x.flip(1) if self.flip else x
        z, log_det = self.couple(x, self.predict(x))
        return z.flip(1) if self.flip else z, log_det.sum(1)

    def decode(self, z: Tensor) -> Tensor:
        """Noise to data, token by token with a cache."""
        z = z.flip(1) if self.flip else z
        caches = self.caches(z.shape[0])
        tokens = [z[:, :1]]
        for index in range(z.shape[1] - 1):
            raw = self.predict(tokens[-1], index, caches)
            tokens.append(self.uncouple(z[:, index + 1 : index + 2], raw))
        x = torch.cat(tokens, 1)
        return x.flip(1) if self.flip else x


class TarFlow(nn.Module):
    """A chain of blocks of alternating direction over (batch, tokens, channels)."""

    block: type[Block] = Block

    def __init__(self, tokens: int, channels: int, width: int, heads: int, layers: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            self.block(tokens, channels, width, heads, layers, flip=bool(index % 2)) for index in range(blocks)
        )

    def chain(self) -> list[Block]:
        """The blocks from data to noise."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-likelihood in nats, (batch,)."""
        total = x.new_zeros(x.shape[0])
        for block in self.chain():
            x, log_det = block.encode(x)
            total = total + log_det
        prior: Tensor = torch.distributions.Normal(0.0, 1.0).log_prob(x)
        return total + prior.flatten(1).sum(1)

    def sample(self, z: Tensor) -> Tensor:
        """Noise to data."""
        for block in reversed(self.chain()):
            z = block.decode(z)
        return z


# -- the ten lines ----------------------------------------------------------------------------------------------------


class FastAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.block_attention(q, k, v)


class FastBlock(Block):
    attention = FastAttention

    def couple(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return ops.affine_forward(x, raw, activation="exp", shifted=True)

    def uncouple(self, z: Tensor, raw: Tensor) -> Tensor:
        return ops.affine_inverse(z, raw, activation="exp")


class FastTarFlow(TarFlow):
    block = FastBlock


# -- sampling by `solve` ----------------------------------------------------------------------------------------------


def solved(flow: FastTarFlow, z: Tensor, size: int, tolerance: float) -> Tensor:
    """Noise to data, a window of tokens at a time; the queries of a window belong to the last cached keys."""
    for block in reversed(flow.chain()):
        caches = block.caches(z.shape[0])

        def fn(x: Tensor, window: slice, block: Block = block, caches: Caches = caches) -> tuple[Tensor, Tensor]:
            first = max(window.start, 1)  # token 0 passes unchanged
            for cache in caches:
                cache[:] = [kept[:, :, : first - 1] for kept in cache]
            raw = block.predict(x[:, first - 1 : window.stop - 1], first - 1, caches)
            log_scale, shift = F.pad(raw, (0, 0, first - window.start, 0)).chunk(2, -1)
            return shift, log_scale.exp()

        z = z.flip(1) if block.flip else z
        z, _ = starflow.solve(fn, z, windowed=True, schedule=starflow.Window(size, tolerance))
        z = z.flip(1) if block.flip else z
    return z


@dataclass(frozen=True)
class Outcome:
    """Largest differences from the plain model, and times in seconds: (plain, fast[, solved])."""

    log_prob_error: float
    sample_error: float
    solve_error: float
    log_prob_seconds: tuple[float, float]
    sample_seconds: tuple[float, float, float]


def compare(
    tokens: int = 1024, channels: int = 12, width: int = 128, layers: int = 2, blocks: int = 2, batch: int = 1
) -> Outcome:
    """Compare the plain model and the one on ops with the same weights, on the same data and noise."""
    torch.manual_seed(0)
    sizes = (tokens, channels, width, width // 32, layers, blocks)
    plain, fast = TarFlow(*sizes).eval(), FastTarFlow(*sizes).eval()
    for block in plain.chain():
        # Tokens depend on those just before them as weakly as in trained models: the gain of `solve` rests on that.
        nn.init.normal_(block.proj_out.weight, 0.0, 0.2 * width**-0.5)
    fast.load_state_dict(plain.state_dict())
    x, z = torch.randn(2, batch, tokens, channels).unbind()
    with torch.inference_mode():
        plain_seconds, expected = _timed(partial(plain.log_prob, x))
        fast_seconds, log_prob = _timed(partial(fast.log_prob, x))
        plain_sampling, samples = _timed(partial(plain.sample, z))
        fast_sampling, fast_samples = _timed(partial(fast.sample, z))
        solving, solutions = _timed(partial(solved, fast, z, 128, 1e-3))
    return Outcome(
        float((log_prob - expected).abs().max() / expected.abs().max()),
        float((fast_samples - samples).abs().max()),
        float((solutions - samples).abs().max()),
        (plain_seconds, fast_seconds),
        (plain_sampling, fast_sampling, solving),
    )


def _timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Least seconds of two calls, and the value."""
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        value = call()
        times.append(time.perf_counter() - begin)
    return min(times), value


def main() -> None:
    """Compare, check and print."""
    done = compare()
    assert done.log_prob_error < 1e-5, f"log_prob differs by {done.log_prob_error:.1e}, relative"
    assert done.sample_error < 1e-3, f"samples differ by {done.sample_error:.1e}"
    assert done.solve_error < 1e-2, f"solved samples differ by {done.solve_error:.1e}"
    plain, fast = done.log_prob_seconds
    print(f"likelihood: {plain * 1e3:.0f} ms in plain torch, {fast * 1e3:.0f} ms with ops: {plain / fast:.2f}x")
    plain, fast, solve = done.sample_seconds
    print(f"sampling: {plain * 1e3:.0f} ms in plain torch, {fast * 1e3:.0f} ms with ops: {plain / fast:.2f}x")
    print(f"sampling with starflow.solve: {solve * 1e3:.0f} ms: {plain / solve:.1f}x")


if __name__ == "__main__":
    main()
