"""jacobi_solve: the sliding-window solver of one block in native code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from starflow_ext._affine import ScaleActivation, check_soft_clip
from starflow_ext._check import refuse_types, require, types_of
from starflow_ext._load import operators
from starflow_ext._mode import in_reference_mode
from starflow_ext._options import SCALE_ACTIVATIONS, check_name, code_of
from starflow_ext.jacobi_sweep import jacobi_sweep_reference
from starflow_ext.jacobi_update import jacobi_update_reference
from starflow_ext.linear import ProductInput
from starflow_ext.sweep_block import (
    BlockState,
    BlockWeights,
    block_sizes,
    block_tensors,
    product_input_of,
    require_no_derivative,
)
from starflow_ext.window_sweep import WindowProgress, sweep_window


@dataclass(frozen=True, eq=False)
class SolveProgress:
    """How far a solve has come; ``jacobi_solve`` goes on from here.

    Attributes:
        x: (batch, tokens + 1, channels) float32; row n + 1 holds token n. Tokens that are given, or guessed before
            the first evaluation, are there at the start.
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
        """Start at token ``first`` of all samples; the other arguments are sizes of the attributes."""
        batch, tokens = x.shape[0], x.shape[1] - 1
        frontier = torch.full((batch,), first, device=x.device)
        return cls(x, frontier, frontier.clone(), x.new_zeros(halves, batch, tokens, out_channels))


class Guided(NamedTuple):
    """The option ``guided``: whether and which outputs are extrapolated, and whether its weight grows over the clip."""

    linear: bool
    log_scale: bool
    shift: bool
    annealed: bool

    @classmethod
    def of(cls, guided: str) -> Guided:
        """Read the option.

        Raises:
            RuntimeError: if it is neither "gaussian" nor made of "a", "b" and "+", with one of the first two.
        """
        gaussian = guided == "gaussian"
        known = gaussian or (set(guided) <= set("ab+") and guided.strip("+") != "")
        expected = '"gaussian", or "a", "b" or both, with "+" for a weight that grows along the clip'
        require(known, "jacobi_solve", "guided is", f'"{guided}"', expected)
        return cls(not gaussian, not gaussian and "a" in guided, not gaussian and "b" in guided, "+" in guided)


