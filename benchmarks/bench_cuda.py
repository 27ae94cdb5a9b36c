"""Speed of each op on a CUDA device: plain torch, torch.compile and the native kernel side by side, by events.

    pytest benchmarks -m cuda --benchmark-json=benchmarks/results/cuda.json

Every value is checked once before it is timed, against the float64 reference or against torch. Before each call the
second-level cache is overwritten and the device waits, so that all launches of the call are enqueued before the first
of them runs: what is timed is the device. Data are random; the ceilings, a copy and a product in bfloat16, are measured
in the same run. benchmarks/gpu_day.sh runs this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from starflow_ext import ops
from starflow_ext._load import native
from starflow_ext._mode import reference_mode
from starflow_ext._spec import Sample, Spec, tensors
from starflow_ext.jacobi_solve import SweepCount
from starflow_ext.linear_pack import PackedWeight, pack_weight
from starflow_ext.sweep_block import BlockState, BlockWeights

from . import seven_b
from .bench_ops import check, draw, implementation, outcome

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or torch without CUDA"),
]

CASES = [(name, case) for name, spec in ops.SPECS.items() if "cuda" in spec.variants for case in spec.cases]
ROUNDS = 20
# Cycles, some 3 ms: a host enqueues a thousand kernels in that time.
WAIT = 5_000_000


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
    """Bytes read and written a second by copying 1 GB, and operations a second of a product in bfloat16.

    Of random data: with fewer bits that change a device takes less power, and runs faster.
    """
    source = torch.randn(1 << 28, device="cuda")
    side = 8192
    factor = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)
    copy = _best(partial(torch.empty_like(source).copy_, source))
    return {"copy": 2 * source.nbytes / copy, "product": 2 * side**3 / _best(partial(torch.matmul, factor, factor))}


@pytest.fixture(scope="session")
def cold_device() -> Callable[[], None]:
    """Overwrite more than any second-level cache holds, and let the device wait for the launches of the next call."""
    more = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def prepare() -> None:
        more.zero_()
        torch.cuda._sleep(WAIT)

    return prepare


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
    name: str, case: str, variant: str, ceilings: dict[str, float], cold_device: Callable[[], None], benchmark: Any
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
        benchmark.pedantic(call, setup=cold_device, rounds=ROUNDS, warmup_rounds=2)
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


def _shares(benchmark: Any, ceilings: dict[str, float], variant: str, moved: int, operations: int) -> None:
    best = benchmark.stats.stats.min
    benchmark.extra_info.update(
        {
            "variant": variant,
            "device": torch.cuda.get_device_name(),
            "GB/s": round(moved / best / 1e9, 1),
            "percent of copy": round(100 * moved / best / ceilings["copy"], 1),
            "TFLOP/s": round(operations / best / 1e12, 2),
            "percent of product": round(100 * operations / best / ceilings["product"], 1),
        }
    )


@pytest.mark.parametrize("variant", ["torch", "cuda", "tcgen05"])
@pytest.mark.parametrize("rows", [16, 64, 128, 256, 4096])
@pytest.mark.parametrize("weight", seven_b.WEIGHTS)
@pytest.mark.benchmark(timer=Moment)
def test_products_of_the_7b_model(
    weight: str,
    rows: int,
    variant: str,
    ceilings: dict[str, float],
    cold_device: Callable[[], None],
    benchmark: Any,
) -> None:
    """In bfloat16 with a bias, against `F.linear`; on a device of 10.x also by the kernel that has to be asked for."""
    asked = variant == "tcgen05"
    if asked and torch.cuda.get_device_capability()[0] != 10:
        pytest.skip("the device is not of compute capability 10")
    out, depth = seven_b.WEIGHTS[weight]
    x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(out, depth, device="cuda", dtype=torch.bfloat16) * depth**-0.5
    bias = torch.randn(out, device="cuda", dtype=torch.bfloat16)
    theirs, ours = partial(F.linear, x, w, bias), partial(ops.linear, x, pack_weight(w, keep=False), bias.float())
    native.set_linear_kernel("own" if asked else "")
    try:
        with torch.inference_mode():
            torch.testing.assert_close(ours(), theirs(), atol=5e-2, rtol=5e-2)
            benchmark.group = f"linear, {weight}, {rows} rows"
            call = theirs if variant == "torch" else ours
            benchmark.pedantic(call, setup=cold_device, rounds=ROUNDS, warmup_rounds=2)
    finally:
        native.set_linear_kernel("")
    _shares(benchmark, ceilings, variant, w.nbytes + 2 * rows * (out + depth), 2 * rows * out * depth)


# Samples, heads, queries, keys, channels: windows of the deep block with guidance, frames of a shallow one, training.
ATTENTION = {
    "window of 64": (2, 64, 64, 16896, 64),
    "window of 128": (2, 64, 128, 16896, 64),
    "frames": (21, 48, 1590, 1590, 64),
    "training": (1, 16, 8192, 8192, 64),
    "training, heads of 128": (1, 8, 8192, 8192, 128),
}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@pytest.mark.parametrize("variant", [*BACKENDS, "cuda"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("case", ATTENTION)
@pytest.mark.benchmark(timer=Moment)
def test_attention_beside_torch(
    case: str,
    gradient: bool,
    variant: str,
    ceilings: dict[str, float],
    cold_device: Callable[[], None],
    benchmark: Any,
) -> None:
    """In bfloat16: windows on all keys, which torch's back ends take without a mask in memory, the others causal."""
    samples, heads, queries, keys, channels = ATTENTION[case]
    causal = queries == keys
    if gradient and not causal:
        pytest.skip("windows are sampled, not trained")
    q, k, v = (
        torch.randn(samples, heads, n, channels, device="cuda", dtype=torch.bfloat16, requires_grad=gradient)
        for n in (queries, keys, keys)
    )

    def attend(which: str) -> Tensor:
        if which == "cuda":
            return ops.block_attention(q, k, v, causal=causal)
        with sdpa_kernel(BACKENDS[which]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def of(which: str) -> Callable[[], Any]:
        if not gradient:
            return partial(attend, which)
        out = attend(which)
        grad = torch.ones_like(out)
        return partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)

    with nullcontext() if gradient else torch.inference_mode():
        for got, want in zip(tensors((of(variant)(),)), tensors((of("cuda")(),)), strict=True):
            torch.testing.assert_close(got, want, atol=3e-2, rtol=3e-2)
        benchmark.group = f"attention{', gradient' * gradient}, {case}"
        benchmark.pedantic(of(variant), setup=cold_device, rounds=ROUNDS, warmup_rounds=2)
    pairs = samples * heads * queries * keys // (2 if causal else 1)
    moved = sum(tensor.nbytes for tensor in (q, q, k, v)) * (2 if gradient else 1)
    # Two products forward, five of a gradient.
    _shares(benchmark, ceilings, variant, moved, pairs * channels * 2 * (5 if gradient else 2))


