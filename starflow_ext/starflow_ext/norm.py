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
    refuse_types,
    require,
    require_first_order,
    types_of,
)
from starflow_ext._load import operators
from starflow_ext._mode import in_reference_mode
from starflow_ext._options import CONSTANTS, NORM_KINDS, check_name, name_of
from starflow_ext._spec import Bound, Dtypes, Sample, Spec

NormKind = Literal["layer_norm", "rms_norm"]

# Epsilons of the published models, by kind of norm.
EPSILON: Final = {kind: CONSTANTS[f"{kind}_epsilon"] for kind in NORM_KINDS if kind != "none"}

# What is added to the weight of each kind unless it is asked for otherwise.
OFFSET: Final = {"layer_norm": 0.0, "rms_norm": 1.0}

# On CUDA a block of threads holds a row in registers, which bounds the channels.
MOST_CHANNELS_CUDA: Final = CONSTANTS["norm_most_channels_cuda"]


@overload
def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: NormKind = "layer_norm",
    eps: float | None = None,
    weight_offset: float | None = None,
    residual: None = None,
) -> Tensor: ...
@overload
def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: NormKind = "layer_norm",
    eps: float | None = None,
    weight_offset: float | None = None,
    residual: Tensor,
) -> tuple[Tensor, Tensor]: ...
def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: NormKind = "layer_norm",
    eps: float | None = None,
    weight_offset: float | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise over the last axis in float32, of ``x`` or of ``x + residual``.

    Native on the CPU and on CUDA devices (compiled and run on an emulated device; never run on a GPU).

    Args:
        x: (..., channels); float32, bfloat16, float16 or float64. On a CUDA device at most 4096 channels.
        weight: (channels,), any of these dtypes; None multiplies by one.
        bias: (channels,), LayerNorm only; dtype of ``weight``, any without one.
        kind: "layer_norm" or "rms_norm".
        eps: what is added to the mean square; None: 1e-5 for LayerNorm, 1e-6 for RMSNorm.
        weight_offset: what is added to ``weight``. 0 for a plain weight (LayerNorm; RMSNorm of Llama, Qwen, Mistral), 1
            for an offset from one (TarFlow, Gemma). None: 0 for LayerNorm, 1 for RMSNorm.
        residual: (..., channels), float32 (float64 for float64 ``x``): the stream that ``x`` is added to first.

    Returns:
        (..., channels), float32 (float64 for float64 ``x``); with a residual also the sum, in the same dtype.

    Raises:
        RuntimeError: if a type, a shape, a dtype, a device or an option is wrong, or RMSNorm is given a bias.

    Reference:
        Ba et al., Layer Normalization (2016); Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
    """
    arguments = (x, weight, bias, kind, eps, weight_offset, residual)
    if not all(map(isinstance, arguments, _TYPES)):
        refuse_types("norm", norm, arguments)
    if in_reference_mode():
        return norm_reference(*arguments)
    operator, lowered = _lower(*arguments)
    result: Tensor | tuple[Tensor, Tensor] = operator(*lowered)
    return result


def norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float | None,
    weight_offset: float | None,
    residual: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ``norm`` in plain torch; arguments as there."""
    check(x, weight, bias, kind, eps, weight_offset, residual)
    dtype = arithmetic_dtype(x.dtype)
    total = x.to(dtype) if residual is None else x.to(dtype) + residual
    shift = None if bias is None else bias.to(dtype)
    scale = None
    if weight is not None:
        offset = OFFSET[kind] if weight_offset is None else weight_offset
        scale = weight.to(dtype) if offset == 0.0 else offset + weight.to(dtype)
    epsilon = EPSILON[kind] if eps is None else eps
    if kind == "layer_norm":
        normed = F.layer_norm(total, total.shape[-1:], scale, shift, epsilon)
    else:
        normed = F.rms_norm(total, total.shape[-1:], scale, epsilon)
    return normed if residual is None else (normed, total)


def check_epsilon(op: str, name: str, eps: float | None) -> None:
    """Check what is added to a mean square."""
    require(eps is None or 0.0 <= eps < float("inf"), op, f"{name} is", eps, "a finite number >= 0")


def check_weight_offset(op: str, name: str, weight_offset: float | None, weight: Tensor | None) -> None:
    """Check what is added to the weight of a norm, which there must be then."""
    require(weight_offset is None or weight is not None, op, f"{name} is", weight_offset, "None without a weight")
    finite = weight_offset is None or abs(weight_offset) < float("inf")
    require(finite, op, f"{name} is", weight_offset, "a finite number")


