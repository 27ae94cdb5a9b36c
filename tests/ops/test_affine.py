"""What is special to the affine ops: the mathematics of the pair, extremes, NaN, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from starflow_ext import ops
from starflow_ext._spec import Sample, Spec, tensors

from . import battery
from .battery import assert_equal, assert_near, assert_refused, outcome, plain

AFFINE = [ops.SPECS[name] for name in ("affine_forward", "affine_inverse", "jacobi_update")]
every_affine_op = pytest.mark.parametrize("spec", AFFINE, ids=lambda spec: spec.name)

OPTIONS = [
    {"activation": activation, "soft_clip": soft_clip, "shifted": shifted}
    for activation in ("softplus", "exp", "none")
    for soft_clip in (0.0, 2.0)
    for shifted in (False, True)
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))


def _draw(generator: torch.Generator, options: dict[str, object]) -> tuple[torch.Tensor, torch.Tensor]:
    halves = 1 if options["activation"] == "none" else 2
    x = torch.randn(3, 6, 11, generator=generator, dtype=torch.float64)
    return x, torch.randn(3, 6, 11 * halves, generator=generator, dtype=torch.float64)


@every_option
def test_round_trip(options: dict[str, object], generator: torch.Generator, isa: str) -> None:
    x, raw = _draw(generator, options)
    z, _ = ops.affine_forward(x, raw, **options)
    torch.testing.assert_close(ops.affine_inverse(z, raw, **options), x, rtol=1e-13, atol=1e-13)
    z, _ = ops.affine_forward(x.float(), raw.float(), **options)
    torch.testing.assert_close(ops.affine_inverse(z, raw.float(), **options), x.float(), rtol=1e-5, atol=1e-5)


@every_option
def test_log_det_is_that_of_the_jacobian(options: dict[str, object], generator: torch.Generator, isa: str) -> None:
    x, raw = _draw(generator, options)
    x, raw = x[0], raw[0]
    jacobian = torch.autograd.functional.jacobian(lambda value: ops.affine_forward(value, raw, **options)[0], x)
    _, log_det = ops.affine_forward(x, raw, **options)
    expected = torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))
    assert expected.sign == 1
    torch.testing.assert_close(log_det.sum(), expected.logabsdet, rtol=1e-12, atol=1e-12)


@every_option
def test_shifted_is_the_plain_op_one_token_on(options: dict[str, object], generator: torch.Generator) -> None:
    options = {**options, "shifted": True}
    x, raw = _draw(generator, options)
    plain = {**options, "shifted": False}
    z, log_det = ops.affine_forward(x, raw, **options)
    z_plain, log_det_plain = ops.affine_forward(x[:, 1:], raw[:, :-1], **plain)
    assert torch.equal(z[:, 0], x[:, 0])
    assert torch.equal(log_det[:, 0], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(z[:, 1:], z_plain)
    assert torch.equal(log_det[:, 1:], log_det_plain)


def test_zero_raw_is_the_identity() -> None:
    x = torch.linspace(-3, 3, 24, dtype=torch.float64).reshape(1, 2, 12)
    for activation in ("softplus", "exp"):
        z, log_det = ops.affine_forward(x, torch.zeros(1, 2, 24, dtype=torch.float64), activation=activation)
        torch.testing.assert_close(z, x, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(log_det, torch.zeros(1, 2, dtype=torch.float64), rtol=0, atol=1e-13)


def test_log_of_a_tiny_softplus_is_its_argument(isa: str) -> None:
    """For u far below zero log(softplus(u)) is u, where softplus itself would lose it to underflow."""
    u = torch.tensor([-70.0, -50.0, -30.0])
    raw = torch.cat([u - math.log(math.e - 1), torch.zeros(3)]).reshape(1, 6)
    _, log_det = ops.affine_forward(torch.zeros(1, 3), raw)
    torch.testing.assert_close(log_det, -u.sum()[None], rtol=1e-6, atol=0)


def test_native_gradient_of_one_result_alone(generator: torch.Generator) -> None:
    x, raw = _draw(generator, OPTIONS[0])
    for index in (0, 1):
        native = [value.clone().requires_grad_() for value in (x, raw)]
        ops.affine_forward(*native)[index].sum().backward()
        exact = [value.clone().requires_grad_() for value in (x, raw)]
        scale = torch.nn.functional.softplus(exact[1][..., :11] + math.log(math.e - 1))
        plain = (exact[0] - exact[1][..., 11:]) / scale if index == 0 else -scale.log()
        plain.sum().backward()
        torch.testing.assert_close(native[1].grad, exact[1].grad)
        torch.testing.assert_close(native[0].grad, torch.zeros_like(x) if index else exact[0].grad)


@pytest.mark.parametrize("spec", AFFINE[:2], ids=lambda spec: spec.name)
def test_any_leading_dimensions(spec: Spec) -> None:
    sample = plain(spec)
    expected = outcome(spec, sample)
    assert_equal(outcome(spec, sample.map(lambda tensor: tensor[0])), tuple(want[0] for want in expected))
    five = sample.map(lambda tensor: tensor[None, :, None].expand(2, -1, 3, -1, -1))
    got = tensors(spec.call(**five.arguments))
    assert_equal(got, tuple(want[None, :, None].expand_as(a) for a, want in zip(got, expected, strict=True)))


@every_affine_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_values_past_the_caches_are_the_same(spec: Spec, dtype: torch.dtype, isa: str) -> None:
    """Outputs from 8 MB on are written past the caches; cut in samples they are not."""
    generator = torch.Generator().manual_seed(13)
    size = torch.finfo(dtype).bits // 8
    width = 64 // size
    tokens = (9 << 20) // (2 * width * size)
    halves = {name: tensor.shape[-1] // 48 for name, tensor in plain(spec).arguments.items()}
    drawn = Sample(
        "",
        {
            name: torch.randn((2, tokens, width * count), generator=generator).to(dtype)
            for name, count in halves.items()
        },
    )
    whole = outcome(spec, drawn)
    for b in range(2):
        part = outcome(spec, drawn.map(lambda tensor, b=b: tensor[b : b + 1]))
        assert_equal(part, tuple(want[b : b + 1] for want in whole))


@every_affine_op
@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_extremes_stay_finite(spec: Spec, activation: str, isa: str) -> None:
    """Scales within exp(+-80) whatever the network puts out, and no NaN in value or gradient."""
    extremes = torch.tensor([-torch.inf, -1e30, -1e4, -90.0, -80.0, -30.0, 0.0, 30.0, 80.0, 90.0, 1e4, 1e30, torch.inf])
    channels = len(extremes)
    data = {name: torch.ones(1, 2, channels) for name in plain(spec).arguments}
    raw = torch.cat([extremes, torch.zeros(channels)]).expand(1, 2, -1).clone()
    sample = Sample("extremes", {**data, "raw": raw, "activation": activation})
    expected = outcome(spec, battery.in_float64(sample), reference=True)
    for got, want in zip(outcome(spec, sample), expected, strict=True):
        assert not got.isnan().any()
        # Near exp(80) a rounding of the exponent's argument is one of 80 units.
        assert_near(got, want.float(), spec.bounds[torch.float32]._replace(relative=3e-5, absolute=1e-4), activation)
    if spec.differentiable:
        found = battery.gradients(spec, sample, lambda result: result)
        assert all(not gradient.isnan().any() for gradient in found.values())


@every_affine_op
def test_nan_propagates(spec: Spec, isa: str) -> None:
    """A NaN anywhere in a token's inputs is seen in each of that token's per-token results and nowhere else."""
    for channel in (0, 3, 17, 40):
        for argument in plain(spec).arguments:
            sample = plain(spec)
            sample.arguments[argument][1, 2, channel] = torch.nan
            results = outcome(spec, sample)
            assert any(result[1, 2].isnan().any() for result in results), (channel, argument)
            for result in results:
                elsewhere = result.clone()
                elsewhere[1, 2] = 0
                assert not elsewhere.isnan().any()


@every_affine_op
def test_wrong_arguments_get_one_sentence(spec: Spec) -> None:
    good = plain(spec).arguments
    raw = good["raw"]
    data = {name: tensor for name, tensor in good.items() if name != "raw"}
    first = "z" if spec.name == "affine_inverse" else "x"
    shapes = f"for {first} of shape [2, 5, 48]"
    dimensions = "batch" if spec.mutates else "..."
    whole = {name: tensor.long() for name, tensor in data.items()}
    half = {name: tensor.bfloat16() for name, tensor in data.items()}
    flat = {name: tensor.flatten() for name, tensor in good.items()}
    wrong: list[tuple[dict[str, object], str]] = [
        (whole, f"{first} has dtype int64, expected float32, bfloat16, float16 or float64"),
        (half, f"raw has dtype float32, expected bfloat16 for {first} of bfloat16"),
        (
            {"raw": raw.double()},
            f"raw has dtype float64, expected float32, bfloat16 or float16 for {first} of float32",
        ),
        ({"raw": raw[..., :-1]}, f"raw has shape [2, 5, 95], expected [2, 5, 96] {shapes}"),
        ({"activation": "none"}, f"raw has shape [2, 5, 96], expected [2, 5, 48] {shapes}"),
        ({"activation": "relu"}, 'activation is "relu", expected "softplus", "exp" or "none"'),
        ({"soft_clip": -1.0}, "soft_clip is -1, expected a finite number >= 0"),
        ({"soft_clip": float("nan")}, "soft_clip is nan, expected a finite number >= 0"),
        (flat, f"{first} has shape [480], expected ({dimensions}, tokens, channels)"),
    ]
    for changed, sentence in wrong:
        assert_refused(spec, {**good, **changed}, sentence)
