"""norm: LayerNorm and RMSNorm, with an optional residual added first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow_ext._check import (
    arithmetic_dtype,
    check_device,
    check_floating,
    check_like,
    check_tensor,
    dtype_text,
    require,
    require_first_order,
    shape_text,
)
from starflow_ext._load import operators
from starflow_ext._mode import in_reference_mode
from starflow_ext._options import CONSTANTS, NORM_KINDS, check_name, name_of
from starflow_ext._spec import Bound, Dtypes, Sample, Spec

NormKind = Literal["layer_norm", "rms_norm"]

# Epsilons of the published models, by kind of norm.
EPSILON: Final = {kind: CONSTANTS[f"{kind}_epsilon"] for kind in NORM_KINDS if kind != "none"}

# On CUDA a block of threads holds a row in registers, which bounds the channels.
MOST_CHANNELS_CUDA: Final = CONSTANTS["norm_most_channels_cuda"]


@overload
def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, kind: NormKind = "layer_norm", residual: None = None
) -> Tensor: ...
@overload
def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, kind: NormKind = "layer_norm", residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: NormKind = "layer_norm",
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise over the last axis in float32, of ``x`` or of ``x + residual``.

    Native on the CPU and on CUDA devices (compiled and run on an emulated device; never run on a GPU).

    Args:
        x: (..., channels); float32, bfloat16, float16 or float64. On a CUDA device at most 4096 channels.
        weight: (channels,), any of these dtypes. LayerNorm multiplies by ``weight``; RMSNorm by ``1 + weight`` (an
            offset from one, as the published checkpoints store it).
        bias: (channels,), LayerNorm only; dtype of ``weight``.
        kind: "layer_norm" (eps 1e-5) or "rms_norm" (eps 1e-6).
        residual: (..., channels), float32 (float64 for float64 ``x``): the stream that ``x`` is added to first.

    Returns:
        (..., channels), float32 (float64 for float64 ``x``); with a residual also the sum, in the same dtype.

    Raises:
        RuntimeError: if a shape, a dtype, a device or ``kind`` is wrong, or RMSNorm is given a bias.

    Reference:
        Ba et al., Layer Normalization (2016); Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
    """
    if in_reference_mode():
        return norm_reference(x, weight, bias, kind, residual)
    operator, arguments = _lower(x, weight, bias, kind, residual)
    result: Tensor | tuple[Tensor, Tensor] = operator(*arguments)
    return result


def norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ``norm`` in plain torch; arguments as there."""
    check(x, weight, bias, kind, residual)
    dtype = arithmetic_dtype(x.dtype)
    total = x.to(dtype) if residual is None else x.to(dtype) + residual
    shift = None if bias is None else bias.to(dtype)
    if kind == "layer_norm":
        normed = F.layer_norm(total, total.shape[-1:], weight.to(dtype), shift, EPSILON[kind])
    else:
        normed = F.rms_norm(total, total.shape[-1:], 1.0 + weight.to(dtype), EPSILON[kind])
    return normed if residual is None else (normed, total)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, residual: Tensor | None) -> None:
    """Raise what the native op raises for the same mistake; arguments as of the reference."""
    op = "norm"
    check_floating(op, "x", x)
    require(x.dim() >= 1, op, "x has shape", "[]", "(..., channels)")
    check_name(op, "kind", kind, EPSILON)
    fits = not x.is_cuda or x.shape[-1] <= MOST_CHANNELS_CUDA
    require(fits, op, "x has channels", x.shape[-1], f"at most {MOST_CHANNELS_CUDA} on a CUDA device")
    check_floating(op, "weight", weight)
    expected = f"[{x.shape[-1]}] for channels of x"
    require(weight.shape == x.shape[-1:], op, "weight has shape", shape_text(weight.shape), expected)
    check_device(op, "weight", weight, "x", x)
    if bias is not None:
        require(kind == "layer_norm", op, "bias is", "given", "None for rms_norm")
        check_like(op, "bias", bias, "weight", weight)
    if residual is not None:
        got, stream = residual.dtype, arithmetic_dtype(x.dtype)
        expected = f"{dtype_text(stream)} for x of {dtype_text(x.dtype)}"
        require(got == stream, op, "residual has dtype", dtype_text(got), expected)
        shapes = shape_text(residual.shape), f"{shape_text(x.shape)} like x"
        require(residual.shape == x.shape, op, "residual has shape", *shapes)
        check_device(op, "residual", residual, "x", x)


_native = operators().norm.default
_native_residual = operators().norm_residual.default
_native_backward = operators().norm_backward.default


def _lower(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, residual: Tensor | None
) -> tuple[Any, tuple[Any, ...]]:
    check_name("norm", "kind", kind, EPSILON)
    if residual is None:
        return _native, (x, weight, bias, NORM_KINDS[kind])
    return _native_residual, (x, weight, bias, NORM_KINDS[kind], residual)


def _kind(code: int) -> str:
    return name_of("norm", "kind", code, NORM_KINDS)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    check(x, weight, bias, _kind(kind), None)
    return x.new_empty(x.shape, dtype=arithmetic_dtype(x.dtype))


def _fake_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: int, residual: Tensor
) -> tuple[Tensor, Tensor]:
    check(x, weight, bias, _kind(kind), residual)
    return residual.new_empty(x.shape), residual.new_empty(x.shape)


def _fake_backward(
    grad_out: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, kind: int, with_bias: bool
) -> tuple[Tensor, Tensor]:
    check(x, weight, None, _kind(kind), None)
    for name, gradient in (("grad_out", grad_out), ("grad_sum", grad_sum)):
        if gradient is not None:
            check_tensor("norm_backward", name, gradient, arithmetic_dtype(x.dtype), x.shape, "x", x)
    return x.new_empty(x.shape), grad_out.new_empty(2 if with_bias else 1, x.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.kind = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad_out: Tensor, grad_sum: Tensor | None = None) -> tuple[Tensor | None, ...]:
    require_first_order("norm")
    x, weight = ctx.saved_tensors
    grad_x, parameters = _native_backward(grad_out, grad_sum, x, weight, ctx.kind, ctx.with_bias)
    grad_weight, *grad_bias = parameters.to(weight.dtype)
    return grad_x, grad_weight, grad_bias[0] if grad_bias else None, None


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.kind, _ = inputs
    ctx.with_bias, ctx.dtype = bias is not None, x.dtype
    ctx.save_for_backward(output[1], weight)


def _backward_residual(ctx: Any, grad_out: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
    grad_total, *others = _backward(ctx, grad_out, grad_sum)
    assert grad_total is not None
    return grad_total.to(ctx.dtype), *others, grad_total


def _samples(dtypes: Dtypes, generator: torch.Generator) -> Iterator[Sample]:
    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def sample(
        label: str, shape: tuple[int, ...], *, bias: bool = True, residual: bool = False, kind: str = "layer_norm"
    ) -> Sample:
        arguments: dict[str, Any] = {
            "x": 2.0 * draw(shape, dtypes[0]) + 0.5,
            "weight": draw(shape[-1:], dtypes[1]),
            "bias": draw(shape[-1:], dtypes[1]) if bias and kind == "layer_norm" else None,
            "kind": kind,
        }
        if residual:
            arguments["residual"] = draw(shape, arithmetic_dtype(dtypes[0]))
        return Sample(f"{label}, {kind}", arguments)

    yield sample("defaults", (2, 5, 48))
    yield Sample("large", sample("", (6, 301, 48), residual=True).arguments)
    for kind in EPSILON:
        yield sample("one channel", (1, 1, 1), kind=kind)
        yield sample("no samples", (0, 5, 7), kind=kind)
        yield sample("no tokens", (2, 0, 7), kind=kind)
        yield sample("one row", (19,), kind=kind)
        yield sample("two dimensions", (4, 19), kind=kind)
        yield sample("four dimensions", (2, 3, 2, 19), kind=kind)
        yield sample("residual", (2, 3, 33), kind=kind, residual=True)
        yield sample("many channels", (1, 3, 1300), kind=kind)
        for channels in (2, 7, 8, 9, 15, 16, 17, 65, 130):
            yield sample(f"{channels} channels", (2, 3, channels), kind=kind)
    yield sample("no bias", (2, 3, 19), bias=False)
    yield sample("no bias, residual", (2, 3, 19), bias=False, residual=True)


def _case(
    shape: tuple[int, ...], kind: str = "layer_norm", *, residual: bool = False, dtype: torch.dtype = torch.float32
) -> Callable[[torch.Generator], Sample]:
    def draw(generator: torch.Generator) -> Sample:
        def values(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        arguments: dict[str, Any] = {"x": values(*shape).to(dtype), "weight": values(shape[-1]), "kind": kind}
        if kind == "layer_norm":
            arguments["bias"] = values(shape[-1])
        if residual:
            arguments["residual"] = values(*shape)
        return Sample(str(list(shape)), arguments)

    return draw


torch.library.register_fake("starflow_ext::norm", _fake)
torch.library.register_fake("starflow_ext::norm_residual", _fake_residual)
torch.library.register_fake("starflow_ext::norm_backward", _fake_backward)
torch.library.register_autograd("starflow_ext::norm", _backward, setup_context=_save)
torch.library.register_autograd("starflow_ext::norm_residual", _backward_residual, setup_context=_save_residual)

_WINDOW = (1, 64, 256)
_LARGE = (64, 1024, 256)

SPEC = Spec(
    name="norm",
    call=norm,
    reference=norm_reference,
    check=check,
    # Dtypes of x, and of weight and bias.
    dtypes=(
        *((dtype, dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ),
    samples=_samples,
    # Float32 is allowed 16 units of rounding: two sums, a root and three products; a value near the mean loses its
    # leading digits. Results are never in half precision; gradients are.
    bounds={
        torch.float64: Bound(1e-13, 1e-13),
        torch.float32: Bound(2e-6, 4e-6),
        torch.float16: Bound(1e-3, 4e-6),
        torch.bfloat16: Bound(8e-3, 4e-6),
    },
    differentiable=("x", "weight", "bias", "residual"),
    shared=("weight", "bias"),
    lower=_lower,
    cases={
        "window": _case(_WINDOW),
        "window rms": _case(_WINDOW, "rms_norm"),
        "window residual": _case(_WINDOW, residual=True),
        "large": _case(_LARGE),
        "large rms": _case(_LARGE, "rms_norm"),
        "large residual": _case(_LARGE, residual=True),
        "large bfloat16": _case(_LARGE, dtype=torch.bfloat16),
        "wide": _case((1, 256, 3072), "rms_norm"),
    },
)
