"""DecodeState: the K/V buffers of one block while a clip is decoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from starflow.model.layers import Transformer
from starflow_ext.rope_append import Cache


@dataclass(frozen=True)
class DecodeState:
    """K/V buffers, allocated once.

    Slots are positions: text first, then the network's inputs. A sweep of the solver writes provisional keys
    and values at the slots of its window, and the next sweep overwrites them; slots of accepted tokens are never
    written again. The buffers store no length: a query reads the slots up to its own position.

    Args:
        caches: by layer, each (rows, kv_heads, capacity, head_dim).
        text_tokens: slots taken by text.
    """

    caches: tuple[Cache, ...]
    text_tokens: int

    @classmethod
    def allocate(
        cls,
        network: Transformer,
        rows: int,
        tokens: int,
        text_tokens: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> DecodeState:
        """Buffers for `rows` samples of `tokens` tokens behind `text_tokens` text tokens."""
        shape = (rows, network.kv_heads, text_tokens + tokens, network.head_dim)
        dtype = network.dtype if dtype is None else dtype
        return cls(
            tuple(
                Cache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
                for _ in network.layers
            ),
            text_tokens,
        )

    def forget(self, tokens: int) -> None:
        """Moves keys and values of grid tokens by `tokens` slots to the front, over those of the first ones."""
        begin = self.text_tokens
        for cache in self.caches:
            for held in cache:
                held[:, :, begin : held.shape[2] - tokens] = held[:, :, begin + tokens :].clone()
