"""Classifier-free guidance: two predictions for each token, one affine map."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from starflow.arguments import check_flag
from starflow.messages import shown
from starflow.model.affine import Affine
from starflow.numeric import integer, number

Kind = Literal["gaussian", "linear"]


@dataclass(frozen=True)
class Guidance:
    """How the conditional and the unconditional prediction are combined.

    Args:
        weight: w; 0 is no guidance.
        kind: "gaussian" combines the two Gaussians (STARFlow); "linear" extrapolates the network's outputs (TarFlow).
        parts: with "linear", which outputs are extrapolated: "a" the log-scale, "b" the shift.
        annealed: with "linear", the weight grows from 0 to w along the sequence.
        temperature: with "linear", divides the attention logits of the unconditional prediction.
        all_blocks: guide the shallow blocks too where they read the condition.
        frames: of the clip, given ones included, that are guided: the first so many, where a cache rolls; None for all.
            What guidance adds to a frame the next one begins with, and adds to again: in a long clip it piles up.

    Raises:
        ValueError: a value out of range, or an option of "linear" with "gaussian".

    Reference: Gu et al., STARFlow (2025), section 3.5; Zhai et al., TarFlow (2024), section 3.5.
    """

    weight: float = 0.0
    kind: Kind = "gaussian"
    parts: str = "ab"
    annealed: bool = False
    temperature: float = 1.0
    all_blocks: bool = True
    frames: int | None = None

    def __post_init__(self) -> None:
        if (weight := number(self.weight)) is None or not 0.0 <= weight < float("inf"):
            raise ValueError(f"guidance: weight is {shown(self.weight)}, expected a finite number >= 0")
        if self.frames is not None and ((frames := integer(self.frames)) is None or frames < 1):
            raise ValueError(f"guidance: frames is {shown(self.frames)}, expected None or an integer >= 1")
        if not isinstance(self.parts, str) or not set(self.parts) <= {"a", "b"}:
            raise ValueError(f"guidance: parts is {shown(self.parts)}, expected a subset of 'ab'")
        if self.kind not in get_args(Kind):
            raise ValueError(f"guidance: kind is {self.kind!r}, expected 'gaussian' or 'linear'")
        check_flag("guidance", "annealed", self.annealed)
        check_flag("guidance", "all_blocks", self.all_blocks)
        if (temperature := number(self.temperature)) is None or not 0.0 < temperature < float("inf"):
            raise ValueError(f"guidance: temperature is {shown(self.temperature)}, expected a finite number > 0")
        if self.kind == "gaussian":
            for name, value, left in (("parts", self.parts, "ab"), ("annealed", self.annealed, False)):
                if value != left:
                    raise ValueError(f"guidance: {name} is {shown(value)}, expected kind 'linear' together with it")
            if temperature != 1.0:
                raise ValueError(f"guidance: temperature is {temperature:g}, expected kind 'linear' together with it")

    @property
    def active(self) -> bool:
        """Whether the unconditional prediction is needed at all."""
        return self.weight > 0.0 and bool(self.parts)

    @property
    def needs_condition(self) -> bool:
        """Whether the two predictions differ by the condition alone, so that guidance means nothing without one."""
        return self.kind == "gaussian" or self.temperature == 1.0

    def combine(self, affine: Affine, start: int | Tensor, tokens: int) -> Affine:
        """One affine map from a batch of two halves, conditional first.

        Args:
            affine: prediction of 2 * batch rows.
            start: first token of the window, one number or one for each sample (batch,).
            tokens: of the whole clip; the annealed weight reaches w at the last.
        """
        if self.kind == "gaussian":
            return replace(affine, guidance=self.weight)
        given, free = affine.raw.chunk(2)
        weight: float | Tensor = self.weight
        if self.annealed:
            offset = start[:, None] if isinstance(start, Tensor) else start
            position = offset + torch.arange(given.shape[1], device=given.device)
            weight = self.weight * (position / max(tokens - 1, 1))[..., None]
        guided = given + weight * (given - free)
        log_scale, shift = (guided if part in self.parts else given for part in "ab")
        if affine.activation == "none":
            return replace(affine, raw=shift)
        half = given.shape[-1] // 2
        return replace(affine, raw=torch.cat([log_scale[..., :half], shift[..., half:]], -1))
