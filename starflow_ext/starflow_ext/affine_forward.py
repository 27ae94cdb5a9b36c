"""affine_forward: data to noise, and the log-determinant of the map, in one pass over memory."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from starflow_ext._affine import (
    AFFINE_BOUNDS,
    AFFINE_DTYPES,
    ScaleActivation,
    activation_of,
    affine_cases,
    affine_samples,
    affine_terms,
    check_data,
    check_log_det,
    check_raw,
)
from starflow_ext._check import arithmetic_dtype, check_like, refuse_types, require_first_order, types_of
from starflow_ext._load import operators
from starflow_ext._mode import in_reference_mode
from starflow_ext._options import SCALE_ACTIVATIONS, code_of
from starflow_ext._spec import Spec


def affine_forward(
    x: Tensor, raw: Tensor, *, activation: ScaleActivation = "softplus", soft_clip: float = 0.0, shifted: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute ``z = (x - shift) / scale`` and the log-determinant of the map.

    Args:
        x: data (..., tokens, channels); float32, bfloat16, float16 or float64.
        raw: (..., tokens, 2 * channels), log-scale before shift; (..., tokens, channels), shift alone, with activation
            "none". Dtype of ``x``, or bfloat16 or float16 with ``x`` in float32.
        activation: scale = softplus(a + log(e - 1)) for "softplus", exp(a) for "exp", 1 for "none".
        soft_clip: s > 0 replaces ``raw`` by ``s * tanh(raw / s)`` first.
        shifted: row n of ``raw`` belongs to token n + 1; token 0 is left alone and the last row is unused.

    Returns:
        z: noise (..., tokens, channels), dtype of ``x``.
        log_det: (..., tokens), minus the sum of log(scale) over channels; float32, or float64 for ``x`` in float64.

    Raises:
        RuntimeError: if a type, a shape, a dtype, a device or an option is wrong.

    Reference:
        Zhai et al., Normalizing Flows are Capable Generative Models, section 3.
    """
    arguments = (x, raw, activation, soft_clip, shifted)
    if not all(map(isinstance, arguments, _TYPES)):
        refuse_types("affine_forward", affine_forward, arguments)
    if in_reference_mode():
        return affine_forward_reference(*arguments)
    operator, lowered = _lower(*arguments)
    z, log_det = operator(*lowered)
    return z, log_det


def affine_forward_reference(
    x: Tensor, raw: Tensor, activation: str, soft_clip: float, shifted: bool
) -> tuple[Tensor, Tensor]:
    """Compute ``affine_forward`` in plain torch; arguments as there."""
    check(x, raw, activation, soft_clip, shifted)
    dtype = arithmetic_dtype(x.dtype)
    terms = affine_terms(raw, dtype, activation, soft_clip, shifted)
    z = (x.to(dtype) - terms.shift) / terms.scale
    return z.to(x.dtype), -terms.log_scale.sum(dim=-1)


def check(x: Tensor, raw: Tensor, activation: str, soft_clip: float, shifted: bool) -> None:
    """Raise what the native op raises for the same mistake; arguments as of the reference."""
    check_data("affine_forward", "x", x)
    check_raw("affine_forward", "x", x, raw, activation, soft_clip)


# The types that each argument may have.
_TYPES: Final = types_of(affine_forward)

_native = operators().affine_forward.default
_native_backward = operators().affine_forward_backward.default


def _lower(x: Tensor, raw: Tensor, activation: str, soft_clip: float, shifted: bool) -> tuple[Any, tuple[Any, ...]]:
    """The native operator of a call and its arguments."""
    return _native, (x, raw, code_of("affine_forward", "activation", activation, SCALE_ACTIVATIONS), soft_clip, shifted)


def _fake(x: Tensor, raw: Tensor, activation: int, soft_clip: float, shifted: bool) -> tuple[Tensor, Tensor]:
    check(x, raw, activation_of("affine_forward", activation), soft_clip, shifted)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=arithmetic_dtype(x.dtype))


def _fake_backward(
    grad_z: Tensor, grad_log_det: Tensor, x: Tensor, raw: Tensor, activation: int, soft_clip: float, shifted: bool
) -> tuple[Tensor, Tensor]:
    op = "affine_forward_backward"
    check_data(op, "x", x)
    check_raw(op, "x", x, raw, activation_of(op, activation), soft_clip)
    check_like(op, "grad_z", grad_z, "x", x)
    check_log_det(op, grad_log_det, x)
    return x.new_empty(x.shape), raw.new_empty(raw.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, raw, *ctx.options = inputs
    ctx.save_for_backward(x, raw)


def _backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
    require_first_order("affine_forward")
    grad_x, grad_raw = _native_backward(grad_z, grad_log_det, *ctx.saved_tensors, *ctx.options)
    return grad_x, grad_raw, None, None, None


torch.library.register_fake("starflow_ext::affine_forward", _fake)
torch.library.register_fake("starflow_ext::affine_forward_backward", _fake_backward)
torch.library.register_autograd("starflow_ext::affine_forward", _backward, setup_context=_save)

SPEC = Spec(
    name="affine_forward",
    call=affine_forward,
    reference=affine_forward_reference,
    check=check,
    dtypes=AFFINE_DTYPES,
    samples=partial(affine_samples, "x"),
    bounds=AFFINE_BOUNDS,
    differentiable=("x", "raw"),
    lower=_lower,
    cases=affine_cases("x"),
)
