"""One battery over every op with native kernels; what is special to an op is in its own file."""

from __future__ import annotations

import pytest
import torch

import starflow_ext
from starflow_ext._spec import Sample, Spec

from . import battery
from .battery import DIFFERENTIABLE, DTYPES, SPECS, assert_near, outcome, samples, schema_arguments, tensors

every_op = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
every_differentiable_op = pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda spec: spec.name)
every_dtype = pytest.mark.parametrize("dtype, raw_dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@every_op
@every_dtype
def test_value_is_that_of_the_float64_reference(
    spec: Spec, dtype: torch.dtype, raw_dtype: torch.dtype, isa: str
) -> None:
    for sample in samples(spec, dtype, raw_dtype):
        expected = outcome(spec, battery.in_float64(sample), reference=True)
        for index, (got, want) in enumerate(zip(outcome(spec, sample), expected, strict=True)):
            # What is not stored in the dtype of the data is as exact as the arithmetic.
            stored = got.dtype if got.dtype == dtype or dtype == torch.float64 else torch.float32
            assert_near(got, want, spec.bounds[stored], f"{sample.label}, result {index}")


@every_op
@every_dtype
def test_dtypes_and_shapes_are_those_of_the_reference(spec: Spec, dtype: torch.dtype, raw_dtype: torch.dtype) -> None:
    for sample in samples(spec, dtype, raw_dtype):
        for got, want in zip(outcome(spec, sample), outcome(spec, sample, reference=True), strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape), sample.label


@every_op
def test_any_strides(spec: Spec, isa: str) -> None:
    """Rows apart, channels apart, samples apart: the values of the contiguous call."""
    for sample in samples(spec, torch.float32, torch.float32):
        expected = outcome(spec, sample)
        for spread in (_rows_apart, _channels_apart, _tokens_first):
            strided = Sample(sample.label, tuple(spread(tensor) for tensor in sample.args), sample.kwargs)
            returned = spec.call(*strided.args, **strided.kwargs)
            got = (*tensors(returned), *(strided.args[i] for i in spec.mutates))
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a, b), f"{sample.label}, {spread.__name__}"


def _rows_apart(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan"), dtype=tensor.dtype)
    wide[..., 2 : 2 + tensor.shape[-1]] = tensor
    return wide[..., 2 : 2 + tensor.shape[-1]]


def _channels_apart(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], dim=-1)[..., 0]


def _tokens_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


@every_differentiable_op
def test_any_leading_dimensions(spec: Spec) -> None:
    sample = next(iter(samples(spec, torch.float32, torch.float32)))
    expected = outcome(spec, sample)
    two = Sample("", tuple(tensor[0] for tensor in sample.args), sample.kwargs)
    for got, want in zip(outcome(spec, two), expected, strict=True):
        assert torch.equal(got, want[0])
    five = Sample("", tuple(tensor[None, :, None].expand(2, -1, 3, -1, -1) for tensor in sample.args), sample.kwargs)
    for got, want in zip(tensors(spec.call(*five.args, **five.kwargs)), expected, strict=True):
        assert torch.equal(got, want[None, :, None].expand_as(got))


@every_differentiable_op
def test_gradcheck(spec: Spec, isa: str) -> None:
    for sample in samples(spec, torch.float64, torch.float64):
        if max(tensor.shape[-1] for tensor in sample.args) > 40:
            continue
        # It calls the op once for each element: one sample and two tokens are enough.
        args = tuple(tensor[:1, :2].clone().requires_grad_() for tensor in sample.args)
        assert torch.autograd.gradcheck(lambda *inputs, kwargs=sample.kwargs: spec.call(*inputs, **kwargs), args)


@every_differentiable_op
@every_dtype
def test_gradient_is_that_of_the_float64_reference(
    spec: Spec, dtype: torch.dtype, raw_dtype: torch.dtype, isa: str
) -> None:
    for sample in samples(spec, dtype, raw_dtype):
        gradients = []
        for call, exact in ((spec.call, False), (spec.call, True)):
            inputs = [(tensor.double() if exact else tensor.clone()).requires_grad_() for tensor in sample.args]
            with starflow_ext.reference_mode() if exact else torch.enable_grad():
                results = tensors(call(*inputs, **sample.kwargs))
            loss = sum((result.double() * _weights(result)).sum() for result in results)
            gradients.append(torch.autograd.grad(loss, inputs))
        for got, want, given in zip(*gradients, sample.args, strict=True):
            assert got.dtype == given.dtype
            bound = spec.bounds[given.dtype]
            # Differences of two terms, either of which was rounded; and upstream gradients are rounded to the dtype.
            scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
            coarsest = max(bound.relative, spec.bounds[dtype].relative)
            assert_near(got, want, bound._replace(relative=coarsest, absolute=4 * coarsest * scale), sample.label)


def _weights(result: torch.Tensor) -> torch.Tensor:
    """Weights that every dtype holds exactly."""
    return (torch.arange(result.numel()) % 5 - 2.0).reshape(result.shape).double()


