"""norm and its gradient on the emulated device, against their references in float64."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext import ops
from starflow_ext._check import arithmetic_dtype
from starflow_ext._spec import Bound, Dtypes, Sample
from starflow_ext.norm import EPSILON, OFFSET

from ..ops import battery
from .emulator import SEEDS, Kernels, Mutation, Report, assert_caught, emulated, mutations, some

SPEC = ops.SPECS["norm"]
SOURCE = "ops/norm/norm.cu"


def _rows(tensor: Tensor) -> Tensor:
    """(..., channels) as (batch, tokens, channels)."""
    whole = tensor if tensor.dim() >= 2 else tensor.unsqueeze(0)
    return whole.reshape(prod(whole.shape[:-2]), *whole.shape[-2:])


def _shape(rows: Tensor, kind: str, epsilon: float | None = None, offset: float | None = None) -> dict[str, Any]:
    batch, tokens, channels = rows.shape
    shape = {"batch": batch, "tokens": tokens, "channels": channels, "data": rows.dtype}
    return shape | {
        "centred": kind == "layer_norm",
        "epsilon": EPSILON[kind] if epsilon is None else epsilon,
        "weight_offset": OFFSET[kind] if offset is None else offset,
    }


def _arguments(sample: Sample) -> tuple[Any, ...]:
    """x, weight, bias, kind, residual, epsilon and offset, as the entry passes them on: there always is a weight."""
    given = SPEC.arguments(**sample.arguments)
    x, weight, bias, _, epsilon, offset = SPEC.lowered(sample)[1][:6]
    return x, weight, bias, given["kind"], given["residual"], epsilon, offset


def _norm(
    kernels: Kernels,
    seed: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    residual: Tensor | None,
    epsilon: float | None = None,
    offset: float | None = None,
) -> tuple[Report, tuple[Tensor, ...]]:
    rows, dtype = _rows(x), arithmetic_dtype(x.dtype)
    out = rows.new_empty(rows.shape, dtype=dtype)
    total = None if residual is None else torch.empty_like(out)
    report = kernels.launch(
        "norm_cuda",
        seed,
        shape=_shape(rows, kind, epsilon, offset),
        x=rows,
        residual=None if residual is None else _rows(residual),
        weight=weight.to(dtype),
        bias=None if bias is None else bias.to(dtype),
        out=out,
        sum=total,
    )
    results = (out,) if total is None else (out, total)
    return report, tuple(result.reshape(x.shape) for result in results)


def _run(kernels: Kernels, seed: int, sample: Sample) -> tuple[Report, tuple[Tensor, ...]]:
    return _norm(kernels, seed, *_arguments(sample))


def _values(kernels: Kernels, dtypes: Dtypes) -> None:
    pairs = zip(battery.samples(SPEC, dtypes), battery.exact("norm", dtypes), strict=True)
    for seed, (sample, expected) in enumerate(pairs):
        _, results = _run(kernels, seed, sample)
        for got, want in zip(results, expected, strict=True):
            battery.assert_near(got, want, battery.bound_of(SPEC, sample, got.dtype), sample.label)


@pytest.mark.parametrize("dtypes", SPEC.dtypes, ids=str)
def test_value(dtypes: Dtypes) -> None:
    _values(emulated(SOURCE), dtypes)


def _wide(kernels: Kernels, channels: int, dtype: torch.dtype) -> None:
    """Rows that several warps hold."""
    generator = torch.Generator().manual_seed(channels)
    x, residual = (torch.randn(1, 3, channels, generator=generator) for _ in "xr")
    arguments = {"x": x.to(dtype), "weight": torch.randn(channels, generator=generator), "residual": residual}
    for seed, kind in zip(SEEDS, list(EPSILON) * 4, strict=True):
        sample = Sample(f"{channels} channels, {kind}", arguments | {"kind": kind})
        _, results = _run(kernels, seed, sample)
        for got, want in zip(results, battery.outcome(SPEC, battery.in_float64(sample), reference=True), strict=True):
            battery.assert_near(got, want, SPEC.bounds[torch.float32], sample.label)


@pytest.mark.parametrize("channels", [512, 1536, 3072, 3075, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_of_wide_rows(channels: int, dtype: torch.dtype) -> None:
    _wide(emulated(SOURCE), channels, dtype)


def _gradients(
    kernels: Kernels, seed: int, sample: Sample, per_block: int = 2
) -> Iterator[tuple[str, Tensor, Tensor, Bound]]:
    """Along a random direction, of the kernel and by autograd in float64, and how far apart they may be.

    Gradients and their results are read and written once.
    """
    x, weight, bias, kind, residual, epsilon, offset = _arguments(sample)
    # The entry gives the gradient of a norm with a residual the sum in place of x.
    if residual is not None:
        x = x.to(residual.dtype) + residual
    dtype = arithmetic_dtype(x.dtype)
    rows = _rows(x)
    generator = torch.Generator().manual_seed(seed)
    grad_out, grad_sum = (torch.randn(rows.shape, generator=generator).to(dtype) for _ in "os")
    leaves = [None if leaf is None else leaf.double().requires_grad_() for leaf in (x, weight, bias)]
    out = _rows(SPEC.reference(leaves[0], leaves[1], leaves[2], kind, epsilon, offset, None))
    loss = (out * grad_out.double()).sum()
    if residual is not None:
        loss = loss + (_rows(leaves[0]) * grad_sum.double()).sum()
    expected = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])
    batch, tokens, channels = rows.shape
    count = -(-batch * tokens // per_block)
    grad_x = torch.empty_like(rows)
    parameters = rows.new_empty(1 if bias is None else 2, channels, dtype=dtype)
    report = kernels.launch(
        "norm_backward_cuda",
        seed,
        shape=_shape(rows, kind, epsilon, offset),
        grad_out=grad_out,
        grad_sum=None if residual is None else grad_sum,
        x=rows,
        weight=weight.to(dtype),
        grad_x=grad_x,
        partial=rows.new_empty(count, *parameters.shape, dtype=dtype),
        parameters=parameters,
        blocks={"rows": batch * tokens, "per_block": per_block, "count": count},
        with_bias=bias is not None,
    )
    assert [report.read[name] for name in ("x", "grad_out")] == [rows.numel() * rows.element_size(), grad_out.nbytes]
    assert report.written == dict.fromkeys(report.read, 0) | {
        "grad_x": grad_x.nbytes,
        "partial": count * parameters.nbytes,
        "parameters": parameters.nbytes,
    }
    for name, got, want in zip(("x", "weight", "bias"), (grad_x.reshape(x.shape), *parameters), expected, strict=False):
        relative, absolute = SPEC.bounds[got.dtype]
        # Terms as large as the largest result cancel in it.
        largest = float(want.abs().max()) if want.numel() else 0.0
        yield name, got, want, Bound(relative, absolute + 2 * SPEC.bounds[dtype].relative * largest)


def _gradients_near(kernels: Kernels, dtypes: Dtypes) -> None:
    for seed, sample in enumerate(battery.samples(SPEC, dtypes)):
        if sample.arguments["x"].numel() > 0:
            for name, got, want, bound in _gradients(kernels, seed, sample, per_block=2 + seed % 3):
                battery.assert_near(got, want, bound, f"{sample.label}, {name}")


@pytest.mark.parametrize("dtypes", SPEC.dtypes, ids=str)
def test_gradient(dtypes: Dtypes) -> None:
    _gradients_near(emulated(SOURCE), dtypes)


def _wide_gradients(kernels: Kernels, channels: int) -> None:
    arguments = {"x": torch.randn(2, 5, channels), "weight": torch.randn(channels), "bias": torch.randn(channels)}
    for seed in SEEDS:
        for name, got, want, bound in _gradients(kernels, seed, Sample("", arguments), per_block=3):
            battery.assert_near(got, want, bound, f"{channels} channels, {name}")


@pytest.mark.parametrize("channels", [1536, 1537])
def test_gradient_of_wide_rows(channels: int) -> None:
    _wide_gradients(emulated(SOURCE), channels)


def test_no_rows_have_no_gradient() -> None:
    parameters = torch.full((2, 7), float("nan"))
    emulated(SOURCE).launch(
        "norm_backward_cuda",
        0,
        shape=_shape(torch.empty(0, 5, 7), "layer_norm"),
        parameters=parameters,
        with_bias=True,
    )
    assert torch.equal(parameters, torch.zeros(2, 7))


def _moved(kernels: Kernels) -> None:
    """x, and a residual, are read once and results written once; the parameters are read for each row."""
    for channels, dtype in ((64, torch.bfloat16), (3072, torch.float32), (61, torch.float16)):
        x, residual = torch.randn(2, 3, channels).to(dtype), torch.randn(2, 3, channels)
        weight, bias = torch.randn(channels), torch.randn(channels)
        report, (out, total) = _norm(kernels, 0, x, weight, bias, "layer_norm", residual)
        each_row = {"weight": 6 * weight.nbytes, "bias": 6 * bias.nbytes}
        nothing = {"out": 0, "sum": 0}
        assert report.read == {"x": x.nbytes, "residual": residual.nbytes, **each_row, **nothing}
        written = {"out": out.nbytes, "sum": total.nbytes}
        assert report.written == dict.fromkeys(report.written, 0) | written
        assert report.bank_conflicts == 0


def test_bytes_moved() -> None:
    _moved(emulated(SOURCE))


def test_every_schedule_gives_the_same_bits() -> None:
    x, weight = torch.randn(1, 2, 3072), torch.randn(3072)
    _, expected = _norm(emulated(SOURCE), 0, x, weight, None, "layer_norm", None)
    for seed in SEEDS[1:]:
        battery.assert_equal(_norm(emulated(SOURCE), seed, x, weight, None, "layer_norm", None)[1], expected)


def _anywhere(kernels: Kernels) -> None:
    """Rows may begin at any address and lie at any distance."""
    for channels, skip, gap in ((64, 0, 1), (64, 1, 0), (64, 1, 3), (64, 4, 4), (61, 0, 3)):
        whole = torch.full((2, 4, skip + channels + gap), float("nan"))
        x = whole[..., skip : skip + channels].copy_(torch.randn(2, 4, channels))
        weight = torch.randn(channels)
        _, (got,) = _norm(kernels, 1, x, weight, None, "layer_norm", None)
        want = SPEC.reference(x.double(), weight.double(), None, "layer_norm", None, None, None)
        battery.assert_near(got, want, SPEC.bounds[torch.float32], f"{channels}, {skip}, {gap}")
        for name, grad, exact, bound in _gradients(kernels, 1, Sample("", {"x": x, "weight": weight})):
            battery.assert_near(grad, exact, bound, f"{channels}, {skip}, {gap}, {name}")


def test_rows_may_lie_anywhere() -> None:
    _anywhere(emulated(SOURCE))


MUTATIONS = [
    *mutations(
        SOURCE,
        {
            r"c < channels(?=\) step)": "true",
            r"shape\.channels % width == 0 && ": "",
            r"aligned\(args\.x, width, data_size\) &&": "",
            r"sums\((sum|squares|along)\);": "",
            r"values\[piece\]\[i\] - mean;": "values[piece][i];",
            r"shape\.centred \? along\[0\] / static_cast<T>\(channels\) : T\(0\)": "T(0)",
            r" \+ added\[i\];": ";",
        },
    ),
    *mutations(
        "cuda/reduce.cuh",
        {
            r"__syncthreads\(\);": "",
            r"turn_ = 1 - turn_;": "",
            r"warp < warps; \+\+warp": "warp + 1 < warps; ++warp",
            r"if \(c < channels\)": "",
            r"warp > 0 \|\| c >= channels": "c >= channels",
            r"(?<=warp > 0 )\|\| c >= channels": "",
        },
    ),
]


@pytest.mark.parametrize("mutation", some(MUTATIONS), ids=str)
def test_mutation_is_caught(mutation: Mutation) -> None:
    def check(kernels: Kernels) -> None:
        _values(kernels, (torch.float32, torch.float32))
        _wide(kernels, 1536, torch.float32)
        _gradients_near(kernels, (torch.float32, torch.float32))
        _wide_gradients(kernels, 1536)
        _moved(kernels)
        _anywhere(kernels)

    assert_caught(SOURCE, mutation, check)
