"""What every test of the battery needs: calls of an op, and how far results are from float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import starflow_ext
from starflow_ext import ops
from starflow_ext._spec import Bound, Dtypes, Sample, Spec, tensors

SPECS = list(ops.SPECS.values())
DIFFERENTIABLE = [spec for spec in SPECS if spec.differentiable]


def with_dtypes(specs: list[Spec]) -> pytest.MarkDecorator:
    """Parametrize a test by op and by the combinations of dtypes that it takes."""
    pairs = [(spec, dtypes) for spec in specs for dtypes in spec.dtypes]
    ids = ["-".join([spec.name, *(str(dtype).removeprefix("torch.") for dtype in dtypes)]) for spec, dtypes in pairs]
    return pytest.mark.parametrize("spec, dtypes", pairs, ids=ids)


def samples(spec: Spec, dtypes: Dtypes) -> Iterator[Sample]:
    yield from spec.samples(dtypes, torch.Generator().manual_seed(3))


def samples_of(spec: Spec, dtype: torch.dtype) -> Iterator[Sample]:
    """Calls in which every dtype is the same."""
    yield from samples(spec, (dtype,) * len(spec.dtypes[0]))


def plain(spec: Spec) -> Sample:
    """The first call in float32."""
    return next(samples_of(spec, torch.float32))


def large(spec: Spec, dtype: torch.dtype = torch.float32) -> Sample:
    return next(sample for sample in samples_of(spec, dtype) if sample.label == "large")


def copied(sample: Sample) -> Sample:
    return sample.map(torch.clone)


def in_float64(sample: Sample) -> Sample:
    return sample.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def run(spec: Spec, sample: Sample, call: Callable[..., Any] | None = None) -> tuple[Tensor, ...]:
    """Run an op; what it returns, and what it overwrites."""
    returned = (call or spec.call)(**sample.arguments)
    return (*tensors(returned), *tensors(tuple(sample.arguments.get(name) for name in spec.mutates)))


def outcome(spec: Spec, sample: Sample, *, reference: bool = False) -> tuple[Tensor, ...]:
    """Run an op, or its reference, on copies."""
    sample = copied(sample)
    if reference:
        sample = Sample(sample.label, spec.arguments(**sample.arguments))
    return run(spec, sample, spec.reference if reference else None)


@cache
def exact(name: str, dtypes: Dtypes) -> list[tuple[Tensor, ...]]:
    """What the reference makes of each sample in float64; the same for all variants."""
    spec = ops.SPECS[name]
    return [outcome(spec, in_float64(sample), reference=True) for sample in samples(spec, dtypes)]


def inputs(spec: Spec, sample: Sample) -> dict[str, Tensor]:
    """The arguments of a call that have gradients; none where something is overwritten."""
    if tensors(tuple(sample.arguments.get(name) for name in spec.mutates)):
        return {}
    found = {name: sample.arguments.get(name) for name in spec.differentiable}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def requiring(spec: Spec, sample: Sample) -> tuple[Sample, dict[str, Tensor]]:
    """A copy of a call whose differentiable arguments require gradients, and these."""
    sample = copied(sample)
    leaves = inputs(spec, sample)
    for leaf in leaves.values():
        leaf.requires_grad_()
    return sample, leaves


def gradients(
    spec: Spec, sample: Sample, weigh: Callable[[Tensor], Tensor], call: Callable[..., Any] | None = None
) -> dict[str, Tensor]:
    """Gradients of the weighed sum of all results."""
    sample, leaves = requiring(spec, sample)
    results = tensors((call or spec.call)(**sample.arguments))
    loss = sum(weigh(result).sum() for result in results)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def bound_of(spec: Spec, sample: Sample, dtype: torch.dtype) -> Bound:
    return (sample.bounds or spec.bounds).get(dtype, Bound(0.0, 0.0))


def assert_near(got: Tensor, expected: Tensor, bound: Bound, what: str) -> None:
    """Check shape and values; equal infinities agree, and NaN only with NaN."""
    assert got.shape == expected.shape, what
    got, expected = got.double(), expected.double()
    distance = torch.where(got == expected, 0.0, (got - expected).abs())
    allowed = bound.absolute + bound.relative * expected.abs()
    wrong = ~(distance <= allowed) & ~(got.isnan() & expected.isnan())
    assert not wrong.any(), f"{what}: {got[wrong][:4].tolist()} instead of {expected[wrong][:4].tolist()}"


def assert_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str = "") -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b), what


def assert_gradients_near(spec: Spec, dtypes: Dtypes, call: Sample, sample: Sample) -> None:
    """Check the gradients of a call, which may be the sample on another device, against the reference in float64."""
    given = inputs(spec, call)
    got = gradients(spec, call, _weighed)
    with starflow_ext.reference_mode():
        exact = gradients(spec, in_float64(sample), _weighed)
    # Upstream gradients are rounded to the dtype of what they belong to.
    coarsest = max(bound_of(spec, call, dtype).relative for dtype in dtypes)
    for name, value in got.items():
        want = exact[name]
        assert value.dtype == given[name].dtype
        # Sums and differences of terms, any of which was rounded.
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        bound = bound_of(spec, call, given[name].dtype)._replace(relative=coarsest, absolute=4 * coarsest * scale)
        assert_near(value.cpu(), want, bound, f"{sample.label}, {name}")


def _weighed(result: Tensor) -> Tensor:
    """With weights that every dtype holds exactly."""
    weights = torch.arange(result.numel(), device=result.device) % 5 - 2.0
    return result.double() * weights.reshape(result.shape).double()


def assert_refused(spec: Spec, arguments: Mapping[str, Any], sentence: str) -> None:
    """The native op, the reference and explain() refuse with the same words."""
    calls = (spec.call, lambda **given: starflow_ext.explain(spec.name, **given))
    for call in calls:
        with pytest.raises(RuntimeError) as refusal:
            call(**arguments)
        assert str(refusal.value) == f"{spec.name}: {sentence}"
    with starflow_ext.reference_mode(), pytest.raises(RuntimeError) as refusal:
        spec.call(**arguments)
    assert str(refusal.value) == f"{spec.name}: {sentence}"
