"""A causal language model of the library transformers on `starflow_ext`: its attention registered, its linears packed.

    python examples/hugging_face.py

`register` makes "starflow" a value of `attn_implementation`: `ops.block_attention` then takes the place of a mask in
memory, with grouped heads, padding on the left (`k_start`), and dynamic or static caches. `pack` puts the products with
weights on `ops.linear`. The model is a small Llama with random weights, so that nothing is downloaded. Logits and
generated tokens are those of torch's own attention; the speed-up is printed.

Reference: Touvron et al., Llama 2 (2023); Wolf et al., Transformers (2020).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

from starflow_ext import ops, pack_weight
from starflow_ext.linear_pack import WeightStorage


def _places(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """What stands for a mask: position of the first query and first visible key of each sample, (batch, 1, 1, 2)."""
    if local_size is not None:
        raise ValueError(f"attention has a sliding window of {local_size} tokens, expected none")
    start = torch.as_tensor(q_offset, device=device).reshape(-1)[:1] - kv_offset
    first = torch.zeros(batch_size, dtype=torch.int64, device=device)
    if attention_mask is not None:
        seen = attention_mask[:, : kv_length + kv_offset].long()
        if (seen.diff(dim=-1) < 0).any():
            raise ValueError("attention_mask has padding behind a token, expected padding on the left alone")
        first = (1 - seen).sum(-1) - kv_offset
    return torch.stack([start.expand(batch_size), first], -1)[:, None, None]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers calls it: (batch, tokens, heads, head_dim), and no weights."""
    if dropout > 0.0:
        raise ValueError(f"dropout of attention is {dropout:g}, expected 0")
    places: dict[str, Any] = {}
    if attention_mask is not None:
        start, first = attention_mask[:, 0, 0].unbind(-1)
        places = {"q_start": start, "k_start": first}
    return ops.block_attention(query, key, value, scale=scaling, **places).transpose(1, 2), None


def register() -> None:
    """Make "starflow" a value of `attn_implementation` of every model that goes by the interface of transformers."""
    AttentionInterface.register("starflow", _attention)
    AttentionMaskInterface.register("starflow", _places)


class Packed(nn.Module):
    """A linear layer on a packed copy of its weight, for inference."""

    def __init__(self, linear: nn.Linear, storage: WeightStorage | None = None) -> None:
        super().__init__()
        self.weight = pack_weight(linear.weight.detach(), storage, keep=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., in_features) by the weight."""
        return ops.linear(x, self.weight, self.bias)


def pack(model: nn.Module, storage: WeightStorage | None = None) -> None:
    """Replace every linear layer of a model by a packed one; `storage` is that of `pack_weight`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Packed(child, storage))


def build(width: int, layers: int, *, storage: WeightStorage | None = None) -> tuple[Any, Any]:
    """Return a Llama with random weights as transformers runs it, and the same on `starflow_ext`."""
    register()
    config: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 256),
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    plain: Any = LlamaForCausalLM(LlamaConfig(**{**config, "attn_implementation": "sdpa"}))
    fast: Any = LlamaForCausalLM(LlamaConfig(**{**config, "attn_implementation": "starflow"}))
    fast.load_state_dict(plain.state_dict())
    pack(fast, storage)
    return plain.eval(), fast.eval()


def _timed(call: Callable[[], Any], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


@torch.inference_mode()
def compare(width: int, layers: int, prompts: tuple[int, ...], new: int) -> dict[str, float]:
    """Compare both models on prompts of these lengths, padded on the left to the longest.

    Returns:
        "logits", the largest difference where there is no padding; and for each kind of cache the share of generated
        tokens that are the same.
    """
    plain, fast = build(width, layers)
    longest = max(prompts)
    tokens = torch.randint(1, 512, (len(prompts), longest), generator=torch.Generator().manual_seed(1))
    seen = torch.stack([(torch.arange(longest) >= longest - length).long() for length in prompts])
    tokens = tokens * seen
    want, got = (model(tokens, attention_mask=seen).logits for model in (plain, fast))
    found = {"logits": float((got - want)[seen.bool()].abs().max())}
    for cache in ("dynamic", "static"):
        options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "cache_implementation": cache}
        options |= {"attention_mask": seen, "disable_compile": True, "eos_token_id": None}
        want, got = (model.generate(tokens, **options) for model in (plain, fast))
        found[cache] = float((want == got).float().mean())
    return found


@torch.inference_mode()
def speed(
    width: int, layers: int, context: int, new: int, repeats: int = 3, *, storage: WeightStorage | None = None
) -> float:
    """Return how many times faster `new` tokens go through the model behind a cache of `context` tokens."""
    models = build(width, layers, storage=storage)
    tokens = torch.randint(1, 512, (1, context + new), generator=torch.Generator().manual_seed(1))
    times = []
    for model in models:
        cache = model(tokens[:, :context], use_cache=True).past_key_values

        def step(model: Any = model, cache: Any = cache) -> None:
            model(tokens[:, context:], past_key_values=cache, use_cache=True)
            # By how many tokens go: newer versions refuse the length that is left.
            cache.crop(-new)

        times.append(_timed(step, repeats))
    return times[0] / times[1]


def main() -> None:
    """Print the agreement, and the speed-up by context and new tokens."""
    found = compare(512, 4, (300, 211, 37), 24)
    print(f"largest difference of logits {found['logits']:.1e}")
    print(f"same tokens: {found['dynamic']:.0%} with a dynamic cache, {found['static']:.0%} with a static one")
    for context in (1024, 4096):
        ratios = (f"{new} new {speed(512, 4, context, new):.2f}x" for new in (1, 4, 16, 64))
        print(f"behind {context} tokens: " + ", ".join(ratios))


if __name__ == "__main__":
    main()
