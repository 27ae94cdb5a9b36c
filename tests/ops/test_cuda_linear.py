"""linear on a CUDA device in the sizes of the published 7B model, against float64; skipped where there is none.

Its weights are deeper than any pipeline has stages, so that each stage is used again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from starflow_ext import ops
from starflow_ext._load import native
from starflow_ext._options import EPILOGUES
from starflow_ext.linear import InputNorm
from starflow_ext.linear_pack import pack_weight

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or torch without CUDA"),
]

# (out_channels, in_channels) of a layer of both widths.
WEIGHTS = [shape for w in (4096, 3072) for shape in ((3 * w, w), (w, w), (4 * w, w), (w, 4 * w))]
HALVES = (torch.bfloat16, torch.float16)
# Half the last bit that a type keeps, relative to the value.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Of float32 sums of products, whose terms tensor cores cut off instead of rounding them, relative to the sum of their
# sizes.
SUMS = 2e-6
# No slope of these is above 1.13.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
Record = Callable[[str, object], None]


@pytest.fixture(autouse=True, params=["by the device", "tcgen05"])
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernel that the device runs by itself; on one of 10.x then the one that has to be asked for."""
    asked = request.param == "tcgen05"
    if asked and torch.cuda.get_device_capability()[0] != 10:
        pytest.skip("the device is not of compute capability 10")
    native.set_linear_kernel("own" if asked else "")
    yield
    native.set_linear_kernel("")


def _draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda")


def _poison(like: Tensor) -> None:
    """Fill the memory that torch hands out next for a tensor of this size."""
    torch.full_like(like, torch.nan)


def _share(got: Tensor, expected: Tensor, bound: Tensor) -> float:
    """The largest distance, of what is allowed."""
    return float(((got.double() - expected).abs() / bound).nan_to_num(torch.inf).max())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 64, 128, 256, 4096])
@pytest.mark.parametrize("out, depth", WEIGHTS)
def test_value(out: int, depth: int, rows: int, dtype: torch.dtype, record_property: Record) -> None:
    """Every epilogue, with gate and residual and without, on sums that are cut and on whole ones, by the rows."""
    x, weight = _draw(rows, depth, seed=1).to(dtype), (_draw(out, depth, seed=2) / depth**0.5).to(dtype)
    bias, multiply, residual = _draw(out, seed=3), _draw(rows, out, seed=4).to(dtype), _draw(rows, out, seed=5)
    exact = F.linear(x.double(), weight.double(), bias.double())
    sums = SUMS * F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    packed = pack_weight(weight, keep=False)
    worst = 0.0
    for epilogue in EPILOGUES:
        activated = ACTIVATIONS[epilogue](exact)
        # In the type of x, and in float32.
        for options, want, bound in (
            ({}, activated, 1.13 * sums),
            (
                {"multiply": multiply, "residual": residual},
                residual.double() + activated * multiply.double(),
                1.13 * sums * multiply.double().abs(),
            ),
        ):
            stored = torch.float32 if options else dtype
            _poison(want.to(stored))
            got = ops.linear(x, packed, bias, epilogue=epilogue, **options)
            assert got.dtype == stored
            allowed = bound + (ROUNDING[stored] + 2.0**-22) * want.abs() + 1e-6
            worst = max(worst, _share(got, want, allowed))
    record_property("share of the bound", round(worst, 3))
    assert worst <= 1.0


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("rows", [16, 256])
@pytest.mark.parametrize("out, depth", WEIGHTS[:4])
def test_norm_on_the_way_in(out: int, depth: int, rows: int, kind: str, record_property: Record) -> None:
    """Of a float32 stream, rounded to the type of the weight behind it."""
    x, scale = 2 + _draw(rows, depth, seed=1), 1 + 0.1 * _draw(depth, seed=2)
    weight = (_draw(out, depth, seed=3) / depth**0.5).bfloat16()
    norm = InputNorm(scale, kind=kind, weight_offset=0.0)
    normalised = ops.norm(x.double(), scale.double(), kind=kind, weight_offset=0.0)
    want = F.linear(normalised, weight.double())
    allowed = 2.0**-8 * F.linear(normalised.abs(), weight.double().abs()) + 1e-6
    worst = _share(ops.linear(x, pack_weight(weight, keep=False), norm=norm), want, allowed)
    record_property("share of the bound", round(worst, 3))
    assert worst <= 1.0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("out, depth", WEIGHTS)
def test_a_row_has_the_same_bits_among_any_others(out: int, depth: int, dtype: torch.dtype) -> None:
    """In every tile, on sums that are cut and on whole ones."""
    x = _draw(4096, depth, seed=1).to(dtype)
    packed = pack_weight((_draw(out, depth, seed=2) / depth**0.5).to(dtype), keep=False)
    together = ops.linear(x, packed)
    for rows in (1, 17, 33, 65, 129, 300, 1500):
        for first in (0, 4096 - rows):
            assert torch.equal(ops.linear(x[first : first + rows], packed), together[first : first + rows]), rows


def test_more_rows_than_a_grid_is_high() -> None:
    """65,537 tiles of 128 rows, where a grid has at most 65,535 blocks along y and z."""
    rows = 65536 * 128 + 1
    x, weight = _draw(rows, 8, seed=1).bfloat16(), _draw(16, 8, seed=2).bfloat16()
    got = ops.linear(x, pack_weight(weight, keep=False))
    torch.testing.assert_close(got[-300:], F.linear(x[-300:], weight), atol=2e-2, rtol=2e-2)
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradient(dtype: torch.dtype, record_property: Record) -> None:
    """Of x, weight and bias through a GELU and a residual, in the type of the weight."""
    x, weight, bias = _draw(300, 1024, seed=1).to(dtype), (_draw(768, 1024, seed=2) / 32).to(dtype), _draw(768, seed=3)
    upstream = _draw(300, 768, seed=4).to(dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    got = torch.autograd.grad(ops.linear(x, pack_weight(weight), bias, epilogue="gelu"), leaves, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    want = torch.autograd.grad(F.gelu(F.linear(*exact)), exact, upstream.double())
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        # Sums of terms that were rounded to the type, and the derivative of GELU of a rounded product.
        worst = max(worst, _share(a, b, 4 * ROUNDING[dtype] * (b.abs() + b.square().mean().sqrt())))
    record_property("share of the bound", round(worst, 3))
    assert worst <= 1.0
