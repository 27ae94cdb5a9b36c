"""The published 7B model for benchmarks: its sizes, and its blocks with random weights on a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from starflow_ext import ops
from starflow_ext.jacobi_solve import SolveProgress, SweepCount
from starflow_ext.linear_pack import pack_weight
from starflow_ext.rope_append import Rotation
from starflow_ext.sweep_block import BlockState, BlockWeights, LayerWeights, LinearWeights

# Channels of a token; tokens of a clip of 5 seconds at 480p and of one of its frames; of the text in front.
CHANNELS, TOKENS, FRAME, TEXT = 48, 33390, 1590, 256
# Sweeps of the shallow blocks over a frame, and evaluations a token of the deep one: what a small flow took. The counts
# of the 7B model are not known.
SHALLOW_SWEEPS, DEEP_EVALUATIONS = 5, 4
SHALLOW_BLOCKS = 5


@dataclass(frozen=True)
class Size:
    """A kind of block; head size 64, an MLP of two products.

    Attributes:
        width: channels of the residual stream. heads: of the attention. hidden: channels of the MLP. layers: how many.
    """

    width: int
    heads: int
    hidden: int
    layers: int

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        """(out_channels, in_channels) of the products of a layer, by name."""
        width, hidden = self.width, self.hidden
        return {"qkv": (3 * width, width), "proj": (width, width), "up": (hidden, width), "down": (width, hidden)}


HEAD_DIM = 64
SIZES = {"top": Size(4096, 64, 16384, 24), "shallow": Size(3072, 48, 12288, 2)}
# The eight weights, by name.
WEIGHTS = {f"{kind} {name}": shape for kind, size in SIZES.items() for name, shape in size.weights.items()}


def block(size: Size, layers: int | None = None) -> BlockWeights:
    """The network of a block, of so many layers or all."""
    generator = torch.Generator("cuda").manual_seed(5)

    def linear(out: int, depth: int) -> LinearWeights:
        weight = torch.randn(out, depth, generator=generator, device="cuda", dtype=torch.bfloat16) * depth**-0.5
        return LinearWeights(pack_weight(weight, keep=False), torch.zeros(out, device="cuda"))

    ones, zeros = torch.ones(size.width, device="cuda"), torch.zeros(size.width, device="cuda")
    stack = tuple(
        LayerWeights(
            **{name: linear(*shape) for name, shape in size.weights.items()},
            attention_norm=(ones, zeros),
            mlp_norm=(ones, zeros),
        )
        for _ in range(size.layers if layers is None else layers)
    )
    ends = linear(size.width, CHANNELS), linear(2 * CHANNELS, size.width)
    return BlockWeights(size.heads, size.heads, HEAD_DIM, *ends, stack, "layer_norm", final_norm=zeros)


def state(weights: BlockWeights, rows: int, text: int = TEXT, tokens: int = TOKENS) -> BlockState:
    """Caches for so many samples."""
    angles = torch.rand(text + tokens, HEAD_DIM // 2, device="cuda")
    rotation = Rotation(angles.cos(), angles.sin())
    return BlockState.allocate(
        weights,
        rows,
        text + tokens,
        text_tokens=text,
        storage="bfloat16",
        query_rotation=rotation,
        key_rotation=rotation,
    )


def solve(
    weights: BlockWeights, state: BlockState, tokens: int, window: int, sweeps: int, *, begin: int, guidance: float
) -> SweepCount:
    """So many sweeps from token `begin` on, of which each accepts one token: at tolerance 0."""
    halves = 2 if guidance else 1
    samples = state.keys.shape[1] // halves
    x = torch.zeros(samples, tokens + 1, CHANNELS, device="cuda")
    z = torch.randn(samples, tokens, CHANNELS, device="cuda")
    progress = SolveProgress.begin(x, begin, halves=halves, out_channels=2 * CHANNELS)
    return ops.jacobi_solve(
        weights,
        state,
        progress,
        z,
        first=0,
        first_token=0,
        frame_tokens=FRAME,
        window=window,
        tolerance=0.0,
        guidance=guidance,
        soft_clip=4.0,
        most_sweeps=sweeps,
    )
