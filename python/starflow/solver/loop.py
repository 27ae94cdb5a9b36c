"""The one solver that owns every inverse: `x[n] = shift(x[< n]) + scale(x[< n]) * z[n]` for all n.

Three schedules of the same loop: `Sequential` (token by token), `Chunks` (the published fixed chunks with their
stopping rule) and `Window` (a sliding window that accepts token by token, the default).

The window holds the tokens behind the accepted prefix. A sweep evaluates all of it at once with the prefix in the K/V
cache. The first token is then exact, since all that it reads is final; a later token is accepted when every token
before it in the window moved, since its own last evaluation, by less than the tolerance in units of its own scale.
The window slides past what was accepted and is filled up by guesses: shift and scale of the token one frame earlier,
and the token's own noise.

Every x that is returned is the exact inverse of some noise z'; `certify` measures max |z' - z|, in units of the
noise's standard deviation. It is more telling than the distance to the token-by-token result: where a small change of z
changes x a lot, rounding in float32 alone decides what token-by-token decoding returns.

Reference: Song et al., Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving (2021), for
Jacobi iteration; Gu et al., STARFlow-V (2025), for chunks; the acceptance rule and the guess are this project's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow.schedules import Chunks, Schedule, Sequential, Window
from starflow.solver.protocol import Autoregressive
from starflow.solver.report import SolveReport, Tally, not_finite
from starflow.solver.window import sweep_once
from starflow_ext.jacobi_solve import SolveProgress
from starflow_ext.window_sweep import WILD, WindowProgress

# Most sweeps of one native call: between calls Ctrl-C is seen.
_MOST_SWEEPS = 64


class Inversion:
    """A solve that goes on while noise comes in and tokens go out.

    In native code, on one level of the processor, tokens do not depend on the pieces that their noise comes in, to the
    last bit: what is computed of a token depends on no later one, and sweeps of a window that reached beyond the noise
    at hand are taken back and done again when there is more. Only `Chunks` are cut by where a piece ends.

    Args:
        model: fresh decoder of a block (its cache is written).
        schedule: how.
        known: first tokens that are given, (batch, known tokens, channels), kept bit for bit; their dtype is that of
            the solve.
        judge: makes the decoder that computes the certificate, for a `model` of lower precision, or one that goes on
            after a report; None takes `model` itself.
        before: the token before the first, (batch, 1, channels), of a window that goes on from another one; None where
            the first token is that of a clip. Only the guesses of `Chunks` depend on it.

    Raises:
        ValueError: more tokens than the model has.
        NotFiniteError: a token is not finite.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Autoregressive,
        schedule: Schedule,
        known: Tensor,
        judge: Callable[[], Autoregressive] | None = None,
        before: Tensor | None = None,
    ) -> None:
        count = known.shape[1]
        require_finite(known, 0, "given data")
        self._model, self._schedule, self._judge = model, schedule, judge
        # Row n + 1 holds token n, so that rows n .. are what the network reads to predict the tokens n ..
        first = known.new_zeros(known.shape[0], 1, known.shape[2]) if before is None else before
        self._x = torch.cat([first, known], 1)
        self._goes_on = before is not None
        self._z = torch.zeros_like(known)
        self._first = max(count, model.first_token)
        if count > model.first_token:
            model.evaluate(self._x[:, model.first_token : count], model.first_token)
        self._size = 1
        if isinstance(schedule, Window):
            self._size = schedule.size or model.default_window(known.shape[0], self._first)
        self._at = WindowProgress([self._first] * known.shape[0], [self._first] * known.shape[0])
        self._before_the_end: tuple[WindowProgress, Tensor] | None = None
        self._more = False
        self._progress = Tally()

    @property
    def tokens(self) -> int:
        """Tokens so far: given ones, and those whose noise is at hand."""
        return self._z.shape[1]

    @property
    def final(self) -> int:
        """Tokens that will not change any more, in all samples."""
        return min(*self._at.frontier, self.tokens)

    @property
    def x(self) -> Tensor:
        """(batch, tokens, channels), of which the first `final` are solved."""
        return self._x[:, 1:]

    @property
    def z(self) -> Tensor:
        """Noise like `x`; zeros at given tokens."""
        return self._z

    @torch.inference_mode()
    def extend(self, z: Tensor, *, more: bool = False) -> None:
        """Appends noise.

        Args:
            z: (batch, further tokens, channels).
            more: whether there may be more noise after this.

        Raises:
            ValueError: a shape that does not fit.
            NotFiniteError: noise that is not finite.
        """
        left = self._model.tokens - self.tokens
        if z.dim() != 3 or z.shape[::2] != self._z.shape[::2] or z.shape[1] > left:
            batch, _, channels = self._z.shape
            raise ValueError(
                f"solve: z has shape {list(z.shape)}, expected ({batch}, at most {left} further tokens, {channels})"
            )
        require_finite(z, self._progress.before + self.tokens, "noise")
        if self._before_the_end is not None:
            self._at, self._x = self._before_the_end
            self._before_the_end = None
        new = max(self.tokens, self._first)
        self._x, self._z = torch.cat([self._x, z], 1), torch.cat([self._z, z], 1)
        if isinstance(self._schedule, Window):
            guess = self._model.initial_guess(self._z[:, new:])
            # The guess also counts as the earlier value of a token in its first evaluation.
            self._x[:, new + 1 :] = torch.where(guess.abs() < WILD, guess, self._z[:, new:])
        if self._at.kept is not None:
            self._at.kept = F.pad(self._at.kept, (0, 0, 0, z.shape[1]))
        self._more = more

    @torch.inference_mode()
    def run(self, until: int) -> int:
        """Sweeps until `until` tokens are final, of those whose noise is at hand; returns how many are.

        Raises:
            NotFiniteError: a token is not finite; names it, as soon as it is met.
        """
        until = min(until, self.tokens)
        model, x, z, at, progress = self._model, self._x, self._z, self._at, self._progress
        while self.final < until:
            if isinstance(self._schedule, Chunks):
                _chunk(model, x, z, self._schedule, at, progress, goes_on=self._goes_on)
            elif isinstance(self._schedule, Sequential):
                _token(model, x, z, at, progress)
            else:
                if self._more and self._before_the_end is None and max(at.frontier) + self._size > self.tokens:
                    self._before_the_end = at.clone(), x.clone()
                watched = until < self.tokens or (self._more and self._before_the_end is None)
                sweeps = 1 if watched else _MOST_SWEEPS
                _window(model, x, z, self._first, self._size, self._schedule.tolerance, sweeps, at, progress)
        return self.final

    def report(self) -> SolveReport:
        """What the solve has done so far. Sweeps that were taken back and done again count each time."""
        report = SolveReport(
            tokens=max(self.final - self._first, 0),
            rows=self._progress.rows * self._model.halves,
            sweeps=len(self._progress.accepted),
            samples=self._z.shape[0],
            accepted=tuple(self._progress.accepted),
            passes=tuple(self._progress.passes),
            window=self._progress.window,
        )
        if isinstance(self._schedule, Window) and self._schedule.certificate:
            model = self._model if self._judge is None else self._judge()
            solved = self.final
            error = certify(model, self.x[:, :solved], self._z[:, :solved], self._first)
            report = replace(report, backward_error=error)
        return report