class SweepCount(NamedTuple):
    """Rows that a call evaluated, tokens that each of its sweeps made final, and the first token that is not finite."""

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
    activation: ScaleActivation = "softplus",
    soft_clip: float = 0.0,
    guidance: float = 0.0,
    guided: str = "gaussian",
    product_input: ProductInput | None = None,
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
        progress: the state that the solve goes on from; written.
        z: (batch, tokens, channels) float32 noise.
        first: first token that is solved for. first_token: the token that slot 0 of the network predicts.
        frame_tokens: tokens of a frame; guesses come from the token one frame earlier.
        window: rows of a sample in a sweep.
        tolerance: a token's change, in units of its scale, must be below it.
        activation, soft_clip: as of ``jacobi_update``.
        guidance: its weight; above 0 there are two halves.
        guided: "gaussian" as in ``jacobi_update``, or the parts that are extrapolated: "a" the log-scale, "b" the
            shift, with "+" for a weight that grows along the clip.
        product_input: as of ``jacobi_sweep``.
        most_sweeps: sweeps after which the call returns, so that the caller can use final tokens or be interrupted.

    Returns:
        Counts of this call; ``bad`` is (sample, token) where a final token is NaN or infinite, which ends the solve.

    Raises:
        RuntimeError: if a type, a shape, a dtype or an option is wrong or a derivative is asked for; on CUDA also while
            the current stream is captured into a graph.

    Reference:
        Song et al., Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving (2021); the acceptance
        by token and the guess are this project's (docs/solver.md).
    """
    where = (weights, state, progress, z, first, first_token, frame_tokens, window, tolerance)
    given = (*where, activation, soft_clip, guidance, guided, product_input, most_sweeps)
    if not all(map(isinstance, given, _TYPES)):
        refuse_types("jacobi_solve", jacobi_solve, given)
    require_no_derivative("jacobi_solve", weights, state, z, progress.x)
    if in_reference_mode():
        return jacobi_solve_reference(
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
    accepted, rows, sample, token = _native(
        progress.x,
        progress.frontier,
        progress.fresh,
        progress.kept,
        state.keys,
        state.values,
        z,
        block_tensors(weights, state),
        block_sizes(weights, state),
        product_input_of("jacobi_solve", weights, product_input),
        first,
        first_token,
        frame_tokens,
        window,
        tolerance,
        code_of("jacobi_solve", "activation", activation, SCALE_ACTIVATIONS),
        soft_clip,
        guidance,
        *Guided.of(guided),
        most_sweeps,
    )
    return SweepCount(rows, tuple(accepted.tolist()), None if token < 0 else (sample, token))


# The types that each argument may have.
_TYPES: Final = types_of(jacobi_solve)

_native = operators().jacobi_solve.default


def jacobi_solve_reference(
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
    activation: str,
    soft_clip: float,
    guidance: float,
    guided: str,
    most_sweeps: int,
    sweep: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> SweepCount:
    """Compute ``jacobi_solve`` by the rule of ``window_sweep``; arguments and result as there.

    ``sweep`` runs in place of ``jacobi_sweep``, on the network's input, the first slots of the windows and the first
    slots that may be written.
    """
    _check_options(first, first_token, frame_tokens, window, tolerance, activation, soft_clip, guidance)
    how = Guided.of(guided)
    batch, total, channels = z.shape
    halves = progress.kept.shape[0]

    def evaluate(previous: Tensor, start: int | Tensor, final: Tensor | None) -> Tensor:
        slots = torch.as_tensor(start, device=z.device).expand(batch) - first_token + state.text_tokens
        keep = torch.zeros_like(slots) if final is None else final - first_token + state.text_tokens
        call = previous.repeat(halves, 1, 1), slots.repeat(halves), keep.repeat(halves)
        return jacobi_sweep_reference(weights, state, *call, False) if sweep is None else sweep(*call)

    def update_(x: Tensor, noise: Tensor, raw: Tensor, tokens: Tensor) -> Tensor:
        if guidance == 0.0 or not how.linear:
            return jacobi_update_reference(x, noise, raw, activation, soft_clip, guidance)
        given, free = raw.chunk(2)
        weight = guidance * (tokens / max(total - 1, 1) if how.annealed else torch.ones_like(tokens, dtype=raw.dtype))
        moved = given + weight[..., None] * (given - free)
        parts = (how.shift,) if activation == "none" else (how.log_scale, how.shift)
        pieces = zip(given.split(channels, -1), moved.split(channels, -1), parts, strict=True)
        combined = torch.cat([new if extrapolated else old for old, new, extrapolated in pieces], -1)
        return jacobi_update_reference(x, noise, combined, activation, soft_clip, 0.0)

    at = WindowProgress(progress.frontier.tolist(), progress.fresh.tolist(), progress.kept)
    count = SweepCount(0, (), None)
    while len(count.accepted) < most_sweeps and min(at.frontier, default=total) < total and count.bad is None:
        done = sweep_window(
            evaluate,
            update_,
            progress.x,
            z,
            at,
            first=first,
            frame_tokens=frame_tokens,
            size=window,
            tolerance=tolerance,
        )
        count = SweepCount(count.rows + halves * done.rows, (*count.accepted, done.accepted), done.bad)
    progress.frontier.copy_(torch.tensor(at.frontier))
    progress.fresh.copy_(torch.tensor(at.fresh))
    return count


def _check_options(
    first: int,
    first_token: int,
    frame_tokens: int,
    window: int,
    tolerance: float,
    activation: str,
    soft_clip: float,
    guidance: float,
) -> None:
    """Raise what the native op raises for the same mistake."""
    op = "jacobi_solve"
    check_name(op, "activation", activation, SCALE_ACTIVATIONS)
    require(first_token >= 0, op, "first_token is", first_token, "at least 0")
    require(first >= first_token, op, "first is", first, f"at least first_token, {first_token}")
    for name, count in (("frame_tokens", frame_tokens), ("window", window)):
        require(count >= 1, op, f"{name} is", count, "at least 1")
    for name, value in (("tolerance", tolerance), ("guidance", guidance)):
        require(0.0 <= value < float("inf"), op, f"{name} is", f"{value:g}", "a finite number >= 0")
    check_soft_clip(op, soft_clip)
