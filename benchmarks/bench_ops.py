"""Speed of each op with native kernels: plain torch, torch.compile, what else users choose, and every CPU level.

    pytest benchmarks                   # all, a quarter of an hour on two cores
    pytest benchmarks -m quick          # the cases that users meet, at the highest level
    pytest benchmarks/bench_ops.py -m quick --benchmark-json=benchmarks/results/ops.json
    python benchmarks/report.py benchmarks/results/ops.json

Every value is checked once against the float64 reference before it is timed. GB/s counts the bytes that the op must
move at least. The ceiling is measured in the same run, on as many threads: the rate at which a loop reads and writes as
many bytes, wherever they fit, or that of multiplications, whichever leaves a call more time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext import ops
from starflow_ext._load import native
from starflow_ext._spec import Sample, Spec, tensors

from .machine import Ceilings, Work
from .rivals import rivals

# The cases of `-m quick`.
QUICK = {
    "affine_forward": ("large", "window"),
    "affine_inverse": ("large", "window"),
    "block_attention": ("window of 64, 4096 keys, float32", "window of 64, 4096 keys, bfloat16", "denoiser, float32"),
    "jacobi_update": ("large", "window"),
    "linear": ("16 rows", "64 rows"),
    "norm": ("window", "large", "large residual", "wide"),
    "rope_append": ("window half", "large"),
}


def _calls() -> Iterator[Any]:
    """Each case by each variant that has it; the highest level of an op is in the quick ones."""
    missing = native.isa_levels()
    for name, spec in ops.SPECS.items():
        levels = [level for level in missing if level in spec.variants]
        highest = [level for level in levels if not missing[level]][-1:]
        for case in spec.cases:
            for variant in ("torch", "compile", *rivals(name, case), *levels):
                quick = case in QUICK.get(name, ()) and (variant not in levels or variant in highest)
                label = "-".join((name, case, variant)).replace(" ", "-")
                yield pytest.param(name, case, variant, marks=[pytest.mark.quick] if quick else [], id=label)


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


def check(
    spec: Spec, case: str, sample: Sample, results: tuple[Tensor, ...], variant: str, *, partly: bool = False
) -> None:
    """Compare results with the exact ones; `partly` where what is overwritten is not among them."""
    for got, want in zip(results, _exact(spec.name, case), strict=not partly):
        if got.is_floating_point():
            relative, absolute = (sample.bounds or spec.bounds)[got.dtype]
            # The bound is four times that of the tests: millions of elements include worse roundings.
            assert ((got.double() - want).abs() <= 4 * (absolute + relative * want.abs())).all(), variant


def least_work(spec: Spec, sample: Sample, results: tuple[Tensor, ...]) -> Work:
    """What a call must do; no op writes more than it reads."""
    given = sum(tensor.nbytes for tensor in tensors(tuple(sample.arguments.values())))
    returned = sum(result.nbytes for result in results)
    moved = spec.bytes_moved(sample) if spec.bytes_moved else given + returned
    written = min(returned, moved // 2)
    half = any(tensor.dtype == torch.bfloat16 for tensor in tensors(tuple(sample.arguments.values())))
    return Work(moved - written, written, spec.operations(sample) if spec.operations else 0, half)


@pytest.mark.parametrize("name, case, variant", list(_calls()), indirect=["variant"])
def test_op(name: str, case: str, variant: str, ceilings: Ceilings, benchmark: Any) -> None:
    spec = ops.SPECS[name]

    def prepared() -> tuple[Sample, Callable[[], Any]]:
        sample = draw(spec, case)
        other = rivals(name, case).get(variant)
        if other is not None:
            return sample, other(spec, sample)
        return sample, partial(implementation(spec, variant), **spec.arguments(**sample.arguments))

    with torch.inference_mode():
        sample, call = prepared()
        # What is overwritten is at first as it was drawn.
        first, once = prepared()
        returned = tensors(once())
        if variant in rivals(name, case):
            check(spec, case, first, returned, variant, partly=True)
        else:
            overwritten = tuple(spec.arguments(**first.arguments)[name] for name in spec.mutates)
            returned = (*returned, *tensors(overwritten))
            check(spec, case, first, returned, variant)
        work = least_work(spec, sample, outcome(spec, spec.call, draw(spec, case)))
        del first, once, returned
        for _ in range(2):
            call()
        benchmark.group = f"{name} {case} {sample.label}"
        slow = work.moved > 1 << 20
        benchmark.pedantic(call, rounds=7 if slow else 50, iterations=1 if slow else 20, warmup_rounds=1)
    best = benchmark.stats.stats.min
    ceiling = ceilings.of(work, best)
    benchmark.extra_info.update(
        {
            "variant": variant,
            "call": sample.label,
            "GB/s": round(work.moved / best / 1e9, 2),
            "ceiling seconds": float(f"{ceiling.seconds:.4g}"),
            "ceiling": ceiling.text,
            "threads": torch.get_num_threads(),
        }
    )
    if work.operations:
        benchmark.extra_info["GFLOP/s"] = round(work.operations / best / 1e9, 1)
