"""linear: a matrix product with what follows it: bias, activation, gate, residual."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow_ext._check import require

Epilogue = Literal["none", "gelu", "gelu_tanh"]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    epilogue: Epilogue = "none",
    multiply: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Compute ``residual + epilogue(x @ weight.T + bias) * multiply``.

    Plain torch on every device; there is no native kernel yet.

    Args:
        x: (..., in_channels); rounded to the dtype of ``weight`` for the product.
        weight: (out_channels, in_channels).
        bias: (out_channels,).
        epilogue: "none", "gelu" (exact, erf) or "gelu_tanh".
        multiply: (..., out_channels), the other factor of a gated unit.
        residual: (..., out_channels); the sum keeps its dtype, so a float32 residual stream stays float32.

    Returns:
        (..., out_channels), in the dtype of ``residual`` if given, else of the product.

    Raises:
        RuntimeError: if ``epilogue`` is unknown or a shape does not agree.

    Reference:
        Hendrycks and Gimpel, Gaussian Error Linear Units (2016); Shazeer, GLU Variants Improve Transformer (2020).
    """
    require(
        epilogue in ("none", "gelu", "gelu_tanh"), "linear", "epilogue is", f'"{epilogue}"', "none, gelu, gelu_tanh"
    )
    require(
        x.shape[-1] == weight.shape[1],
        "linear",
        "x has shape",
        list(x.shape),
        f"[..., {weight.shape[1]}] for weight of shape {list(weight.shape)}",
    )
    shape = [*x.shape[:-1], weight.shape[0]]
    for name, tensor, expected in (
        ("bias", bias, shape[-1:]),
        ("multiply", multiply, shape),
        ("residual", residual, shape),
    ):
        if tensor is not None:
            require(list(tensor.shape) == expected, "linear", f"{name} has shape", list(tensor.shape), expected)
    out = F.linear(x.to(weight.dtype), weight, bias)
    if epilogue != "none":
        out = F.gelu(out, approximate="tanh" if epilogue == "gelu_tanh" else "none")
    if multiply is not None:
        out = out * multiply
    if residual is not None:
        out = residual + out.to(torch.promote_types(out.dtype, residual.dtype))
    return out
