"""One battery over every op with native kernels; what is special to an op is in its own file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import starflow_ext
from starflow_ext._load import native
from starflow_ext._spec import Sample, Spec, tensors
from starflow_ext.linear_pack import PackedWeight

from . import battery
from .battery import (
    DIFFERENTIABLE,
    SPECS,
    assert_equal,
    assert_near,
    bound_of,
    copied,
    gradients,
    inputs,
    large,
    outcome,
    plain,
    requiring,
    run,
    samples,
    samples_of,
    with_dtypes,
)

every_op = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
every_differentiable_op = pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda spec: spec.name)


@with_dtypes(SPECS)
def test_value_is_that_of_the_float64_reference(spec: Spec, dtypes: tuple[torch.dtype, ...], isa: str) -> None:
    for sample, expected in zip(samples(spec, dtypes), battery.exact(spec.name, dtypes), strict=True):
        for index, (got, want) in enumerate(zip(outcome(spec, sample), expected, strict=True)):
            assert_near(got, want, bound_of(spec, sample, got.dtype), f"{sample.label}, result {index}")


@with_dtypes(SPECS)
def test_dtypes_and_shapes_are_those_of_the_reference(spec: Spec, dtypes: tuple[torch.dtype, ...]) -> None:
    for sample in samples(spec, dtypes):
        for got, want in zip(outcome(spec, sample), outcome(spec, sample, reference=True), strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape), sample.label


@every_op
def test_any_strides(spec: Spec, isa: str) -> None:
    """Rows apart, channels apart, samples apart: the values of the contiguous call."""
    for sample in samples_of(spec, torch.float32):
        expected = outcome(spec, sample)
        for spread in (_rows_apart, _channels_apart, _tokens_first):
            assert_equal(run(spec, sample.map(spread)), expected, f"{sample.label}, {spread.__name__}")


def _filler(tensor: Tensor) -> float:
    return float("nan") if tensor.is_floating_point() else 1 << 20


def _rows_apart(tensor: Tensor) -> Tensor:
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), _filler(tensor), dtype=tensor.dtype)
    wide[..., 2 : 2 + tensor.shape[-1]] = tensor
    return wide[..., 2 : 2 + tensor.shape[-1]]


def _channels_apart(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, _filler(tensor))], dim=-1)[..., 0]


def _tokens_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() > 1 else tensor.clone()


@every_differentiable_op
def test_gradcheck(spec: Spec, isa: str) -> None:
    for sample in samples_of(spec, torch.float64):
        sample, leaves = requiring(spec, sample)
        if leaves and sample.label != "large":

            def call(*values: Tensor, arguments: Any = sample.arguments, names: Any = tuple(leaves)) -> Any:
                return tensors(spec.call(**{**arguments, **dict(zip(names, values, strict=True))}))

            # Fast mode: along a random direction, not once for each element.
            assert torch.autograd.gradcheck(call, tuple(leaves.values()), fast_mode=True), sample.label


@with_dtypes(DIFFERENTIABLE)
def test_gradient_is_that_of_the_float64_reference(spec: Spec, dtypes: tuple[torch.dtype, ...], isa: str) -> None:
    for sample in samples(spec, dtypes):
        if inputs(spec, sample):
            battery.assert_gradients_near(spec, dtypes, sample, sample)


@every_differentiable_op
def test_second_order_gradient_is_refused(spec: Spec) -> None:
    sample, leaves = requiring(spec, plain(spec))
    result = tensors(spec.call(**sample.arguments))[0]
    with pytest.raises(RuntimeError, match=rf"^{spec.name}: create_graph is True, expected False: second-order"):
        torch.autograd.grad(result.sum(), list(leaves.values()), create_graph=True)


@every_op
def test_opcheck(spec: Spec) -> None:
    """One call of each kind: which tensors are given, of how many dimensions, and whether they are empty."""
    seen = set()
    for sample in samples_of(spec, torch.float32):
        kind = tuple(
            (name, tuple((tensor.dim(), tensor.numel() > 0) for tensor in tensors(value)))
            for name, value in sample.arguments.items()
        )
        if kind not in seen and sample.label != "large":
            operator, arguments = spec.lowered(requiring(spec, sample)[0])
            torch.library.opcheck(operator, arguments)
        seen.add(kind)


@every_op
def test_compiles_without_a_graph_break(spec: Spec) -> None:
    compiled = torch.compile(spec.call, fullgraph=True, backend="aot_eager")
    sample = plain(spec)
    assert_equal(run(spec, copied(sample), compiled), outcome(spec, sample))


@every_differentiable_op
def test_gradient_through_compile(spec: Spec) -> None:
    compiled = torch.compile(spec.call, fullgraph=True, backend="aot_eager")
    got, want = (gradients(spec, plain(spec), torch.square, call) for call in (compiled, None))
    assert_equal(tuple(got.values()), tuple(want.values()))


def _everything(spec: Spec, sample: Sample) -> tuple[Tensor, ...]:
    """Results, and gradients where there are any."""
    found = outcome(spec, sample)
    return (*found, *gradients(spec, sample, torch.square).values()) if inputs(spec, sample) else found


@every_op
def test_any_number_of_threads_gives_the_same_bits(spec: Spec, isa: str) -> None:
    before = torch.get_num_threads()
    sample = large(spec)
    expected = _everything(spec, sample)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_equal(_everything(spec, sample), expected)
    finally:
        torch.set_num_threads(before)


@every_op
def test_thirty_runs_give_the_same_bits(spec: Spec, isa: str) -> None:
    sample = large(spec)
    expected = outcome(spec, sample)
    for _ in range(30):
        assert_equal(outcome(spec, sample), expected)


@every_op
def test_a_sample_does_not_depend_on_its_batch(spec: Spec, isa: str) -> None:
    sample = large(spec)
    together = outcome(spec, sample)
    for b in (0, 5):

        def alone(tensor: Tensor, b: int = b) -> Tensor:
            return tensor[b : b + 1]

        got = outcome(spec, sample.map(alone, but=spec.shared))
        assert_equal(got, tuple(result[b : b + 1] for result in together))


@every_op
def test_reference_mode_runs_the_reference(spec: Spec) -> None:
    sample = plain(spec)
    with starflow_ext.reference_mode():
        got = outcome(spec, sample)
        assert starflow_ext.explain(spec.name, **sample.arguments).runs == "torch"
        # Torch's attention is the plain formula in this mode, and a kernel of its own outside.
        assert_equal(got, outcome(spec, sample, reference=True))


@every_op
def test_explain_names_a_variant_of_the_op(spec: Spec, isa: str) -> None:
    explanation = starflow_ext.explain(spec.name, **plain(spec).arguments)
    assert explanation.runs in spec.variants
    assert {explanation.runs, *explanation.refused} >= {*spec.variants, "torch"}


@every_op
def test_explain_on_a_cuda_device(spec: Spec) -> None:
    """Tensors of the device without memory: no device is needed to ask."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Packed weights are for CPU kernels.
        movable = (
            s for s in samples_of(spec, torch.float32) if not isinstance(s.arguments.get("weight"), PackedWeight)
        )
        sample = next(movable).map(lambda tensor: torch.empty_like(tensor, device="cuda"))
        if "cuda" in spec.variants and not native.build_info()["cuda"]:
            with pytest.raises(
                RuntimeError, match=r"^explain: data is on cuda:0, expected cpu: this build has no CUDA"
            ):
                starflow_ext.explain(spec.name, **sample.arguments)
            return
        explanation = starflow_ext.explain(spec.name, **sample.arguments)
    refused = "" if "cuda" in spec.variants else "this op has no CUDA kernel yet"
    refused = refused or spec.refuses("cuda", **spec.arguments(**sample.arguments))
    assert explanation.runs == ("torch" if refused else "cuda")
    assert explanation.refused.get("cuda", "") == refused


@with_dtypes(SPECS)
def test_autocast_lowers_nothing_or_the_operands(spec: Spec, dtypes: tuple[torch.dtype, ...]) -> None:
    sample = next(samples(spec, dtypes))
    lowered = sample.map(torch.Tensor.bfloat16) if spec.autocast and torch.float64 not in dtypes else sample
    expected = outcome(spec, lowered)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(outcome(spec, sample), expected)
        for got, want in zip(outcome(spec, sample, reference=True), expected, strict=True):
            assert got.dtype == want.dtype
