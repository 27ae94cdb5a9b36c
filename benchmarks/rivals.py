"""What users would write in place of an op, beside plain torch and torch.compile of its formula.

The formula that an op is checked by is not always what one would choose: it makes its masks at each call, and torch's
products of bfloat16 are slow on processors without an instruction for them. Each entry takes a call of the op, prepares
what a model prepares once, and returns what is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from starflow_ext._spec import Sample, Spec

Make = Callable[[Spec, Sample], Callable[[], Any]]


def _wide(spec: Spec, sample: Sample) -> Sample:
    return sample.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def _formula(spec: Spec, sample: Sample) -> Callable[[], Any]:
    return partial(spec.reference, **spec.arguments(**sample.arguments))


def _compiled(spec: Spec, sample: Sample) -> Callable[[], Any]:
    return partial(torch.compile(spec.reference), **spec.arguments(**sample.arguments))


def _in_float32(make: Make) -> Make:
    return lambda spec, sample: make(spec, _wide(spec, sample))


def _attention(spec: Spec, sample: Sample) -> Callable[[], Any]:
    """Torch's attention with a mask that was made before, or its causal one."""
    q, k, v = (sample.arguments[name] for name in "qkv")
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if queries == keys:
        return partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=grouped)
    unseen = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    # A mask that is added is faster than one of booleans, which is turned into it at each call.
    mask = torch.zeros(queries, keys, dtype=q.dtype).masked_fill(unseen, -torch.inf)
    return partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask, enable_gqa=grouped)


def _by_frame(spec: Spec, sample: Sample) -> Callable[[], Any]:
    """Torch's attention of one frame after the other with the keys that it sees, without a mask."""
    q, k, v = (sample.arguments[name] for name in "qkv")
    mask = sample.arguments["frames"]
    assert mask.prefix == 0
    size, frames = mask.frame_tokens, q.shape[2] // mask.frame_tokens

    def run() -> Tensor:
        parts = []
        for frame in range(frames):
            last = min(frame + mask.look_ahead, frames)
            first = 0 if mask.window is None else max(0, frame + mask.look_ahead - 1 - mask.window)
            rows, seen = slice(frame * size, (frame + 1) * size), slice(first * size, last * size)
            parts.append(F.scaled_dot_product_attention(q[:, :, rows], k[:, :, seen], v[:, :, seen]))
        return torch.cat(parts, 2)

    return run


def _linear(spec: Spec, sample: Sample) -> Callable[[], Any]:
    """Torch's product by the weight before packing."""
    x, weight = sample.arguments["x"], sample.arguments["weight"].unpack()
    return partial(F.linear, x, weight)


def _rotation(spec: Spec, sample: Sample) -> Callable[[], Any]:
    """The rotation as Llama has it: by complex numbers where neighbours are pairs, else by halves that are swapped."""
    given = sample.arguments
    heads, kv_heads, start = given["heads"], given["kv_heads"], given.get("start", 0)
    qkv, (cos, sin) = given["qkv"], given["query_rotation"]
    cache = given.get("cache")
    tokens = qkv.shape[1]
    if given["pairing"] == "interleaved":
        turns = torch.complex(cos, sin)[None, :, None]

        def rotated(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * turns).flatten(-2)

    else:
        wide_cos, wide_sin = (torch.cat([table, table], -1)[None, :, None] for table in (cos, sin))

        def rotated(x: Tensor) -> Tensor:
            u, v = x.chunk(2, -1)
            return x * wide_cos + torch.cat([-v, u], -1) * wide_sin

    def run() -> tuple[Tensor, ...]:
        q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 2)
        q, k, v = rotated(q).transpose(1, 2), rotated(k).transpose(1, 2), v.transpose(1, 2)
        if cache is None:
            return q, k, v
        cache.keys[:, :, start : start + tokens] = k
        cache.values[:, :, start : start + tokens] = v
        return q, cache.keys[:, :, : start + tokens], cache.values[:, :, : start + tokens]

    return run


def rivals(op: str, case: str) -> dict[str, Make]:
    """What else competes in this case of an op, by name."""
    found: dict[str, Make] = {}
    if op == "block_attention":
        found["by frame" if "denoiser" in case else "sdpa"] = _by_frame if "denoiser" in case else _attention
    elif op == "linear":
        found["F.linear"] = _linear
    elif op == "rope_append" and "norms" not in case and "bfloat16" not in case:
        found["as in Llama"] = _rotation
    if "bfloat16" in case:
        wide: dict[str, Make] = {"torch": _formula, "compile": _compiled, **found}
        found |= {f"{name}, float32": _in_float32(make) for name, make in wide.items()}
    return found