@pytest.fixture(scope="module")
def deep() -> BlockWeights:
    """Two layers of the deep block of the published 7B model."""
    return seven_b.block(seven_b.SIZES["top"], 2)


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
    cold_device: Callable[[], None],
    benchmark: Any,
) -> None:
    """A sweep at the middle of the clip."""
    state = seven_b.state(deep, rows)
    start = torch.full((rows,), seven_b.TEXT + seven_b.TOKENS // 2)
    x = torch.randn(rows, window, seven_b.CHANNELS, device="cuda")
    call = partial(ops.jacobi_sweep, deep, state, x, start)
    benchmark.group = f"jacobi_sweep, {rows} x {window}"
    with torch.inference_mode(), reference_mode() if variant == "torch" else nullcontext():
        got = call()
        with reference_mode():
            # The kernels round activations to bfloat16, the reference does not.
            torch.testing.assert_close(got, call(), atol=0.1, rtol=0.1)
        benchmark.pedantic(call, setup=cold_device, rounds=ROUNDS, warmup_rounds=2)
    seen = 2 * 2 * rows * (int(start[0]) + window) * seven_b.SIZES["top"].width * 2
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


@pytest.fixture(scope="module")
def clip_state() -> Iterator[tuple[BlockWeights, BlockState]]:
    """The deep block of 24 layers (9.7 GB) and its caches of a whole clip with guidance (26 GB)."""
    weights = seven_b.block(seven_b.SIZES["top"])
    yield weights, seven_b.state(weights, 2)
    torch.cuda.empty_cache()


def _rate(tokens: int, count: SweepCount, seconds: float) -> dict[str, float]:
    sweeps = len(count.accepted)
    return {"ms a sweep": round(1e3 * seconds / sweeps, 3), "evaluations a second": round(tokens * sweeps / seconds)}


@pytest.mark.parametrize("way", ["graph", "step", "loop", "graph, no early launches"])
@pytest.mark.parametrize("window", [16, 64, 128])
def test_rate_of_the_deep_block(
    window: int, way: str, clip_state: tuple[BlockWeights, BlockState], benchmark: Any
) -> None:
    """32 sweeps with guidance from the middle of a clip, by the wall clock; the ways run the same kernels."""
    middle = seven_b.TOKENS // 2
    solve = partial(seven_b.solve, *clip_state, seven_b.TOKENS, window, 32, begin=middle, guidance=3.5)
    native.set_repeat(way.partition(",")[0])
    native.set_early_launches("," not in way)
    try:
        with torch.inference_mode():
            count = solve()
            assert len(count.accepted) == 32
            benchmark.group = f"deep block, 32 sweeps of 2 x {window}"
            benchmark.pedantic(solve, rounds=3, warmup_rounds=1)
    finally:
        native.set_repeat("")
        native.set_early_launches(True)
    rate = _rate(window, count, benchmark.stats.stats.min)
    # What follows for a clip, if a token took so many evaluations.
    clip = seven_b.TOKENS * seven_b.DEEP_EVALUATIONS / rate["evaluations a second"]
    benchmark.extra_info.update({"variant": way, **rate, "s a clip": round(clip, 2)})


def test_rate_of_a_shallow_block(benchmark: Any) -> None:
    """Sweeps of all 21 frames of a clip at once, each within its frame, by the wall clock."""
    weights = seven_b.block(seven_b.SIZES["shallow"])
    frames = seven_b.TOKENS // seven_b.FRAME
    state = seven_b.state(weights, frames, text=0, tokens=seven_b.FRAME)
    sweeps = seven_b.SHALLOW_SWEEPS
    solve = partial(seven_b.solve, weights, state, seven_b.FRAME, seven_b.FRAME, sweeps, begin=0, guidance=0.0)
    with torch.inference_mode():
        count = solve()
        assert len(count.accepted) == sweeps
        benchmark.group = f"shallow block, {sweeps} sweeps of {frames} x {seven_b.FRAME}"
        benchmark.pedantic(solve, rounds=3, warmup_rounds=1)
    seconds = benchmark.stats.stats.min
    clip = seven_b.SHALLOW_BLOCKS * seconds
    benchmark.extra_info.update({**_rate(seven_b.TOKENS, count, seconds), "s a clip": round(clip, 2)})
