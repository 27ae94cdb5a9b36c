"""Calls of block_attention for its tests on the emulated device, and their results in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from starflow_ext._check import dtype_text
from starflow_ext._spec import Sample
from starflow_ext.block_attention import SPEC, FrameMask

from ..ops import battery
from .emulator import Kernels, Report
from .switches import BOUND

HALVES = (torch.float16, torch.bfloat16)
FORWARD = "ops/block_attention/block_attention.cu"
FORWARD_SM90 = "ops/block_attention/block_attention_sm90.cu"
BACKWARD = "ops/block_attention/block_attention_backward.cu"
BACKWARD_SM90 = "ops/block_attention/block_attention_backward_sm90.cu"
# What several kernels include, and what is taken away of it (see `Switches`).
STAGED = {
    "ops/block_attention/block_attention_sm90.cuh": {
        r"n % stages": "(on ? 0 : {0})",
        r"n / stages % 2": "(on ? 0 : {0})",
    },
    "cuda/tensor_map.cuh": {
        r"static_cast<cuuint64_t>\(sizes\[3 - d\]\)(?=;)": "{0} + (on ? 8 : 0)",
        r"CU_TENSOR_MAP_SWIZZLE_128B": "(on ? CU_TENSOR_MAP_SWIZZLE_NONE : {0})",
    },
}
DOTS = {
    "ops/block_attention/block_attention_backward.cuh": {
        r"index < shape\.batch \* shape\.heads \* shape\.queries": BOUND
    }
}
# Keys of a tile of the kernels of sm_90a, and the number of tiles that are in shared memory at a time.
COLUMNS = 128
STAGES = 2
# Of gradients, relative to the largest: weights and products are rounded before each product.
GRADIENT_BOUNDS = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}

OPTIONS = (
    "causal",
    "q_start",
    "q_starts",
    "k_start",
    "k_starts",
    "k_length",
    "k_lengths",
    "prefix",
    "frame_tokens",
    "look_ahead",
    "window",
)


@dataclass(frozen=True)
class Call:
    """What both launchers take, from the arguments of the public function."""

    q: Tensor
    k: Tensor
    v: Tensor
    common: Mapping[str, Any]

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> Call:
        _, (q, k, v, *values) = SPEC.lowered(Sample("", arguments))
        options = dict(zip((*OPTIONS, "temperature", "temperatures"), values, strict=True))
        batch, heads, queries, head_dim = q.shape
        kv_heads, keys = k.shape[1:3]
        start, length = options["q_start"], options["k_length"]
        root, temperatures = head_dim**0.5, options["temperatures"]
        return Call(
            q,
            k,
            v,
            {
                "shape": {
                    "batch": batch,
                    "heads": heads,
                    "kv_heads": kv_heads,
                    "queries": queries,
                    "keys": keys,
                    "head_dim": head_dim,
                    "data": q.dtype,
                },
                "mask": {
                    "causal": options["causal"],
                    "frames": options["frame_tokens"] > 0,
                    "prefix": options["prefix"],
                    "frame_tokens": max(1, options["frame_tokens"]),
                    "look_ahead": options["look_ahead"],
                    "window": options["window"],
                    "first": options["k_start"] or 0,
                    "firsts": options["k_starts"],
                    "start": keys - queries if start is None else start,
                    "starts": options["q_starts"],
                    "length": keys if length is None else length,
                    "lengths": options["k_lengths"],
                },
                "scale": {
                    "scale": 1.0 / (root * options["temperature"]),
                    "root": root,
                    "temperatures": None if temperatures is None else temperatures.double(),
                },
                "q": q,
                "k": k,
                "v": v,
            },
        )

    @property
    def wide(self) -> bool:
        return self.q.shape[-1] % (4 if self.q.dtype == torch.float32 else 8) == 0


def by_token(like: Tensor) -> Tensor:
    """As the op allocates results, but rows as far apart as those of ``like``; NaN where nothing is written."""
    batch, heads, tokens, head_dim = like.shape
    return like.new_full((batch, tokens, heads, like.stride(2)), torch.nan).transpose(1, 2)[..., :head_dim]


@dataclass(frozen=True)
class Run:
    """What a launch of the forward pass left; `parts` are the results of the parts of the keys."""

    report: Report
    out: Tensor
    lse: Tensor
    parts: Tensor | None


def run_forward(kernels: Kernels, launcher: str, seed: int, call: Call, rows: int = 64, splits: int = 1) -> Run:
    """In tiles of so many rows, with the keys in so many parts."""
    out, lse = by_token(call.q), torch.full(call.q.shape[:3], torch.nan)
    parts = torch.full((splits * (call.q.numel() + lse.numel()),), torch.nan) if splits > 1 else None
    report = kernels.launch(launcher, seed, **call.common, out=out, lse=lse, tile_rows=rows, splits=splits, parts=parts)
    return Run(report, out, lse, parts)


@dataclass(frozen=True)
class ForwardKernel:
    """A kernel of the forward pass: its launcher, type, channels and rows."""

    source: str
    dtype: torch.dtype
    width: int
    rows: int

    @property
    def launcher(self) -> str:
        return f"{Path(self.source).stem}_cuda"

    def __str__(self) -> str:
        return f"{Path(self.source).stem} {dtype_text(self.dtype)}, {self.width} channels, {self.rows} rows"


FORWARD_KERNELS = (
    *(ForwardKernel(FORWARD, torch.float32, width, rows) for width, rows in ((64, 64), (128, 64), (256, 32))),
    *(
        ForwardKernel(FORWARD, dtype, width, rows)
        for dtype in HALVES
        for width, rows in ((64, 64), (64, 128), (128, 64), (128, 128), (256, 64))
    ),
    *(
        ForwardKernel(FORWARD_SM90, dtype, width, rows)
        for dtype in HALVES
        for width, rows in ((64, 64), (64, 128), (128, 64), (128, 128))
    ),
)


def usual_calls(dtype: torch.dtype) -> Iterator[Sample]:
    """Calls of the battery that have a row; of the large one two of the six samples."""
    for sample in battery.samples(SPEC, (dtype,)):
        if sample.arguments["q"].numel() > 0:
            yield sample.map(lambda tensor: tensor[:2]) if sample.label == "large" else sample


@dataclass(frozen=True)
class Above:
    """What the gradient takes beside a call: the results, and what comes from above."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


