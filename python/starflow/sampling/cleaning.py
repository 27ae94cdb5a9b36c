"""Removal of the noise of the training data from the output of the flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from starflow.model import Flow


Cleaning = Literal["learned", "published", "score", "none"]


@dataclass(frozen=True)
class Denoising:
    """How the noise of the training data is removed.

    Unless `whole` is set, a frame is cleaned together with the frames around it, as a clip of their own: `behind`
    frames, itself, and `look_ahead` frames. So a cleaned frame does not depend on how long the clip gets.

    Args:
        kind: "learned" by the denoiser, "published" by the same in one pass over a window of frames, "score" by a step
            along the flow's own score, or "none".
        sigma: standard deviation of that noise.
        step: step of the denoiser (see `starflow.model.tweedie_step`).
        behind, look_ahead: frames before and after a frame that it is cleaned with.
        whole: the clip is cleaned at once, when it has ended, for a denoiser or a score that needs all frames.
        chunk: with "published", latent frames of a pass; a longer clip takes several, which overlap (see
            `Denoiser.denoise_video`).
    """

    kind: Cleaning
    sigma: float
    step: float = 0.0
    behind: int = 0
    look_ahead: int = 0
    whole: bool = False
    chunk: int | None = None


def score_denoise(
    flow: Flow, x: Tensor, y: Tensor | None, sigma: float, frame_conditions: Tensor | None = None
) -> Tensor:
    """Denoises by the flow's own score: `x - sigma^2 * numel * d nll / d x` (Tweedie), for flows without a denoiser.

    Args:
        flow: left as it is, in its mode and without gradients.
        x: noisy latents.
        y: text or labels.
        sigma: standard deviation of the noise on the data.
        frame_conditions: vectors of the frames, as of `Flow.encode`.

    Returns:
        Like `x`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        context, told = (None if given is None else given.clone() for given in (y, frame_conditions))
        loss = flow.nll(leaf, context, told).mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
    return x - sigma**2 * x.numel() * gradient
