"""The window schedule in plain torch: a model as the rule of `starflow_ext.window_sweep` calls it."""

from __future__ import annotations

from torch import Tensor

from starflow.solver.protocol import Autoregressive
from starflow.solver.report import Tally, not_finite
from starflow_ext.window_sweep import WindowProgress, sweep_window


def sweep_once(
    model: Autoregressive,
    x: Tensor,
    z: Tensor,
    first: int,
    size: int,
    tolerance: float,
    at: WindowProgress,
    progress: Tally,
) -> None:
    """One sweep of the window in plain torch."""
    affine = progress.maps

    def evaluate(previous: Tensor, start: int | Tensor, final: Tensor | None) -> Tensor:
        nonlocal affine
        affine = model.evaluate(previous, start, final)
        return affine.raw

    def update_(tokens: Tensor, noise: Tensor, raw: Tensor, numbers: Tensor) -> Tensor:
        assert affine is not None
        return affine.like(raw).update_(tokens, noise)

    done = sweep_window(
        evaluate,
        update_,
        x,
        z,
        at,
        first=first,
        frame_tokens=model.frame_tokens,
        size=size,
        tolerance=tolerance,
        guesses=model.frame_tokens < model.tokens - first,
    )
    progress.maps = affine
    progress.rows += done.rows
    progress.accepted.append(done.accepted)
    if done.bad is not None:
        raise not_finite("solution", done.bad[0], progress.before + done.bad[1])
