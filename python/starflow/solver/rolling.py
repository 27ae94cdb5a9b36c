"""RollingInversion: the inverse of a block that attends to the last frames alone, frame by frame and without end.

The cache holds a fixed number of frames. When it is full, the keys and values of those frames that the next one sees
move to the front, over the others; rotary angles go on as if nothing had moved, and so does everything else: no frame
is ever encoded twice, and each costs the same.

A sweep never looks beyond the frame that is being solved. So tokens do not depend on how much noise is at hand, and
what steers a frame need not be known before it begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow.model import Affine
from starflow.schedules import Schedule, Window
from starflow.solver.decoder import BlockDecoder
from starflow.solver.loop import Inversion, require_finite
from starflow.solver.report import SolveReport, Tally

# Frames that are forgotten together at least: to move the others costs about as much as to read the cache once.
_FEWEST = 4
# Slots whose keys lie together in a cache (csrc/cpu/panels.h) move in one piece.
_PIECE = 32


def rolling_frames(behind: int, frame_tokens: int) -> int:
    """Frames that the cache of a block holds that sees its own frame and `behind` frames before it."""
    aligned = _PIECE // math.gcd(_PIECE, frame_tokens)
    forgotten = max(behind, _FEWEST)
    if aligned <= 2 * _FEWEST:
        forgotten = -(-forgotten // aligned) * aligned
    return behind + forgotten


class RollingInversion(Inversion):
    """A solve that goes on for ever.

    Args:
        model: fresh decoder of a block that attends to the last frames alone; its layout has as many frames as its
            cache holds.
        schedule: how.
        behind: frames that a frame sees before its own, fewer than the cache holds.
        like: (batch, no tokens, channels) in the dtype of the solve.
        judge: makes the decoder that computes the certificate, which has a cache of its own.
        trace: reports have an entry for every sweep, and so grow with the clip.
    """

    def __init__(
        self,
        model: BlockDecoder,
        schedule: Schedule,
        behind: int,
        like: Tensor,
        judge: Callable[[], BlockDecoder],
        *,
        trace: bool,
    ) -> None:
        super().__init__(model, schedule, like)
        self._decoder, self._behind, self._trace = model, behind, trace
        certified = isinstance(schedule, Window) and schedule.certificate
        self._second = judge() if certified else None
        self._certified = 0  # tokens that the judge has seen
        self._error = 0.0 if certified else None
        self._counted = 0  # solved tokens that a report has counted
        self._past: SolveReport | None = None

    @torch.inference_mode()
    def give(self, tokens: Tensor, told: Tensor | None = None) -> None:
        """Appends tokens that are known, before any other.

        Args:
            tokens: whole frames, (batch, tokens, channels).
            told: vectors of these frames (batch, frames, frame_dim), for a block that reads such.

        Raises:
            NotFiniteError: a token is not finite.
        """
        require_finite(tokens, self._progress.before + self.tokens, "given data")
        for index, frame in enumerate(tokens.split(self._decoder.frame_tokens, 1)):
            self._make_room()
            self._tell(None if told is None else told[:, index : index + 1])
            start = self.tokens
            self._x, self._z = torch.cat([self._x, frame], 1), F.pad(self._z, (0, 0, 0, frame.shape[1]))
            for decoder in self._decoders:
                decoder.evaluate(self._x[:, start:-1], start)
            self._first = self._certified = self.tokens
            self._at.frontier = [self._first] * self._x.shape[0]
            self._at.fresh = list(self._at.frontier)

    @torch.inference_mode()
    def solve(self, z: Tensor, told: Tensor | None = None) -> Tensor:
        """Solves the next frame.

        Args:
            z: its noise, (batch, frame tokens, channels).
            told: its vector (batch, 1, frame_dim), for a block that reads such.

        Returns:
            Its tokens, like `z`.

        Raises:
            NotFiniteError: a token is not finite; names it.
        """
        self._make_room()
        self._tell(told)
        self.extend(z)
        self.run(self.tokens)
        self._counted += z.shape[1]
        return self._x[:, -z.shape[1] :]

    @torch.inference_mode()
    def change(self, context: Tensor | None, null: Tensor | None) -> None:
        """Changes the text or labels of the frames to come; arguments as of `BlockDecoder`."""
        self._certify()
        for decoder in self._decoders:
            decoder.change(context, null)

    @torch.inference_mode()
    def unguide(self) -> None:
        """Solves the frames to come without guidance."""
        if self._decoder.guidance is None:
            return
        self._past = self.report()
        self._restart(0)
        # Guesses are made of the conditional half of what was evaluated.
        self._at.kept = None if self._at.kept is None else self._at.kept[:1].clone()
        if isinstance(maps := self._progress.maps, Affine):
            self._progress.maps = replace(maps, guidance=0.0)
        for decoder in self._decoders:
            decoder.unguide()

    @torch.inference_mode()
    def report(self) -> SolveReport:
        """What the solve has done so far."""
        self._certify()
        tally = self._progress
        report = SolveReport(
            tokens=self._counted,
            rows=tally.rows * self._decoder.halves,
            sweeps=len(tally.accepted),
            samples=self._z.shape[0],
            accepted=tuple(tally.accepted) if self._trace else (),
            passes=tuple(tally.passes) if self._trace else (),
            window=min(tally.window, self._decoder.frame_tokens),
            backward_error=self._error,
        )
        return report if self._past is None else self._past.then(report)

    @property
    def _decoders(self) -> tuple[BlockDecoder, ...]:
        """All that have a cache."""
        return (self._decoder,) if self._second is None else (self._decoder, self._second)

    def _tell(self, told: Tensor | None) -> None:
        """Gives the decoders the vector of the next frame, and what stands before its tokens."""
        area = self._decoder.frame_tokens
        before = self._decoder.conditioner.before_next(self.x, area)
        if told is None and before is None:
            return
        for decoder in self._decoders:
            decoder.tell(self.tokens // area, told, before)

    def _make_room(self) -> None:
        """Forgets frames where the cache is full."""
        if self.tokens < self._decoder.tokens:
            return
        self._past = self.report()
        frames = self._decoder.tokens // self._decoder.frame_tokens - self._behind
        for decoder in self._decoders:
            decoder.forget(frames)
        gone, at = frames * self._decoder.frame_tokens, self._at
        self._restart(gone)
        # Copies, since views would keep the forgotten tokens in memory.
        self._x, self._z = self._x[:, gone:].clone(), self._z[:, gone:].clone()
        at.kept = None if at.kept is None else at.kept[:, :, gone:].clone()
        at.frontier, at.fresh = ([token - gone for token in tokens] for tokens in (at.frontier, at.fresh))
        self._certified -= gone
        self._first = max(self._first - gone, 0)

    def _restart(self, gone: int) -> None:
        """Counts anew, after a report, so many tokens further on."""
        tally = self._progress
        self._progress = Tally(window=tally.window, maps=tally.maps, before=tally.before + gone)
        self._counted = 0

    def _certify(self) -> None:
        """Measures the backward error of the tokens that the judge has not seen."""
        begin, end = self._certified, self.final
        if self._second is None or self._error is None or begin == end:
            return
        affine = self._second.evaluate(self._x[:, begin:end], begin)
        seen, _ = affine.encode(self._x[:, begin + 1 : end + 1])
        self._error = max(self._error, float((seen - self._z[:, begin:end]).abs().max()))
        self._certified = end