def gradient_rows(head_dim: int) -> int:
    """Queries of a tile of the gradient's kernel of sm_90a (`sm90_gradient_rows`)."""
    return 128 if head_dim <= 64 else 64


def run_backward(
    kernels: Kernels, launcher: str, seed: int, call: Call, above: Above
) -> tuple[Report, tuple[Tensor, ...]]:
    """What a launch of the gradient left: its gradients, with NaN where nothing was written."""
    grads = tuple(by_token(x) for x in (call.q, call.k, call.v))
    memory: dict[str, Tensor] = {}
    # The blocks of the other kernel tell each other nothing, and share words of 4 bytes where rows have odd lengths.
    tells = launcher.endswith("_sm90_cuda")
    if tells and call.k.shape[2] > COLUMNS:
        batch, heads, queries, head_dim = call.q.shape
        tiles = batch * heads * -(-queries // gradient_rows(head_dim))
        # Whatever lies there: sums that nobody has added to are not read, and the launch itself clears the turns.
        memory = {
            "sums": torch.full((tiles * gradient_rows(head_dim) * (64 if head_dim <= 64 else 128),), torch.nan),
            "turns": torch.full((tiles * 2,), 77, dtype=torch.int32),
        }
    report = kernels.launch(
        launcher,
        seed,
        watch_blocks=tells,
        **call.common,
        out=above.out,
        lse=above.lse,
        grad_out=above.grad_out,
        grad_lse=above.grad_lse,
        grad_q=grads[0],
        grad_k=grads[1],
        grad_v=grads[2],
        dots=torch.full(above.lse.shape, torch.nan),
        **memory,
    )
    return report, grads


@cache
def exact_gradients(dtype: torch.dtype) -> list[tuple[Sample, Above, tuple[Tensor, ...]]]:
    """Of each call with a gradient: results and what comes from above, and the gradients by autograd in float64."""
    samples = list(usual_calls(dtype))
    samples += [
        Sample(f"mixed, head_dim {head_dim}", arguments_for(dtype, head_dim)) for head_dim in (64, 128, 160, 256)
    ]
    return [(sample, *gradients_of(sample.arguments)) for sample in samples]


def gradients_of(arguments: Mapping[str, Any]) -> tuple[Above, tuple[Tensor, ...]]:
    """What the gradient of a call takes, and its gradients by autograd in float64. A NaN is one that nobody reads."""
    dtype = arguments["q"].dtype
    finite = {name: arguments[name].nan_to_num(0.0) for name in ("q", "k", "v")}
    doubles = SPEC.arguments(**battery.in_float64(Sample("", {**arguments, **finite})).arguments)
    leaves = [doubles[name].requires_grad_() for name in ("q", "k", "v")]
    out, lse = SPEC.reference(**{**doubles, "return_lse": True})
    grad_out = draw(*out.shape, dtype=dtype, seed=4)
    grad_lse = draw(*lse.shape, dtype=torch.float32, seed=5).where(lse.isfinite(), torch.tensor(0.0))
    seen = torch.where(lse.isfinite(), lse, 0.0)
    loss = (out * grad_out.double()).sum() + (seen * grad_lse.double()).sum()
    grads = torch.autograd.grad(loss, leaves)
    return Above(out.detach().to(dtype), lse.detach().float(), grad_out, grad_lse), grads


def assert_gradients(dtype: torch.dtype, label: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for name, mine, exact_one in zip("qkv", got, want, strict=True):
        largest = max(1.0, 4 * exact_one.abs().max().item()) if exact_one.numel() else 1.0
        bound = SPEC.bounds[dtype]._replace(relative=0.0, absolute=GRADIENT_BOUNDS[dtype] * largest)
        battery.assert_near(mine, exact_one, bound, f"{label}, {name}")


@cache
def exact(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    found = []
    for sample in usual_calls(dtype):
        doubles = battery.in_float64(sample)
        found.append(SPEC.reference(**{**SPEC.arguments(**doubles.arguments), "return_lse": True}))
    return found


def assert_forward(dtype: torch.dtype, label: str, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    battery.assert_near(got[0], want[0], SPEC.bounds[dtype], label)
    battery.assert_near(got[1], want[1], SPEC.bounds[torch.float32], f"{label}, lse")


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments_for(
    dtype: torch.dtype, head_dim: int = 64, queries: int = 70, keys: int = 150, **options: Any
) -> dict[str, Any]:
    """Two samples, two heads on one of keys, keys of different lengths, a prefix and frames, rows that see nothing."""
    return {
        "q": draw(2, 2, queries, head_dim, dtype=dtype, seed=1),
        "k": draw(2, 1, keys, head_dim, dtype=dtype, seed=2),
        "v": draw(2, 1, keys, head_dim, dtype=dtype, seed=3),
        "causal": True,
        "frames": FrameMask(prefix=20, frame_tokens=30, look_ahead=1, window=2),
        "q_start": torch.tensor([keys - queries, -3]),
        "k_length": torch.tensor([keys, keys - 13]),
        **options,
    }


def in_rows(tensor: Tensor, skip: int = 0) -> Tensor:
    """The same in rows of 24 elements where it has less, from a place on, with NaN around it."""
    head_dim = tensor.shape[-1]
    rows = tensor.new_full((*tensor.shape[:-1], skip + max(24, head_dim)), torch.nan)
    rows[..., skip : skip + head_dim] = tensor
    return rows[..., skip : skip + head_dim]


def small(dtype: torch.dtype, head_dim: int, skip: int = 0) -> dict[str, Any]:
    """Rows and keys that fill no tile, and NaN behind each sample's keys."""
    options = {"q_start": torch.tensor([-3, 103]), "k_length": torch.tensor([140, 131])}
    arguments = arguments_for(dtype, head_dim, queries=37, keys=140, **options)
    for name in ("k", "v"):
        arguments[name][1, :, 131:] = torch.nan
    return {**arguments, **{name: in_rows(arguments[name], skip) for name in ("q", "k", "v")}}


def in_chunks(tensor: Tensor, skip: int = 0, gap: int = 0) -> Tensor:
    """The same in rows of whole 16 bytes, from a place on and so far apart, with NaN around it."""
    head_dim = tensor.shape[-1]
    width = skip + -(-head_dim // 8) * 8 + gap
    rows = tensor.new_full((*tensor.shape[:-1], width), torch.nan)
    rows[..., skip : skip + head_dim] = tensor
    return rows[..., skip : skip + head_dim]


@cache
def small_exact(dtype: torch.dtype, head_dim: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, tuple[Tensor, ...]]:
    arguments = small(dtype, head_dim)
    finite = {name: arguments[name].nan_to_num(0.0).double().requires_grad_() for name in ("q", "k", "v")}
    out, lse = SPEC.reference(**{**SPEC.arguments(**{**arguments, **finite}), "return_lse": True})
    above = draw(*out.shape, dtype=dtype, seed=4)
    grads = torch.autograd.grad((out * above.double()).sum(), list(finite.values()))
    return (out.detach(), lse.detach()), above, torch.zeros_like(lse, dtype=torch.float32), grads
