"""The rule of the sliding window in plain torch: one sweep over the windows of a batch.

``jacobi_solve`` is tested against it, and models decode by it where no native kernel runs. docs/solver.md states the
rule in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from starflow_ext._options import CONSTANTS

# A provisional token of a larger magnitude is taken for divergence, not data.
WILD: Final = CONSTANTS["wild"]

# Evaluates windows. Takes the network's input (batch, width, channels), each row the token before the one that it
# predicts; the first tokens of the windows, one number or one for each sample; and the first token of each sample whose
# cached keys and values may be overwritten, or None for all. Returns the network's output (halves * batch, width, out
# channels).
Evaluate = Callable[[Tensor, "int | Tensor", "Tensor | None"], Tensor]
# Overwrites tokens (batch, width, channels) by the affine map of their noise under the network's output. Takes the
# tokens, their noise, the output, and the numbers of the tokens (batch or 1, width). Returns the largest change of each
# token in units of its scale, (batch, width).
Update = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Indices of a window in (batch, tokens, ...).
Places = tuple[slice, slice] | tuple[Tensor, Tensor]


@dataclass
class WindowProgress:
    """State of a solve beside its tokens, from which it can go on.

    Attributes:
        frontier: first token of each sample that is not final.
        fresh: first token of each sample that was never evaluated.
        kept: (halves, batch, tokens, out channels) the network's last output for each token; None before the first.
    """

    frontier: list[int]
    fresh: list[int]
    kept: Tensor | None = None

    def clone(self) -> WindowProgress:
        """Return a copy that later sweeps do not change."""
        kept = None if self.kept is None else self.kept.clone()
        return WindowProgress(list(self.frontier), list(self.fresh), kept)


class Swept(NamedTuple):
    """Rows that a sweep evaluated in each half, tokens that it made final, and the first that is not finite."""

    rows: int
    accepted: int
    bad: tuple[int, int] | None


def sweep_window(
    evaluate: Evaluate,
    update_: Update,
    x: Tensor,
    z: Tensor,
    at: WindowProgress,
    *,
    first: int,
    frame_tokens: int,
    size: int,
    tolerance: float,
    guesses: bool = True,
) -> Swept:
    """Evaluate the window of each sample once, and accept what is final.

    Args:
        evaluate: the network.
        update_: its affine map.
        x: (batch, tokens + 1, channels); row n + 1 holds token n. Written.
        z: (batch, tokens, channels) noise.
        at: state of the solve; written.
        first: first token that is solved for.
        frame_tokens: tokens of a frame; guesses come from the token one frame earlier.
        size: rows of a window.
        tolerance: a token's change, in units of its scale, must be below it.
        guesses: whether outputs are kept for guesses; False where there is no later frame.

    Returns:
        The counts of this sweep.
    """
    # Frontiers are kept on the host, which reads them in every sweep: tensor ops on them would take as long as calls of
    # a small model.
    batch, total, frontier = z.shape[0], z.shape[1], at.frontier
    low = min(frontier)
    width = min(size, total - low)
    # A sample ahead of the others, near its end, computes some accepted tokens again, without effect: their cached
    # keys and values stay, so that a sample does not depend on the batch that it is in.
    starts = [low] * batch if low + width == total else [min(token, total - width) for token in frontier]
    again = starts != frontier
    here, after = (places([token + shift for token in starts], width, z.device) for shift in (0, 1))
    tokens = token_numbers(starts, width, z.device)
    if at.kept is not None and max(starts) + width > min(at.fresh):
        _guess_(update_, x, z, tokens, at.kept, at.fresh, first, frame_tokens)
    _tame_(x, z, here, tokens, frontier)
    begin = starts[0] if _together(starts) else torch.tensor(starts, device=z.device)
    final = torch.tensor(frontier, device=z.device) if again else None
    raw = evaluate(x[here], begin, final)
    moved = x[after].clone()
    change = update_(moved, z[here], raw, tokens)
    accepted = change < tolerance
    done = None
    if final is not None:
        done = (tokens < final[:, None])[..., None]
        moved = torch.where(done, x[after], moved)
        accepted |= done[..., 0]
    x[after] = moved
    if guesses:
        halves = raw.view(raw.shape[0] // batch, batch, *raw.shape[1:])
        if at.kept is None:
            at.kept = raw.new_zeros(halves.shape[0], batch, total, raw.shape[-1])
        for kept, half in zip(at.kept, halves, strict=True):
            kept[here] = half if done is None else torch.where(done, kept[here], half)
    if min(at.fresh) < max(starts) + width:
        at.fresh = [max(token, start + width) for token, start in zip(at.fresh, starts, strict=True)]
    # A token is final when all before it in the window moved less than the tolerance; NaN never does.
    settled = accepted.cumprod(1).sum(1)
    reached: list[int] = (settled.add_(1).clamp_(max=width) + begin).tolist()
    bad = None
    if not math.isfinite(float(change.amax())):
        # Only the last accepted token of a sample can be NaN or infinite: those before it moved by a finite number.
        for sample, (start, token) in enumerate(zip(starts, reached, strict=True)):
            if bad is None and not math.isfinite(float(change[sample, token - 1 - start])):
                bad = sample, token - 1
    at.frontier = reached
    return Swept(batch * width, sum(reached) - sum(frontier), bad)


def _guess_(
    update_: Update,
    x: Tensor,
    z: Tensor,
    tokens: Tensor,
    kept: Tensor,
    fresh: list[int],
    first: int,
    frame_tokens: int,
) -> None:
    """Place tokens that were never evaluated: shift and scale of the nearest earlier frame, their own noise."""
    ahead = tokens - torch.tensor(fresh, device=z.device)[:, None]
    source = tokens - (torch.div(ahead, frame_tokens, rounding_mode="floor") + 1) * frame_tokens
    wanted = (ahead >= 0) & (source >= first)
    if not bool(wanted.any()):
        return
    rows = torch.arange(len(fresh), device=z.device)[:, None]
    guess = x[rows, tokens + 1]
    update_(guess, z[rows, tokens], kept[:, rows, source.clamp(min=0)].flatten(0, 1), tokens)
    x[rows, tokens + 1] = torch.where(wanted[..., None], guess, x[rows, tokens + 1])


def _tame_(x: Tensor, z: Tensor, here: Places, tokens: Tensor, frontier: list[int]) -> None:
    """Replace tokens in the network's input that are not final, where they are not finite or huge, by their noise.

    A masked NaN still reaches every row of the window, as 0 * NaN. Such a token is only a guess, so that any value may
    stand in its place.
    """
    read = x[here]
    size = read.abs()
    if float(size.amax()) < WILD:
        return
    provisional = tokens > torch.tensor(frontier, device=z.device)[:, None]
    noise = z[torch.arange(len(frontier), device=z.device)[:, None], (tokens - 1).clamp(min=0)]
    x[here] = torch.where(provisional[..., None] & ~(size < WILD), noise, read)


def _together(starts: list[int]) -> bool:
    """Tell whether all samples start at one token."""
    return starts.count(starts[0]) == len(starts)


def places(starts: list[int], width: int, device: torch.device) -> Places:
    """Return indices of ``width`` tokens from each sample's start on; slices where all samples start together."""
    if _together(starts):
        return slice(None), slice(starts[0], starts[0] + width)
    return torch.arange(len(starts), device=device)[:, None], token_numbers(starts, width, device)


def token_numbers(starts: list[int], width: int, device: torch.device) -> Tensor:
    """Return the numbers of the tokens of a window, (batch, width); (1, width) where all start together."""
    if _together(starts):
        return torch.arange(starts[0], starts[0] + width, device=device)[None]
    return torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
