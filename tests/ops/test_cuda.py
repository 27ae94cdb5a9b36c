"""The battery's values and gradients on a CUDA device; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from starflow_ext._spec import Sample, Spec

from . import battery
from .battery import DIFFERENTIABLE, DTYPES, SPECS, assert_near, outcome, samples, tensors

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or torch without CUDA"),
]


def _on_device(sample: Sample) -> Sample:
    return Sample(sample.label, tuple(tensor.cuda() for tensor in sample.args), sample.kwargs)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype, raw_dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_value(spec: Spec, dtype: torch.dtype, raw_dtype: torch.dtype) -> None:
    for sample in samples(spec, dtype, raw_dtype):
        expected = outcome(spec, battery.in_float64(sample), reference=True)
        for got, want in zip(outcome(spec, _on_device(sample)), expected, strict=True):
            assert got.is_cuda
            stored = got.dtype if got.dtype == dtype or dtype == torch.float64 else torch.float32
            assert_near(got.cpu(), want, spec.bounds[stored], sample.label)


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda spec: spec.name)
def test_gradient_is_that_of_the_cpu(spec: Spec) -> None:
    for sample in samples(spec, torch.float64, torch.float64):
        gradients = []
        for call in (sample, _on_device(sample)):
            inputs = [tensor.clone().requires_grad_() for tensor in call.args]
            sum(result.square().sum() for result in tensors(spec.call(*inputs, **call.kwargs))).backward()
            gradients.append([tensor.grad.cpu() for tensor in inputs if tensor.grad is not None])
        for got, want in zip(*reversed(gradients), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_it_runs_on_the_current_stream(spec: Spec) -> None:
    sample = next(iter(samples(spec, torch.float32, torch.float32)))
    expected = outcome(spec, _on_device(sample))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = outcome(spec, _on_device(sample))
    stream.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
