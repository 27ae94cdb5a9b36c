"""block_attention's kernel of sm_90a on the emulated device (TMA, mbarriers, wgmma), against float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext._spec import Sample
from starflow_ext.block_attention import SPEC, FrameMask

from ..ops import battery
from .attention import (
    COLUMNS,
    FORWARD_SM90,
    HALVES,
    STAGED,
    STAGES,
    Call,
    arguments_for,
    assert_forward,
    exact,
    in_chunks,
    run_forward,
    usual_calls,
)
from .emulator import SEEDS, EmulationError, Kernels, Report, emulated
from .switches import BOUND, NOT, STATEMENT, Switches

# Rows of a tile, and parts of the keys.
SCHEDULES = ((64, 1), (128, 1), (64, 3), (128, 2))


def _joined(parts: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """What block_attention.cu makes of the results of the parts of the keys."""
    lse = logs.logsumexp(0)
    weights = torch.where(logs.isfinite(), (logs - lse).exp(), 0.0)
    return (weights[..., None] * parts).sum(0), lse


def _run(kernels: Kernels, seed: int, call: Call, rows: int = 64, splits: int = 1) -> tuple[Report, Tensor, Tensor]:
    run = run_forward(kernels, "block_attention_sm90_cuda", seed, call, rows, splits)
    if run.parts is None:
        return run.report, run.out, run.lse
    size = call.q.numel() * splits
    double = run.parts.double()
    joined, lse = _joined(double[:size].view(splits, *call.q.shape), double[size:].view(splits, *run.lse.shape))
    return run.report, joined.to(call.q.dtype), lse.float()


def _calls(dtype: torch.dtype) -> Iterator[tuple[Sample, tuple[Tensor, Tensor]]]:
    """Those calls of the battery that the kernel takes, keys and values in rows that TMA takes."""
    for sample, want in zip(usual_calls(dtype), exact(dtype), strict=True):
        shape = sample.arguments["k"].shape
        if shape[-1] <= 128 and shape[2] > 0:
            placed = {name: in_chunks(sample.arguments[name]) for name in ("k", "v")}
            yield Sample(sample.label, {**sample.arguments, **placed}), want


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_value(dtype: torch.dtype) -> None:
    """Every mask, size and option of the battery, each in another schedule, by other tiles and parts of the keys."""
    calls = list(_calls(dtype))
    assert len(calls) > 20
    for i, (sample, want) in enumerate(calls):
        rows, splits = SCHEDULES[i % len(SCHEDULES)]
        call = Call.of(sample.arguments)
        report, out, lse = _run(emulated(FORWARD_SM90), i, call, rows, splits)
        assert_forward(dtype, f"{sample.label}, {rows} rows, {splits} parts", (out, lse), want)
        # Of a row that is whole chunks; what wgmma reads always is.
        assert report.bank_conflicts == 0 or not call.wide, sample.label


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rows, splits", [(64, 2), (128, 1)])
def test_every_schedule_gives_the_same_bits(dtype: torch.dtype, head_dim: int, rows: int, splits: int) -> None:
    """More tiles than stages, so that each stage is used again."""
    kernels = emulated(FORWARD_SM90)
    call = Call.of(_long(dtype, head_dim))
    report, *expected = _run(kernels, SEEDS[0], call, rows, splits)
    assert report.tensor_copies > 2 * STAGES * (head_dim // 64) * report.blocks
    for seed in SEEDS[1:]:
        battery.assert_equal(tuple(_run(kernels, seed, call, rows, splits)[1:]), tuple(expected))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_stand_alone(dtype: torch.dtype, head_dim: int) -> None:
    """With the keys in one part, a query's bits are those that it has alone, in a tile of any size."""
    kernels = emulated(FORWARD_SM90)
    arguments = {**arguments_for(dtype, head_dim, keys=400), "q_start": 300}
    _, together, _ = _run(kernels, 0, Call.of(arguments), 128)
    for i in (0, 1, 37, 69):
        alone = {**arguments, "q": arguments["q"][:, :, i : i + 1], "q_start": 300 + i}
        _, out, _ = _run(kernels, 1, Call.of(alone))
        assert torch.equal(out, together[:, :, i : i + 1])


