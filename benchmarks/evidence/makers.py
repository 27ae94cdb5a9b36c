"""Clips of a trained row, in each of its ways of sampling."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from baselines import Baseline, Diffusion, LastFrame, Task
from torch import Tensor

from starflow import Pipeline
from starflow.config import RunConfig
from starflow.inference import in_inference_mode
from starflow.model import Flow
from starflow.sampling import Session
from starflow.text import Features
from starflow.training.batches import make_parts


@dataclass(frozen=True)
class Asked:
    """Clips that a model shall make.

    Args:
        captions: of the clips.
        frames: that are made.
        given: pixels (clips, given frames, channels, height, width) that they follow, or None.
        told: vectors (clips, given and made frames, frame_dim), or None.
        seed: of the first clip.
    """

    captions: list[str]
    frames: int
    given: Tensor | None = None
    told: Tensor | None = None
    seed: int = 0

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the clips."""
        return tuple(range(self.seed, self.seed + len(self.captions)))


def ways(model: Flow | Baseline | LastFrame) -> dict[str, dict[str, Any]]:
    """The ways of sampling a model, by name, and their options."""
    if isinstance(model, Flow):
        return {"denoised": {}, "score step": {"denoise": "score"}, "not denoised": {"denoise": "none"}}
    if isinstance(model, Diffusion):
        return {f"{steps} steps": {"steps": steps} for steps in (1, 2, 4, 16, 64)}
    return {"": {}}


@in_inference_mode
def make(model: Flow | Baseline | LastFrame, config: RunConfig, asked: Asked, options: Mapping[str, Any]) -> Tensor:
    """Pixels (clips, frames, channels, height, width) in [-1, 1] of what was asked for, given frames left out.

    Args:
        model: a flow with its denoiser, or a baseline.
        config: of its row.
        asked: what is made.
        options: of sampling: those of the pipeline for a flow, attributes of a baseline.
    """
    if isinstance(model, Flow):
        made = drawn(open_session(model, config, asked, options), asked.frames)
    else:
        made = _other(model, config, asked, options)
    return made.clamp(-1.0, 1.0)


def open_session(flow: Flow, config: RunConfig, asked: Asked, options: Mapping[str, Any]) -> Session:
    """The session of a flow that goes on with what was asked for."""
    codec, text = make_parts(config)
    # Without a rolling cache the whole clip is attended to.
    given = 0 if asked.given is None else asked.given.shape[1]
    whole = {} if config.flow.attention_frames is not None else {"frames": given + asked.frames}
    session = Pipeline(flow, config, codec, text).session(asked.captions, seed=asked.seed, **whole, **options)
    if asked.told is not None:
        session.tell(asked.told)
    if asked.given is not None:
        session.prefill(asked.given)
    return session


def drawn(session: Session, frames: int) -> Tensor:
    """Pixels (clips, frames, channels, height, width) of the next frames of a session, the last it makes."""
    return torch.cat([made.pixels for made in session.extend(frames, last=True)], 1)


def _other(model: Baseline | LastFrame, config: RunConfig, asked: Asked, options: Mapping[str, Any]) -> Tensor:
    codec, text = make_parts(config)
    data = config.data
    model = copy.copy(model)
    for name, value in options.items():
        setattr(model, name, value)
    task = Task(
        asked.seeds,
        (codec.latent_channels, data.height // codec.spatial, data.width // codec.spatial),
        asked.frames,
        None if asked.given is None else codec.encode(asked.given),
        Features(config.flow, text)(asked.captions),
        asked.told,
    )
    return codec.decode(model.follow(task))
