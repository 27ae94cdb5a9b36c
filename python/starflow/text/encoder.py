"""The one interface between captions and the text features that the flow reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

__all__ = ["TextEncoder"]


class TextEncoder(Protocol):
    """Turns captions into a fixed number of feature vectors.

    Attributes:
        size: vectors per caption.
        dim: numbers per vector.
    """

    size: int
    dim: int

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode captions.

        Args:
            texts: one caption a sample; "" is the caption of nothing, as guidance and dropped captions need it.

        Returns:
            float32 (batch, size, dim); rows past the end of a caption are zero.

        Raises:
            ValueError: when a caption cannot be encoded, or is longer than `size`.
        """

    def to_config(self) -> dict[str, Any]:
        """The arguments that make this encoder again, with its "kind" for `make_text_encoder`."""
