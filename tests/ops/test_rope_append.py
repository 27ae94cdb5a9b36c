"""What is special to rope_append: its mathematics, the cache, what stays final, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import starflow_ext
from starflow_ext import ops
from starflow_ext._options import PAIRINGS
from starflow_ext.rope_append import Cache, Pairing, Rotation

from .battery import assert_equal, assert_refused, copied, outcome, plain, run, samples_of

SPEC = ops.SPECS["rope_append"]
every_pairing = pytest.mark.parametrize("pairing", ["interleaved", "half"])


def _draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _angles(positions: torch.Tensor, planes: int) -> Rotation:
    angle = positions.double()[..., None] * 10.0 ** -torch.arange(planes).double()
    return Rotation(angle.cos(), angle.sin())


@every_pairing
def test_products_depend_on_the_distance_alone(pairing: Pairing, generator: torch.Generator, isa: str) -> None:
    qkv = _draw(generator, 1, 1, 3 * 20).expand(1, 6, -1)
    products = []
    for offset in (0.0, 17.0):
        table = _angles(torch.arange(6) + offset, 10)
        q, k, _ = ops.rope_append(qkv, heads=1, kv_heads=1, query_rotation=table, key_rotation=table, pairing=pairing)
        products.append(q @ k.mT)
    torch.testing.assert_close(*products, rtol=1e-12, atol=1e-12)
    for distance in range(-5, 6):
        diagonal = products[0][0, 0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-12)


@every_pairing
def test_a_rotation_keeps_lengths_and_the_norm_gives_them(
    pairing: Pairing, generator: torch.Generator, isa: str
) -> None:
    qkv, table = _draw(generator, 2, 3, 4 * 18), _angles(torch.arange(3), 9)
    rotated, k, v = ops.rope_append(qkv, heads=2, kv_heads=1, query_rotation=table, pairing=pairing)
    plain_q, plain_k, plain_v = ops.rope_append(qkv, heads=2, kv_heads=1)
    torch.testing.assert_close(rotated.norm(dim=-1), plain_q.norm(dim=-1), rtol=1e-13, atol=0)
    assert_equal((k, v), (plain_k, plain_v))
    normed = ops.rope_append(
        1e3 * qkv, heads=2, kv_heads=1, query_rotation=table, query_norm=torch.zeros(18), pairing=pairing
    )[0]
    torch.testing.assert_close(
        normed.norm(dim=-1), torch.full((2, 2, 3), 18.0**0.5, dtype=torch.float64), rtol=1e-8, atol=0
    )


def test_the_split_is_head_major(generator: torch.Generator) -> None:
    qkv = _draw(generator, 2, 3, 8 * 5)
    q, k, v = ops.rope_append(qkv, heads=4, kv_heads=2)
    heads = qkv.unflatten(-1, (8, 5)).transpose(1, 2)
    assert_equal((q, k, v), (heads[:, :4], heads[:, 4:6], heads[:, 6:]))


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16])
def test_a_window_in_pieces_is_the_window(kept: torch.dtype, generator: torch.Generator, isa: str) -> None:
    qkv, table = _draw(generator, 2, 7, 4 * 16).float(), _angles(torch.arange(7), 8)
    table = Rotation(table.cos.float(), table.sin.float())
    options: dict[str, Any] = {"heads": 2, "kv_heads": 1, "query_norm": qkv[0, 0, :16], "key_norm": qkv[0, 1, :16]}
    whole, pieces = (Cache(*(torch.full((2, 1, 9, 16), 3.0, dtype=kept) for _ in "kv")) for _ in "ab")
    q = ops.rope_append(qkv, query_rotation=table, key_rotation=table, cache=whole, start=1, **options)[0]
    parts = []
    for first, last in ((0, 1), (1, 4), (4, 7)):
        part = Rotation(table.cos[first:last], table.sin[first:last])
        q_part, k, v = ops.rope_append(
            qkv[:, first:last],
            query_rotation=part,
            key_rotation=part,
            cache=pieces,
            start=1 + first,
            **options,
        )
        assert k.shape == v.shape == (2, 1, 1 + last, 16)
        assert k.data_ptr() == pieces.keys.data_ptr()
        parts.append(q_part)
    assert torch.equal(torch.cat(parts, 2), q)
    assert_equal(pieces, whole)
    for buffer in whole:  # the slots around the window are untouched
        assert (buffer[:, :, [0, 8]] == 3).all()


def test_final_slots_keep_what_they_hold_even_from_nan(generator: torch.Generator, isa: str) -> None:
    qkv = _draw(generator, 3, 4, 3 * 8).float()
    qkv[1, 1:3] = torch.nan
    cache = Cache(*(torch.full((3, 1, 8, 8), float(n)) for n in range(2)))
    starts, final = torch.tensor([0, 2, 4]), torch.tensor([2, 5, 99])
    ops.rope_append(qkv, heads=1, kv_heads=1, cache=cache, start=starts, final=final)
    for n, buffer in enumerate(cache):
        fresh = qkv[..., 8 * (n + 1) : 8 * (n + 2)]
        assert torch.equal(buffer[0, 0, 2:4], fresh[0, 2:])
        assert torch.equal(buffer[1, 0, 5:6], fresh[1, 3:])
        buffer[0, 0, 2:4] = buffer[1, 0, 5:6] = n
        assert (buffer == n).all()


def test_nothing_is_rounded_between_projection_and_cache(generator: torch.Generator) -> None:
    qkv, table = _draw(generator, 1, 4, 3 * 16).bfloat16(), _angles(torch.arange(4), 8)
    cache = Cache(*(torch.zeros(1, 1, 4, 16) for _ in "kv"))
    ops.rope_append(qkv, heads=1, kv_heads=1, key_rotation=table, key_norm=torch.ones(16), cache=cache)
    exact = ops.rope_append(qkv.double(), heads=1, kv_heads=1, key_rotation=table, key_norm=torch.ones(16))[1]
    torch.testing.assert_close(cache.keys.double(), exact, rtol=2e-6, atol=4e-6)


def test_threads_change_no_bit_of_a_cache(isa: str, generator: torch.Generator) -> None:
    qkv = torch.randn(4, 300, 4 * 64, generator=generator)
    buffers = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cache = Cache(*(torch.zeros(4, 1, 310, 64) for _ in "kv"))
            q, *_ = ops.rope_append(
                qkv, heads=2, kv_heads=1, key_norm=qkv[0, 0, :64], cache=cache, start=torch.tensor([0, 3, 7, 10])
            )
            buffers.append((q, *cache))
    finally:
        torch.set_num_threads(before)
    assert_equal(buffers[0], buffers[1])
    assert_equal(buffers[0], buffers[2])


def test_cached_calls_compile_without_a_graph_break() -> None:
    compiled = torch.compile(ops.rope_append, fullgraph=True, backend="aot_eager")
    for sample in samples_of(SPEC, torch.float32):
        if sample.label in {"values in a cache", "final slots"}:
            assert_equal(run(SPEC, copied(sample), compiled), outcome(SPEC, sample), sample.label)


def test_gradients_through_a_cache_or_to_the_tables_are_refused(generator: torch.Generator) -> None:
    qkv = torch.zeros(1, 2, 3 * 4, requires_grad=True)
    cache = Cache(*(torch.zeros(1, 1, 2, 4) for _ in "kv"))
    sentence = r"^rope_append: gradient mode is on for a tensor that requires a gradient, expected a call with a cache"
    for mode in (starflow_ext.reference_mode(), torch.enable_grad()):
        with mode, pytest.raises(RuntimeError, match=sentence):
            ops.rope_append(qkv, heads=1, kv_heads=1, cache=cache)
    with torch.no_grad():
        ops.rope_append(qkv, heads=1, kv_heads=1, cache=cache)
    table = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^rope_append: rotation has tables that require a gradient, expected"):
        ops.rope_append(qkv, heads=1, kv_heads=1, query_rotation=Rotation(table, table))


def test_wrong_arguments() -> None:
    good = plain(SPEC).arguments  # batch 2, 5 tokens, heads 4 and 2 of 16
    qkv, rotation = good["qkv"], good["query_rotation"]
    cut = Rotation(rotation.cos[:4], rotation.sin[:4])
    by_sample = Rotation(*(table.expand(3, -1, -1) for table in rotation))
    buffer = torch.zeros(2, 2, 6, 16)

    def cached(keys: torch.Tensor = buffer, values: torch.Tensor | None = None, **more: Any) -> dict[str, Any]:
        return {"cache": Cache(keys, keys.clone() if values is None else values), **more}

    known = "expected float32, bfloat16, float16 or float64"
    tables = "expected [..., 5, 8] for 5 tokens of head_dim 16"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"qkv": qkv.int()}, f"qkv has dtype int32, {known}"),
        ({"qkv": qkv[0]}, "qkv has shape [5, 128], expected (batch, tokens, channels)"),
        ({"heads": 0}, "heads is 0, expected at least 1"),
        ({"kv_heads": -1}, "kv_heads is -1, expected at least 1"),
        ({"heads": 3}, "qkv has channels 128, expected a multiple of 7 (heads + 2 kv_heads)"),
        ({"pairing": "other"}, 'pairing is "other", expected "interleaved" or "half"'),
        ({"query_norm": qkv[0, 0, :7]}, "query_norm has shape [7], expected [16] for head_dim of qkv"),
        ({"key_norm": qkv[0, 0, :16].int()}, f"key_norm has dtype int32, {known}"),
        ({"key_rotation": cut}, f"rotation has shape [4, 8], {tables}"),
        ({"query_rotation": by_sample}, f"rotation has shape [3, 5, 8], {tables}"),
        (
            {"query_rotation": Rotation(rotation.cos, rotation.sin[:, :4])},
            "query_rotation.sin has shape [5, 4], expected [5, 8] like query_rotation.cos",
        ),
        ({"qkv": qkv[..., :120]}, "head_dim is 15, expected an even number for a rotation"),
        (
            cached(buffer.double()),
            "cache.keys has dtype float64, expected float32, bfloat16 or float16 for qkv of float32",
        ),
        (cached(buffer[:1]), "cache.keys has shape [1, 2, 6, 16], expected [2, 2, capacity, 16]"),
        (cached(buffer[0]), "cache.keys has shape [2, 6, 16], expected [2, 2, capacity, 16]"),
        (
            cached(buffer[:1].expand(2, -1, -1, -1)),
            "cache.keys has elements that share memory, expected a tensor of its own (an expanded one cannot be "
            "written; use .clone())",
        ),
        (
            cached(buffer, buffer[:, :, :5]),
            "cache.values has shape [2, 2, 5, 16], expected [2, 2, 6, 16] like cache.keys",
        ),
        (cached(start=2), "cache holds 6 slots, expected at least 7"),
        (cached(start=torch.tensor([0, 3])), "cache holds 6 slots, expected at least 8"),
        (cached(start=-1), "start is -1, expected a slot, at least 0"),
        (cached(start=torch.tensor([-2, 0])), "start is -2, expected a slot, at least 0"),
        (cached(start=torch.tensor([0, 0, 0])), "start has shape [3], expected [2], one a sample"),
        (cached(final=torch.tensor([0, 0], dtype=torch.int32)), "final has dtype int32, expected int64"),
    ]
    for changed, sentence in wrong:
        changed = {**good, **changed}
        if "heads" in changed and changed["qkv"].shape[-1] == 120:
            changed |= {"query_norm": None, "key_norm": None}
        assert_refused(SPEC, changed, sentence)
    with pytest.raises(RuntimeError, match=r"^rope_append: query_rotation has one table, expected cosines and sines"):
        torch.ops.starflow_ext.rope_append(qkv, 4, 2, rotation.cos, None, None, None, None, None, PAIRINGS["half"])


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("start", [(1 << 63) - 1, (1 << 63) - 3, (1 << 63) - 4])
def test_slots_beyond_all_numbers_are_refused(start: int, tensor: bool) -> None:
    cache = (torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 4))
    place = torch.tensor([start]) if tensor else start
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"^rope_append: cache holds 8 .* at least {start + 3}$"):
        ops.rope_append(torch.randn(1, 3, 24), heads=2, kv_heads=2, cache=cache, start=place)


def test_caches_lie_apart() -> None:
    qkv, both = torch.randn(1, 3, 24), torch.zeros(1, 2, 8, 8)
    views = {"beside": torch.zeros(2, 1, 2, 8, 4).unbind(0), "between": torch.zeros(1, 2, 8, 2, 4).unbind(3)}
    found = []
    for cache in (*views.values(), tuple(both.split(4, -1)), tuple(torch.zeros(1, 2, 8, 4, 2).unbind(-1))):
        with torch.no_grad():
            found.append(ops.rope_append(qkv, heads=2, kv_heads=2, cache=cache))
        assert not torch.equal(found[-1][1], found[-1][2])
    for got in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(got, found[0], strict=True))
    whole, memory = torch.zeros(1, 2, 8, 4), torch.zeros(400)
    wrong = {
        "cache.values has memory in common with cache.keys": (whole, whole),
        "cache.values has memory in common with cache.keys, ": (both[..., :4], both[..., 3:7]),
        "cache.keys has elements that share memory": (memory.as_strided((1, 2, 8, 4), (64, 32, 3, 1)), whole),
        "cache.keys has memory in common with qkv": (memory[50:114].view(1, 2, 8, 4), whole),
    }
    for message, cache in wrong.items():
        given = memory[:72].view(1, 3, 24)
        with torch.no_grad(), pytest.raises(RuntimeError, match=f"^rope_append: {message}"):
            ops.rope_append(given, heads=2, kv_heads=2, cache=cache)
