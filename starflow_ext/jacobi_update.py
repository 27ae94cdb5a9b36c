"""jacobi_update: one sweep's update of the data in place, with the largest change of each token."""

from __future__ import annotations

import torch
from torch import Tensor

from starflow_ext._affine import (
    Activation,
    affine_terms,
    arithmetic_dtype,
    check_data,
    check_raw,
    guided_terms,
    shape_text,
)
from starflow_ext._check import require


def jacobi_update(
    x: Tensor,
    z: Tensor,
    raw: Tensor,
    *,
    activation: Activation = "softplus",
    soft_clip: float = 0.0,
    guidance: float = 0.0,
) -> Tensor:
    """Overwrite ``x`` by ``shift + scale * z`` and tell how far each token moved in units of its own scale.

    Args:
        x: current data (batch, tokens, channels), overwritten; float32, bfloat16, float16 or float64.
        z: noise, shape and dtype of ``x``.
        raw: (batch, tokens, 2 * channels), or (batch, tokens, channels) with activation "none"; with guidance, twice
            as many rows: the conditional half before the unconditional one. Dtype of ``x``, or bfloat16 or float16
            with ``x`` in float32.
        activation: scale = softplus(a + log(e - 1)) for "softplus", exp(a) for "exp", 1 for "none".
        soft_clip: s > 0 replaces ``raw`` by ``s * tanh(raw / s)`` first.
        guidance: weight w; above zero the two halves are combined into one affine map.

    Returns:
        change: (batch, tokens), float32: max over channels of ``|x_new - x_old| / scale``. NaN where any channel is
        NaN, so that a comparison with a tolerance never accepts it.

    Raises:
        RuntimeError: if a shape, a dtype, a device or an option is wrong, or if a gradient is asked for.

    Reference:
        Gu et al., STARFlow, section 3.5 (guidance); Song et al., Accelerating Feedforward Computation via Parallel
        Nonlinear Equation Solving, section 3 (Jacobi iteration).
    """
    return jacobi_update_reference(x, z, raw, activation, soft_clip, guidance)


def jacobi_update_reference(
    x: Tensor, z: Tensor, raw: Tensor, activation: str, soft_clip: float, guidance: float
) -> Tensor:
    """Compute ``jacobi_update`` in plain torch; arguments as there."""
    op = "jacobi_update"
    check_data(op, "x", x, dim=3)
    require(z.dtype == x.dtype, op, "z has dtype", str(z.dtype)[6:], f"{str(x.dtype)[6:]} like x")
    require(z.shape == x.shape, op, "z has shape", shape_text(z.shape), f"{shape_text(x.shape)} like x")
    require(z.device == x.device, op, "z is on", z.device, f"{x.device} like x")
    require(0.0 <= guidance < float("inf"), op, "guidance is", f"{guidance:g}", "a finite number >= 0")
    check_raw(op, "x", x, raw, activation, soft_clip, halves=2 if guidance > 0.0 else 1)
    dtype = arithmetic_dtype(x.dtype)
    if x.shape[-1] == 0:
        return torch.zeros(x.shape[:2], device=x.device)
    terms = affine_terms(raw, dtype, activation, soft_clip, shifted=False)
    shift, scale = terms.shift, terms.scale
    if guidance > 0.0:
        (shift, shift_u), (scale, scale_u), (log_scale, log_scale_u) = (term.chunk(2) for term in terms)
        shift, scale = guided_terms(
            type(terms)(shift, scale, log_scale), type(terms)(shift_u, scale_u, log_scale_u), guidance
        )
    new = shift + scale * z.to(dtype)
    change = ((new - x.to(dtype)).abs() / scale).amax(dim=-1).to(torch.float32)
    x.copy_(new)
    return change
