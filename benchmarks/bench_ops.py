"""Speed of each op with native kernels: plain torch, torch.compile and every CPU level side by side.

    pytest benchmarks/bench_ops.py --benchmark-json=benchmarks/results/ops.json
    python benchmarks/report.py benchmarks/results/ops.json

Every value is checked once against the float64 reference before it is timed. GB/s counts the bytes that the op must
move at least; the ceiling is the bandwidth of a copy, measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext import ops
from starflow_ext._spec import Sample, Spec

LARGE = (64, 1024, 256)  # 64 MB of float32
FRAME = (4, 256, 192)  # a frame of a video model, four samples
WINDOW = (1, 64, 48)  # a window of the solver

CASES: dict[str, tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = {
    "large": (LARGE, torch.float32, {}),
    "large exp": (LARGE, torch.float32, {"activation": "exp"}),
    "large clipped": (LARGE, torch.float32, {"soft_clip": 3.0}),
    "large bfloat16": (LARGE, torch.bfloat16, {}),
    "frame": (FRAME, torch.float32, {}),
    "window": (WINDOW, torch.float32, {}),
}


def _draw(spec: Spec, shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype) -> Sample:
    generator = torch.Generator().manual_seed(5)
    wide = (*shape[:-1], 2 * shape[-1])
    shapes = [shape] * (2 if spec.mutates else 1) + [wide]
    return Sample("", tuple(torch.randn(s, generator=generator).to(dtype) for s in shapes), options)


def _positional(spec: Spec, sample: Sample) -> tuple[Any, ...]:
    return (*sample.args, *(dict(spec.call.__kwdefaults__) | dict(sample.kwargs)).values())


def _check(spec: Spec, call: Callable[..., Any], sample: Sample) -> None:
    """Compare the first rows of a whole call with float64."""
    rows = Sample("", tuple(tensor[:1, :7].double() for tensor in sample.args), sample.kwargs)
    want = spec.reference(*_positional(spec, rows))
    got = call(*_positional(spec, sample))
    for a, b in zip(_tensors(got), _tensors(want), strict=True):
        bound = spec.bounds[a.dtype]
        distance = (a[:1, :7].double() - b.double()).abs()
        assert (distance <= bound.absolute + bound.relative * b.double().abs()).all()


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _implementation(spec: Spec, variant: str) -> Callable[..., Any]:
    if variant == "torch":
        return spec.reference
    if variant == "compile":
        return torch.compile(spec.reference)
    keywords = tuple(spec.call.__kwdefaults__)

    def native(*values: Any) -> Any:
        tensors = values[: -len(keywords)]
        return spec.call(*tensors, **dict(zip(keywords, values[-len(keywords) :], strict=True)))

    return native


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ops.SPECS)
def test_op(name: str, case: str, variant: str, copy_bandwidth: float, benchmark: Any) -> None:
    spec = ops.SPECS[name]
    shape, dtype, options = CASES[case]
    sample = _draw(spec, shape, options, dtype)
    call = _implementation(spec, variant)
    arguments = _positional(spec, sample)
    with torch.inference_mode():
        _check(spec, call, sample)
        for _ in range(2):
            call(*arguments)
        benchmark.group = f"{name} {case} {list(shape)}"
        large = sample.args[0].nbytes > 1 << 20
        benchmark.pedantic(call, arguments, rounds=7 if large else 50, iterations=1 if large else 20, warmup_rounds=1)
    best = benchmark.stats.stats.min
    rate = spec.bytes_moved(sample) / best
    benchmark.extra_info.update(
        {
            "variant": variant,
            "shape": list(shape),
            "GB/s": round(rate / 1e9, 2),
            "percent of copy": round(100 * rate / copy_bandwidth, 1),
            "copy GB/s": round(copy_bandwidth / 1e9, 2),
            "threads": torch.get_num_threads(),
        }
    )