def check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float | None,
    weight_offset: float | None,
    residual: Tensor | None,
) -> None:
    """Raise what the native op raises for the same mistake; arguments as of the reference."""
    op = "norm"
    _check_options(weight, kind, eps, weight_offset)
    check_floating(op, "x", x)
    require(x.dim() >= 1, op, "x has shape", "[]", "(..., channels)")
    fits = not x.is_cuda or x.shape[-1] <= MOST_CHANNELS_CUDA
    require(fits, op, "x has channels", x.shape[-1], f"at most {MOST_CHANNELS_CUDA} on a CUDA device")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and (name == "weight" or weight is None):
            check_floating(op, name, parameter)
            fits = parameter.shape == x.shape[-1:]
            require(fits, op, f"{name} has shape", parameter.shape, x.shape[-1:], "for channels of x")
            check_device(op, name, parameter, "x", x)
    if bias is not None:
        require(kind == "layer_norm", op, "bias is", "given", "None for rms_norm")
        if weight is not None:
            check_like(op, "bias", bias, "weight", weight)
    if residual is not None:
        stream = arithmetic_dtype(x.dtype)
        require(residual.dtype == stream, op, "residual has dtype", residual.dtype, stream, "for x of", x.dtype)
        require(residual.shape == x.shape, op, "residual has shape", residual.shape, x.shape, "like x")
        check_device(op, "residual", residual, "x", x)


def _check_options(weight: Tensor | None, kind: str, eps: float | None, weight_offset: float | None) -> None:
    check_name("norm", "kind", kind, EPSILON)
    check_epsilon("norm", "eps", eps)
    check_weight_offset("norm", "weight_offset", weight_offset, weight)


# The types that each argument may have.
_TYPES: Final = types_of(norm)

_native = operators().norm.default
_native_residual = operators().norm_residual.default
_native_backward = operators().norm_backward.default


def _lower(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float | None,
    weight_offset: float | None,
    residual: Tensor | None,
) -> tuple[Any, tuple[Any, ...]]:
    _check_options(weight, kind, eps, weight_offset)
    epsilon = EPSILON[kind] if eps is None else eps
    offset = OFFSET[kind] if weight_offset is None else weight_offset
    if weight is None:
        require(x.dim() >= 1, "norm", "x has shape", "[]", "(..., channels)")
        like = x if bias is None else bias
        weight, offset = like.new_zeros(x.shape[-1:]), 1.0
    options = (x, weight, bias, NORM_KINDS[kind], epsilon, offset)
    return (_native, options) if residual is None else (_native_residual, (*options, residual))


def _check_native(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: int, epsilon: float, offset: float, residual: Tensor | None
) -> None:
    """Raise what the operators raise; arguments as of the operators."""
    check(x, weight, bias, name_of("norm", "kind", kind, NORM_KINDS), epsilon, offset, residual)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, kind: int, epsilon: float, offset: float) -> Tensor:
    _check_native(x, weight, bias, kind, epsilon, offset, None)
    return x.new_empty(x.shape, dtype=arithmetic_dtype(x.dtype))


def _fake_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: int, epsilon: float, offset: float, residual: Tensor
) -> tuple[Tensor, Tensor]:
    _check_native(x, weight, bias, kind, epsilon, offset, residual)
    return residual.new_empty(x.shape), residual.new_empty(x.shape)


def _fake_backward(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    kind: int,
    epsilon: float,
    offset: float,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    _check_native(x, weight, None, kind, epsilon, offset, None)
    for name, gradient in (("grad_out", grad_out), ("grad_sum", grad_sum)):
        if gradient is not None:
            check_tensor("norm_backward", name, gradient, arithmetic_dtype(x.dtype), x.shape, "x", x)
    return x.new_empty(x.shape), grad_out.new_empty(2 if with_bias else 1, x.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.options = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad_out: Tensor, grad_sum: Tensor | None = None) -> tuple[Tensor | None, ...]:
    require_first_order("norm")
    x, weight = ctx.saved_tensors
    grad_x, parameters = _native_backward(grad_out, grad_sum, x, weight, *ctx.options, ctx.with_bias)
    grad_weight, *grad_bias = parameters.to(weight.dtype)
    return grad_x, grad_weight, grad_bias[0] if grad_bias else None, None, None, None


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, *ctx.options, _ = inputs
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
        label: str,
        shape: tuple[int, ...],
        *,
        bias: bool = True,
        residual: bool = False,
        kind: str = "layer_norm",
        **options: Any,
    ) -> Sample:
        arguments: dict[str, Any] = {
            "x": 2.0 * draw(shape, dtypes[0]) + 0.5,
            "weight": draw(shape[-1:], dtypes[1]),
            "bias": draw(shape[-1:], dtypes[1]) if bias and kind == "layer_norm" else None,
            "kind": kind,
        }
        if residual:
            arguments["residual"] = draw(shape, arithmetic_dtype(dtypes[0]))
        return Sample(f"{label}, {kind}", arguments | options)

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
        yield sample("eps", (2, 3, 19), kind=kind, eps=0.5)
        yield sample("plain weight", (2, 3, 19), kind=kind, weight_offset=0.0)
        yield sample("offset from one, residual", (2, 3, 19), kind=kind, weight_offset=1.0, residual=True)
        yield sample("no weight", (2, 3, 19), kind=kind, weight=None)
        yield sample("neither weight nor bias, residual", (2, 3, 19), kind=kind, weight=None, bias=False, residual=True)
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
