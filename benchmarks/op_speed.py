"""What the ops save in anybody's model: the targets of group "ops" of targets.py.

    python benchmarks/targets.py --group ops

A line is the worst ratio over its shapes, on one thread, and again on as many as torch uses: the least time of the
fastest competitor over that of the op, in calls that take turns. Competitors are what a user would write: torch's own
function, the same under torch.compile, and other forms of it that torch runs faster. Results are compared first.
"""

from __future__ import annotations

import functools
import importlib.util
import runpy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figures import Figure, Skipped, target
from timing import interleaved, threads
from torch import Tensor
from torch.nn import functional as F

import starflow_ext
from starflow_ext import ops
from starflow_ext._spec import tensors
from starflow_ext.rope_append import Cache, Rotation, rotate

Call = Callable[..., Any]


@dataclass(frozen=True)
class Contest:
    """One shape: the op, and what competes with it on the same arguments.

    Attributes:
        label: the shape.
        ours: the op.
        theirs: competitors by name, each also compiled.
        arguments: of every call.
        uncompiled: competitors that torch.compile leaves as they are.
        near: largest difference of the results, relative to the largest value.
        gradient: whether autograd records the calls.
    """

    label: str
    ours: Call
    theirs: dict[str, Call]
    arguments: tuple[Any, ...]
    uncompiled: dict[str, Call] | None = None
    near: float = 1e-4
    gradient: bool = False

    def run(self) -> dict[str, float]:
        """Seconds of the op and of each competitor, on as many threads as torch uses now."""
        calls = {"ours": self.ours, **self.theirs, **(self.uncompiled or {})}
        for name, call in self.theirs.items():
            calls[f"{name}, compiled"] = torch.compile(call, dynamic=False)
        with torch.inference_mode(not self.gradient):
            bound = {name: functools.partial(call, *self.arguments) for name, call in calls.items()}
            want = tensors(bound["ours"]())
            for name, call in bound.items():
                for a, b in zip(want, tensors(call()), strict=True):
                    distance = float((a.double() - b.double()).abs().max() / b.double().abs().max())
                    assert distance <= self.near, f"{self.label}, {name}: results are {distance:.1e} apart"
            once = min(interleaved(*bound.values(), rounds=1, least=0.0, of=min))
            seconds = interleaved(*bound.values(), rounds=25 if once < 0.02 else 7, least=2e-3, of=min)
        return dict(zip(bound, seconds, strict=True))


def worst(name: str, goal: float, moonshot: float, contests: Callable[[], Iterator[Contest]]) -> Iterator[Figure]:
    """The lines of one target: the worst ratio on one thread, and on all."""
    torch._dynamo.config.recompile_limit = 64
    for count in sorted({1, torch.get_num_threads()}):
        found = {}
        with threads(count):
            for contest in contests():
                seconds = contest.run()
                ours = seconds.pop("ours")
                best = min(seconds, key=seconds.__getitem__)
                found[contest.label] = (seconds[best] / ours, ours, best)
                torch._dynamo.reset()
        raw: dict[str, Any] = {
            label: f"{ratio:.2f}x, {ours * 1e3:.4g} ms, against {best}" for label, (ratio, ours, best) in found.items()
        }
        value = min(ratio for ratio, _, _ in found.values())
        yield Figure(f"{name}_threads_{count}", value, "x torch or torch.compile, worst", goal, moonshot, raw=raw)


