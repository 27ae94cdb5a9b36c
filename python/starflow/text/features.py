"""Captions as training assembled them, and what the flow reads of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from starflow.config import FlowConfig, RunConfig
from starflow.data import CaptionMode, assemble, nearest_aspect
from starflow.text.encoder import TextEncoder

# Captions whose features are kept.
CAPTION_CACHE = 4096


def caption_for(
    config: RunConfig,
    caption: str,
    *,
    mode: CaptionMode | None = None,
    drop: bool = False,
    image: bool = False,
    size: tuple[int, int] | None = None,
) -> str:
    """The caption as the flow of this run reads it: with frame rate, noise level and shape where the run tells them.

    Args:
        config: of the run.
        caption: what the clip shows.
        mode: what is special about the clip.
        drop: the caption of nothing.
        image: a single frame without time.
        size: height and width in pixels, by default those of the configuration.
    """
    fps = None
    if config.data.caption_fps:
        fps = 0.0 if image or config.data.frames == 1 else config.data.fps
    noise_level = config.train.noise_std if config.train.cond_noise_level else None
    aspect = None
    if config.data.mix_aspect:
        aspect = nearest_aspect(*(size or (config.data.height, config.data.width)))
    return assemble(caption, mode=mode, drop=drop, fps=fps, noise_level=noise_level, aspect_ratio=aspect)


class Features:
    """Captions to what the flow reads, remembered by caption.

    Every caption is encoded by itself: the features must not depend on the batch, or a resumed run would differ.

    Args:
        flow: architecture.
        encoder: of the text; None for a flow that reads none.
    """

    def __init__(self, flow: FlowConfig, encoder: TextEncoder | None) -> None:
        self._classes = flow.num_classes > 0
        self._encoder = encoder
        self._known: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor | None:
        """Text (batch, text tokens, txt_dim), class labels (batch,) with -1 for none, or None."""
        if self._encoder is None:
            return None
        features = torch.cat([self._encode(self._encoder, caption) for caption in captions])
        if not self._classes:
            return features
        rows = features[:, 0]
        return torch.where(rows.any(1), rows.argmax(1), -1)

    def _encode(self, encoder: TextEncoder, caption: str) -> Tensor:
        if caption not in self._known:
            if len(self._known) >= CAPTION_CACHE:
                self._known.pop(next(iter(self._known)))
            self._known[caption] = encoder.encode([caption])
        return self._known[caption]
