"""jacobi_solve: the sliding-window solver of one block in native code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from starflow_ext._affine import Activation
from starflow_ext._load import operators
from starflow_ext._mode import in_reference_mode
from starflow_ext._sweep_reference import jacobi_solve_reference
from starflow_ext.jacobi_sweep import (
    Activations,
    BlockState,
    BlockWeights,
    activations_of,
    block_sizes,
    block_tensors,
)


@dataclass(frozen=True, eq=False)
class SolveProgress:
    """How far a solve has come; ``jacobi_solve`` goes on from here.

    Attributes:
        x: (batch, tokens + 1, channels) float32; row n + 1 holds token n. Tokens that are given, or guessed before
            anything is evaluated, stand there at the start.
        frontier: (batch,) int64 first token of each sample that is not final; all tensors on one device.
        fresh: (batch,) int64 first token of each sample that was never evaluated.
        kept: (halves, batch, tokens, out channels) float32: the network's last output for each token.
    """

    x: Tensor
    frontier: Tensor
    fresh: Tensor
    kept: Tensor

    @classmethod
    def begin(cls, x: Tensor, first: int, *, halves: int, out_channels: int) -> SolveProgress:
        """Start at token ``first`` of all samples; the other arguments as the attributes."""
        batch, tokens = x.shape[0], x.shape[1] - 1
        frontier = torch.full((batch,), first, device=x.device)
        return cls(x, frontier, frontier.clone(), x.new_zeros(halves, batch, tokens, out_channels))


class SweepCount(NamedTuple):
    """What a call did: rows it evaluated, tokens that each sweep made final, and the first one that is not finite."""

    rows: int
    accepted: tuple[int, ...]
    bad: tuple[int, int] | None


def jacobi_solve(
    weights: BlockWeights,
    state: BlockState,
    progress: SolveProgress,
    z: Tensor,
    *,
    first: int,
    first_token: int,
    frame_tokens: int,
    window: int,
    tolerance: float,
    activation: Activation = "softplus",
    soft_clip: float = 0.0,
    guidance: float = 0.0,
    guided: str = "gaussian",
    activations: Activations | None = None,
    most_sweeps: int = 64,
) -> SweepCount:
    """Sweep until every token is final, or ``most_sweeps`` times.

    A sweep evaluates, for each sample, the ``window`` tokens from its frontier on. A token becomes final when all
    tokens before it in the window moved by less than ``tolerance`` in units of their own scale; the first always does.
    With tolerance 0 that is token-by-token decoding, to the last bit, for any window; and a sample's result never
    depends on its batch.

    On CUDA the device decides what is accepted and whether there is another sweep; the host waits once, for the end of
    the call. Every sample has as many rows in each sweep there, until all are done.

    Args:
        weights, state: the block; with guidance, the caches hold the conditional samples before the unconditional ones.
        progress: where to go on; written.
        z: (batch, tokens, channels) float32 noise.
        first: first token that is solved for. first_token: the token that slot 0 of the network predicts.
        frame_tokens: tokens of a frame; guesses come from the token one frame earlier.
        window: rows of a sample in a sweep.
        tolerance: of the change of a token.
        activation, soft_clip: of ``jacobi_update``.
        guidance: weight; above 0 there are two halves. guided: "gaussian" as in ``jacobi_update``, or the parts that
            are extrapolated: "a" the log-scale, "b" the shift, with "+" for a weight that grows along the clip.
        activations: of ``jacobi_sweep``.
        most_sweeps: after so many it returns, for the caller to look at what is final or to be interrupted.

    Returns:
        What was done; ``bad`` is (sample, token) where a final token is NaN or infinite, which ends the solve.

    Raises:
        RuntimeError: if a shape, a dtype or an option is wrong; on CUDA also while the current stream is captured into
            a graph.

    Reference:
        Song et al., Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving (2021); the acceptance
        by token and the guess are this project's (docs/solver.md).
    """
    if in_reference_mode():
        done = jacobi_solve_reference(
            weights,
            state,
            progress,
            z,
            first=first,
            first_token=first_token,
            frame_tokens=frame_tokens,
            window=window,
            tolerance=tolerance,
            activation=activation,
            soft_clip=soft_clip,
            guidance=guidance,
            guided=guided,
            most_sweeps=most_sweeps,
        )
        return SweepCount(*done)
    report: Tensor = _native(
        progress.x,
        progress.frontier,
        progress.fresh,
        progress.kept,
        state.keys,
        state.values,
        z,
        block_tensors(weights, state),
        block_sizes(weights, state),
        activations_of(weights, activations),
        [first, first_token, frame_tokens, window],
        tolerance,
        activation,
        soft_clip,
        guidance,
        guided,
        most_sweeps,
    )
    rows, sample, token, *accepted = report.tolist()
    return SweepCount(rows, tuple(accepted), None if token < 0 else (sample, token))


_native = operators().jacobi_solve.default
