"""Speed of each op with native kernels: plain torch, torch.compile and every CPU level side by side.

    pytest benchmarks/bench_ops.py --benchmark-json=benchmarks/results/ops.json
    python benchmarks/report.py benchmarks/results/ops.json

Every value is checked once against the float64 reference before it is timed. GB/s counts the bytes that the op must
move at least; the ceiling is the bandwidth of a copy, measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext import ops
from starflow_ext._spec import Sample, Spec, tensors

CASES = [(name, case) for name, spec in ops.SPECS.items() for case in spec.cases]


def draw(spec: Spec, case: str) -> Sample:
    return spec.cases[case](torch.Generator().manual_seed(5))


def implementation(spec: Spec, variant: str) -> Callable[..., Any]:
    if variant == "torch":
        return spec.reference
    return torch.compile(spec.reference) if variant == "compile" else spec.call


def outcome(spec: Spec, call: Callable[..., Any], sample: Sample) -> tuple[Tensor, ...]:
    """The tensors that a call returns, and those that it overwrites."""
    arguments = spec.arguments(**sample.arguments)
    returned = tensors(call(**arguments))
    return (*returned, *tensors(tuple(arguments[name] for name in spec.mutates)))


@lru_cache(maxsize=1)
def _exact(name: str, case: str) -> tuple[Tensor, ...]:
    spec = ops.SPECS[name]
    sample = draw(spec, case).map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    return outcome(spec, spec.reference, sample)


def check(spec: Spec, case: str, sample: Sample, results: tuple[Tensor, ...], variant: str) -> None:
    for got, want in zip(results, _exact(spec.name, case), strict=True):
        if got.is_floating_point():
            relative, absolute = (sample.bounds or spec.bounds)[got.dtype]
            # The bound is four times that of the tests: millions of elements include worse roundings.
            assert ((got.double() - want).abs() <= 4 * (absolute + relative * want.abs())).all(), variant


@pytest.mark.parametrize("name, case", CASES, ids=lambda value: value.replace(" ", "-"))
def test_op(name: str, case: str, variant: str, copy_bandwidth: float, benchmark: Any) -> None:
    spec = ops.SPECS[name]
    if variant not in ("torch", "compile", *spec.variants):
        pytest.skip(f"{name} has no variant {variant}")
    sample = draw(spec, case)
    call = partial(implementation(spec, variant), **spec.arguments(**sample.arguments))
    given = sum(tensor.nbytes for tensor in tensors(tuple(sample.arguments.values())))
    with torch.inference_mode():
        results = outcome(spec, implementation(spec, variant), draw(spec, case))
        check(spec, case, sample, results, variant)
        moved = spec.bytes_moved(sample) if spec.bytes_moved else given + sum(result.nbytes for result in results)
        del results
        for _ in range(2):
            call()
        benchmark.group = f"{name} {case} {sample.label}"
        slow = given > 1 << 20
        benchmark.pedantic(call, rounds=7 if slow else 50, iterations=1 if slow else 20, warmup_rounds=1)
    best = benchmark.stats.stats.min
    benchmark.extra_info.update(
        {
            "variant": variant,
            "call": sample.label,
            "GB/s": round(moved / best / 1e9, 2),
            "percent of copy": round(100 * moved / best / copy_bandwidth, 1),
            "copy GB/s": round(copy_bandwidth / 1e9, 2),
            "threads": torch.get_num_threads(),
        }
    )
    if spec.operations:
        benchmark.extra_info["GFLOP/s"] = round(spec.operations(sample) / best / 1e9, 1)