def test_visible_tiles_are_read_once() -> None:
    """Each by the tile of rows that sees it; what no row sees may be NaN, in a tile that is read too."""
    arguments = arguments_for(
        torch.bfloat16,
        queries=32,
        keys=700,
        q_start=torch.tensor([500, 600]),
        k_length=torch.tensor([690, 620]),
        frames=FrameMask(prefix=20, frame_tokens=30, look_ahead=1, window=2),
    )
    hidden = arguments["k"].new_ones(2, 1, 700, 1, dtype=torch.bool)
    tiles = 0
    for b, (start, length) in enumerate(((500, 690), (600, 620))):
        # By the first and the last query: the prefix, and a run of keys.
        first = 20 + 30 * max((start - 20) // 30 - 2, 0)
        last = min(start + 31 + 1, length)
        hidden[b, :, :20] = hidden[b, :, first:last] = False
        run = range(first // COLUMNS, -(-last // COLUMNS))
        tiles += len({0, *run})
    for name in ("k", "v"):
        arguments[name] = torch.where(hidden, torch.nan, arguments[name])
    call = Call.of(arguments)
    report, out, lse = _run(emulated(FORWARD_SM90), 0, call)
    finite = {name: arguments[name].nan_to_num(0.0) for name in ("k", "v")}
    doubles = battery.in_float64(Sample("", {**arguments, **finite}))
    want = SPEC.reference(**{**SPEC.arguments(**doubles.arguments), "return_lse": True})
    assert_forward(torch.bfloat16, "hidden NaN", (out, lse), want)
    # All of them end before the last of the keys.
    assert report.read["k"] == report.read["v"] == tiles * COLUMNS * 64 * 2
    assert report.read["q"] == arguments["q"].nbytes
    assert report.written["out"] == out.nbytes
    assert report.tensor_copies == 2 * tiles
    # A warp's quarter of 64 x 128 x 16 or of 64 x 64 x 16 each.
    assert report.group_products == tiles * 4 * (64 // 16 + COLUMNS // 16)


def test_rows_may_lie_anywhere() -> None:
    """Queries and results at any address and distance, keys at multiples of 16 bytes: the same bits."""
    kernels = emulated(FORWARD_SM90)
    arguments = arguments_for(torch.bfloat16)
    _, *expected = _run(kernels, 0, Call.of(arguments))
    for skip, gap, of_keys in ((1, 0, 0), (0, 3, 8), (8, 8, 16)):
        moved = {"q": in_chunks(arguments["q"], skip, gap)}
        moved |= {name: in_chunks(arguments[name], of_keys, 8) for name in ("k", "v")}
        _, *got = _run(kernels, 1, Call.of({**arguments, **moved}))
        battery.assert_equal(tuple(got), tuple(expected))


def test_what_tma_does_not_take_is_an_error() -> None:
    """Which the op never asks for (`forward_kernel_for`)."""
    arguments = arguments_for(torch.bfloat16)
    for name in ("k", "v"):
        for placed in (in_chunks(arguments[name], 4), in_chunks(arguments[name], 0, 4)):
            with pytest.raises(EmulationError, match="block_attention_sm90_cuda: error 1 of the CUDA runtime"):
                _run(emulated(FORWARD_SM90), 0, Call.of({**arguments, name: placed}))


def _long(dtype: torch.dtype, head_dim: int = 64) -> dict[str, Any]:
    """Five tiles of keys, of which each sample sees others, the last ones in part; NaN behind each sample's keys."""
    arguments = arguments_for(
        dtype,
        head_dim,
        queries=37,
        keys=5 * COLUMNS - 9,
        q_start=torch.tensor([590, 400]),
        k_length=torch.tensor([5 * COLUMNS - 9, 500]),
        frames=None,
    )
    for name in ("k", "v"):
        arguments[name][1, :, 500:] = torch.nan
        arguments[name] = in_chunks(arguments[name])
    return arguments


# Mutations: each barrier, wait, fence, count and bound taken away in turn; for 64 channels of one type alone.
MUTATIONS = {
    r"phase_of\(n\) \^ 1": "(on ? phase_of(n) : {0})",
    r"(?<=, )F::stage_bytes(?=\);)": "(on ? F::stage_bytes / 2 : {0})",
    r"__syncthreads\(\);": STATEMENT,
    r"(?<=turn_of \+ )group\b": "(on ? 1 - {0} : {0})",
    r"(?<=turn_of \+ )1 - group\b": "(on ? group : {0})",
    r"(?<=if \()group == [01](?=\) pass_on)": BOUND,
    # In parentheses the pattern below does not see it.
    r"take_values\(n - 1\);\s+turns\.await\(\);": "if (on) { (turns.await)(); take_values(n - 1); } else { {0} }",
    r"turns\.\w+\(\);": STATEMENT,
    r"(sync|arrive)_named<F::\w+>\([^;]*\);": STATEMENT,
    r"(Empty|Full)::wait\([^;]*\);": STATEMENT,
    r"Full::arrive_and_expect_tx\([^;]*\);": "if (on) { Full::arrive(&barriers.full[stage]); } else {0}",
    r"(?<=if \()lane\(\) == 0": BOUND,
    r"leave\(shared\.\w+, (0|n|n - 1)\);": STATEMENT,
    r"\bF::multiplying_warps(?=\);)": "(on ? 2 * {0} : {0})",
    r"cutlass::arch::fence_\w+\(\);": STATEMENT,
    r"cute::cp_async_wait<0>\(\);": STATEMENT,
    r"cute::warpgroup_(arrive|wait<[01]>|commit_batch)\(\);": STATEMENT,
    r"cute::GMMA::ScaleOut::Zero": "(on ? cute::GMMA::ScaleOut::One : {0})",
    r"(?<=if \()any\.all_in\(key, key \+ F::columns\)": BOUND,
    r"!any\.has\([^;{]*?F::columns\)": NOT,
    r"!seen\(\)\.every\.all_in\([^;]*?\)(?=\) hide)": NOT,
    r"scale_sums\([^;]*\);": STATEMENT,
    r"threadIdx\.x != F::multiplying": NOT,
}
SHARED = "ops/block_attention/block_attention_forward.cuh"
SHARED_MUTATIONS = {
    r"__syncwarp\(\);": STATEMENT,
    r"first \+ in_tile < end(?= \?)": BOUND,
    r"(?<!else )if \(r < block\.end": "if ((on || r < block.end)",  # the other is that of float32
}
EDITS = {
    "launch_by_width<Float16>": "launch_by_width<BFloat16>",
    r"launch_forward<Element, 128\b": "launch_forward<Element, 64",
}
SWITCHES = Switches(
    FORWARD_SM90,
    {FORWARD_SM90: MUTATIONS, SHARED: SHARED_MUTATIONS, **STAGED},
    EDITS,
)


def _whole() -> dict[str, Any]:
    """Whole tiles of keys, all of them visible to all."""
    options = {"causal": False, "q_start": None, "k_length": None, "frames": None}
    return arguments_for(torch.bfloat16, queries=37, keys=3 * COLUMNS, **options)


def _prefix() -> dict[str, Any]:
    """Hidden keys in the first tile, of which the prefix is seen, and in the last."""
    frames = FrameMask(prefix=20, frame_tokens=30, look_ahead=1, window=2)
    options = {"q_start": torch.tensor([300, 250]), "k_length": None, "frames": frames}
    return arguments_for(torch.bfloat16, queries=37, keys=3 * COLUMNS, **options)


@cache
def _checked() -> list[tuple[str, Call, int, int, tuple[Tensor, Tensor]]]:
    schedules = ((64, 64, 1), (40, 128, 1), (17, 64, 2), (64, 128, 2))
    calls = [(f"head_dim {d}", _long(torch.bfloat16, d), rows, splits) for d, rows, splits in schedules]
    found = []
    more = [("whole tiles", _whole(), 64, 1), ("prefix", _prefix(), 128, 1)]
    for label, arguments, rows, splits in [*calls, *more]:
        finite = {name: arguments[name].nan_to_num(0.0) for name in ("k", "v")}
        doubles = battery.in_float64(Sample("", {**arguments, **finite}))
        want = SPEC.reference(**{**SPEC.arguments(**doubles.arguments), "return_lse": True})
        found.append((label, Call.of(arguments), rows, splits, want))
    return found


def check(kernels: Kernels) -> None:
    for seed, (label, call, rows, splits, want) in enumerate(_checked()):
        report, out, lse = _run(kernels, seed, call, rows, splits)
        assert_forward(torch.bfloat16, label, (out, lse), want)
        assert report.bank_conflicts == 0 or not call.wide


def test_source_without_a_mutation_passes() -> None:
    check(SWITCHES.kernels(None))


@pytest.mark.parametrize("place", range(len(SWITCHES.places)), ids=SWITCHES.places.__getitem__)
def test_mutation_is_caught(place: int) -> None:
    with pytest.raises((EmulationError, AssertionError)):
        check(SWITCHES.kernels(place))
