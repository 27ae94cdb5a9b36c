"""Speed of each op on a CUDA device: plain torch, torch.compile and the native kernel side by side, by events.

    pytest benchmarks -m cuda --benchmark-json=benchmarks/results/cuda.json

Every value is checked once against the float64 reference before it is timed. The second-level cache is overwritten
before each call. The ceilings, a copy and a product in bfloat16, are measured in the same run.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from starflow_ext import ops
from starflow_ext._load import native
from starflow_ext._mode import reference_mode
from starflow_ext._spec import Sample, Spec, tensors
from starflow_ext.jacobi_solve import SolveProgress, SweepCount
from starflow_ext.linear_pack import PackedWeight, pack_weight
from starflow_ext.rope_append import Rotation
from starflow_ext.sweep_block import BlockState, BlockWeights, LayerWeights, LinearWeights

from .bench_ops import check, draw, implementation, outcome

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or torch without CUDA"),
]

CASES = [(name, case) for name, spec in ops.SPECS.items() if "cuda" in spec.variants for case in spec.cases]
ROUNDS = 20


class Moment:
    """A point of the device's current stream; the difference of two is in seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Moment) -> float:
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1e3


def _best(call: partial[Any]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        begin = Moment()
        call()
        seconds.append(Moment() - begin)
    return min(seconds)


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """Bytes read and written a second by copying 1 GB, and operations a second of a product in bfloat16."""
    source = torch.ones(1 << 28, device="cuda")
    side = 8192
    factor = torch.ones(side, side, device="cuda", dtype=torch.bfloat16)
    copy = _best(partial(torch.empty_like(source).copy_, source))
    return {"copy": 2 * source.nbytes / copy, "product": 2 * side**3 / _best(partial(torch.matmul, factor, factor))}


@pytest.fixture(scope="session")
def cold_cache() -> partial[Any]:
    """Overwrite more than any second-level cache holds."""
    return partial(torch.empty(256 << 20, dtype=torch.uint8, device="cuda").zero_)


def _on_cuda(spec: Spec, case: str, variant: str) -> Sample:
    """The call on the device; torch multiplies by the weight before packing."""
    sample = spec.on_cuda(draw(spec, case))
    if variant == "cuda":
        return sample
    plain = {k: v.weight if isinstance(v, PackedWeight) else v for k, v in sample.arguments.items()}
    return replace(sample, arguments=plain)


@pytest.mark.parametrize("name, case", CASES, ids=lambda value: value.replace(" ", "-"))
@pytest.mark.parametrize("variant", ["torch", "compile", "cuda"])
@pytest.mark.benchmark(timer=Moment)
def test_op(
    name: str, case: str, variant: str, ceilings: dict[str, float], cold_cache: partial[Any], benchmark: Any
) -> None:
    spec = ops.SPECS[name]
    sample = _on_cuda(spec, case, variant)
    call = partial(implementation(spec, variant), **spec.arguments(**sample.arguments))
    with torch.inference_mode():
        fresh = _on_cuda(spec, case, variant)
        results = tuple(result.cpu() for result in outcome(spec, implementation(spec, variant), fresh))
        check(spec, case, sample, results, variant)
        given = sum(tensor.nbytes for tensor in tensors(tuple(sample.arguments.values())))
        moved = spec.bytes_moved(sample) if spec.bytes_moved else given + sum(result.nbytes for result in results)
        benchmark.group = f"{name} {case} {sample.label}"
        benchmark.pedantic(call, setup=cold_cache, rounds=ROUNDS, warmup_rounds=2)
    best = benchmark.stats.stats.min
    benchmark.extra_info.update(
        {
            "variant": variant,
            "device": torch.cuda.get_device_name(),
            "call": sample.label,
            "GB/s": round(moved / best / 1e9, 1),
            "percent of copy": round(100 * moved / best / ceilings["copy"], 1),
        }
    )
    if spec.operations:
        rate = spec.operations(sample) / best
        benchmark.extra_info["TFLOP/s"] = round(rate / 1e12, 2)
        benchmark.extra_info["percent of product"] = round(100 * rate / ceilings["product"], 1)


@pytest.mark.parametrize("variant", ["flash-attn", "cuda"])
@pytest.mark.parametrize("queries, keys", [(64, 1024), (64, 16384), (1590, 33390), (4096, 4096)])
@pytest.mark.benchmark(timer=Moment)
def test_attention_beside_flash_attn(
    queries: int, keys: int, variant: str, cold_cache: partial[Any], benchmark: Any
) -> None:
    """Causal attention of the last tokens, 32 heads of 128 in bfloat16; skipped without flash-attn."""
    flash = pytest.importorskip("flash_attn")
    q, k, v = (torch.randn(1, n, 32, 128, device="cuda", dtype=torch.bfloat16) for n in (queries, keys, keys))
    theirs = partial(flash.flash_attn_func, q, k, v, causal=True)
    ours = partial(ops.block_attention, *(x.transpose(1, 2) for x in (q, k, v)), causal=True, q_start=keys - queries)
    benchmark.group = f"block_attention, {queries} queries, {keys} keys"
    with torch.inference_mode():
        torch.testing.assert_close(ours().transpose(1, 2), theirs(), atol=2e-2, rtol=2e-2)
        call = ours if variant == "cuda" else theirs
        benchmark.pedantic(call, setup=cold_cache, rounds=ROUNDS, warmup_rounds=2)
    benchmark.extra_info.update({"variant": variant, "device": torch.cuda.get_device_name()})


# Two layers of the deep block of the published 7B model, in bfloat16, on the cache of a whole clip after its text.
WIDTH, HEADS, HEAD_DIM, HIDDEN, CHANNELS, TEXT, TOKENS, FRAME = 4096, 64, 64, 16384, 48, 256, 33390, 1590


@pytest.fixture(scope="module")
def deep() -> BlockWeights:
    """The layers with random weights."""
    generator = torch.Generator("cuda").manual_seed(5)

    def linear(out: int, depth: int) -> LinearWeights:
        weight = torch.randn(out, depth, generator=generator, device="cuda", dtype=torch.bfloat16) * depth**-0.5
        return LinearWeights(pack_weight(weight, keep=False), torch.zeros(out, device="cuda"))

    ones, zeros = torch.ones(WIDTH, device="cuda"), torch.zeros(WIDTH, device="cuda")
    layers = tuple(
        LayerWeights(
            qkv=linear(3 * WIDTH, WIDTH),
            proj=linear(WIDTH, WIDTH),
            up=linear(HIDDEN, WIDTH),
            down=linear(WIDTH, HIDDEN),
            attention_norm=(ones, zeros),
            mlp_norm=(ones, zeros),
        )
        for _ in range(2)
    )
    ends = linear(WIDTH, CHANNELS), linear(2 * CHANNELS, WIDTH)
    return BlockWeights(HEADS, HEADS, HEAD_DIM, *ends, layers, "layer_norm", final_norm=zeros)


def _state(deep: BlockWeights, rows: int) -> BlockState:
    angles = torch.rand(TEXT + TOKENS, HEAD_DIM // 2, device="cuda")
    rotation = Rotation(angles.cos(), angles.sin())
    return BlockState.allocate(
        deep,
        rows,
        TEXT + TOKENS,
        text_tokens=TEXT,
        storage="bfloat16",
        query_rotation=rotation,
        key_rotation=rotation,
    )


@pytest.mark.parametrize("variant", ["torch", "cuda"])
@pytest.mark.parametrize("window", [1, 64, 128, 1590])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.benchmark(timer=Moment)
def test_sweep(
    rows: int,
    window: int,
    variant: str,
    deep: BlockWeights,
    ceilings: dict[str, float],
    cold_cache: partial[Any],
    benchmark: Any,
) -> None:
    """A sweep at the middle of the clip."""
    state = _state(deep, rows)
    start = torch.full((rows,), TEXT + TOKENS // 2)
    x = torch.randn(rows, window, CHANNELS, device="cuda")
    call = partial(ops.jacobi_sweep, deep, state, x, start)
    benchmark.group = f"jacobi_sweep, {rows} x {window}"
    with torch.inference_mode(), reference_mode() if variant == "torch" else nullcontext():
        got = call()
        with reference_mode():
            # The kernels round activations to bfloat16, the reference does not.
            torch.testing.assert_close(got, call(), atol=0.1, rtol=0.1)
        benchmark.pedantic(call, setup=cold_cache, rounds=ROUNDS, warmup_rounds=2)
    seen = 2 * 2 * rows * (int(start[0]) + window) * WIDTH * 2
    best = benchmark.stats.stats.min
    # A weight of two bytes costs two operations a row.
    rate = 2 * rows * window * deep.nbytes / 2 / best
    benchmark.extra_info.update(
        {
            "variant": variant,
            "device": torch.cuda.get_device_name(),
            "percent of copy": round(100 * (deep.nbytes + seen) / best / ceilings["copy"], 1),
            "percent of product": round(100 * rate / ceilings["product"], 1),
        }
    )


@pytest.mark.parametrize("way", ["graph", "step", "loop"])
@pytest.mark.parametrize("window", [16, 128])
@pytest.mark.benchmark(timer=Moment)
def test_solve(window: int, way: str, deep: BlockWeights, benchmark: Any) -> None:
    """32 sweeps with guidance; the ways to repeat a sweep run the same kernels and differ in the time between."""
    state = _state(deep, 2)
    z = torch.randn(1, TOKENS, CHANNELS, device="cuda")
    options = {"first": 0, "first_token": 0, "frame_tokens": FRAME, "window": window, "tolerance": 0.0}

    def solve() -> SweepCount:
        x = torch.zeros(1, TOKENS + 1, CHANNELS, device="cuda")
        progress = SolveProgress.begin(x, 0, halves=2, out_channels=2 * CHANNELS)
        return ops.jacobi_solve(deep, state, progress, z, guidance=3.5, soft_clip=4.0, most_sweeps=32, **options)

    native.set_repeat(way)
    try:
        with torch.inference_mode():
            assert len(solve().accepted) == 32
            benchmark.group = f"jacobi_solve, 32 sweeps of 2 x {window}"
            benchmark.pedantic(solve, rounds=ROUNDS, warmup_rounds=2)
    finally:
        native.set_repeat("")
    benchmark.extra_info.update({"variant": way, "device": torch.cuda.get_device_name()})
