"""rope_append and its gradient on the emulated device, against their references in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext import ops
from starflow_ext._check import arithmetic_dtype
from starflow_ext._spec import Bound, Dtypes, Sample
from starflow_ext.rope_append import Cache, Rotation

from ..ops import battery
from .emulator import SEEDS, Kernels, Mutation, Report, assert_caught, emulated, mutations

SPEC = ops.SPECS["rope_append"]
SOURCE = "ops/rope_append/rope_append.cu"
PLANES = "ops/rope_append/rope_append_planes.cuh"


def _turn(rotation: Rotation | None, weight: Tensor | None, qkv: Tensor) -> dict[str, Any]:
    dtype = arithmetic_dtype(qkv.dtype)
    turn: dict[str, Any] = {"weight": None if weight is None else weight.to(dtype)}
    if rotation is not None:
        # One table for all samples has no stride between them.
        cos, sin = (table.to(dtype).expand(qkv.shape[0], *table.shape[-2:]) for table in rotation)
        turn |= {"cos": cos, "sin": sin}
    return turn


def _shape(qkv: Tensor, heads: int, kv_heads: int, pairing: str, kept: torch.dtype) -> dict[str, Any]:
    batch, tokens, width = qkv.shape
    shape = {"batch": batch, "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "data": qkv.dtype, "kept": kept}
    return shape | {"head_dim": width // (heads + 2 * kv_heads), "interleaved": pairing == "interleaved"}


def _run(kernels: Kernels, seed: int, sample: Sample) -> tuple[Report, tuple[Tensor, ...]]:
    """What the public function returns and overwrites."""
    given = SPEC.arguments(**sample.arguments)
    qkv, heads, kv_heads, cache, start = (given[n] for n in ("qkv", "heads", "kv_heads", "cache", "start"))
    batch, tokens, width = qkv.shape
    q, k, v = (qkv.new_empty(batch, n, tokens, width // (heads + 2 * kv_heads)) for n in (heads, kv_heads, kv_heads))
    end = tokens
    if cache is not None:
        k, v = cache
        end = tokens + (int(start.max()) if isinstance(start, Tensor) else start)
        end = end if given["slots"] is None else given["slots"]
    report = kernels.launch(
        "rope_append_cuda",
        seed,
        shape=_shape(qkv, heads, kv_heads, given["pairing"], k.dtype),
        qkv=qkv,
        query=_turn(given["query_rotation"], given["query_norm"], qkv),
        key=_turn(given["key_rotation"], given["key_norm"], qkv),
        q=q,
        k=k,
        v=v,
        start=None if isinstance(start, Tensor) else start,
        starts=start if isinstance(start, Tensor) else None,
        final=given["final"],
    )
    if cache is None:
        return report, (q, k, v)
    return report, (q, k[:, :, :end], v[:, :, :end], k, v)


def _values(kernels: Kernels, dtypes: Dtypes) -> None:
    pairs = zip(battery.samples(SPEC, dtypes), battery.exact("rope_append", dtypes), strict=True)
    for seed, (sample, expected) in enumerate(pairs):
        if sample.label == "large" and dtypes[0] != torch.float32:
            continue
        _, results = _run(kernels, seed, battery.copied(sample))
        for got, want in zip(results, expected, strict=True):
            battery.assert_near(got, want, battery.bound_of(SPEC, sample, got.dtype), sample.label)


@pytest.mark.parametrize("dtypes", SPEC.dtypes, ids=str)
def test_value(dtypes: Dtypes) -> None:
    _values(emulated(SOURCE), dtypes)


def _sample(head_dim: int, pairing: str, dtype: torch.dtype, **arguments: Any) -> Sample:
    angles = torch.randn(4, head_dim // 2)
    rotation = Rotation(angles.cos(), angles.sin())
    weight = torch.randn(head_dim)
    given = {"qkv": torch.randn(2, 4, 6 * head_dim).to(dtype), "heads": 2, "kv_heads": 2, "pairing": pairing}
    given |= {"query_rotation": rotation, "key_rotation": rotation, "query_norm": weight, "key_norm": weight}
    return Sample(f"head_dim {head_dim}, {pairing}, {dtype}", given | arguments)


@pytest.mark.parametrize("head_dim", [64, 128, 254, 256])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_the_published_sizes(head_dim: int, pairing: str, dtype: torch.dtype) -> None:
    for seed in SEEDS:
        sample = _sample(head_dim, pairing, dtype)
        _, results = _run(emulated(SOURCE), seed, sample)
        expected = battery.outcome(SPEC, battery.in_float64(sample), reference=True)
        for got, want in zip(results, expected, strict=True):
            battery.assert_near(got, want, SPEC.bounds[got.dtype], sample.label)


def _gradients(
    kernels: Kernels, seed: int, sample: Sample, *, per_block: int = 3, gap: int = 0
) -> Iterator[tuple[str, Tensor, Tensor, Bound]]:
    """Along a random direction, of the kernel and by autograd in float64, and how far apart they may be."""
    given = SPEC.arguments(**sample.arguments)
    qkv, heads, kv_heads = given["qkv"], given["heads"], given["kv_heads"]
    dtype = arithmetic_dtype(qkv.dtype)
    batch, tokens, width = qkv.shape
    head_dim = width // (heads + 2 * kv_heads)
    exact = SPEC.arguments(**battery.in_float64(sample).arguments)
    leaves = {name: exact[name].requires_grad_() for name in SPEC.differentiable if exact[name] is not None}
    results = SPEC.reference(**exact)
    generator = torch.Generator().manual_seed(seed)
    upstream = [
        torch.randn(*result.shape[:-1], head_dim + gap, generator=generator).to(qkv.dtype)[..., :head_dim]
        for result in results
    ]
    weighed = sum((result * grad.double()).sum() for result, grad in zip(results, upstream, strict=True))
    expected = dict(zip(leaves, torch.autograd.grad(weighed, list(leaves.values())), strict=True))
    rows = batch * tokens
    count = -(-rows // per_block)
    normed = given["query_norm"] is not None or given["key_norm"] is not None
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    weights = qkv.new_empty(2, head_dim, dtype=dtype)
    report = kernels.launch(
        "rope_append_backward_cuda",
        seed,
        shape=_shape(qkv, heads, kv_heads, given["pairing"], qkv.dtype),
        qkv=qkv,
        query=_turn(given["query_rotation"], given["query_norm"], qkv),
        key=_turn(given["key_rotation"], given["key_norm"], qkv),
        grad_q=upstream[0],
        grad_k=upstream[1],
        grad_v=upstream[2],
        grad_qkv=grad_qkv,
        partial=qkv.new_empty(count, 2, head_dim, dtype=dtype) if normed else None,
        weights=weights if normed else None,
        blocks={"rows": rows, "per_block": per_block, "count": count},
    )
    assert [report.read[f"grad_{name}"] for name in "qkv"] == [grad.numel() * grad.element_size() for grad in upstream]
    assert report.written["grad_qkv"] == grad_qkv.nbytes
    if normed:
        assert report.written["weights"] == weights.nbytes
    for name, got in {"qkv": grad_qkv, "query_norm": weights[0], "key_norm": weights[1]}.items():
        if name in expected:
            want = expected[name]
            relative, absolute = SPEC.bounds[got.dtype]
            # Terms as large as the largest result cancel in it.
            largest = float(want.abs().max()) if want.numel() else 0.0
            yield name, got, want, Bound(relative, absolute + 4 * SPEC.bounds[dtype].relative * largest)


def _gradients_near(kernels: Kernels, dtypes: Dtypes) -> None:
    for seed, sample in enumerate(battery.samples(SPEC, dtypes)):
        if "cache" not in sample.arguments and sample.arguments["qkv"].numel() > 0 and sample.label != "large":
            for name, got, want, bound in _gradients(kernels, seed, sample, per_block=2 + seed % 3):
                battery.assert_near(got, want, bound, f"{sample.label}, {name}")


@pytest.mark.parametrize("dtypes", [dtypes for dtypes in SPEC.dtypes if dtypes[0] == dtypes[1]], ids=str)
def test_gradient(dtypes: Dtypes) -> None:
    _gradients_near(emulated(SOURCE), dtypes)


@pytest.mark.parametrize("head_dim", [128, 254])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_gradient_of_heads_of_the_published_sizes(head_dim: int, pairing: str) -> None:
    for seed in SEEDS:
        sample = _sample(head_dim, pairing, torch.float32)
        for name, got, want, bound in _gradients(emulated(SOURCE), seed, sample):
            battery.assert_near(got, want, bound, f"{sample.label}, {name}")


def _moved(kernels: Kernels) -> None:
    """The projection is read once, and its parts are written once."""
    for head_dim, pairing, dtype in ((128, "interleaved", torch.bfloat16), (64, "half", torch.float32)):
        cache = Cache(torch.zeros(2, 2, 9, head_dim), torch.zeros(2, 2, 9, head_dim))
        for sample in (_sample(head_dim, pairing, dtype), _sample(head_dim, pairing, dtype, cache=cache, start=5)):
            report, (q, k, *_) = _run(kernels, 0, sample)
            qkv = sample.arguments["qkv"]
            written = 2 * 2 * 4 * head_dim * k.element_size()
            assert report.read["qkv"] == qkv.nbytes
            assert report.written == dict.fromkeys(report.written, 0) | {"q": q.nbytes, "k": written, "v": written}


def test_bytes_moved() -> None:
    _moved(emulated(SOURCE))


def _anywhere(kernels: Kernels) -> None:
    """Rows may begin at any address and lie at any distance; so may the slots of a cache."""
    for head_dim, skip, gap in ((16, 0, 1), (16, 1, 0), (16, 2, 2), (16, 4, 4)):
        for pairing in ("interleaved", "half"):
            sample = _sample(head_dim, pairing, torch.float32)
            whole = torch.full((2, 4, skip + 6 * head_dim + gap), float("nan"))
            qkv = whole[..., skip : skip + 6 * head_dim].copy_(sample.arguments["qkv"])
            buffer = torch.full((2, 2, 4, head_dim + gap), float("nan"))
            cache = Cache(buffer[..., :head_dim], buffer.clone()[..., :head_dim])
            moved = Sample("", {**sample.arguments, "qkv": qkv, "cache": cache})
            _, results = _run(kernels, 1, moved)
            expected = battery.outcome(SPEC, battery.in_float64(sample), reference=True)
            for got, want in zip(results[:3], expected, strict=True):
                battery.assert_near(got, want, SPEC.bounds[got.dtype], f"{pairing}, {skip}, {gap}")
            rows = Sample("", {**sample.arguments, "qkv": qkv})
            for name, got, want, bound in _gradients(kernels, 1, rows, gap=gap):
                battery.assert_near(got, want, bound, f"{pairing}, {skip}, {gap}, {name}")


def _odd_heads(kernels: Kernels) -> None:
    """Rows and gradients at multiples of 16 bytes, but not the heads within a row."""
    sample = _sample(6, "half", torch.float32, query_rotation=None, key_rotation=None)
    for name, got, want, bound in _gradients(kernels, 1, sample, gap=2):
        battery.assert_near(got, want, bound, name)


def test_heads_of_no_multiple_of_16_bytes() -> None:
    _odd_heads(emulated(SOURCE))


def test_rows_may_lie_anywhere() -> None:
    _anywhere(emulated(SOURCE))


def test_every_schedule_gives_the_same_bits() -> None:
    sample = _sample(64, "interleaved", torch.float32)
    _, expected = _run(emulated(SOURCE), 0, sample)
    for seed in SEEDS[1:]:
        battery.assert_equal(_run(emulated(SOURCE), seed, sample)[1], expected)


MUTATIONS = mutations(
    SOURCE,
    {
        r"p < layout\.planes(?=\) step)": "true",
        r"slot < args\.final\[b\]": "false",
        r"head < shape\.heads \+ 2 \* shape\.kv_heads && ": "",
        r"first \+ group < items": "true",
        r"__syncthreads\(\);": "",
        r"if \(!here\) return;": "",
        r"if \(!here\) continue;": "",
        r"shape\.head_dim % \(2 \* width\) != 0": "false",
        r" && aligned\(args\.qkv, 2 \* width, data_size\)": "",
        r"\? args\.start : args\.starts\[b\]": "? args.start : args.start",
        r"T\(-1\)": "T(1)",
        r"is_query \? 0 : layout\.head_dim": "0",
    },
) + mutations(PLANES, {r"layout\.v\(p\) < layout\.head_dim": "true"})


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_caught(mutation: Mutation) -> None:
    def check(kernels: Kernels) -> None:
        _values(kernels, (torch.float32, torch.float32))
        _gradients_near(kernels, (torch.float32, torch.float32))
        _moved(kernels)
        _anywhere(kernels)
        _odd_heads(kernels)

    assert_caught(SOURCE, mutation, check)
