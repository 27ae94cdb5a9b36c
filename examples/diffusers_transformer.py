"""A diffusion transformer of the library diffusers on `starflow_ext`: its attention processors and linears replaced.

    python examples/diffusers_transformer.py

`JointAttention` is an attention processor for layers in which an image attends to itself and to a text, as those of
Stable Diffusion 3: `ops.block_attention` without a mask takes the place of torch's attention. `swap_linears` packs the
weights. The model is small and has random weights, so that nothing is downloaded. Its output is that of the processors
of diffusers; the speed-up is printed.

Reference: Esser et al., Scaling Rectified Flow Transformers (2024); von Platen et al., Diffusers (2022).
"""

from __future__ import annotations

import copy
import time
from typing import Any, NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from starflow_ext import ops, swap_linears


class JointAttention:
    """Attention processor of diffusers: the tokens of an image, and those of a text where the layer has them."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(batch, tokens, channels) of the image, and of the text or None, to the same."""
        if attention_mask is not None:
            raise ValueError("attention_mask is given, expected None: these models see all tokens")
        streams = [_heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))]
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            streams.append(_heads(attn, encoder_hidden_states, added, (attn.norm_added_q, attn.norm_added_k)))
        q, k, v = (torch.cat(parts, 2) for parts in zip(*streams, strict=True))
        out = ops.block_attention(q, k, v, causal=False).transpose(1, 2).flatten(2)
        tokens, text = out.split([hidden_states.shape[1], out.shape[1] - hidden_states.shape[1]], 1)
        image: Tensor = attn.to_out[1](attn.to_out[0](tokens))
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def _heads(
    attn: Any, x: Tensor, projections: tuple[nn.Module, ...], norms: tuple[nn.Module | None, ...]
) -> list[Tensor]:
    """Queries, keys and values of a stream, each (batch, heads, tokens, head_dim)."""
    q, k, v = (project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for project in projections)
    q, k = (part if norm is None else norm(part) for part, norm in zip((q, k), norms, strict=True))
    return [q, k, v]


def build(width: int, layers: int) -> tuple[nn.Module, nn.Module]:
    """Return a transformer with random weights as diffusers runs it, and the same on `starflow_ext`."""
    torch.manual_seed(0)
    heads = width // 64
    plain: Any = SD3Transformer2DModel(
        sample_size=128,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=64,
        caption_projection_dim=width,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=64,
        qk_norm="rms_norm",
    )
    fast = copy.deepcopy(plain)
    fast.set_attn_processor(JointAttention())
    swap_linears(fast)
    return plain.eval(), fast.eval()


class Comparison(NamedTuple):
    """What `compare` returns: the largest difference over the largest value, and how many times faster."""

    error: float
    speedup: float


@torch.inference_mode()
def compare(width: int, layers: int, tokens: int, repeats: int = 3) -> Comparison:
    """Compare both models on an image of so many tokens (a square number) and a text of 77."""
    side = 2 * round(tokens**0.5)
    generator = torch.Generator().manual_seed(1)
    given = {
        "hidden_states": torch.randn(1, 4, side, side, generator=generator),
        "encoder_hidden_states": torch.randn(1, 77, 64, generator=generator),
        "pooled_projections": torch.randn(1, 64, generator=generator),
        "timestep": torch.tensor([500]),
    }
    models = build(width, layers)
    want, got = (model(**given).sample for model in models)
    times: list[list[float]] = [[], []]
    for _ in range(repeats):
        for model, taken in zip(models, times, strict=True):
            begin = time.perf_counter()
            model(**given)
            taken.append(time.perf_counter() - begin)
    return Comparison(float((got - want).abs().max() / want.abs().max()), min(times[0]) / min(times[1]))


def main() -> None:
    """Print agreement and speed-up by the number of tokens of the image."""
    for tokens in (64, 256, 1024, 4096):
        done = compare(512, 4, tokens)
        print(f"{tokens} tokens: {done.speedup:.2f}x, largest relative difference {done.error:.1e}")


if __name__ == "__main__":
    main()
