"""jacobi_update: one sweep's update of the data in place, with the largest change of each token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from starflow_ext._affine import (
    AFFINE_BOUNDS,
    AFFINE_DTYPES,
    ScaleActivation,
    Terms,
    activation_of,
    affine_cases,
    affine_samples,
    affine_terms,
    check_data,
    check_raw,
    guided_terms,
)
from starflow_ext._check import arithmetic_dtype, check_like, check_own_memory, refuse_types, require, types_of
from starflow_ext._load import operators
from starflow_ext._mode import in_reference_mode, require_no_transform
from starflow_ext._options import SCALE_ACTIVATIONS, code_of
from starflow_ext._spec import Dtypes, Sample, Spec


def jacobi_update(
    x: Tensor,
    z: Tensor,
    raw: Tensor,
    *,
    activation: ScaleActivation = "softplus",
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
        RuntimeError: if a type, a shape, a dtype, a device or an option is wrong, or if a gradient is asked for or a
            transform of torch.func is active.

    Reference:
        Gu et al., STARFlow, section 3.5 (guidance); Song et al., Accelerating Feedforward Computation via Parallel
        Nonlinear Equation Solving, section 3 (Jacobi iteration).
    """
    arguments = (x, z, raw, activation, soft_clip, guidance)
    if not all(map(isinstance, arguments, _TYPES)):
        refuse_types("jacobi_update", jacobi_update, arguments)
    require_no_transform("jacobi_update", "x is overwritten")
    require(
        not (torch.is_grad_enabled() and (x.requires_grad or z.requires_grad or raw.requires_grad)),
        "jacobi_update",
        "gradient mode is",
        "on for a tensor that requires a gradient",
        "a call under torch.no_grad() or torch.inference_mode()",
    )
    if in_reference_mode():
        return jacobi_update_reference(*arguments)
    operator, lowered = _lower(*arguments)
    change: Tensor = operator(*lowered)
    return change


def jacobi_update_reference(
    x: Tensor, z: Tensor, raw: Tensor, activation: str, soft_clip: float, guidance: float
) -> Tensor:
    """Compute ``jacobi_update`` in plain torch; arguments as there."""
    check(x, z, raw, activation, soft_clip, guidance)
    dtype = arithmetic_dtype(x.dtype)
    terms = affine_terms(raw, dtype, activation, soft_clip, shifted=False)
    if guidance > 0.0:
        conditional, unconditional = zip(*(term.chunk(2) for term in terms), strict=True)
        shift, scale = guided_terms(Terms(*conditional), Terms(*unconditional), guidance)
    else:
        shift, scale = terms.shift, terms.scale
    new = shift + scale * z.to(dtype)
    change = ((new - x.to(dtype)).abs() / scale).to(torch.float32)
    x.copy_(new)
    # A token without channels has not moved: its change is the empty sum, 0, as amax of nothing is undefined.
    return change.amax(dim=-1) if x.shape[-1] > 0 else change.sum(dim=-1)


def check(x: Tensor, z: Tensor, raw: Tensor, activation: str, soft_clip: float, guidance: float) -> None:
    """Raise what the native op raises for the same mistake; arguments as of the reference."""
    op = "jacobi_update"
    check_data(op, "x", x, dim=3)
    check_like(op, "z", z, "x", x)
    require(0.0 <= guidance < float("inf"), op, "guidance is", f"{guidance:g}", "a finite number >= 0")
    check_raw(op, "x", x, raw, activation, soft_clip, halves=2 if guidance > 0.0 else 1)
    check_own_memory(op, "x", x)


# The types that each argument may have.
_TYPES: Final = types_of(jacobi_update)

_native = operators().jacobi_update.default


def _lower(
    x: Tensor, z: Tensor, raw: Tensor, activation: str, soft_clip: float, guidance: float
) -> tuple[Any, tuple[Any, ...]]:
    """The native operator of a call and its arguments."""
    return _native, (
        x,
        z,
        raw,
        code_of("jacobi_update", "activation", activation, SCALE_ACTIVATIONS),
        soft_clip,
        guidance,
    )


def _fake(x: Tensor, z: Tensor, raw: Tensor, activation: int, soft_clip: float, guidance: float) -> Tensor:
    check(x, z, raw, activation_of("jacobi_update", activation), soft_clip, guidance)
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def _samples(dtypes: Dtypes, generator: torch.Generator) -> Iterator[Sample]:
    for sample in affine_samples("x", dtypes, generator, shifted=False):
        x, raw = sample.arguments["x"], sample.arguments["raw"]
        z = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        yield Sample(sample.label, {**sample.arguments, "z": z})
        unconditional = torch.randn(raw.shape, generator=generator, dtype=torch.float64).to(raw.dtype)
        guided = {"x": x.clone(), "z": z, "raw": torch.cat([raw, unconditional]), "guidance": 1.5}
        yield Sample(f"{sample.label}, guidance=1.5", {**sample.arguments, **guided})


torch.library.register_fake("starflow_ext::jacobi_update", _fake)

SPEC = Spec(
    name="jacobi_update",
    call=jacobi_update,
    reference=jacobi_update_reference,
    check=check,
    dtypes=AFFINE_DTYPES,
    samples=_samples,
    bounds=AFFINE_BOUNDS,
    mutates=("x",),
    lower=_lower,
    cases=affine_cases("x", "z"),
)