@torch.inference_mode()
def invert(
    model: Autoregressive,
    z: Tensor,
    schedule: Schedule,
    known: Tensor | None = None,
    judge: Callable[[], Autoregressive] | None = None,
) -> tuple[Tensor, SolveReport]:
    """Finds x with `z = (x - shift(x)) / scale(x)`.

    Args:
        model: fresh decoder of a block (its cache is written).
        z: noise (batch, tokens, channels), float32 or float64; what stands at known tokens is ignored.
        schedule: how.
        known: first tokens that are given, (batch, known tokens, channels): kept bit for bit.
        judge: makes the decoder that computes the certificate, for a `model` of lower precision; None takes `model`
            itself.

    Returns:
        x like `z`, and the report.

    Raises:
        ValueError: shapes that do not fit.
        NotFiniteError: a token is not finite; names it, as soon as it is met.
    """
    if z.dim() != 3 or z.shape[1] != model.tokens:
        raise ValueError(f"solve: z has shape {list(z.shape)}, expected (batch, {model.tokens}, channels)")
    count = 0 if known is None else known.shape[1]
    if known is not None and (count > z.shape[1] or known.shape[::2] != z.shape[::2]):
        raise ValueError(f"solve: known has shape {list(known.shape)}, expected at most {list(z.shape)} tokens of z")
    solving = Inversion(model, schedule, z[:, :0] if known is None else known.to(z.dtype), judge)
    solving.extend(z[:, count:])
    solving.run(z.shape[1])
    return solving.x, solving.report()


