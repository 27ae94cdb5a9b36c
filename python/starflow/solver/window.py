"""The window rule in plain torch: one sweep over the tokens behind the accepted prefix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from starflow.solver.places import Places, places, together, token_numbers
from starflow.solver.protocol import Autoregressive
from starflow.solver.report import not_finite
from starflow.solver.state import KeptOutputs, Standing, Tally


def sweep_window(
    model: Autoregressive,
    x: Tensor,
    z: Tensor,
    first: int,
    size: int,
    tolerance: float,
    at: Standing,
    progress: Tally,
) -> None:
    """One sweep of the window in plain torch."""
    # Frontiers are lists on the host, since each sweep branches on them; a call of a small model is as short as this
    # bookkeeping.
    batch, total, frontier = z.shape[0], z.shape[1], at.frontier
    low = min(frontier)
    width = min(size, total - low)
    # A sample ahead of the others, near its end, computes some accepted tokens again, without effect: what was
    # cached of them stays, so that a sample does not depend on the batch that it is in.
    starts = [low] * batch if low + width == total else [min(token, total - width) for token in frontier]
    again = starts != frontier
    here, after = (places([token + shift for token in starts], width, z.device) for shift in (0, 1))
    if isinstance(at.kept, KeptOutputs) and max(starts) + width > min(at.fresh):
        at.kept.guess_(x, z, starts, width, at.fresh)
    _tame_(x, z, here, starts, width, frontier)
    begin = starts[0] if together(starts) else torch.tensor(starts, device=z.device)
    final = torch.tensor(frontier, device=z.device) if again else None
    affine = model.evaluate(x[here], begin, final)
    moved = x[after].clone()
    change = affine.update_(moved, z[here])
    accepted = change < tolerance
    if final is not None:
        done = token_numbers(starts, width, z.device) < final[:, None]
        moved = torch.where(done[..., None], x[after], moved)
        accepted |= done
    x[after] = moved
    if model.frame_tokens < model.tokens - first:
        if at.kept is None:
            at.kept = KeptOutputs(affine, first, model.frame_tokens, batch, model.tokens)
        assert isinstance(at.kept, KeptOutputs)
        at.kept.keep(affine, here)
    if min(at.fresh) < max(starts) + width:
        at.fresh = [max(token, start + width) for token, start in zip(at.fresh, starts, strict=True)]
    # A token is final when all before it in the window moved less than the tolerance; NaN never does.
    settled = accepted.cumprod(1).sum(1)
    reached: list[int] = (settled.add_(1).clamp_(max=width) + begin).tolist()
    if not math.isfinite(float(change.amax())):
        # Only the last accepted token can be NaN or infinite: the others moved by a finite amount.
        for sample, (start, token) in enumerate(zip(starts, reached, strict=True)):
            if not math.isfinite(float(change[sample, token - 1 - start])):
                raise not_finite("solution", sample, token - 1)
    progress.rows += batch * width
    progress.accepted.append(sum(reached) - sum(frontier))
    at.frontier = reached


# Provisional tokens beyond this are divergence, not data.
WILD = 1e6


def _tame_(x: Tensor, z: Tensor, here: Places, starts: list[int], width: int, frontier: list[int]) -> None:
    """Replaces provisional tokens that are not finite, or far off, by their noise before the network reads them.

    A masked NaN still reaches every row of the window, as 0 * NaN. Any value in its place is as right, for it is only a
    guess.
    """
    read = x[here]
    size = read.abs()
    if float(size.amax()) < WILD:
        return
    tokens = token_numbers(starts, width, z.device)
    provisional = tokens > torch.tensor(frontier, device=z.device)[:, None]
    noise = z[torch.arange(len(starts), device=z.device)[:, None], (tokens - 1).clamp(min=0)]
    x[here] = torch.where(provisional[..., None] & ~(size < WILD), noise, read)
