"""rope_append: split heads, normalise queries and keys, rotate, write keys and values into the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from starflow_ext._check import (
    Joined,
    arithmetic_dtype,
    as_record,
    check_device,
    check_floating,
    check_like,
    check_own_memory,
    check_tensor,
    refuse_types,
    require,
    require_first_order,
    types_of,
)
from starflow_ext._load import operators
from starflow_ext._mode import in_reference_mode, require_no_transform
from starflow_ext._options import CONSTANTS, PAIRINGS, check_name, code_of, name_of
from starflow_ext._spec import Bound, Dtypes, Sample, Spec, tensors
from starflow_ext.norm import norm_reference

Pairing = Literal["interleaved", "half"]

# On CUDA a warp holds a head in registers, which bounds head_dim.
MOST_HEAD_DIM_CUDA: Final = CONSTANTS["rope_append_most_head_dim_cuda"]


class Rotation(NamedTuple):
    """Cosines and sines of rotary angles, each (tokens, head_dim / 2) or (batch, tokens, head_dim / 2), float32."""

    cos: Tensor
    sin: Tensor


class Cache(NamedTuple):
    """Key and value buffers of one layer, each (batch, kv_heads, capacity, head_dim). Keys are stored rotated."""

    keys: Tensor
    values: Tensor


def rotate(x: Tensor, rotation: Rotation, pairing: Pairing) -> Tensor:
    """Rotate pairs of elements: ``(u, v) -> (u cos - v sin, v cos + u sin)``.

    Args:
        x: (batch, heads, tokens, head_dim).
        rotation: cosines and sines by plane; plane k pairs elements (2k, 2k + 1) when "interleaved" and
            (k, k + head_dim / 2) when "half".
        pairing: "interleaved" or "half".

    Returns:
        (batch, heads, tokens, head_dim), dtype of ``x``; computed in float32.

    Raises:
        RuntimeError: if ``pairing`` is unknown or the tables do not fit ``x``.

    Reference:
        Su et al., RoFormer (2021), section 3.4.
    """
    check_name("rope_append", "pairing", pairing, PAIRINGS)
    _check_rotation("rotation", rotation, x.shape[0], x.shape[2], x.shape[3])
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(dtype).unsqueeze(-3) for t in rotation)
    pairs = x.to(dtype).unflatten(-1, (-1, 2) if pairing == "interleaved" else (2, -1))
    axis = -1 if pairing == "interleaved" else -2
    u, v = pairs.unbind(axis)
    return torch.stack([u * cos - v * sin, v * cos + u * sin], axis).flatten(-2).to(x.dtype)


def rope_append(
    qkv: Tensor,
    *,
    heads: int,
    kv_heads: int,
    query_rotation: Rotation | tuple[Tensor, Tensor] | None = None,
    key_rotation: Rotation | tuple[Tensor, Tensor] | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    pairing: Pairing = "interleaved",
    cache: Cache | tuple[Tensor, Tensor] | None = None,
    start: int | Tensor = 0,
    final: Tensor | None = None,
    slots: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the fused projection into rotated queries, keys and values; with a cache, write keys and values into it.

    Native on the CPU and on CUDA devices, in one pass over ``qkv`` (on CUDA compiled and run on an emulated device;
    never run on a GPU).

    Args:
        qkv: (batch, tokens, (heads + 2 * kv_heads) * head_dim): queries, keys, values, head-major; float32, bfloat16,
            float16 or float64. On a CUDA device head_dim is at most 256.
        heads, kv_heads: numbers of heads.
        query_rotation, key_rotation: angles of the tokens, ``Rotation`` or a plain tuple; None leaves them unrotated
            (learned positions).
        query_norm, key_norm: RMSNorm weights (head_dim,), offsets from one; applied before the rotation.
        pairing: which elements form a plane.
        cache: buffers that tokens are written to, at slots ``start .. start + tokens``, ``Cache`` or a plain tuple;
            float32, bfloat16 or float16 (float64 for float64 ``qkv``). No gradient: call it under ``torch.no_grad()``
            or ``torch.inference_mode()``.
        start: first slot, one number or one for each sample (batch,) int64.
        final: (batch,) int64; slots below it keep what they hold, whatever the tokens are; None writes all.
        slots: how many slots of the cache are returned; None is ``max(start) + tokens``, which for a tensor ``start``
            has to be read, and so cannot be compiled.

    Returns:
        q (batch, heads, tokens, head_dim), and k, v: (batch, kv_heads, tokens, head_dim) without a cache; with one,
        its first ``slots`` slots.

    Raises:
        RuntimeError: if a type, a shape, a dtype, a device or an option is wrong, the channels do not split into the
            heads, the cache is too short, ``start``, ``final`` or ``slots`` is given without one, or a gradient through
            the cache is asked for.

    Reference:
        Su et al., RoFormer (2021); Henry et al., Query-Key Normalization for Transformers (2020).
    """
    op = "rope_append"
    options = (query_norm, key_norm, pairing)
    placed = (start, final, slots)
    given = (qkv, heads, kv_heads, query_rotation, key_rotation, *options, cache, *placed)
    if not all(map(isinstance, given, _TYPES)):
        refuse_types(op, rope_append, given)
    if query_rotation is not None:
        query_rotation = as_record(op, "query_rotation", query_rotation, Rotation, _TENSORS)
    if key_rotation is not None:
        key_rotation = as_record(op, "key_rotation", key_rotation, Rotation, _TENSORS)
    if cache is not None:
        cache = as_record(op, "cache", cache, Cache, _TENSORS)
    arguments = (qkv, heads, kv_heads, query_rotation, key_rotation, *options, cache, *placed)
    if cache is not None:
        require_no_transform(op, "the cache is overwritten")
        require(
            not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors(arguments))),
            "rope_append",
            "gradient mode is",
            "on for a tensor that requires a gradient",
            "a call with a cache under torch.no_grad() or torch.inference_mode()",
        )
    if in_reference_mode():
        return rope_append_reference(*arguments)
    operator, lowered = _lower(*arguments)
    if cache is None:
        q, k, v = operator(*lowered)
        return q, k, v
    q = operator(*lowered)
    end = _end(start, qkv.shape[1]) if slots is None else slots
    return q, cache.keys[:, :, :end], cache.values[:, :, :end]


