"""affine_forward: data to noise, and the log-determinant of the map, in one pass over memory."""

from __future__ import annotations

from torch import Tensor

from starflow_ext._affine import Activation, affine_terms, arithmetic_dtype, check_data, check_raw


def affine_forward(
    x: Tensor, raw: Tensor, *, activation: Activation = "softplus", soft_clip: float = 0.0, shifted: bool = False
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
        RuntimeError: if a shape, a dtype, a device or an option is wrong.

    Reference:
        Zhai et al., Normalizing Flows are Capable Generative Models, section 3.
    """
    return affine_forward_reference(x, raw, activation, soft_clip, shifted)


def affine_forward_reference(
    x: Tensor, raw: Tensor, activation: str, soft_clip: float, shifted: bool
) -> tuple[Tensor, Tensor]:
    """Compute ``affine_forward`` in plain torch; arguments as there."""
    check_data("affine_forward", "x", x)
    check_raw("affine_forward", "x", x, raw, activation, soft_clip)
    dtype = arithmetic_dtype(x.dtype)
    terms = affine_terms(raw, dtype, activation, soft_clip, shifted)
    z = (x.to(dtype) - terms.shift) / terms.scale
    return z.to(x.dtype), -terms.log_scale.sum(dim=-1)