# -- attention --------------------------------------------------------------------------------------------------------


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query of a group of heads as so many queries of one head."""
    return F.scaled_dot_product_attention(q.view(*k.shape[:2], -1, q.shape[-1]), k, v).view(q.shape)


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = q.view(*k.shape[:2], -1, q.shape[-1])
    weights = torch.softmax(rows @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
    return (weights @ v).view(q.shape)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _few(queries: int) -> Iterator[Contest]:
    for keys in (1024, 4096, 16384):
        for heads in (8, 32):
            q, k, v = _draw(1, heads, queries, 64), _draw(1, 8, keys, 64), _draw(1, 8, keys, 64)
            label = f"{heads} heads on 8, {keys} keys"
            if queries == 1:
                forms = {"formula": _formula}
                others = {"sdpa": _grouped, "sdpa, folded": _folded}
                yield Contest(label, ops.block_attention, forms, (q, k, v), others)
            else:
                seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
                added = torch.zeros(queries, keys).masked_fill(~seen, -torch.inf)
                others = {"sdpa": _masked, "sdpa, added": lambda q, k, v, _, a=added: _masked(q, k, v, a)}
                ours = lambda q, k, v, _: ops.block_attention(q, k, v)  # noqa: E731
                yield Contest(label, ours, {}, (q, k, v, seen), others)


@target("ops")
def attention_one_query() -> Iterator[Figure]:
    """One query on 1k, 4k and 16k keys of 8 heads of 64, with as many and four times as many query heads."""
    yield from worst("attention_one_query", 1.1, 1.5, lambda: _few(1))


@target("ops")
def attention_few_queries() -> Iterator[Figure]:
    """4, 16 and 64 queries, the last tokens of 1k, 4k and 16k keys, heads as above."""
    for queries in (4, 16, 64):
        yield from worst(f"attention_{queries}_queries", 1.4, 2.0, functools.partial(_few, queries))


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _with_backward(attention: Call) -> Call:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(q, k, v), (q, k, v), torch.ones_like(q))

    return run


@target("ops")
def attention_causal() -> Iterator[Figure]:
    """Causal attention of 1k and 4k tokens, 8 heads of 64, forward and with its gradient."""

    def contests(backward: bool) -> Iterator[Contest]:
        for tokens in (1024, 4096):
            given = tuple(_draw(1, 8, tokens, 64).requires_grad_(backward) for _ in range(3))
            calls: tuple[Call, Call] = (ops.block_attention, _causal)
            ours, theirs = map(_with_backward, calls) if backward else calls
            yield Contest(f"{tokens} tokens", ours, {}, given, {"sdpa": theirs}, gradient=backward)

    yield from worst("attention_causal_forward", 1.3, 1.6, lambda: contests(False))
    yield from worst("attention_causal_backward", 1.6, 2.0, lambda: contests(True))


# -- passes over memory -----------------------------------------------------------------------------------------------


@target("ops")
def rope() -> Iterator[Figure]:
    """Rotation of 1k to 8k tokens, 8 heads of 64 each of queries, keys and values, into a cache; all is written."""

    def contests() -> Iterator[Contest]:
        for pairing in ("interleaved", "half"):
            for tokens in (1024, 4096, 8192):
                qkv, angles = _draw(1, tokens, 3 * 8 * 64), _draw(tokens, 32)
                rotation = Rotation(angles.cos(), angles.sin())
                cache = Cache(*(torch.zeros(1, 8, tokens, 64) for _ in range(2)))

                def ours(qkv: Tensor, rotation: Rotation, cache: Cache, pairing: Any = pairing) -> Any:
                    options: dict[str, Any] = {"query_rotation": rotation, "key_rotation": rotation, "cache": cache}
                    return ops.rope_append(qkv, heads=8, kv_heads=8, pairing=pairing, **options)

                def theirs(qkv: Tensor, rotation: Rotation, cache: Cache, pairing: Any = pairing) -> Any:
                    parts = qkv.unflatten(-1, (3, 8, 64)).permute(2, 0, 3, 1, 4)
                    q, k, v = parts.unbind(0)
                    cache.keys.copy_(rotate(k, rotation, pairing))
                    cache.values.copy_(v)
                    return rotate(q, rotation, pairing), cache.keys, cache.values

                yield Contest(f"{pairing}, {tokens} tokens", ours, {"eager": theirs}, (qkv, rotation, cache))

    yield from worst("rope_append", 1.2, 2.0, contests)


@target("ops")
def norms() -> Iterator[Figure]:
    """LayerNorm and RMSNorm of 1k rows of 512 to 16k rows of 2048, with and without a residual."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias)

    def layer_added(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, weight.shape, weight, bias), total

    def root(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-6)

    def ours_added(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Any:
        return ops.norm(x, weight, bias, residual=residual)

    def ours_root(x: Tensor, weight: Tensor) -> Any:
        return ops.norm(x, weight, kind="rms_norm", weight_offset=0.0)

    def contests() -> Iterator[Contest]:
        for rows, channels in ((1024, 512), (4096, 1024), (16384, 2048)):
            x, weight, bias = _draw(rows, channels), _draw(channels), _draw(channels) + 1.0
            label = f"{rows} x {channels}"
            yield Contest(f"layer, {label}", ops.norm, {"layer_norm": layer}, (x, weight, bias))
            added = (x, weight, bias, x + 1.0)
            yield Contest(f"layer with residual, {label}", ours_added, {"layer_norm": layer_added}, added)
            yield Contest(f"rms, {label}", ours_root, {"rms_norm": root}, (x, weight))

    yield from worst("norm", 1.3, 2.5, contests)


# -- products ---------------------------------------------------------------------------------------------------------


@target("ops")
def packed() -> Iterator[Figure]:
    """A packed product and a gated MLP in float32, 16 to 2048 rows of 1024 channels."""
    width, hidden = 1024, 2816
    gate, up = _draw(hidden, width) / width**0.5, _draw(width, hidden).T / width**0.5
    down = _draw(width, hidden) / hidden**0.5
    weights = tuple(weight.contiguous() for weight in (gate, up, down))
    bias = _draw(hidden)
    first, second, third = (starflow_ext.pack_weight(weight, keep=False) for weight in weights)

    def ours(x: Tensor, *_: Tensor) -> Tensor:
        return ops.linear(ops.linear(x, first, epilogue="silu", multiply=ops.linear(x, second)), third)

    def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def product(x: Tensor, *_: Tensor) -> Tensor:
        return ops.linear(x, first, bias)

    rows = (16, 128, 1024, 2048)
    yield from worst(
        "packed_linear",
        1.1,
        1.3,
        lambda: (
            Contest(f"{n} rows", product, {}, (_draw(n, width), weights[0], bias), {"linear": F.linear}) for n in rows
        ),
    )
    yield from worst(
        "gated_mlp",
        1.1,
        1.4,
        lambda: (Contest(f"{n} rows", ours, {"linear": gated}, (_draw(n, width), *weights)) for n in rows),
    )


@target("ops")
def decode() -> Iterator[Figure]:
    """One new token of a Llama of width 1024 and 8 layers behind 1k tokens, against transformers' own attention."""
    if importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not installed: pip install 'starflow-ext[examples]'")
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "hugging_face.py"))
    for storage, goal, moonshot in (("float32", 1.2, 1.5), ("int8", 2.0, 2.5)):
        for count in sorted({1, torch.get_num_threads()}):
            with threads(count):
                raw = {
                    f"{context} tokens": example["speed"](1024, 8, context, 1, storage=storage) for context in (1024,)
                }
            name = f"llama_decode_{storage}_threads_{count}"
            yield Figure(name, min(raw.values()), "x transformers in float32", goal, moonshot, raw=raw)


