"""block_attention and its gradient on the emulated device, against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext._spec import Sample
from starflow_ext.block_attention import SPEC, FrameMask

from ..ops import battery
from .emulator import SEEDS, Kernels, Report, emulated

FORWARD = "ops/block_attention/block_attention.cu"
BACKWARD = "ops/block_attention/block_attention_backward.cu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of gradients, relative to the largest: weights and products are rounded before each product.
GRADIENT_BOUNDS = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Rows of a tile, and parts of the keys. Tiles of 128 rows exist for 16 bits; float32 has one size for each width.
SCHEDULES = ((64, 1), (128, 1), (64, 3), (64, 2), (128, 4))
OPTIONS = ("causal", "q_start", "q_starts", "k_length", "k_lengths", "prefix", "frame_tokens", "look_ahead", "window")


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


def _by_token(like: Tensor) -> Tensor:
    """As the op allocates results; NaN where nothing is written."""
    batch, heads, tokens, head_dim = like.shape
    return like.new_full((batch, tokens, heads, head_dim), torch.nan).transpose(1, 2)


def _forward(kernels: Kernels, seed: int, call: Call, rows: int = 64, splits: int = 1) -> tuple[Report, Tensor, Tensor]:
    out, lse = _by_token(call.q), torch.full(call.q.shape[:3], torch.nan)
    parts = torch.full((splits * call.q.numel() + splits * lse.numel(),), torch.nan) if splits > 1 else None
    report = kernels.launch(
        "block_attention_cuda", seed, **call.common, out=out, lse=lse, tile_rows=rows, splits=splits, parts=parts
    )
    return report, out, lse


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for sample in battery.samples(SPEC, (dtype,)):
        if sample.arguments["q"].numel() > 0:
            yield sample


@cache
def _exact(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    found = []
    for sample in _samples(dtype):
        doubles = battery.in_float64(sample)
        found.append(SPEC.reference(**{**SPEC.arguments(**doubles.arguments), "return_lse": True}))
    return found


def _assert_forward(dtype: torch.dtype, label: str, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    battery.assert_near(got[0], want[0], SPEC.bounds[dtype], label)
    battery.assert_near(got[1], want[1], SPEC.bounds[torch.float32], f"{label}, lse")


def _assert_values(kernels: Kernels, dtype: torch.dtype) -> None:
    for i, (sample, want) in enumerate(zip(_samples(dtype), _exact(dtype), strict=True)):
        call = Call.of(sample.arguments)
        rows, splits = SCHEDULES[i % len(SCHEDULES)]
        report, *got = _forward(kernels, i, call, rows, splits)
        _assert_forward(dtype, f"{sample.label}, {rows} rows, {splits} parts", (got[0], got[1]), want)
        assert report.bank_conflicts == 0 or not call.wide, sample.label


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value(dtype: torch.dtype) -> None:
    """Every mask, size and option of the battery, each in another schedule, by other tiles and parts of the keys."""
    _assert_values(emulated(FORWARD), dtype)


def _draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _arguments(
    dtype: torch.dtype, head_dim: int = 64, queries: int = 70, keys: int = 150, **options: Any
) -> dict[str, Any]:
    """Two samples, two heads on one of keys, keys of different lengths, a prefix and frames, rows that see nothing."""
    return {
        "q": _draw(2, 2, queries, head_dim, dtype=dtype, seed=1),
        "k": _draw(2, 1, keys, head_dim, dtype=dtype, seed=2),
        "v": _draw(2, 1, keys, head_dim, dtype=dtype, seed=3),
        "causal": True,
        "frames": FrameMask(prefix=20, frame_tokens=30, look_ahead=1, window=2),
        "q_start": torch.tensor([keys - queries, -3]),
        "k_length": torch.tensor([keys, keys - 13]),
        **options,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_schedule_gives_the_same_bits(dtype: torch.dtype, head_dim: int) -> None:
    kernels = emulated(FORWARD)
    call = Call.of(_arguments(dtype, head_dim, queries=35))
    for rows, splits in ((64, 2), (128, 1)):
        _, *expected = _forward(kernels, SEEDS[0], call, rows, splits)
        for seed in SEEDS[1:]:
            _, *got = _forward(kernels, seed, call, rows, splits)
            battery.assert_equal(tuple(got), tuple(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_stand_alone(dtype: torch.dtype) -> None:
    """With the keys in one part, a query's bits are those that it has alone, in a tile of any size."""
    kernels = emulated(FORWARD)
    arguments = {**_arguments(dtype, head_dim=128), "q_start": 60}
    _, together, _ = _forward(kernels, 0, Call.of(arguments), 128)
    for i in (0, 1, 37, 69):
        alone = {**arguments, "q": arguments["q"][:, :, i : i + 1], "q_start": 60 + i}
        _, out, _ = _forward(kernels, 1, Call.of(alone))
        assert torch.equal(out, together[:, :, i : i + 1])


