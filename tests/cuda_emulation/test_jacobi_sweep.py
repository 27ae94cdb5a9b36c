"""jacobi_sweep on the emulated device, all launches of all layers, against its reference in plain torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext.jacobi_sweep import jacobi_sweep_reference
from starflow_ext.sweep_block import BlockState, BlockWeights

from ..ops.blocks import KINDS, block, state_of
from .blocks import SWEEP, DeviceBlock, reference_caches, sweep_kernels
from .emulator import SEEDS, Kernels, Mutation, assert_caught, mutations, some

# Distance from the reference, whose products are of float32; values are of order 1.
BOUNDS = {"float16": 5e-3, "bfloat16": 4e-2}
# Tokens in front of the last windows, and slots for all.
PREFIX = 23
SLOTS = PREFIX + 17


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return sweep_kernels()


def _calls(weights: BlockWeights, prefix: int) -> list[tuple[Tensor, Tensor, Tensor, bool]]:
    """Text, a prefix, and two windows at other places in each row: rows, start, keep, text."""
    g = torch.Generator().manual_seed(7)
    width, channels = weights.proj_in.weight.shape
    starts = torch.zeros(3, dtype=torch.int64)
    return [
        (torch.randn(3, 2, width, generator=g), starts, starts, True),
        (torch.randn(3, prefix, channels, generator=g), starts + 2, starts, False),
        (
            torch.randn(3, 9, channels, generator=g),
            prefix + torch.arange(3),
            starts + prefix + 2 - torch.arange(3) % 2,
            False,
        ),
    ]


def _sweeps(
    kernels: Kernels,
    weights: BlockWeights,
    state: BlockState,
    expected: BlockState | None = None,
    *,
    sm90: bool = False,
    sm100: bool = False,
    **how: Any,
) -> tuple[Tensor, ...]:
    """What the sweeps put out, and what the caches then hold; near the reference on another state.

    On sm_90a by the kernels of TMA and wgmma alone; on sm_100f by tcgen05 but for attention.
    """
    device = DeviceBlock.of(weights, state, sm90=sm90, sm100=sm100)
    prefix = state.slots - (SLOTS - PREFIX)
    bound = BOUNDS[weights.proj_in.weight.storage]
    results = []
    for rows, start, keep, text in _calls(weights, prefix):
        report, raw = device.sweep(kernels, rows, start, keep, text=text, **how)
        assert (report.group_products > 0, report.products == 0) == (sm90, sm90)
        assert (report.tensor_products > 0) == sm100
        results.append(raw)
        if expected is not None:
            want = jacobi_sweep_reference(weights, expected, rows, start, keep, text)
            torch.testing.assert_close(raw, want, atol=bound, rtol=bound)
    # Slots that no window of a row has reached are as they were.
    reached = torch.arange(state.slots) < prefix + 9 + torch.arange(3)[:, None]
    for index, cache in enumerate((device.keys, device.values)):
        seen = reached[None, :, None, :, None].expand_as(cache)
        assert cache[~seen].isnan().all()
        results.append(cache[seen])
        if expected is not None:
            want = reference_caches(weights, expected)[index][seen]
            torch.testing.assert_close(cache[seen].float(), want, atol=bound, rtol=bound)
    return tuple(results)


def _checked(kernels: Kernels, options: dict[str, Any], storage: Any, cache: Any, **how: Any) -> tuple[Tensor, ...]:
    state, expected = (state_of(block(options, storage), 3, SLOTS, storage=cache) for _ in range(2))
    return _sweeps(kernels, block(options, storage), state, expected, **how)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage, cache", [("float16", "float16"), ("bfloat16", "float32")])
def test_sweeps_are_those_of_the_reference(kind: str, storage: Any, cache: Any, kernels: Kernels) -> None:
    _checked(kernels, KINDS[kind], storage, cache)


@pytest.mark.parametrize("cache", ["bfloat16", "float16"])
def test_every_type_of_cache(cache: Any, kernels: Kernels) -> None:
    _checked(kernels, {}, "bfloat16", cache)


def _rotated(kernels: Kernels, **on: bool) -> None:
    """Heads that the product normalises, rotates and writes; the depth cut in two or not; edges of tiles."""
    for head_dim, heads, width in ((8, 3, 40), (16, 2, 64), (32, 1, 512), (64, 2, 40)):
        for qk in (True, False):
            options = {"head_dim": head_dim, "heads": heads, "kv_heads": 1, "width": width, "qk": qk, "bias": qk}
            storage = "float16" if qk else "bfloat16"
            _checked(kernels, options, storage, storage, **on)


@pytest.mark.parametrize("on", [{}, {"sm90": True}, {"sm100": True}], ids=["sm_80", "sm_90a", "sm_100f"])
def test_heads_of_all_sizes_that_the_product_rotates(on: dict[str, bool], kernels: Kernels) -> None:
    _rotated(kernels, **on)


def _over_frames(kernels: Kernels, kind: str, storage: Any, cache: Any, *, sm90: bool = False) -> None:
    weights = block(KINDS[kind], storage)
    frames = {"frame_tokens": 6, "frames_behind": 1}
    state, expected = (state_of(weights, 3, SLOTS + (120 if sm90 else 0), storage=cache, **frames) for _ in range(2))
    _sweeps(kernels, weights, state, expected, sm90=sm90)


@pytest.mark.parametrize("kind", ["plain", "large heads"])
@pytest.mark.parametrize("storage, cache", [("float16", "float16"), ("bfloat16", "float32")])
def test_sweeps_over_the_last_frames(kind: str, storage: Any, cache: Any, kernels: Kernels) -> None:
    """A window that reaches over three frames, of which a token sees its own and the one before."""
    _over_frames(kernels, kind, storage, cache)


def test_sweeps_over_the_last_frames_on_sm_90a(kernels: Kernels) -> None:
    """Most tiles of keys are seen by no query."""
    _over_frames(kernels, "whole tiles", "float16", "float16", sm90=True)


# Of heads whose caches TMA takes; one is padded to a tile of 128 channels.
ON_SM90: dict[str, dict[str, Any]] = {
    "whole tiles": KINDS["whole tiles"],
    "gated, post-norms, q/k norms": KINDS["gated, post-norms, q/k norms"] | {"head_dim": 16},
    "wide heads": {"heads": 3, "kv_heads": 1, "head_dim": 72},
}


@pytest.mark.parametrize("kind, storage", list(zip(ON_SM90, ("float16", "bfloat16", "bfloat16"), strict=True)), ids=str)
def test_sweeps_on_sm_90a(kind: str, storage: Any, kernels: Kernels) -> None:
    """Windows at other places in each row, whose keys reach into a second tile."""
    weights = block(ON_SM90[kind], storage)
    state, expected = (state_of(weights, 3, SLOTS + 120, storage=storage) for _ in range(2))
    _sweeps(kernels, weights, state, expected, sm90=True)


def test_any_number_of_rows_together_gives_the_same_bits_on_sm_90a(kernels: Kernels) -> None:
    weights = block(ON_SM90["gated, post-norms, q/k norms"], "float16")
    first, again = (state_of(weights, 3, SLOTS, storage="float16") for _ in range(2))
    expected = _sweeps(kernels, weights, first, sm90=True)
    for got, want in zip(_sweeps(kernels, weights, again, sm90=True, most_rows=20, seed=1), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "kind, storage", [("whole tiles", "float16"), ("gated, post-norms, q/k norms", "bfloat16")], ids=str
)
def test_sweeps_on_sm_100f(kind: str, storage: Any, kernels: Kernels) -> None:
    """Whose products run by tcgen05: near the reference, and the same bits whatever rows run together."""
    weights = block(KINDS[kind], storage)
    first, again, expected = (state_of(weights, 3, SLOTS, storage=storage) for _ in range(3))
    results = _sweeps(kernels, weights, first, expected, sm100=True)
    for got, want in zip(_sweeps(kernels, weights, again, sm100=True, most_rows=20, seed=1), results, strict=True):
        assert torch.equal(got, want)


def _without(state: BlockState) -> BlockState:
    return replace(state, position=None, condition=None, query_rotation=None, key_rotation=None)


def _bare(kernels: Kernels) -> None:
    """Nothing added to tokens, no positions, no start token; and one of the two alone."""
    weights = block({}, "float16")
    bare = replace(weights, start_token=None)
    for change in (_without, lambda state: replace(state, condition=None), lambda state: replace(state, position=None)):
        state, expected = (change(state_of(weights, 3, SLOTS, storage="float16")) for _ in range(2))
        _sweeps(kernels, bare, state, expected)


def test_what_may_be_absent(kernels: Kernels) -> None:
    _bare(kernels)


def _frames(kernels: Kernels) -> None:
    """Conditions of each frame of 7 tokens."""
    weights = block({}, "float16")
    state, expected = (state_of(weights, 3, SLOTS, storage="float16", condition_tokens=7) for _ in range(2))
    _sweeps(kernels, weights, state, expected)


def test_tokens_of_a_frame_share_its_condition(kernels: Kernels) -> None:
    _frames(kernels)


def _pieces(kernels: Kernels) -> None:
    """Whole windows, or parts of one, after one another: the same bits."""
    weights = block({"gated": True, "post": True}, "float16")
    expected = _sweeps(kernels, weights, state_of(weights, 3, SLOTS, storage="float16"))
    # Two windows of 9 and none of 23; one and a part.
    for most_rows in (20, 9, 5):
        state = state_of(weights, 3, SLOTS, storage="float16")
        for got, want in zip(_sweeps(kernels, weights, state, most_rows=most_rows), expected, strict=True):
            assert torch.equal(got, want), most_rows


def test_any_number_of_rows_together_gives_the_same_bits(kernels: Kernels) -> None:
    _pieces(kernels)


def _halves(kernels: Kernels) -> None:
    """Cache rows beyond the samples read the samples again."""
    weights = block({}, "float16")
    rows, start = torch.randn(2, 5, 5), torch.full((4,), 2)
    raws = []
    for given in (rows, rows.repeat(2, 1, 1)):
        device = DeviceBlock.of(weights, state_of(weights, 4, 7, storage="float16"))
        device.keys[:, :, :, :2] = device.values[:, :, :, :2] = 0.0
        raws.append(device.sweep(kernels, given, start)[1])
    assert torch.equal(*raws)


def test_halves_read_the_same_samples(kernels: Kernels) -> None:
    _halves(kernels)


def test_every_schedule_gives_the_same_bits(kernels: Kernels) -> None:
    weights = block({"post": True}, "bfloat16")
    expected = _sweeps(kernels, weights, state_of(weights, 3, SLOTS, storage="bfloat16"))
    for seed in SEEDS[1:]:
        state = state_of(weights, 3, SLOTS, storage="bfloat16")
        for got, want in zip(_sweeps(kernels, weights, state, seed=seed), expected, strict=True):
            assert torch.equal(got, want)


def test_launches(kernels: Kernels) -> None:
    """As jacobi_sweep_cuda.h counts them, whatever is normalised, rounded or cut by its depth."""
    kinds = (
        ({"head_dim": 64}, 5),
        ({"head_dim": 16, "gated": True}, 6),
        ({"head_dim": 32, "gated": True, "post": True, "qk": True}, 10),
        # Heads that the product does not rotate.
        ({}, 6),
        ({"head_dim": 128}, 6),
        # Split by its depth.
        ({"width": 512, "head_dim": 32, "heads": 1}, 5),
    )
    for kind, layer in kinds:
        weights = block(kind, "float16")
        device = DeviceBlock.of(weights, state_of(weights, 3, SLOTS, storage="float16"))
        report, _ = device.sweep(kernels, torch.zeros(3, 4, 5), torch.full((3,), 2))
        assert report.launches == report.early_launches == 3 + 2 * layer


def test_launches_that_begin_early_give_the_same_bits(kernels: Kernels) -> None:
    """Each of a sweep begins before the one in front of it has ended; so they are in the other tests."""
    weights = block({"gated": True, "post": True, "qk": True}, "float16")
    results = []
    for early in (True, False):
        device = DeviceBlock.of(weights, state_of(weights, 3, SLOTS, storage="float16"), early=early)
        device.keys[:, :, :, :2] = device.values[:, :, :, :2] = 0.0
        report, raw = device.sweep(kernels, torch.ones(3, 4, 5), torch.full((3,), 2))
        assert report.early_launches == (report.launches if early else 0)
        results += [raw, device.keys[:, :, :, :6], device.values[:, :, :, :6]]
    for one, other in zip(results[:3], results[3:], strict=True):
        assert torch.equal(one, other)


MUTATIONS = mutations(
    SWEEP,
    {
        r"row >= g\.piece\.rows\(\)": "false",
        r"args\.slots\[cache_row\] \+ token": "args.slots[cache_row] + row % g.piece.tokens",
        r"g\.piece\.first_window \+ window": "window",
        r"g\.piece\.first_token \+ row": "row",
        r"row % g\.piece\.tokens == 0 && lane\(\) == 0": "row == 0",
        r"slot == block\.text_tokens && ": "",
        r"cache_row % args\.samples": "cache_row",
        r"slot - block\.text_tokens;": "slot;",
        r"condition_of\(block, cache_row, place\)": "condition_of(block, cache_row, 0)",
        r"if \(at >= count\) return;": "",
        r"await_earlier_launches\(\);": "",
        r"g\.counters\[i\] = 0": "(void)0",
        r"counters_taken_ \+= args\.schedule\.counters\(\);": "",
        r"block_\.width % wide == 0 && ": "",
        r"added \? stream_h\(\) : Matrix\{\}": "Matrix{}",
        r"piece_\.first_window \* args_\.tokens \+ piece_\.first_token": "0",
        r"layer \+\s+piece_\.first_window[^;]*": "layer",
        r"args_\.keep \+ piece_\.first_window": "args_.keep",
        r"turn\(2, ": "turn(0, ",
        r"table\(first_table \+ 1\)": "table(first_table)",
        r"attention\.mask\.starts = rope\.starts;": "",
        r"Epilogue::gelu, hidden": "Epilogue::none, hidden",
    },
) + mutations(
    "ops/jacobi_sweep/jacobi_sweep.h",
    {
        r"mask\.causal = !block\.whole_frames;": "",
        r"mask\.prefix = block\.text_tokens;": "mask.prefix = 0;",
        r"mask\.frames \? block\.mask_frames : -1": "-1",
        r"mask\.length = block\.slots;": "mask.length = 1;",
    },
)


@pytest.mark.parametrize("mutation", some(MUTATIONS), ids=str)
def test_mutation_is_caught(mutation: Mutation) -> None:
    def check(kernels: Kernels) -> None:
        _checked(kernels, KINDS["one channel more"] | {"gated": True, "post": True, "qk": True}, "float16", "float16")
        _over_frames(kernels, "one channel more", "float16", "float16")
        _bare(kernels)
        _frames(kernels)
        _pieces(kernels)
        _halves(kernels)
        _rotated(kernels)

    assert_caught(SWEEP, mutation, check)
