"""The battery's values and gradients on a CUDA device; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

import starflow_ext
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
