"""affine_inverse: noise to data, in one pass over memory."""

from __future__ import annotations

from torch import Tensor

from starflow_ext._affine import Activation, affine_terms, arithmetic_dtype, check_data, check_raw


def affine_inverse(
    z: Tensor, raw: Tensor, *, activation: Activation = "softplus", soft_clip: float = 0.0, shifted: bool = False
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
        RuntimeError: if a shape, a dtype, a device or an option is wrong.

    Reference:
        Zhai et al., Normalizing Flows are Capable Generative Models, section 3.
    """
    return affine_inverse_reference(z, raw, activation, soft_clip, shifted)


def affine_inverse_reference(z: Tensor, raw: Tensor, activation: str, soft_clip: float, shifted: bool) -> Tensor:
    """Compute ``affine_inverse`` in plain torch; arguments as there."""
    check_data("affine_inverse", "z", z)
    check_raw("affine_inverse", "z", z, raw, activation, soft_clip)
    dtype = arithmetic_dtype(z.dtype)
    terms = affine_terms(raw, dtype, activation, soft_clip, shifted)
    return (terms.shift + terms.scale * z.to(dtype)).to(z.dtype)
