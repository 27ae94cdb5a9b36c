"""The gradient of block_attention on sm_90a on the emulated device (TMA, mbarriers, wgmma), against float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext.block_attention import FrameMask

from ..ops import battery
from .attention import (
    BACKWARD_SM90,
    COLUMNS,
    DOTS,
    HALVES,
    STAGED,
    Above,
    Call,
    arguments_for,
    assert_gradients,
    exact_gradients,
    gradient_rows,
    gradients_of,
    in_chunks,
    run_backward,
)
from .emulator import SEEDS, EmulationError, Kernels, Report, emulated
from .switches import BOUND, NOT, STATEMENT, Switches


def _run(kernels: Kernels, seed: int, call: Call, above: Above) -> tuple[Report, tuple[Tensor, ...]]:
    return run_backward(kernels, "block_attention_backward_sm90_cuda", seed, call, above)


def _placed(arguments: Mapping[str, Any], above: Above, *where: int) -> tuple[Call, Above]:
    """All that TMA reads in rows that it takes."""
    rows = {name: in_chunks(arguments[name], *where) for name in ("q", "k", "v")}
    return Call.of({**arguments, **rows}), replace(above, grad_out=in_chunks(above.grad_out, *where))


def _calls(dtype: torch.dtype) -> Iterator[tuple[str, Call, Above, tuple[Tensor, ...]]]:
    """Those calls of the battery that the kernel takes."""
    for sample, above, expected in exact_gradients(dtype):
        shape = sample.arguments["k"].shape
        if shape[-1] <= 128 and shape[2] > 0:
            yield sample.label, *_placed(sample.arguments, above), expected


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradient(dtype: torch.dtype) -> None:
    """Every mask, size and option of the battery, through both results; each call in another schedule."""
    calls = list(_calls(dtype))
    assert len(calls) > 20
    for seed, (label, call, above, expected) in enumerate(calls):
        report, grads = _run(emulated(BACKWARD_SM90), seed, call, above)
        assert_gradients(dtype, label, grads, expected)
        assert report.bank_conflicts == 0 or not call.wide, label


def _long(dtype: torch.dtype, head_dim: int = 64) -> dict[str, Any]:
    """Three tiles of keys, and more tiles of queries than stages; the second sample's last queries alone see keys.

    NaN in queries that see no key, of which some fill a tile, and in keys that no query sees.
    """
    keys = 3 * COLUMNS - 9
    starts = torch.tensor([keys - 150, -140])
    arguments = arguments_for(dtype, head_dim, queries=150, keys=keys, q_start=starts, k_length=None, frames=None)
    arguments["q"][1, :, :140] = torch.nan
    for name in ("k", "v"):
        arguments[name][1, :, 10:] = torch.nan
    return arguments


@cache
def _exact_long(dtype: torch.dtype, head_dim: int) -> tuple[Call, Above, tuple[Tensor, ...]]:
    arguments = _long(dtype, head_dim)
    above, expected = gradients_of(arguments)
    above.grad_out[1, :, :140] = torch.nan
    return *_placed(arguments, above), expected


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_schedule_gives_the_same_gradient(dtype: torch.dtype, head_dim: int) -> None:
    """Stages that are used again, three blocks that add to one tile of grad_q, NaN wherever nobody looks."""
    kernels = emulated(BACKWARD_SM90)
    call, above, expected = _exact_long(dtype, head_dim)
    _, first = _run(kernels, SEEDS[0], call, above)
    assert_gradients(dtype, "long", first, expected)
    for seed in SEEDS[1:]:
        battery.assert_equal(_run(kernels, seed, call, above)[1], first)


def test_visible_tiles_are_read_once() -> None:
    """Each tile of queries by the tiles of keys that it sees, sums of grad_q by all of these but the first."""
    keys, queries, head_dim = 700, 32, 64
    arguments = arguments_for(
        torch.bfloat16,
        queries=queries,
        keys=keys,
        q_start=torch.tensor([500, 600]),
        k_length=torch.tensor([690, 620]),
        frames=FrameMask(prefix=20, frame_tokens=30, look_ahead=1, window=2),
    )
    tiles = []
    for start, length in ((500, 690), (600, 620)):
        # By the first and the last query: the prefix, and a run of keys.
        first = 20 + 30 * max((start - 20) // 30 - 2, 0)
        last = min(start + queries, length)
        tiles.append(len({0, *range(first // COLUMNS, -(-last // COLUMNS))}))
    above, expected = gradients_of(arguments)
    call, above = _placed(arguments, above)
    report, grads = _run(emulated(BACKWARD_SM90), 0, call, above)
    assert_gradients(torch.bfloat16, "few", grads, expected)
    heads, rows = 2, gradient_rows(head_dim)
    tile = rows * head_dim * 4
    assert report.read["sums"] == report.written["sums"] == heads * tile * sum(count - 1 for count in tiles)
    # Once for D, too.
    assert report.read["grad_out"] == report.read["q"] * (sum(tiles) + 2) // sum(tiles)
    assert report.read["q"] == heads * sum(tiles) * queries * head_dim * 2
    # Keys that nobody sees are read too.
    assert report.read["k"] == report.read["v"] == arguments["k"].nbytes
    assert report.written["grad_q"] == grads[0].nbytes
    assert report.written["grad_k"] == report.written["grad_v"] == grads[1].nbytes
    # Five products of a tile; a warp's quarter of 64 rows each, in a depth of 16.
    warps, halves = 8, rows // 64
    of_tile = 2 * head_dim // 16 + 2 * rows // 16 + halves * COLUMNS // 16 // 2
    assert report.group_products == heads * sum(tiles) * warps * of_tile


def test_one_tile_of_keys_needs_no_memory() -> None:
    arguments = arguments_for(torch.bfloat16, keys=COLUMNS)
    above, expected = gradients_of(arguments)
    call, above = _placed(arguments, above)
    report, grads = _run(emulated(BACKWARD_SM90), 0, call, above)
    assert_gradients(torch.bfloat16, "one tile", grads, expected)
    assert "sums" not in report.read


def test_rows_may_lie_anywhere() -> None:
    """At multiples of 16 bytes, and results anywhere: the same bits."""
    kernels = emulated(BACKWARD_SM90)
    arguments = arguments_for(torch.bfloat16)
    above, _ = gradients_of(arguments)
    call, placed = _placed(arguments, above)
    _, expected = _run(kernels, 0, call, placed)
    for where in ((0, 8), (8, 8), (16, 24)):
        call, placed = _placed(arguments, above, *where)
        battery.assert_equal(_run(kernels, 1, call, placed)[1], expected)


def test_what_tma_does_not_take_is_an_error() -> None:
    """Which the op never asks for (`backward_kernel_for`)."""
    arguments = arguments_for(torch.bfloat16)
    above, _ = gradients_of(arguments)
    call, placed = _placed(arguments, above)
    for name in ("q", "k", "v", "grad_out"):
        for where in ((4,), (0, 4)):
            moved, changed = call, placed
            if name == "grad_out":
                changed = replace(placed, grad_out=in_chunks(above.grad_out, *where))
            else:
                moved = Call.of({**arguments, name: in_chunks(arguments[name], *where)})
            with pytest.raises(EmulationError, match="backward_sm90_cuda: error 1 of the CUDA runtime"):
                _run(emulated(BACKWARD_SM90), 0, moved, changed)


# Mutations: each barrier, wait, fence, count and bound taken away in turn; for 64 channels of one type alone.
MUTATIONS = {
    r"phase_of\(n\) \^ 1": "(on ? phase_of(n) : {0})",
    r"2 \* B::(key|query)_bytes(?=\);)": "(on ? {0} / 2 : {0})",
    r"__sync(threads|warp)\(\);": STATEMENT,
    r"sync_named<B::\w+>\([^;]*\);": STATEMENT,
    r"(Empty|Full)::wait\([^;]*\);": STATEMENT,
    r"(?<=        )Full::arrive\(&shared\.full\[stage_of\(n\)\]\);(?=\n    \})": STATEMENT,
    r"(?<=if \()lane\(\) == 0(?=\) (Full|Empty)::arrive)": BOUND,
    r"\bB::multiplying_warps(?=\);)": "(on ? 2 * {0} : {0})",
    r"1 \+ B::loading_warps": "(on ? B::loading_warps : {0})",
    r"cutlass::arch::fence_\w+\(\);": STATEMENT,
    r"cute::warpgroup_(arrive|wait<\d>|commit_batch)\(\);": STATEMENT,
    r"cute::GMMA::ScaleOut::Zero": "(on ? cute::GMMA::ScaleOut::One : {0})",
    # What may be NaN, and what is hidden.
    r"!any\.all_in\([^;{]*?B::columns\)(?=\) \{)": NOT,
    r"blind != 0": NOT,
    r"!kept\([^;]*?\)(?=\) rein)": NOT,
    r"(?<=if \()!all(?=\))": NOT,
    r"(?<=if \()seen\.any_in\([^;]*?\)(?=\) return)": BOUND,
    r"query < queries && !sees": "(!on && ({0}))",
    r"(?<=if \()query < queries": BOUND,
    r"sees(?= \? )": BOUND,
    # Bounds of results.
    r"(?<=if \()wide(?=\))": BOUND,
    r"channel( \+ 1)? < shape\.head_dim": BOUND,
    r"query >= shape\.queries": NOT,
    r"key < shape\.keys": BOUND,
    # Turns.
    r"place < 0": NOT,
    r"tiles\.count - 1 - place": "(on ? place : {0})",
    r"turn > 0": NOT,
    r"turn \+ 1 < adders": NOT,
    r"args\.turns\[[^;]*\] = 0;": STATEMENT,
    r"wait_for_signals\([^;]*\);": STATEMENT,
    r"signal\(args\.turns \+ place\);": STATEMENT,
}
EDITS = {
    "launch_by_width<Float16>": "launch_by_width<BFloat16>",
    r"launch_backward<Element, 128\b": "launch_backward<Element, 64",
}
SWITCHES = Switches(
    BACKWARD_SM90,
    {BACKWARD_SM90: MUTATIONS, **DOTS, **STAGED},
    EDITS,
)


@cache
def _odd(head_dim: int) -> tuple[Call, Above, tuple[Tensor, ...]]:
    """A prefix and frames, channels that fill no tile, three tiles of keys and few queries."""
    arguments = arguments_for(
        torch.bfloat16,
        head_dim,
        queries=37,
        keys=3 * COLUMNS - 9,
        q_start=torch.tensor([300, 250]),
        k_length=None,
        frames=FrameMask(prefix=20, frame_tokens=30, look_ahead=1, window=2),
    )
    above, expected = gradients_of(arguments)
    return *_placed(arguments, above), expected


@cache
def _before_first() -> tuple[Call, Above, tuple[Tensor, ...]]:
    """Queries that stand beside keys of their tile and see none of them."""
    options = {"q_start": torch.tensor([260, 330]), "k_start": torch.tensor([300, 3]), "k_length": None, "frames": None}
    arguments = arguments_for(torch.bfloat16, 64, queries=37, keys=3 * COLUMNS - 9, **options)
    above, expected = gradients_of(arguments)
    return *_placed(arguments, above), expected


def check(kernels: Kernels) -> None:
    calls = (_odd(17), _odd(40), _before_first(), _exact_long(torch.bfloat16, 64))
    for seed, (call, above, expected) in enumerate(calls):
        report, grads = _run(kernels, seed, call, above)
        assert_gradients(torch.bfloat16, f"head_dim {call.q.shape[-1]}", grads, expected)
        assert report.bank_conflicts == 0 or not call.wide


def test_source_without_a_mutation_passes() -> None:
    check(SWITCHES.kernels(None))


@pytest.mark.parametrize("place", range(len(SWITCHES.places)), ids=SWITCHES.places.__getitem__)
def test_mutation_is_caught(place: int) -> None:
    with pytest.raises((EmulationError, AssertionError)):
        check(SWITCHES.kernels(place))
