"""The state of a solve between two sweeps, and its counters."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from starflow.solver.places import Places, token_numbers
from starflow.solver.protocol import AffineMaps


@dataclass
class Tally:
    """What a solve has done so far.

    Attributes:
        rows: evaluations of a token, all samples.
        accepted: tokens accepted in each sweep, all samples.
        passes: sweeps of each chunk.
        window: most rows of a sample in a call.
    """

    rows: int = 0
    accepted: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    window: int = 1


@dataclass
class Standing:
    """Everything beside x that a solve needs to go on.

    Attributes:
        frontier: first token of each sample that is not final.
        fresh: first token of each sample that was never evaluated.
        kept: the network's last outputs; None before the first.
    """

    frontier: list[int]
    fresh: list[int]
    kept: KeptOutputs | Tensor | None = None

    def clone(self) -> Standing:
        """A copy that later sweeps leave alone."""
        return Standing(list(self.frontier), list(self.fresh), None if self.kept is None else self.kept.clone())


class KeptOutputs:
    """The network's last output for each token, from which tokens one frame later are guessed."""

    def __init__(self, affine: AffineMaps, first: int, frame: int, batch: int, total: int) -> None:
        self._like, self._first, self._frame = affine, first, frame
        self._raw = affine.raw.new_zeros(affine.raw.shape[0] // batch, batch, total, affine.raw.shape[-1])

    def clone(self) -> KeptOutputs:
        """A copy that later sweeps leave alone."""
        copied = copy.copy(self)
        copied._raw = self._raw.clone()
        return copied

    def keep(self, affine: AffineMaps, here: Places) -> None:
        """Keeps the outputs of a window."""
        halves = affine.raw.view(self._raw.shape[0], self._raw.shape[1], *affine.raw.shape[1:])
        for kept, raw in zip(self._raw, halves, strict=True):
            kept[here] = raw

    def guess_(self, x: Tensor, z: Tensor, starts: list[int], width: int, fresh: list[int]) -> None:
        """Guesses tokens that were never evaluated: shift and scale of an earlier frame, and their own noise."""
        tokens = token_numbers(starts, width, z.device)
        ahead = tokens - torch.tensor(fresh, device=z.device)[:, None]
        source = tokens - (torch.div(ahead, self._frame, rounding_mode="floor") + 1) * self._frame
        wanted = (ahead >= 0) & (source >= self._first)
        if not bool(wanted.any()):
            return
        rows = torch.arange(len(starts), device=z.device)[:, None]
        raw = self._raw[:, rows, source.clamp(min=0)].flatten(0, 1)
        guess = x[rows, tokens + 1]
        self._like.like(raw).update_(guess, z[rows, tokens])
        x[rows, tokens + 1] = torch.where(wanted[..., None], guess, x[rows, tokens + 1])
