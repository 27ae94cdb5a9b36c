"""Packed blocks of every kind, with random weights, and states for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from starflow_ext import ops
from starflow_ext.jacobi_solve import SolveProgress, SweepCount
from starflow_ext.linear_pack import pack_weight
from starflow_ext.rope_append import Rotation
from starflow_ext.sweep_block import BlockState, BlockWeights, LayerWeights, LinearWeights

# Distance from the reference by what is stored and what enters the products; values are of order 1.
BOUNDS = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 0.1, "int8": 5e-5, "two_bfloat16": 2e-5}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated, post-norms, q/k norms": {"gated": True, "post": True, "qk": True, "norm": "rms_norm", "bias": False},
    "no norms": {"normed": False, "final": False, "post": True},
    "whole tiles": {"width": 64, "heads": 4, "kv_heads": 4, "head_dim": 32, "hidden": 128},
    "one channel more": {"width": 33, "heads": 3, "kv_heads": 3, "head_dim": 34, "hidden": 31},
    "large heads": {"heads": 2, "kv_heads": 2, "head_dim": 256},
}


def block(options: dict[str, Any], storage: Any = "float32", device: str = "cpu") -> BlockWeights:
    g = torch.Generator().manual_seed(5)
    width, heads, kv_heads = options.get("width", 40), options.get("heads", 2), options.get("kv_heads", 1)
    head_dim, hidden, channels = options.get("head_dim", 12), options.get("hidden", 50), 5
    normed = options.get("normed", True)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(device)

    def linear(out: int, depth: int) -> LinearWeights:
        weight = pack_weight(draw(out, depth) * depth**-0.5, storage, keep=False)
        return LinearWeights(weight, 0.1 * draw(out) if options.get("bias", True) else None)

    def layer() -> LayerWeights:
        return LayerWeights(
            qkv=linear((heads + 2 * kv_heads) * head_dim, width),
            proj=linear(width, heads * head_dim),
            up=linear(hidden, width),
            gate=linear(hidden, width) if options.get("gated") else None,
            down=linear(width, hidden),
            attention_norm=(1 + 0.1 * draw(width), 0.1 * draw(width)) if normed else (None, None),
            mlp_norm=(1 + 0.1 * draw(width), 0.1 * draw(width)) if normed else (None, None),
            query_norm=0.1 * draw(head_dim) if options.get("qk") else None,
            key_norm=0.1 * draw(head_dim) if options.get("qk") else None,
            attention_post=0.1 * draw(width) if options.get("post") else None,
            mlp_post=0.1 * draw(width) if options.get("post") else None,
        )

    return BlockWeights(
        heads,
        kv_heads,
        head_dim,
        linear(width, channels),
        linear(2 * channels, width),
        tuple(layer() for _ in range(2)),
        options.get("norm", "layer_norm") if normed else None,
        start_token=draw(channels),
        final_norm=0.1 * draw(width) if options.get("final", True) else None,
    )


def state_of(
    weights: BlockWeights, rows: int, slots: int, text: int = 2, *, condition_tokens: int = 0, **options: Any
) -> BlockState:
    """With `condition_tokens` of a frame that many tokens have a condition of their own."""
    g = torch.Generator().manual_seed(6)
    angles = torch.rand(slots, weights.head_dim // 2, generator=g) * 6
    rotation = Rotation(angles.cos(), angles.sin())
    width = weights.proj_in.weight.out_channels
    rotation = Rotation(*(table.to(weights.device) for table in rotation))
    frames = () if condition_tokens == 0 else (-(-(slots - text) // condition_tokens),)
    return BlockState.allocate(
        weights,
        rows,
        slots,
        text_tokens=text,
        condition_tokens=condition_tokens,
        temperature=torch.linspace(0.8, 1.2, rows).to(weights.device),
        position=0.3 * torch.randn(slots - text, width, generator=g).to(weights.device),
        condition=0.3 * torch.randn(rows, *frames, width, generator=g).to(weights.device),
        query_rotation=rotation,
        key_rotation=Rotation(rotation.sin, rotation.cos),
        **options,
    )


def sweeps(weights: BlockWeights, state: BlockState, product_input: Any = None) -> list[Tensor]:
    """Text, a prefix, two windows at other places in each row, and what the caches then hold."""
    g = torch.Generator().manual_seed(7)
    rows = state.keys.shape[1]
    width, channels = weights.proj_in.weight.shape
    text = torch.randn(rows, state.text_tokens, width, generator=g).to(weights.device)
    out = [ops.jacobi_sweep(weights, state, text, torch.zeros(rows, dtype=torch.int64), text=True)]
    for start, tokens, keep in ((torch.full((rows,), 2), 70, None), (70 + torch.arange(rows), 9, 72)):
        x = torch.randn(rows, tokens, channels, generator=g).to(weights.device)
        kept = None if keep is None else torch.full((rows,), keep)
        out.append(ops.jacobi_sweep(weights, state, x, start, keep=kept, product_input=product_input))
    return [*out, state.keys.float(), state.values.float()]


# Tokens of a clip that `solve` solves.
TOKENS = 24


def solve(
    weights: BlockWeights,
    window: int,
    tolerance: float,
    guidance: float = 0.0,
    batch: int = 3,
    samples: int = 3,
    most_sweeps: int = 64,
) -> tuple[Tensor, list[SweepCount]]:
    """The first samples of a batch, solved on the device of the weights; their storage is that of the cache."""
    halves = 2 if guidance else 1
    g = torch.Generator().manual_seed(8)
    z = torch.randn(batch, TOKENS, 5, generator=g)[:samples].to(weights.device)
    x = torch.randn(batch, TOKENS + 1, 5, generator=g)[:samples].to(weights.device)
    state = state_of(weights, halves * samples, TOKENS + 2, storage=weights.proj_in.weight.storage)
    state.temperature.fill_(1.0)
    assert state.condition is not None
    state.condition.fill_(0.1)
    progress = SolveProgress.begin(x, 1, halves=halves, out_channels=10)
    counts: list[SweepCount] = []
    while int(progress.frontier.min()) < TOKENS:
        counts.append(
            ops.jacobi_solve(
                weights,
                state,
                progress,
                z,
                first=1,
                first_token=0,
                frame_tokens=8,
                window=window,
                tolerance=tolerance,
                soft_clip=3.0,
                guidance=guidance,
                most_sweeps=most_sweeps,
            )
        )
    return progress.x[:, 1:], counts
