"""Affine: what a conditioner predicts for each token, as a value with two directions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from starflow_ext import ops
from starflow_ext._affine import ScaleActivation, Terms, affine_terms, guided_terms
from starflow_ext._check import arithmetic_dtype


@dataclass(frozen=True)
class Affine:
    """The map `x = shift + scale * z` of every token, kept as the network put it out.

    Args:
        raw: (batch, tokens, 2 * channels), or (batch, tokens, channels) with activation "none"; twice the rows,
            conditional half first, with `guidance` > 0.
        activation: how the scale comes from `raw`.
        soft_clip: bound of `raw`; 0 is none.
        shifted: row n belongs to token n + 1 and the first token passes unchanged (models without a start token).
        guidance: weight of classifier-free guidance; 0 is none.
    """

    raw: Tensor
    activation: ScaleActivation
    soft_clip: float = 0.0
    shifted: bool = False
    guidance: float = 0.0

    def like(self, raw: Tensor) -> Affine:
        """The maps of another output of the same network."""
        return replace(self, raw=raw)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to noise: `z = (x - shift) / scale` like `x`, and log |dz/dx| of each token (batch, tokens)."""
        if self.guidance > 0.0:
            terms = self.terms()
            return (x - terms.shift) / terms.scale, -terms.log_scale.sum(-1)
        return ops.affine_forward(
            x, self.raw, activation=self.activation, soft_clip=self.soft_clip, shifted=self.shifted
        )

    def decode(self, z: Tensor) -> Tensor:
        """Noise to data for known `raw`: `x = shift + scale * z`."""
        if self.guidance > 0.0:
            x = torch.zeros_like(z)
            self.update_(x, z)
            return x
        return ops.affine_inverse(
            z, self.raw, activation=self.activation, soft_clip=self.soft_clip, shifted=self.shifted
        )

    def update_(self, x: Tensor, z: Tensor) -> Tensor:
        """Overwrites `x` by its decoded value; returns the largest change of each token in units of its scale."""
        return ops.jacobi_update(
            x, z, self.raw, activation=self.activation, soft_clip=self.soft_clip, guidance=self.guidance
        )

    def terms(self) -> Terms:
        """Shift, scale and log-scale of each dimension, (batch, tokens, channels); for inspection, in plain torch."""
        dtype = arithmetic_dtype(self.raw.dtype)
        terms = affine_terms(self.raw, dtype, self.activation, self.soft_clip, self.shifted)
        if self.guidance <= 0.0:
            return terms
        halves = [Terms(*parts) for parts in zip(*(term.chunk(2) for term in terms), strict=True)]
        shift, scale = guided_terms(halves[0], halves[1], self.guidance)
        return Terms(shift, scale, scale.log())
