"""Speed of each op on a CUDA device: plain torch, torch.compile and the native kernel side by side, by events.

    pytest benchmarks -m cuda --benchmark-json=benchmarks/results/cuda.json

Every value is checked once against the float64 reference before it is timed. The second-level cache is overwritten
before each call. The ceilings, a copy and a product in bfloat16, are measured in the same run.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from starflow_ext import ops
from starflow_ext._spec import Sample, Spec, tensors
from starflow_ext.linear_pack import PackedWeight

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
    """The call on the device; torch multiplies by a weight as it was before it was packed."""
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
