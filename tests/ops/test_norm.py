"""What is special to norm: its mathematics, the residual, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from starflow_ext import ops
from starflow_ext._spec import tensors
from starflow_ext.norm import NormKind

from . import battery
from .battery import assert_equal, assert_refused, plain

SPEC = ops.SPECS["norm"]
every_kind = pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])


def _draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@every_kind
def test_rows_have_unit_mean_square(kind: NormKind, generator: torch.Generator, isa: str) -> None:
    x = 100.0 + 3.0 * _draw(generator, 4, 5, 67)
    weight = torch.zeros(67) if kind == "rms_norm" else torch.ones(67)
    out = ops.norm(x, weight.double(), kind=kind)
    torch.testing.assert_close(out.square().mean(-1), torch.ones(4, 5).double(), rtol=1e-5, atol=0)
    if kind == "layer_norm":
        torch.testing.assert_close(out.mean(-1), torch.zeros(4, 5).double(), rtol=0, atol=1e-12)


@every_kind
def test_scale_of_the_input_is_lost_and_layer_norm_loses_its_mean_too(
    kind: NormKind, generator: torch.Generator, isa: str
) -> None:
    x, weight = _draw(generator, 3, 33), _draw(generator, 33)
    moved = 1e4 * x + (7e4 if kind == "layer_norm" else 0.0)
    torch.testing.assert_close(
        ops.norm(moved, weight, kind=kind), ops.norm(1e4 * x, weight, kind=kind), rtol=1e-9, atol=1e-9
    )


def test_a_mean_far_from_zero_keeps_the_variance(generator: torch.Generator, isa: str) -> None:
    """In float32, sum(x^2) - sum(x)^2 of these rows would have no digit left."""
    x = (4096.0 + (_draw(generator, 8, 200) * 64).round() / 64).float()
    exact = ops.norm(x.double(), torch.ones(200).double())
    torch.testing.assert_close(ops.norm(x, torch.ones(200)).double(), exact, rtol=0, atol=1e-3)


@every_kind
def test_the_residual_is_added_first(kind: NormKind, generator: torch.Generator, isa: str) -> None:
    x, residual, weight = (_draw(generator, 2, 3, 40).float() for _ in range(3))
    weight = weight[0, 0]
    normed, total = ops.norm(x, weight, kind=kind, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.norm(total, weight, kind=kind))
    assert normed.dtype == total.dtype == torch.float32
    half = x.bfloat16()
    assert torch.equal(ops.norm(half, weight, kind=kind, residual=residual)[1], half.float() + residual)


def test_gradient_of_one_result_alone(generator: torch.Generator) -> None:
    x, residual = _draw(generator, 2, 3, 9), _draw(generator, 2, 3, 9)
    weight = _draw(generator, 9)
    for index in (0, 1):
        leaves = [value.clone().requires_grad_() for value in (x, residual)]
        ops.norm(leaves[0], weight, residual=leaves[1])[index].square().sum().backward()
        exact = (x + residual).requires_grad_()
        plain_result = torch.nn.functional.layer_norm(exact, (9,), weight) if index == 0 else exact
        plain_result.square().sum().backward()
        for leaf in leaves:
            torch.testing.assert_close(leaf.grad, exact.grad)


def test_frozen_parameters_get_no_gradient(generator: torch.Generator) -> None:
    x, weight = _draw(generator, 3, 8).requires_grad_(), _draw(generator, 8)
    ops.norm(x, weight, weight).sum().backward()
    assert weight.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("rows", [31, 32, 33, 8191, 8193, 8500])
def test_gradient_of_the_weight_over_blocks_of_rows(rows: int, generator: torch.Generator, isa: str) -> None:
    """Blocks of 32 rows, or 256 blocks: nothing is left out and nothing counted twice."""
    x = torch.ones(rows, 3) * torch.tensor([1.0, -1.0, 0.0])
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    ops.norm(x, weight, bias).sum().backward()
    assert bias.grad is not None
    assert weight.grad is not None
    assert bias.grad.tolist() == [rows] * 3
    torch.testing.assert_close(weight.grad, rows * ops.norm(x[:1], torch.ones(3))[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_values_past_the_caches_are_the_same(dtype: torch.dtype, generator: torch.Generator, isa: str) -> None:
    """Outputs from 8 MB on are written past the caches; cut in halves they are not."""
    x = torch.randn(2, 20000, 64, generator=generator).to(dtype)
    weight = torch.randn(64, generator=generator)
    residual = x.flip(0).float()
    for extra in ({}, {"residual": residual}):
        whole = tensors(ops.norm(x, weight, kind="rms_norm", **extra))
        for b in range(2):
            part = {name: value[b : b + 1] for name, value in extra.items()}
            got = tensors(ops.norm(x[b : b + 1], weight, kind="rms_norm", **part))
            assert_equal(got, tuple(result[b : b + 1] for result in whole))


@every_kind
def test_nan_and_infinity_stay_in_their_row(kind: NormKind, generator: torch.Generator, isa: str) -> None:
    for value in (torch.nan, torch.inf):
        x = torch.randn(3, 50, generator=generator)
        x[1, 37] = value
        out = ops.norm(x, torch.ones(50), kind=kind)
        assert out[1, 37].isnan()
        assert out[[0, 2]].isfinite().all()


def test_wrong_arguments() -> None:
    good = plain(SPEC).arguments
    x, weight = good["x"], good["weight"]
    for changed, sentence in (
        ({"x": x.long()}, "x has dtype int64, expected float32, bfloat16, float16 or float64"),
        ({"x": x[0, 0, 0]}, "x has shape [], expected (..., channels)"),
        ({"kind": "batch_norm"}, 'kind is "batch_norm", expected "layer_norm" or "rms_norm"'),
        ({"weight": weight.int()}, "weight has dtype int32, expected float32, bfloat16, float16 or float64"),
        ({"weight": weight[:7]}, "weight has shape [7], expected [48] for channels of x"),
        ({"bias": weight[:7]}, "bias has shape [7], expected [48] like weight"),
        ({"bias": weight.double()}, "bias has dtype float64, expected float32 like weight"),
        ({"kind": "rms_norm"}, "bias is given, expected None for rms_norm"),
        ({"residual": x.half()}, "residual has dtype float16, expected float32 for x of float32"),
        ({"residual": x[:1]}, "residual has shape [1, 5, 48], expected [2, 5, 48] like x"),
    ):
        assert_refused(SPEC, {**good, **changed}, sentence)


def test_second_order_gradient_with_a_residual_is_refused() -> None:
    sample, leaves = battery.requiring(SPEC, battery.large(SPEC))
    with pytest.raises(RuntimeError, match=r"^norm: create_graph is True"):
        torch.autograd.grad(ops.norm(**sample.arguments)[1].sum(), list(leaves.values()), create_graph=True)
