"""The interface of all text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

__all__ = ["TextEncoder"]


class TextEncoder(Protocol):
    """Turns each caption into a fixed number of feature vectors.

    Attributes:
        size: number of vectors of a caption.
        dim: length of a vector.
    """

    size: int
    dim: int

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode captions.

        Args:
            texts: one caption per sample; "" is the unconditional caption of guidance and of dropped captions.

        Returns:
            float32 (batch, size, dim); vectors past the end of a caption are zero.

        Raises:
            ValueError: when a caption cannot be encoded, or needs more than `size` vectors.
        """

    def to_config(self) -> dict[str, Any]:
        """The configuration from which `make_text_encoder` makes this encoder again."""