@every_differentiable_op
def test_second_order_gradient_is_refused(spec: Spec) -> None:
    sample = next(iter(samples(spec, torch.float32, torch.float32)))
    inputs = [tensor.requires_grad_() for tensor in sample.args]
    result = tensors(spec.call(*inputs, **sample.kwargs))[0]
    with pytest.raises(RuntimeError, match=rf"^{spec.name}: create_graph is True, expected False: second-order"):
        torch.autograd.grad(result.sum(), inputs, create_graph=True)


@every_op
def test_opcheck(spec: Spec) -> None:
    operator = getattr(torch.ops.starflow_ext, spec.name).default
    for sample in samples(spec, torch.float32, torch.float32):
        if sample.label not in {"defaults", "one element", "no tokens", "17 channels"}:
            continue
        inputs = tuple(tensor.clone().requires_grad_(spec.differentiable) for tensor in sample.args)
        torch.library.opcheck(operator, schema_arguments(spec, Sample(sample.label, inputs, sample.kwargs)))


@every_op
def test_compiles_without_a_graph_break(spec: Spec) -> None:
    compiled = torch.compile(spec.call, fullgraph=True, backend="aot_eager")
    sample = next(iter(samples(spec, torch.float32, torch.float32)))
    got, want = battery.copied(sample), battery.copied(sample)
    for a, b in zip(tensors(compiled(*got.args, **got.kwargs)), tensors(spec.call(*want.args)), strict=True):
        assert torch.equal(a, b)
    for i in spec.mutates:
        assert torch.equal(got.args[i], want.args[i])


@every_differentiable_op
def test_gradient_through_compile(spec: Spec) -> None:
    sample = next(iter(samples(spec, torch.float32, torch.float32)))
    compiled = torch.compile(spec.call, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (spec.call, compiled):
        inputs = [tensor.clone().requires_grad_() for tensor in sample.args]
        sum(result.square().sum() for result in tensors(call(*inputs, **sample.kwargs))).backward()
        gradients.append([tensor.grad for tensor in inputs])
    for got, want in zip(*gradients, strict=True):
        assert torch.equal(got, want)


@every_op
def test_any_number_of_threads_gives_the_same_bits(spec: Spec, isa: str) -> None:
    before = torch.get_num_threads()
    sample = _large(spec)
    expected = outcome(spec, sample)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for got, want in zip(outcome(spec, sample), expected, strict=True):
                assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)


@every_op
def test_thirty_runs_give_the_same_bits(spec: Spec, isa: str) -> None:
    sample = _large(spec)
    expected = outcome(spec, sample)
    for _ in range(30):
        for got, want in zip(outcome(spec, sample), expected, strict=True):
            assert torch.equal(got, want)


@every_op
def test_a_sample_does_not_depend_on_its_batch(spec: Spec, isa: str) -> None:
    sample = _large(spec)
    together = outcome(spec, sample)
    for b in (0, 5):
        alone = Sample("", tuple(tensor[b : b + 1] for tensor in sample.args), sample.kwargs)
        for got, want in zip(outcome(spec, alone), together, strict=True):
            assert torch.equal(got, want[b : b + 1])


