"""Captions in the form that a run was trained on, and their features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from starflow.arguments import check_config, check_text, check_texts
from starflow.config import FlowConfig, RunConfig
from starflow.data import CaptionMode, assemble, nearest_aspect
from starflow.inference import without_autocast
from starflow.text.encoder import TextEncoder

# Number of captions whose features are kept.
CAPTION_CACHE = 4096


def caption_for(
    config: RunConfig,
    caption: str,
    *,
    mode: CaptionMode | None = None,
    drop: bool = False,
    image: bool = False,
    size: tuple[int, int] | None = None,
    rate: float | None = None,
) -> str:
    """Assemble a caption as the flow of a run reads it: with frame rate, noise level and shape where the run adds them.

    Args:
        config: of the run.
        caption: what the clip shows.
        mode: see `CaptionMode`.
        drop: whether this is the unconditional caption.
        image: whether the clip is a single frame, without a frame rate.
        size: height and width in pixels; None for those of the configuration.
        rate: frames a second of the clip; None for those of the configuration.
    """
    check_config("caption_for", config, RunConfig)
    check_text("caption_for", "caption", caption)
    fps = None
    if config.data.caption_fps:
        fps = 0.0 if image or config.data.frames == 1 else config.data.fps if rate is None else rate
    noise_level = config.train.noise_std if config.train.cond_noise_level else None
    aspect = None
    if config.data.mix_aspect:
        aspect = nearest_aspect(*(size or (config.data.height, config.data.width)))
    return assemble(caption, mode=mode, drop=drop, fps=fps, noise_level=noise_level, aspect_ratio=aspect)


class Features:
    """Makes the text input of a flow from captions, and keeps the features of the last captions.

    Each caption is encoded by itself. Features that depended on the batch would make a resumed run differ.

    Args:
        flow: architecture of the flow.
        encoder: text encoder; None for a flow without text input.
    """

    def __init__(self, flow: FlowConfig, encoder: TextEncoder | None) -> None:
        self._classes = flow.num_classes > 0
        self._encoder = encoder
        self._known: dict[str, Tensor] = {}

    @without_autocast()
    def __call__(self, captions: Sequence[str]) -> Tensor | None:
        """The text input of the flow.

        Args:
            captions: one per sample.

        Returns:
            text features (batch, text tokens, txt_dim); or class labels (batch,), -1 where there is none; or None for a
            flow without text input.
        """
        if self._encoder is None:
            return None
        check_texts("Features", "captions", captions)
        features = torch.cat([self._encode(self._encoder, caption) for caption in captions])
        if not self._classes:
            return features
        rows = features[:, 0]
        return torch.where(rows.any(1), rows.argmax(1), -1)

    def _encode(self, encoder: TextEncoder, caption: str) -> Tensor:
        found = self._known.get(caption)
        if found is None:
            found = encoder.encode([caption])
            # Threads that sample with one pipeline may each have taken the first one out.
            while len(self._known) >= CAPTION_CACHE:
                self._known.pop(next(iter(list(self._known)), ""), None)
            self._known[caption] = found
        return found