@torch.inference_mode()
def certify(model: Autoregressive, x: Tensor, z: Tensor, first: int = 0) -> float:
    """Backward error of a solution: max |z' - z| with z' from one parallel pass over the finished x.

    Args:
        model: decoder of the block; its cache is overwritten.
        x, z: (batch, tokens, channels).
        first: tokens before it were given and have no noise.
    """
    first = max(first, model.first_token)
    if first >= x.shape[1]:
        return 0.0
    padded = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
    affine = model.evaluate(padded[:, model.first_token : -1], model.first_token)
    seen, _ = affine.encode(x[:, model.first_token :])
    return float((seen - z[:, model.first_token :])[:, first - model.first_token :].abs().max())


def require_finite(tokens: Tensor, first: int, what: str) -> None:
    """Raises `NotFiniteError` for the first token of (batch, tokens, channels) that is not finite."""
    if math.isfinite(tokens.sum(dtype=torch.float64)):
        return
    bad = ~tokens.isfinite().all(-1)
    # The sum of large float64 may overflow.
    if bool(bad.any()):
        sample, token = bad.nonzero()[0].tolist()
        raise not_finite(what, sample, first + token)


def _token(model: Autoregressive, x: Tensor, z: Tensor, at: WindowProgress, progress: Tally) -> None:
    """Solves the next token of all samples."""
    token = at.frontier[0]
    affine = model.evaluate(x[:, token : token + 1], token)
    new = affine.decode(z[:, token : token + 1])
    require_finite(new, progress.before + token, "solution")
    x[:, token + 1 : token + 2] = new
    progress.rows += z.shape[0]
    progress.accepted.append(z.shape[0])
    at.frontier = [token + 1] * z.shape[0]


def _chunk(
    model: Autoregressive,
    x: Tensor,
    z: Tensor,
    schedule: Chunks,
    at: WindowProgress,
    progress: Tally,
    *,
    goes_on: bool,
) -> None:
    """Solves the next chunk of all samples."""
    frame, total, start = model.frame_tokens, z.shape[1], at.frontier[0]
    # As in the published code the first chunk of the second frame of a clip is short and has no guess.
    later = goes_on or progress.before + start > frame
    size = min(4 * schedule.block if later else schedule.block, total - start)
    window = slice(start + 1, start + size + 1)
    progress.window = max(progress.window, size)
    for sweep in range(schedule.max_iterations):
        read = start - frame if sweep == 0 and later else start
        affine = model.evaluate(x[:, read : read + size], start)
        new = affine.decode(z[:, start : start + size])
        change = (new - x[:, window]).square().mean() / new.square().mean()
        x[:, window] = new
        progress.rows += size * z.shape[0]
        progress.accepted.append(0)
        if change < schedule.threshold:
            break
    require_finite(new, progress.before + start, "solution")
    progress.passes.append(sweep + 1)
    progress.accepted[-1] = size * z.shape[0]
    at.frontier = [start + size] * z.shape[0]


def _window(
    model: Autoregressive,
    x: Tensor,
    z: Tensor,
    first: int,
    size: int,
    tolerance: float,
    most_sweeps: int,
    at: WindowProgress,
    progress: Tally,
) -> None:
    """Sweeps the window: up to `most_sweeps` times in native code, once in plain torch."""
    progress.window = max(progress.window, min(size, z.shape[1] - first))
    native = model.native_window if z.dtype == torch.float32 else None
    if native is None:
        sweep_once(model, x, z, first, size, tolerance, at, progress)
        return
    done = native.begin(x, first)
    if at.kept is not None:
        frontier, fresh = (torch.tensor(tokens, device=x.device) for tokens in (at.frontier, at.fresh))
        done = SolveProgress(x, frontier, fresh, at.kept)
    count = native.sweep(done, z, first, size, tolerance, most_sweeps)
    progress.rows += count.rows // model.halves
    progress.accepted += count.accepted
    if count.bad is not None:
        raise not_finite("solution", count.bad[0], progress.before + count.bad[1])
    at.frontier, at.fresh, at.kept = done.frontier.tolist(), done.fresh.tolist(), done.kept
