"""What every test of the battery needs: calls of an op, and how far results are from float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from starflow_ext import ops
from starflow_ext._spec import Bound, Sample, Spec

SPECS = list(ops.SPECS.values())
DIFFERENTIABLE = [spec for spec in SPECS if spec.differentiable]

# Data and raw: the same dtype, or raw narrower than float32 data.
DTYPES = [(dtype, dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)] + [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]


def samples(spec: Spec, dtype: torch.dtype, raw_dtype: torch.dtype) -> Iterator[Sample]:
    yield from spec.samples(dtype, raw_dtype, torch.Generator().manual_seed(3))


def schema_arguments(spec: Spec, sample: Sample) -> tuple[Any, ...]:
    """Return the call as the schema has it: everything positional."""
    defaults = dict(spec.call.__kwdefaults__)
    return (*sample.args, *(defaults | dict(sample.kwargs)).values())


def copied(sample: Sample) -> Sample:
    return Sample(sample.label, tuple(tensor.clone() for tensor in sample.args), sample.kwargs)


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def outcome(spec: Spec, sample: Sample, *, reference: bool = False) -> tuple[Tensor, ...]:
    """Run an op on copies; what it returns, and what it overwrites."""
    sample = copied(sample)
    if reference:
        returned = spec.reference(*schema_arguments(spec, sample))
    else:
        returned = spec.call(*sample.args, **sample.kwargs)
    return (*tensors(returned), *(sample.args[i] for i in spec.mutates))


def in_float64(sample: Sample) -> Sample:
    return Sample(sample.label, tuple(tensor.double() for tensor in sample.args), sample.kwargs)


def assert_near(got: Tensor, expected: Tensor, bound: Bound, what: str) -> None:
    """Check shape and values; equal infinities agree, and NaN only with NaN."""
    assert got.shape == expected.shape, what
    got, expected = got.double(), expected.double()
    distance = torch.where(got == expected, 0.0, (got - expected).abs())
    allowed = bound.absolute + bound.relative * expected.abs()
    wrong = ~(distance <= allowed) & ~(got.isnan() & expected.isnan())
    assert not wrong.any(), f"{what}: {got[wrong][:4].tolist()} instead of {expected[wrong][:4].tolist()}"