def test_only_visible_keys_are_read() -> None:
    """Each once by the tile of rows that sees them, and nothing of what lies behind the length."""
    kernels = emulated(FORWARD)
    options = {"q_start": torch.tensor([80, 90]), "k_length": torch.tensor([150, 137])}
    arguments = _arguments(torch.bfloat16, queries=32, **options)
    for b, length in enumerate((150, 137)):
        for name in ("k", "v"):
            arguments[name][b, :, length:] = torch.nan
    report, out, _ = _forward(kernels, 0, Call.of(arguments))
    assert out.isfinite().all()
    # The prefix, and keys from the first that the first query sees to the last that the last one does.
    visible = (20 + 112 - 20) + (20 + 122 - 20)
    assert report.read["k"] == report.read["v"] == visible * 64 * 2
    assert report.read["q"] == arguments["q"].nbytes
    assert report.written["out"] == out.nbytes


def test_rows_may_lie_anywhere() -> None:
    """At any address and distance, the bits are those of rows that lie side by side."""
    kernels = emulated(FORWARD)
    arguments = _arguments(torch.bfloat16)
    _, *expected = _forward(kernels, 0, Call.of(arguments))
    for skip, gap in ((1, 0), (0, 3), (8, 8)):

        def moved(tensor: Tensor, skip: int = skip, gap: int = gap) -> Tensor:
            whole = torch.full((*tensor.shape[:-1], skip + tensor.shape[-1] + gap), torch.nan, dtype=tensor.dtype)
            whole[..., skip : skip + tensor.shape[-1]] = tensor
            return whole[..., skip : skip + tensor.shape[-1]]

        elsewhere = {**arguments, **{name: moved(arguments[name]) for name in ("q", "k", "v")}}
        _, *got = _forward(kernels, 1, Call.of(elsewhere))
        battery.assert_equal(tuple(got), tuple(expected))


def _backward(
    kernels: Kernels, seed: int, call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Report, tuple[Tensor, ...]]:
    grads = tuple(_by_token(x) for x in (call.q, call.k, call.v))
    dots = torch.full(lse.shape, torch.nan)
    report = kernels.launch(
        "block_attention_backward_cuda",
        seed,
        **call.common,
        out=out,
        lse=lse,
        grad_out=grad_out,
        grad_lse=grad_lse,
        grad_q=grads[0],
        grad_k=grads[1],
        grad_v=grads[2],
        dots=dots,
    )
    return report, grads


@cache
def _exact_gradients(dtype: torch.dtype) -> list[tuple[Sample, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]]:
    """Of each call with a gradient: results and what comes from above, and the gradients by autograd in float64."""
    found = []
    samples = [sample for sample in _samples(dtype) if sample.arguments["q"].shape[-1] <= 128]
    samples += [Sample(f"mixed, head_dim {head_dim}", _arguments(dtype, head_dim)) for head_dim in (64, 128)]
    for sample in samples:
        arguments = SPEC.arguments(**battery.in_float64(sample).arguments)
        leaves = [arguments[name].requires_grad_() for name in ("q", "k", "v")]
        out, lse = SPEC.reference(**{**arguments, "return_lse": True})
        above = _draw(*out.shape, dtype=dtype, seed=4)
        above_lse = _draw(*lse.shape, dtype=torch.float32, seed=5).where(lse.isfinite(), torch.tensor(0.0))
        seen = torch.where(lse.isfinite(), lse, 0.0)
        loss = (out * above.double()).sum() + (seen * above_lse.double()).sum()
        grads = torch.autograd.grad(loss, leaves)
        found.append((sample, out.detach().to(dtype), lse.detach().float(), above, above_lse, grads))
    return found


def _assert_gradients(kernels: Kernels, dtype: torch.dtype) -> None:
    for seed, (sample, out, lse, above, above_lse, expected) in enumerate(_exact_gradients(dtype)):
        call = Call.of(sample.arguments)
        report, grads = _backward(kernels, seed, call, out, lse, above, above_lse)
        for name, got, want in zip("qkv", grads, expected, strict=True):
            largest = max(1.0, 4 * want.abs().max().item()) if want.numel() else 1.0
            bound = SPEC.bounds[dtype]._replace(relative=0.0, absolute=GRADIENT_BOUNDS[dtype] * largest)
            battery.assert_near(got, want, bound, f"{sample.label}, {name}")
        assert report.bank_conflicts == 0 or not call.wide, sample.label


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(dtype: torch.dtype) -> None:
    """Every mask, size and option of the battery, through both results; each call in another schedule."""
    _assert_gradients(emulated(BACKWARD), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_schedule_gives_the_same_gradient(dtype: torch.dtype, head_dim: int) -> None:
    kernels = emulated(BACKWARD)
    call = Call.of(_arguments(dtype, head_dim, queries=35))
    out, above = (_draw(*call.q.shape, dtype=dtype, seed=seed) for seed in (6, 7))
    lse = _draw(*call.q.shape[:3], dtype=torch.float32, seed=8) + 8
    _, expected = _backward(kernels, SEEDS[0], call, out, lse, above, None)
    for seed in SEEDS[1:]:
        battery.assert_equal(_backward(kernels, seed, call, out, lse, above, None)[1], expected)
