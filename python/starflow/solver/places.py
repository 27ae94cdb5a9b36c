"""Indices of the tokens of a window, where each sample may stand at another token."""

from __future__ import annotations

import torch
from torch import Tensor

# Indices of a window in (batch, tokens, ...).
Places = tuple[slice, slice] | tuple[Tensor, Tensor]


def together(starts: list[int]) -> bool:
    """Whether all samples start at one token."""
    return starts.count(starts[0]) == len(starts)


def places(starts: list[int], width: int, device: torch.device) -> Places:
    """Indices of `width` tokens from `starts` on, one for each sample: slices where all start together."""
    if together(starts):
        return slice(None), slice(starts[0], starts[0] + width)
    return torch.arange(len(starts), device=device)[:, None], token_numbers(starts, width, device)


def token_numbers(starts: list[int], width: int, device: torch.device) -> Tensor:
    """Numbers of the tokens of a window, (batch, width); (1, width) where all start together."""
    if together(starts):
        return torch.arange(starts[0], starts[0] + width, device=device)[None]
    return torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