def _large(spec: Spec) -> Sample:
    """Return a call of several grains of work, without guidance."""
    generator = torch.Generator().manual_seed(11)
    first = next(iter(samples(spec, torch.float32, torch.float32)))
    shapes = [(6, 301, tensor.shape[-1]) for tensor in first.args]
    return Sample("large", tuple(torch.randn(shape, generator=generator) for shape in shapes), first.kwargs)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_values_past_the_caches_are_the_same(spec: Spec, dtype: torch.dtype, isa: str) -> None:
    """Outputs from 8 MB on are written past the caches; cut in samples they are not."""
    generator = torch.Generator().manual_seed(13)
    width = 64 // torch.finfo(dtype).bits * 8
    first = next(iter(samples(spec, dtype, dtype)))
    halves = [tensor.shape[-1] // first.args[0].shape[-1] for tensor in first.args]
    tokens = (9 << 20) // (2 * width * torch.finfo(dtype).bits // 8)
    drawn = [torch.randn((2, tokens, width * count), generator=generator).to(dtype) for count in halves]
    whole = outcome(spec, Sample("", tuple(drawn)))
    for b in range(2):
        part = outcome(spec, Sample("", tuple(tensor[b : b + 1] for tensor in drawn)))
        for got, want in zip(part, whole, strict=True):
            assert torch.equal(got, want[b : b + 1])


@every_op
@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_extremes_stay_finite(spec: Spec, activation: str, isa: str) -> None:
    """Scales within exp(+-80) whatever the network puts out, and no NaN in value or gradient."""
    extremes = torch.tensor([-torch.inf, -1e30, -1e4, -90.0, -80.0, -30.0, 0.0, 30.0, 80.0, 90.0, 1e4, 1e30, torch.inf])
    channels = len(extremes)
    raw = torch.cat([extremes, torch.zeros(channels)]).expand(1, 2, -1).clone()
    data = [torch.ones(1, 2, channels) for _ in range(len(samples_args(spec)) - 1)]
    sample = Sample("extremes", (*data, raw), {"activation": activation})
    expected = outcome(spec, battery.in_float64(sample), reference=True)
    for got, want in zip(outcome(spec, sample), expected, strict=True):
        assert not got.isnan().any()
        # Near exp(80) a rounding of the exponent's argument is one of 80 units.
        assert_near(got, want.float(), spec.bounds[torch.float32]._replace(relative=3e-5, absolute=1e-4), activation)
    if spec.differentiable:
        inputs = [tensor.clone().requires_grad_() for tensor in sample.args]
        results = tensors(spec.call(*inputs, **sample.kwargs))
        gradients = torch.autograd.grad(sum(result.sum() for result in results), inputs)
        assert all(not gradient.isnan().any() for gradient in gradients)


def samples_args(spec: Spec) -> tuple[torch.Tensor, ...]:
    return next(iter(samples(spec, torch.float32, torch.float32))).args


@every_op
def test_nan_propagates(spec: Spec, isa: str) -> None:
    """A NaN anywhere in a token's inputs is seen in each of that token's per-token results and nowhere else."""
    for channel in (0, 3, 17, 40):
        for argument in range(len(samples_args(spec))):
            args = [tensor.clone() for tensor in samples_args(spec)]
            args[argument][1, 2, channel] = torch.nan
            results = outcome(spec, Sample("", tuple(args)))
            assert any(result[1, 2].isnan().any() for result in results), (channel, argument)
            for result in results:
                elsewhere = result.clone()
                elsewhere[1, 2] = 0
                assert not elsewhere.isnan().any()


@every_op
def test_reference_mode_runs_the_reference(spec: Spec) -> None:
    sample = next(iter(samples(spec, torch.float32, torch.float32)))
    with starflow_ext.reference_mode():
        got = outcome(spec, sample)
        assert starflow_ext.explain(spec.name, *sample.args).runs == "torch"
    for a, b in zip(got, outcome(spec, sample, reference=True), strict=True):
        assert torch.equal(a, b)


@every_op
def test_autocast_lowers_nothing(spec: Spec) -> None:
    sample = next(iter(samples(spec, torch.float32, torch.bfloat16)))
    expected = outcome(spec, sample)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, want in zip(outcome(spec, sample), expected, strict=True):
            assert torch.equal(got, want)
        for got, want in zip(outcome(spec, sample, reference=True), expected, strict=True):
            assert got.dtype == want.dtype


@every_op
def test_wrong_arguments_get_one_sentence(spec: Spec) -> None:
    """The native op, the reference and explain() refuse with the same words."""
    good = samples_args(spec)
    data, raw = good[0], good[-1]
    first = "z" if spec.name == "affine_inverse" else "x"
    rest = good[1:-1]
    long = tuple(torch.zeros(tensor.shape, dtype=torch.int64) for tensor in (data, *rest))
    half = tuple(tensor.bfloat16() for tensor in (data, *rest))
    wrong: list[tuple[tuple[torch.Tensor, ...], dict[str, object], str]] = [
        ((*long, raw), {}, f"{first} has dtype int64, expected float32, bfloat16, float16 or float64"),
        ((*half, raw), {}, f"raw has dtype float32, expected bfloat16 for {first} of bfloat16"),
        (
            (data, *rest, raw.double()),
            {},
            f"raw has dtype float64, expected float32, bfloat16 or float16 for {first} of float32",
        ),
        (
            (data, *rest, raw[..., :-1]),
            {},
            f"raw has shape [2, 5, 95], expected [2, 5, 96] for {first} of shape [2, 5, 48]",
        ),
        (
            (data, *rest, raw),
            {"activation": "none"},
            f"raw has shape [2, 5, 96], expected [2, 5, 48] for {first} of shape [2, 5, 48]",
        ),
        ((data, *rest, raw), {"activation": "relu"}, 'activation is "relu", expected "softplus", "exp" or "none"'),
        ((data, *rest, raw), {"soft_clip": -1.0}, "soft_clip is -1, expected a finite number >= 0"),
        ((data, *rest, raw), {"soft_clip": float("nan")}, "soft_clip is nan, expected a finite number >= 0"),
        (
            tuple(tensor.flatten() for tensor in (data, *rest, raw)),
            {},
            f"{first} has shape [480], expected ({'batch' if spec.mutates else '...'}, tokens, channels)",
        ),
    ]
    for args, kwargs, sentence in wrong:
        expected = f"{spec.name}: {sentence}"
        for call in (spec.call, lambda *a, **k: starflow_ext.explain(spec.name, *a, **k)):
            with pytest.raises(RuntimeError) as refusal:
                call(*args, **kwargs)
            assert str(refusal.value) == expected
        with starflow_ext.reference_mode(), pytest.raises(RuntimeError) as refusal:
            spec.call(*args, **kwargs)
        assert str(refusal.value) == expected