def rope_append_reference(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    query_rotation: Rotation | None,
    key_rotation: Rotation | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    pairing: Pairing,
    cache: Cache | None,
    start: int | Tensor,
    final: Tensor | None,
    slots: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``rope_append`` in plain torch; arguments as there."""
    options = (query_norm, key_norm, pairing)
    check(qkv, heads, kv_heads, query_rotation, key_rotation, *options, cache, start, final, slots)
    batch, tokens, _ = qkv.shape
    parts = heads + 2 * kv_heads
    q, k, v = qkv.unflatten(-1, (parts, -1)).transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    q = _turned(q, query_norm, query_rotation, pairing)
    k = _turned(k, key_norm, key_rotation, pairing)
    if cache is None:
        return q, k, v
    end = _end(start, tokens)
    if isinstance(start, Tensor) or final is not None:
        rows = torch.arange(batch, device=qkv.device)[:, None]
        first = start[:, None] if isinstance(start, Tensor) else torch.full_like(rows, start)
        places = first + torch.arange(tokens, device=qkv.device)
        for buffer, new in ((cache.keys, k), (cache.values, v)):
            written = new.transpose(1, 2).to(buffer.dtype)
            if final is not None:
                written = torch.where((places < final[:, None])[..., None, None], buffer[rows, :, places], written)
            buffer[rows, :, places] = written
    else:
        cache.keys[:, :, start:end] = k
        cache.values[:, :, start:end] = v
    end = end if slots is None else slots
    return q, cache.keys[:, :, :end], cache.values[:, :, :end]


def _turned(x: Tensor, weight: Tensor | None, rotation: Rotation | None, pairing: Pairing) -> Tensor:
    # The result is rounded once, at the end, as in the kernels.
    out = x if weight is None else norm_reference(x, weight, None, "rms_norm", None, None, None)
    assert isinstance(out, Tensor)
    return (out if rotation is None else rotate(out, rotation, pairing)).to(x.dtype)


def _end(start: int | Tensor, tokens: int) -> int:
    if isinstance(start, Tensor):
        start = int(start.max()) if start.numel() else 0
    return start + tokens


def check(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    query_rotation: Rotation | None,
    key_rotation: Rotation | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    pairing: str,
    cache: Cache | None,
    start: int | Tensor,
    final: Tensor | None,
    slots: int | None,
) -> None:
    """Raise what the native op raises for the same mistake; arguments as of the reference."""
    op = "rope_append"
    head_dim = _check_heads(qkv, heads, kv_heads, query_rotation, key_rotation, query_norm, key_norm, pairing)
    _check_places(cache, start, final, slots)
    if cache is None:
        return
    _check_cache(qkv, kv_heads, head_dim, cache, start, final)
    first, end = start, _end(start, qkv.shape[1])
    if isinstance(first, Tensor):
        first = int(first.min()) if first.numel() else 0
    require(first >= 0, op, "start is", first, "a slot, at least 0")
    require(end <= cache.keys.shape[2], op, "cache holds", f"{cache.keys.shape[2]} slots", f"at least {end}")


def _check_places(cache: Cache | None, start: int | Tensor, final: Tensor | None, slots: int | None) -> None:
    """Check that what speaks of a cache comes with one, and that it has the slots that are asked for."""
    op = "rope_append"
    if cache is None:
        starts = isinstance(start, Tensor) or start != 0
        for name, given in (("start", starts), ("final", final is not None), ("slots", slots is not None)):
            require(not given, op, f"{name} is", "given", "none without a cache")
    elif slots is not None and cache.keys.dim() == 4:
        capacity = cache.keys.shape[2]
        require(0 <= slots <= capacity, op, "slots is", slots, "at least 0 and at most", capacity, "like the cache")


def _check_heads(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    query_rotation: Rotation | None,
    key_rotation: Rotation | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    pairing: str,
) -> int:
    op = "rope_append"
    check_floating(op, "qkv", qkv)
    require(qkv.dim() == 3, op, "qkv has shape", qkv.shape, "(batch, tokens, channels)")
    for name, count in (("heads", heads), ("kv_heads", kv_heads)):
        require(count >= 1, op, f"{name} is", count, "at least 1")
    batch, tokens, width = qkv.shape
    parts = heads + 2 * kv_heads
    require(width % parts == 0, op, "qkv has channels", width, f"a multiple of {parts} (heads + 2 kv_heads)")
    check_name("rope_append", "pairing", pairing, PAIRINGS)
    head_dim = width // parts
    fits = not qkv.is_cuda or head_dim <= MOST_HEAD_DIM_CUDA
    require(fits, op, "head_dim is", head_dim, f"at most {MOST_HEAD_DIM_CUDA} on a CUDA device")
    for name, weight in (("query_norm", query_norm), ("key_norm", key_norm)):
        if weight is not None:
            check_floating(op, name, weight)
            fits = list(weight.shape) == [head_dim]
            require(fits, op, f"{name} has shape", weight.shape, [head_dim], "for head_dim of qkv")
            check_device(op, name, weight, "qkv", qkv)
    for name, rotation in (("query_rotation", query_rotation), ("key_rotation", key_rotation)):
        if rotation is not None:
            _check_rotation(name, rotation, batch, tokens, head_dim)
            check_device(op, "rotation", rotation.cos, "qkv", qkv)
    return head_dim


def _check_rotation(name: str, rotation: Rotation, batch: int, tokens: int, head_dim: int) -> None:
    op = "rope_append"
    require(head_dim % 2 == 0, op, "head_dim is", head_dim, "an even number for a rotation")
    check_floating(op, "rotation", rotation.cos)
    shape, table = list(rotation.cos.shape), [tokens, head_dim // 2]
    fits = shape in (table, [1, *table], [batch, *table])
    expected = ("[..., ", tokens, ", ", head_dim // 2, "] for ", tokens, " tokens of head_dim ", head_dim)
    require(fits, op, "rotation has shape", shape, Joined(expected))
    check_like(op, f"{name}.sin", rotation.sin, f"{name}.cos", rotation.cos)


def _check_cache(
    qkv: Tensor, kv_heads: int, head_dim: int, cache: Cache, start: int | Tensor | None, final: Tensor | None
) -> None:
    op = "rope_append"
    keys, batch = cache.keys, qkv.shape[0]
    wide = qkv.dtype == torch.float64
    kept = (torch.float64,) if wide else (torch.float32, torch.bfloat16, torch.float16)
    known = "float64" if wide else "float32, bfloat16 or float16"
    require(keys.dtype in kept, op, "cache.keys has dtype", keys.dtype, known, "for qkv of", qkv.dtype)
    fits = keys.dim() == 4 and (keys.shape[0], keys.shape[1], keys.shape[3]) == (batch, kv_heads, head_dim)
    expected = ("[", batch, ", ", kv_heads, ", capacity, ", head_dim, "]")
    require(fits, op, "cache.keys has shape", keys.shape, Joined(expected))
    check_device(op, "cache.keys", keys, "qkv", qkv)
    check_own_memory(op, "cache.keys", keys)
    check_like(op, "cache.values", cache.values, "cache.keys", keys)
    check_own_memory(op, "cache.values", cache.values)
    for name, numbers in (("start", start), ("final", final)):
        if isinstance(numbers, Tensor):
            require(numbers.dtype == torch.int64, op, f"{name} has dtype", numbers.dtype, "int64")
            fits = list(numbers.shape) == [batch]
            require(fits, op, f"{name} has shape", numbers.shape, Joined(("[", batch, "], one a sample")))
            check_device(op, name, numbers, "qkv", qkv)


# The types that each argument may have, and both parts of a rotation and of a cache.
_TYPES: Final = types_of(rope_append)
_TENSORS: Final = types_of(Cache)

_native = operators().rope_append.default
_native_cached = operators().rope_append_cached.default
_native_backward = operators().rope_append_backward.default


def _lower(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    query_rotation: Rotation | None,
    key_rotation: Rotation | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    pairing: Pairing,
    cache: Cache | None,
    start: int | Tensor,
    final: Tensor | None,
    slots: int | None,
) -> tuple[Any, tuple[Any, ...]]:
    _check_places(cache, start, final, slots)
    tables = (*(query_rotation or (None, None)), *(key_rotation or (None, None)))
    code = code_of("rope_append", "pairing", pairing, PAIRINGS)
    options = (qkv, heads, kv_heads, *tables, query_norm, key_norm, code)
    if cache is None:
        return _native, options
    # A number would be a constant of a traced graph, and another one another graph.
    if not isinstance(start, Tensor) and (torch.compiler.is_compiling() or isinstance(start, torch.SymInt)):
        start = torch.full(qkv.shape[:1], start, dtype=torch.int64, device=qkv.device)
    one, each = (0, start) if isinstance(start, Tensor) else (start, None)
    return _native_cached, (*options, *cache, one, each, final)


class _Options(NamedTuple):
    """Arguments that the native operators share, in the order of their schemas."""

    heads: int
    kv_heads: int
    query_cos: Tensor | None
    query_sin: Tensor | None
    key_cos: Tensor | None
    key_sin: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    pairing: int

    def check(self, qkv: Tensor) -> int:
        """Raise what the operators raise; returns head_dim."""
        query = None if self.query_cos is None or self.query_sin is None else Rotation(self.query_cos, self.query_sin)
        key = None if self.key_cos is None or self.key_sin is None else Rotation(self.key_cos, self.key_sin)
        pairing = name_of("rope_append", "pairing", self.pairing, PAIRINGS)
        heads = (self.heads, self.kv_heads)
        return _check_heads(qkv, *heads, query, key, self.query_norm, self.key_norm, pairing)


# Number of the shared arguments.
_SHARED: Final = len(_Options._fields)


def _fake(qkv: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    options = _Options(*given)
    head_dim = options.check(qkv)
    batch, tokens, _ = qkv.shape
    heads, kv_heads = options.heads, options.kv_heads
    q, k, v = (qkv.new_empty(batch, count, tokens, head_dim) for count in (heads, kv_heads, kv_heads))
    return q, k, v


def _fake_cached(qkv: Tensor, *given: Any) -> Tensor:
    options = _Options(*given[:_SHARED])
    keys, values, _, starts, final = given[_SHARED:]
    head_dim = options.check(qkv)
    _check_cache(qkv, options.kv_heads, head_dim, Cache(keys, values), starts, final)
    return qkv.new_empty(qkv.shape[0], options.heads, qkv.shape[1], head_dim)


def _fake_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    options = _Options(*given)
    head_dim = options.check(qkv)
    batch, tokens, _ = qkv.shape
    gradients = (
        ("grad_q", grad_q, options.heads),
        ("grad_k", grad_k, options.kv_heads),
        ("grad_v", grad_v, options.kv_heads),
    )
    for name, gradient, heads in gradients:
        shape = (batch, heads, tokens, head_dim)
        check_tensor("rope_append_backward", name, gradient, qkv.dtype, shape, "qkv", qkv)
    normed = options.query_norm is not None or options.key_norm is not None
    return qkv.new_empty(qkv.shape), qkv.new_empty(2 if normed else 0, head_dim, dtype=arithmetic_dtype(qkv.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, *given = inputs
    options = _Options(*given)
    tables = (options.query_cos, options.query_sin, options.key_cos, options.key_sin)
    require(
        not any(table is not None and table.requires_grad for table in tables),
        "rope_append",
        "rotation has",
        "tables that require a gradient",
        "tables without: their gradient exists in starflow_ext.reference_mode() only",
    )
    ctx.save_for_backward(qkv, *tables, options.query_norm, options.key_norm)
    ctx.heads, ctx.kv_heads, ctx.pairing = options.heads, options.kv_heads, options.pairing


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
    require_first_order("rope_append")
    qkv, *saved = ctx.saved_tensors
    options = _Options(*(ctx.heads, ctx.kv_heads, *saved, ctx.pairing))
    grad_qkv, weights = _native_backward(grad_q, grad_k, grad_v, qkv, *options)
    # ``weights`` is (2, head_dim): gradients of the query norm and of the key norm; there are none without norms.
    by_norm = {"query_norm": 0, "key_norm": 1}
    grads = {
        name: weights[row].to(norm.dtype)
        for name, row in by_norm.items()
        if (norm := getattr(options, name)) is not None
    }
    return (grad_qkv, *(grads.get(name) for name in _Options._fields))


torch.library.register_fake("starflow_ext::rope_append", _fake)
torch.library.register_fake("starflow_ext::rope_append_cached", _fake_cached)
torch.library.register_fake("starflow_ext::rope_append_backward", _fake_backward)
torch.library.register_autograd("starflow_ext::rope_append", _backward, setup_context=_save)


def _samples(dtypes: Dtypes, generator: torch.Generator) -> Iterator[Sample]:
    data, kept = dtypes
    exact = data == torch.float64

    def draw(*shape: int, dtype: torch.dtype = data) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def angles(*shape: int) -> Rotation:
        table = draw(*shape, dtype=torch.float64 if exact else torch.float32)
        return Rotation(table.cos(), table.sin())

    def sample(
        label: str,
        batch: int,
        tokens: int,
        head_dim: int,
        heads: tuple[int, int] = (2, 1),
        *,
        rotations: str = "qk",
        norms: str = "qk",
        each: bool = False,
        slots: int = 0,
        returned: int | None = None,
        **options: Any,
    ) -> Sample:
        arguments: dict[str, Any] = {
            "qkv": draw(batch, tokens, (heads[0] + 2 * heads[1]) * head_dim),
            "heads": heads[0],
            "kv_heads": heads[1],
        }
        table = (*((batch,) if each else ()), tokens, head_dim // 2)
        for short, name in (("q", "query"), ("k", "key")):
            if short in rotations:
                arguments[f"{name}_rotation"] = angles(*table)
            if short in norms:
                arguments[f"{name}_norm"] = draw(head_dim)
        if returned is not None:
            arguments["slots"] = returned
        if slots:
            shape = (batch, heads[1], slots, head_dim)
            arguments["cache"] = Cache(draw(*shape, dtype=kept), draw(*shape, dtype=kept))
        return Sample(label, arguments | options)

    yield sample("defaults", 2, 5, 16, (4, 2))
    yield sample("large", 6, 65, 64, (4, 2))
    yield sample("one plane", 1, 1, 2)
    yield sample("no samples", 0, 5, 8)
    yield sample("no tokens", 2, 0, 8)
    yield sample("no rotation, odd head_dim", 2, 3, 7, rotations="")
    yield sample("nothing but the split", 2, 3, 9, rotations="", norms="")
    yield sample("queries rotated", 2, 3, 8, rotations="q", norms="k")
    yield sample("keys rotated, angles by sample", 2, 3, 8, rotations="k", norms="q", each=True)
    yield sample("values in a cache", 2, 5, 16, (4, 2), slots=9, start=3)
    yield sample("cache to its end", 2, 5, 8, slots=5)
    yield sample("no tokens in a cache", 2, 0, 8, slots=5, start=2)
    yield sample("all slots of a cache", 2, 5, 8, slots=9, start=torch.tensor([0, 2]), returned=9)
    yield sample("final slots", 3, 4, 8, slots=9, start=2, final=torch.tensor([0, 4, 9]))
    yield sample(
        "starts by sample", 3, 4, 8, slots=9, each=True, start=torch.tensor([5, 0, 2]), final=torch.tensor([6, 0, 9])
    )
    for pairing in ("interleaved", "half"):
        for head_dim in (6, 8, 16, 30, 32, 34, 48, 64, 66):
            yield sample(f"{pairing}, head_dim {head_dim}", 1, 3, head_dim, pairing=pairing)
        yield sample(f"{pairing}, cached", 1, 3, 34, pairing=pairing, slots=4, start=1, norms="")


def _moved(sample: Sample) -> int:
    """Bytes of a call: qkv and the tables are read; q, k and v are written."""
    arguments = sample.arguments
    qkv, cache = arguments["qkv"], arguments.get("cache")
    kept = qkv.element_size() if cache is None else cache.keys.element_size()
    elements = qkv.numel() // (arguments["heads"] + 2 * arguments["kv_heads"])
    tables = tensors((arguments.get("query_rotation"), arguments.get("key_rotation")))
    written = elements * (arguments["heads"] * qkv.element_size() + 2 * arguments["kv_heads"] * kept)
    return int(qkv.nbytes + written + sum(table.nbytes for table in tables))


def _case(
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    *,
    slots: int = 0,
    norms: bool = False,
    pairing: str = "interleaved",
    dtype: torch.dtype = torch.float32,
) -> Callable[[torch.Generator], Sample]:
    head_dim = 64

    def draw(generator: torch.Generator) -> Sample:
        qkv = torch.randn(batch, tokens, (heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
        table = torch.randn(tokens, head_dim // 2, generator=generator)
        rotation = Rotation(table.cos(), table.sin())
        arguments: dict[str, Any] = {"qkv": qkv, "heads": heads, "kv_heads": kv_heads, "pairing": pairing}
        arguments |= {"query_rotation": rotation, "key_rotation": rotation}
        if norms:
            weight = torch.randn(head_dim, generator=generator)
            arguments |= {"query_norm": weight, "key_norm": weight}
        if slots:
            shape = (batch, kv_heads, slots, head_dim)
            arguments |= {"cache": Cache(*(torch.zeros(shape, dtype=dtype) for _ in "kv")), "start": slots - tokens}
        return Sample(str(list(qkv.shape)), arguments)

    return draw


SPEC = Spec(
    name="rope_append",
    call=rope_append,
    reference=rope_append_reference,
    check=check,
    # Dtypes of qkv and of the cache.
    dtypes=(
        *((dtype, dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ),
    samples=_samples,
    # Float32 is allowed 16 units of rounding: a sum, a root, four products, a difference that may cancel. Half types
    # add the rounding of stored values: nothing is rounded between norm, rotation and cache.
    bounds={
        torch.float64: Bound(1e-13, 1e-13),
        torch.float32: Bound(2e-6, 4e-6),
        torch.float16: Bound(1e-3, 4e-6),
        torch.bfloat16: Bound(8e-3, 4e-6),
    },
    differentiable=("qkv", "query_norm", "key_norm"),
    mutates=("cache",),
    shared=("query_rotation", "key_rotation", "query_norm", "key_norm", "heads", "kv_heads"),
    lower=_lower,
    cases={
        "window": _case(1, 64, 4, 4, slots=320),
        "window norms": _case(1, 64, 4, 4, slots=320, norms=True),
        "window half": _case(1, 64, 4, 4, slots=320, pairing="half"),
        "window bfloat16": _case(1, 64, 4, 4, slots=320, dtype=torch.bfloat16),
        "wide window": _case(1, 64, 24, 8, slots=4096, norms=True),
        "large": _case(8, 1024, 16, 16),
        "large norms": _case(8, 1024, 16, 16, norms=True),
        "large bfloat16": _case(8, 1024, 16, 16, norms=True, dtype=torch.bfloat16),
    },
    bytes_moved=_moved,
)