# -- calls ------------------------------------------------------------------------------------------------------------


@target("ops")
def smallest_calls() -> Iterator[Figure]:
    """The smallest call of each op over that of the nearest function of torch, on one thread."""
    x, raw, bias = _draw(1, 1, 8), _draw(1, 1, 16), _draw(8)
    weight = _draw(8, 8)
    packed = starflow_ext.pack_weight(weight, keep=False)
    q, qkv = _draw(1, 1, 1, 8), _draw(1, 1, 24)
    rotation = Rotation(_draw(1, 4), _draw(1, 4))
    cache = Cache(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))
    turn: dict[str, Any] = {"heads": 1, "kv_heads": 1, "query_rotation": rotation, "key_rotation": rotation}

    def coupling() -> tuple[Tensor, Tensor]:
        shift, scale = raw.chunk(2, -1)
        scale = F.softplus(scale)
        return (x - shift) / scale, scale.log().sum(-1)

    def rotated() -> tuple[Tensor, ...]:
        a, b, c = qkv.view(1, 1, 3, 8).transpose(1, 2).split(1, 1)
        return rotate(a, rotation, "half"), rotate(b, rotation, "half"), c

    pairs: dict[str, tuple[Call, Call]] = {
        "linear": (lambda: ops.linear(x, packed, bias), lambda: F.linear(x, weight, bias)),
        "norm": (lambda: ops.norm(x, bias, bias), lambda: F.layer_norm(x, (8,), bias, bias)),
        "block_attention": (lambda: ops.block_attention(q, q, q), lambda: F.scaled_dot_product_attention(q, q, q)),
        "rope_append": (lambda: ops.rope_append(qkv, **turn), rotated),
        "rope_append, cached": (lambda: ops.rope_append(qkv, cache=cache, start=1, **turn), rotated),
        "affine_forward": (lambda: ops.affine_forward(x, raw), coupling),
        "affine_inverse": (lambda: ops.affine_inverse(x, raw), coupling),
        "jacobi_update": (lambda: ops.jacobi_update(x, x, raw), coupling),
    }
    with threads(1), torch.inference_mode():
        found = {name: interleaved(*calls, rounds=25, least=5e-3, of=min) for name, calls in pairs.items()}
    facts = {name: f"{ours * 1e6:.1f} us, torch {theirs * 1e6:.1f}" for name, (ours, theirs) in found.items()}
    value = max(ours / theirs for ours, theirs in found.values())
    yield Figure("smallest_call", value, "x torch's smallest, worst", 3.0, 2.0, lower=True, raw=facts)
