"""Mathematics of the pair affine_forward and affine_inverse."""

from __future__ import annotations

import math

import pytest
import torch

from starflow_ext import ops

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
