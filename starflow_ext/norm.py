"""norm: LayerNorm and RMSNorm, with an optional residual added first."""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow_ext._check import require

NormKind = Literal["layer_norm", "rms_norm"]

# eps of the published models: LayerNorm 1e-5, RMSNorm 1e-6.
EPSILON: Final = {"layer_norm": 1e-5, "rms_norm": 1e-6}


def norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, kind: NormKind = "layer_norm") -> Tensor:
    """Normalise over the last axis in float32.

    Plain torch on every device; there is no native kernel yet.

    Args:
        x: (..., channels), any floating dtype.
        weight: (channels,). LayerNorm multiplies by ``weight``; RMSNorm by ``1 + weight`` (an offset from one, as the
            published checkpoints store it).
        bias: (channels,), LayerNorm only.
        kind: "layer_norm" (eps 1e-5) or "rms_norm" (eps 1e-6).

    Returns:
        (..., channels), float32 (float64 for float64 ``x``).

    Raises:
        RuntimeError: if ``kind`` is unknown, RMSNorm is given a bias, or the channels do not agree.

    Reference:
        Ba et al., Layer Normalization (2016); Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
    """
    require(kind in EPSILON, "norm", "kind is", f'"{kind}"', '"layer_norm" or "rms_norm"')
    require(
        weight.shape == x.shape[-1:],
        "norm",
        "weight has shape",
        list(weight.shape),
        f"[{x.shape[-1]}] for channels of x",
    )
    if bias is not None:
        require(
            bias.shape == weight.shape, "norm", "bias has shape", list(bias.shape), f"{list(weight.shape)} like weight"
        )
    require(kind == "layer_norm" or bias is None, "norm", "bias is", "given", "None for rms_norm")
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)
    if kind == "layer_norm":
        return F.layer_norm(
            x, x.shape[-1:], weight.to(dtype), None if bias is None else bias.to(dtype), EPSILON["layer_norm"]
        )
    return F.rms_norm(x, x.shape[-1:], 1.0 + weight.to(dtype), EPSILON["rms_norm"])
