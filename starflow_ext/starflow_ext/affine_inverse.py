"""affine_inverse: noise to data, in one pass over memory."""

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
    check_raw,
)
from starflow_ext._check import arithmetic_dtype, check_like, refuse_types, require_first_order, types_of
from starflow_ext._load import operators
from starflow_ext._mode import in_reference_mode
from starflow_ext._options import SCALE_ACTIVATIONS, code_of
from starflow_ext._spec import Spec


def affine_inverse(
    z: Tensor, raw: Tensor, *, activation: ScaleActivation = "softplus", soft_clip: float = 0.0, shifted: bool = False
) -> Tensor:
    """Compute ``x = shift + scale * z``, the inverse of ``affine_forward`` for the same ``raw``.

    Args:
        z: noise (..., tokens, channels); float32, bfloat16, float16 or float64.
        raw: (..., tokens, 2 * channels), log-scale before shift; (..., tokens, channels), shift alone, with activation
            "none". Dtype of ``z``, or bfloat16 or float16 with ``z`` in float32.
        activation: scale = softplus(a + log(e - 1)) for "softplus", exp(a) for "exp", 1 for "none".
        soft_clip: s > 0 replaces ``raw`` by ``s * tanh(raw / s)`` first.
        shifted: row n of ``raw`` belongs to token n + 1; token 0 is left alone and the last row is unused.

    Returns:
        x: data (..., tokens, channels), dtype of ``z``.

    Raises:
        RuntimeError: if a type, a shape, a dtype, a device or an option is wrong.

    Reference:
        Zhai et al., Normalizing Flows are Capable Generative Models, section 3.
    """
    arguments = (z, raw, activation, soft_clip, shifted)
    if not all(map(isinstance, arguments, _TYPES)):
        refuse_types("affine_inverse", affine_inverse, arguments)
    if in_reference_mode():
        return affine_inverse_reference(*arguments)
    operator, lowered = _lower(*arguments)
    x: Tensor = operator(*lowered)
    return x


def affine_inverse_reference(z: Tensor, raw: Tensor, activation: str, soft_clip: float, shifted: bool) -> Tensor:
    """Compute ``affine_inverse`` in plain torch; arguments as there."""
    check(z, raw, activation, soft_clip, shifted)
    dtype = arithmetic_dtype(z.dtype)
    terms = affine_terms(raw, dtype, activation, soft_clip, shifted)
    return (terms.shift + terms.scale * z.to(dtype)).to(z.dtype)


def check(z: Tensor, raw: Tensor, activation: str, soft_clip: float, shifted: bool) -> None:
    """Raise what the native op raises for the same mistake; arguments as of the reference."""
    check_data("affine_inverse", "z", z)
    check_raw("affine_inverse", "z", z, raw, activation, soft_clip)


# The types that each argument may have.
_TYPES: Final = types_of(affine_inverse)

_native = operators().affine_inverse.default
_native_backward = operators().affine_inverse_backward.default


def _lower(z: Tensor, raw: Tensor, activation: str, soft_clip: float, shifted: bool) -> tuple[Any, tuple[Any, ...]]:
    """The native operator of a call and its arguments."""
    return _native, (z, raw, code_of("affine_inverse", "activation", activation, SCALE_ACTIVATIONS), soft_clip, shifted)


def _fake(z: Tensor, raw: Tensor, activation: int, soft_clip: float, shifted: bool) -> Tensor:
    check(z, raw, activation_of("affine_inverse", activation), soft_clip, shifted)
    return z.new_empty(z.shape)


def _fake_backward(
    grad_x: Tensor, z: Tensor, raw: Tensor, activation: int, soft_clip: float, shifted: bool
) -> tuple[Tensor, Tensor]:
    op = "affine_inverse_backward"
    check_data(op, "z", z)
    check_raw(op, "z", z, raw, activation_of(op, activation), soft_clip)
    check_like(op, "grad_x", grad_x, "z", z)
    return z.new_empty(z.shape), raw.new_empty(raw.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, raw, *ctx.options = inputs
    ctx.save_for_backward(z, raw)


def _backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
    require_first_order("affine_inverse")
    grad_z, grad_raw = _native_backward(grad_x, *ctx.saved_tensors, *ctx.options)
    return grad_z, grad_raw, None, None, None


torch.library.register_fake("starflow_ext::affine_inverse", _fake)
torch.library.register_fake("starflow_ext::affine_inverse_backward", _fake_backward)
torch.library.register_autograd("starflow_ext::affine_inverse", _backward, setup_context=_save)

SPEC = Spec(
    name="affine_inverse",
    call=affine_inverse,
    reference=affine_inverse_reference,
    check=check,
    dtypes=AFFINE_DTYPES,
    samples=partial(affine_samples, "z"),
    bounds=AFFINE_BOUNDS,
    differentiable=("z", "raw"),
    lower=_lower,
    cases=affine_cases("z"),
)
