"""The elementary functions of csrc/cpu/vec_math.h, seen through the ops, against float64 on dense grids.

Errors are relative, in units of 2^-24; the bounds are those that the header states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from starflow_ext import ops
from starflow_ext._affine import SOFTPLUS_BIAS

UNIT = 2.0**-24


def _error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected) / expected).abs().max().item() / UNIT


def _scale(values: Tensor, activation: str) -> Tensor:
    ones = torch.ones(1, len(values))
    return ops.affine_inverse(ones, torch.cat([values, 0 * values])[None], activation=activation)[0]


def test_exponential(isa: str) -> None:
    x = torch.linspace(-80, 80, 400_001)
    assert _error(_scale(x, "exp"), x.double().exp()) < 4


def test_softplus_relative_to_the_result(isa: str) -> None:
    u = torch.cat([torch.linspace(-79, 40, 300_001), torch.logspace(-30, 30, 10_001), torch.linspace(-1, 1, 100_001)])
    biased = (u - SOFTPLUS_BIAS).float()
    exact = biased.double() + SOFTPLUS_BIAS
    rounded = biased + SOFTPLUS_BIAS
    # exp(u) for u << 0 multiplies the rounding of the biased argument by |u|; that is the argument's, not ours.
    expected = torch.logaddexp(rounded.double(), torch.zeros((), dtype=torch.float64))
    assert (exact - rounded.double()).abs().max() <= rounded.abs().max() * UNIT
    assert _error(_scale(biased, "softplus"), expected) < 10


def test_logarithm(isa: str) -> None:
    """Absolute below 4 units plus 2 relative ones; one channel a token makes log_det the logarithm of one scale."""
    a = torch.linspace(-78, 78, 200_001)
    raw = torch.stack([a, 0 * a], dim=-1)
    _, log_det = ops.affine_forward(torch.zeros(len(a), 1), raw, activation="exp")
    error = (-log_det.double() - a.double()).abs() / UNIT
    # The scale itself is off by 4 units before the logarithm.
    assert (error <= 8 + 2 * a.abs().double()).all()


def test_hyperbolic_tangent(isa: str) -> None:
    x = torch.cat(
        [torch.linspace(-20, 20, 300_001), torch.logspace(-30, 1.5, 20_001), -torch.logspace(-30, 1.5, 20_001)]
    )
    x = x[x != 0]
    got = ops.affine_inverse(torch.zeros(1, len(x)), x[None], activation="none", soft_clip=1.0)[0]
    assert _error(got, x.double().tanh()) < 8


def test_slope_of_the_clip_without_cancellation(isa: str) -> None:
    x = torch.linspace(-9, 9, 100_001)
    raw = x[None].requires_grad_()
    ops.affine_inverse(torch.zeros(1, len(x)), raw, activation="none", soft_clip=1.0).sum().backward()
    assert raw.grad is not None
    assert _error(raw.grad[0], x.double().cosh() ** -2) < 24
