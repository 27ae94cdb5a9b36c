"""The battery's values and gradients on a CUDA device; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

import starflow_ext
from starflow_ext import ops
from starflow_ext._spec import Spec

from . import battery
from .battery import DIFFERENTIABLE, SPECS, assert_equal, assert_near, bound_of, outcome, plain, samples, samples_of

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or torch without CUDA"),
]


@battery.with_dtypes(SPECS)
def test_value(spec: Spec, dtypes: tuple[torch.dtype, ...]) -> None:
    for sample, expected in zip(samples(spec, dtypes), battery.exact(spec.name, dtypes), strict=True):
        moved = spec.on_cuda(sample)
        for got, want in zip(outcome(spec, moved), expected, strict=True):
            assert got.is_cuda
            assert_near(got.cpu(), want, bound_of(spec, moved, got.dtype), sample.label)


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda spec: spec.name)
def test_gradient_is_that_of_the_cpu(spec: Spec) -> None:
    for sample in samples_of(spec, torch.float64):
        want, got = (battery.gradients(spec, call, torch.square) for call in (sample, spec.on_cuda(sample)))
        for name, gradient in got.items():
            torch.testing.assert_close(gradient.cpu(), want[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_it_runs_on_the_current_stream(spec: Spec) -> None:
    sample = plain(spec)
    expected = outcome(spec, spec.on_cuda(sample))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = outcome(spec, spec.on_cuda(sample))
    stream.synchronize()
    assert_equal(got, expected)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_explain_tells_kernel_from_plain_torch(spec: Spec) -> None:
    runs = starflow_ext.explain(spec.name, **spec.on_cuda(plain(spec)).arguments).runs
    assert runs == ("cuda" if "cuda" in spec.variants else "torch")


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
    # The same keys one element further on, which TMA does not take.
    moved = torch.empty((*k.shape[:-1], head_dim + 9), dtype=dtype, device="cuda")[..., 1 : head_dim + 1].copy_(k)
    for keys_there, kernel in ((k, "wgmma"), (moved, "mma.sync")):
        assert starflow_ext.explain("block_attention", q, keys_there, v, **options).kernel.startswith(kernel)
        out, lse = ops.block_attention(q, keys_there, v, **options)
        spec = ops.SPECS["block_attention"]
        assert_near(out.cpu(), want[0], spec.bounds[dtype], kernel)
        assert_near(lse.cpu(), want[1], spec.bounds[torch.float32], kernel)
