"""block_attention on a CUDA device: large tiles, many keys, gradients, both forward kernels; skipped without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import starflow_ext
from starflow_ext import ops
from starflow_ext.block_attention import FrameMask

from .battery import assert_near

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or torch without CUDA"),
]

SPEC = ops.SPECS["block_attention"]
HALVES = (torch.bfloat16, torch.float16)
Record = Callable[[str, object], None]


def _draw(dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def _elsewhere(keys: Tensor) -> Tensor:
    """The same keys one element further on, which TMA does not take."""
    wide = keys.new_empty((*keys.shape[:-1], keys.shape[-1] + 9))
    return wide[..., 1 : keys.shape[-1] + 1].copy_(keys)


def _share(got: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """The largest distance, of what the op promises."""
    relative, absolute = SPEC.bounds[dtype]
    return float(((got.double() - want).abs() / (absolute + relative * want.abs())).max())


MASKS: dict[str, dict[str, Any]] = {
    "all": {"causal": False},
    "causal": {"causal": True, "q_start": 900},
    "lengths": {"causal": True, "q_start": (700, 1000), "k_length": (1850, 2100)},
    "first keys": {"causal": True, "q_start": 900, "k_start": (0, 300)},
    "frames": {"causal": False, "frames": FrameMask(40, 103, 2, 4), "q_start": 900},
    "causal frames": {"causal": True, "frames": FrameMask(40, 103, 1, None), "q_start": 900},
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_tiles_of_128_rows(mask: str, group: int, head_dim: int, dtype: torch.dtype, record_property: Record) -> None:
    """1,200 queries of 32 heads are more tiles of 128 rows than a device has places; 2,103 keys, in both kernels."""
    queries, keys, heads = 1200, 2103, 32
    q = _draw(dtype, 2, heads, queries, head_dim, seed=1)
    k, v = (_draw(dtype, 2, heads // group, keys, head_dim, seed=seed) for seed in (2, 3))
    options = {
        name: torch.tensor(given).cuda() if isinstance(given, tuple) else given for name, given in MASKS[mask].items()
    }
    want = SPEC.reference(**SPEC.arguments(q.double(), k.double(), v.double(), **options, return_lse=True))
    for keys_there in (k, _elsewhere(k)):
        torch.full_like(q, torch.nan)  # what the result's memory holds before
        out, lse = ops.block_attention(q, keys_there, v, **options, return_lse=True)
        kernel = starflow_ext.explain("block_attention", q, keys_there, v, **options).kernel.partition(",")[0]
        share = max(_share(out, want[0], dtype), _share(lse, want[1], torch.float32))
        record_property(f"share of the bound, {kernel}", round(share, 3))
        assert_near(out, want[0], SPEC.bounds[dtype], kernel)
        assert_near(lse, want[1], SPEC.bounds[torch.float32], kernel)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", ["causal", "causal frames"])
def test_gradient(mask: str, head_dim: int, dtype: torch.dtype, record_property: Record) -> None:
    """700 queries and 1,603 keys, grouped, against float64: relative to a gradient's root mean square."""
    q = _draw(dtype, 2, 8, 700, head_dim, seed=1).requires_grad_()
    k, v = (_draw(dtype, 2, 2, 1603, head_dim, seed=seed).requires_grad_() for seed in (2, 3))
    upstream = _draw(dtype, 2, 8, 700, head_dim, seed=4)
    got = torch.autograd.grad(ops.block_attention(q, k, v, **MASKS[mask]), (q, k, v), upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    with starflow_ext.reference_mode():
        want = torch.autograd.grad(ops.block_attention(*exact, **MASKS[mask]), exact, upstream.double())
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        allowed = 4 * SPEC.bounds[dtype].relative * (b.abs() + b.square().mean().sqrt())
        worst = max(worst, float(((a.double() - b).abs() / allowed).max()))
    record_property("share of the bound", round(worst, 3))
    assert worst <= 1.0


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.skipif(not HOPPER, reason="no device of compute capability 9")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("queries, keys", [(1, 5000), (64, 3000), (700, 1000)])
def test_attention_by_wgmma(dtype: torch.dtype, head_dim: int, queries: int, keys: int) -> None:
    """Few queries (keys in parts) and many, NaN behind the keys of a sample, against float64 and the other kernel."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn((2, heads, rows, head_dim), generator=generator, dtype=torch.float64).to(dtype)
        for heads, rows in ((4, queries), (2, keys), (2, keys))
    )
    length = torch.tensor([keys, keys - 77])
    options = {"causal": True, "q_start": length - queries, "k_length": length, "return_lse": True}
    for x in (k, v):
        x[1, :, keys - 77 :] = 0.0
    want = ops.block_attention(*(x.double() for x in (q, k, v)), **options)
    for x in (k, v):
        x[1, :, keys - 77 :] = torch.nan
    options = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    q, k, v = (x.cuda() for x in (q, k, v))
    for keys_there, kernel in ((k, "wgmma"), (_elsewhere(k), "mma.sync")):
        assert starflow_ext.explain("block_attention", q, keys_there, v, **options).kernel.startswith(kernel)
        out, lse = ops.block_attention(q, keys_there, v, **options)
        assert_near(out.cpu(), want[0], SPEC.bounds[dtype], kernel)
        assert_near(lse.cpu(), want[1], SPEC.bounds[torch.float32], kernel)
