"""block_attention and its gradient on the emulated device, against the definition in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from starflow_ext._spec import Sample
from starflow_ext.block_attention import SPEC

from ..ops import battery
from .attention import (
    BACKWARD,
    DOTS,
    FORWARD,
    HALVES,
    Above,
    Call,
    arguments_for,
    assert_forward,
    assert_gradients,
    draw,
    exact,
    exact_gradients,
    in_rows,
    run_backward,
    run_forward,
    small,
    small_exact,
    usual_calls,
)
from .emulator import SEEDS, EmulationError, Kernels, Report, emulated
from .switches import BOUND, NOT, STATEMENT, Switches

DTYPES = (torch.float32, *HALVES)
# Rows of a tile, and parts of the keys. Tiles of 128 rows exist for 16 bits; float32 has one size for each width.
SCHEDULES = ((64, 1), (128, 1), (64, 3), (64, 2), (128, 4))


def _forward(kernels: Kernels, seed: int, call: Call, rows: int = 64, splits: int = 1) -> tuple[Report, Tensor, Tensor]:
    run = run_forward(kernels, "block_attention_cuda", seed, call, rows, splits)
    return run.report, run.out, run.lse


def _assert_values(kernels: Kernels, dtype: torch.dtype) -> None:
    for i, (sample, want) in enumerate(zip(usual_calls(dtype), exact(dtype), strict=True)):
        call = Call.of(sample.arguments)
        rows, splits = SCHEDULES[i % len(SCHEDULES)]
        report, *got = _forward(kernels, i, call, rows, splits)
        assert_forward(dtype, f"{sample.label}, {rows} rows, {splits} parts", (got[0], got[1]), want)
        assert report.bank_conflicts == 0 or not call.wide, sample.label


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value(dtype: torch.dtype) -> None:
    """Every mask, size and option of the battery, each in another schedule, by other tiles and parts of the keys."""
    _assert_values(emulated(FORWARD), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_schedule_gives_the_same_bits(dtype: torch.dtype, head_dim: int) -> None:
    kernels = emulated(FORWARD)
    call = Call.of(arguments_for(dtype, head_dim, queries=35))
    for rows, splits in ((64, 2), (128, 1)):
        _, *expected = _forward(kernels, SEEDS[0], call, rows, splits)
        for seed in SEEDS[1:]:
            _, *got = _forward(kernels, seed, call, rows, splits)
            battery.assert_equal(tuple(got), tuple(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_stand_alone(dtype: torch.dtype) -> None:
    """With the keys in one part, a query's bits are those that it has alone, in a tile of any size."""
    kernels = emulated(FORWARD)
    arguments = {**arguments_for(dtype, head_dim=128), "q_start": 60}
    _, together, _ = _forward(kernels, 0, Call.of(arguments), 128)
    for i in (0, 1, 37, 69):
        alone = {**arguments, "q": arguments["q"][:, :, i : i + 1], "q_start": 60 + i}
        _, out, _ = _forward(kernels, 1, Call.of(alone))
        assert torch.equal(out, together[:, :, i : i + 1])


def test_only_visible_keys_are_read() -> None:
    """Each once by the tile of rows that sees them, and nothing of what lies behind the length."""
    kernels = emulated(FORWARD)
    options = {"q_start": torch.tensor([80, 90]), "k_length": torch.tensor([150, 137])}
    arguments = arguments_for(torch.bfloat16, queries=32, **options)
    for b, length in enumerate((150, 137)):
        for name in ("k", "v"):
            arguments[name][b, :, length:] = torch.nan
    report, out, _ = _forward(kernels, 0, Call.of(arguments))
    assert out.isfinite().all()
    # The prefix, and keys from the first that the first query sees to the last that the last one does.
    visible = (20 + 112 - 20) + (20 + 122 - 20)
    assert report.read["k"] == report.read["v"] == visible * 64 * 2
    assert report.read["q"] == arguments["q"].nbytes
    assert report.written["out"] == out.nbytes


def test_rows_may_lie_anywhere() -> None:
    """At any address and distance, the bits are those of rows that lie side by side."""
    kernels = emulated(FORWARD)
    arguments = arguments_for(torch.bfloat16)
    _, *expected = _forward(kernels, 0, Call.of(arguments))
    for skip, gap in ((1, 0), (0, 3), (8, 8)):

        def moved(tensor: Tensor, skip: int = skip, gap: int = gap) -> Tensor:
            whole = torch.full((*tensor.shape[:-1], skip + tensor.shape[-1] + gap), torch.nan, dtype=tensor.dtype)
            whole[..., skip : skip + tensor.shape[-1]] = tensor
            return whole[..., skip : skip + tensor.shape[-1]]

        elsewhere = {**arguments, **{name: moved(arguments[name]) for name in ("q", "k", "v")}}
        _, *got = _forward(kernels, 1, Call.of(elsewhere))
        battery.assert_equal(tuple(got), tuple(expected))


def _backward(kernels: Kernels, seed: int, call: Call, above: Above) -> tuple[Report, tuple[Tensor, ...]]:
    return run_backward(kernels, "block_attention_backward_cuda", seed, call, above)


def _assert_gradients(kernels: Kernels, dtype: torch.dtype) -> None:
    for seed, (sample, above, expected) in enumerate(exact_gradients(dtype)):
        call = Call.of(sample.arguments)
        report, grads = _backward(kernels, seed, call, above)
        assert_gradients(dtype, sample.label, grads, expected)
        assert report.bank_conflicts == 0 or not call.wide, sample.label


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(dtype: torch.dtype) -> None:
    """Every mask, size and option of the battery, through both results; each call in another schedule."""
    _assert_gradients(emulated(BACKWARD), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_schedule_gives_the_same_gradient(dtype: torch.dtype, head_dim: int) -> None:
    kernels = emulated(BACKWARD)
    call = Call.of(arguments_for(dtype, head_dim, queries=35))
    out, above = (draw(*call.q.shape, dtype=dtype, seed=seed) for seed in (6, 7))
    lse = draw(*call.q.shape[:3], dtype=torch.float32, seed=8) + 8
    given = Above(out, lse, above, None)
    _, expected = _backward(kernels, SEEDS[0], call, given)
    for seed in SEEDS[1:]:
        battery.assert_equal(_backward(kernels, seed, call, given)[1], expected)


# Mutations: each barrier, each wait, each bound taken away in turn; for two widths of two types at most.
SHARED = "ops/block_attention/block_attention_forward.cuh"
TILES = "ops/block_attention/block_attention_tiles.cuh"
TILES_MUTATIONS = {
    r"column < head_dim(?= &&|;)": BOUND,  # of a copy
    r"column \+ c < head_dim": BOUND,
    r"(?<=some = )from != nullptr": BOUND,
    r"(?<=to\[c\] = )from != nullptr": BOUND,
    r"(?<=if \()column < head_dim": BOUND,
    r"column \+ 1 < head_dim": BOUND,
    r"to == nullptr": NOT,
    r"fits\(all\) && \.\.\.": "on || (fits(all) && ...)",
    r"shape\.head_dim % chunk == 0": BOUND,
}
SHARED_MUTATIONS = {
    r"__syncwarp\(\);": STATEMENT,
    r"first \+ in_tile < end(?= \?)": BOUND,
    r"(?<=if \()r < block\.end(?= &&|\))": BOUND,
}
BARRIERS = {
    r"__sync(threads|warp)\(\);": STATEMENT,
    r"cute::cp_async_wait<0>\(\);": STATEMENT,
    r"1 - stage": "(on ? stage : {0})",
}
FORWARD_MUTATIONS = BARRIERS | {
    r"\bany\.has\(begin \+ row\)": BOUND,
    r"!seen\(\)\.every\.all_in\([^;]*?\)(?=\) hide)": NOT,
    r"index >= all": NOT,
}
BACKWARD_MUTATIONS = BARRIERS | {
    r"first \+ row < end(?= \?)": BOUND,
    r"seen\.any\.has\(begin \+ row\)": BOUND,
    r"begin \+ row < row_end": BOUND,
    r"begin \+ c < row_end": BOUND,
    r"\ball \|\|": "all || on ||",
    r"(?<=if \()!all": "!on && {0}",
    r"\br < end(?= \? (row_at|r :))": BOUND,
    r"\bkey < end": BOUND,
}


EDITS = {
    "launch(_by_width)?<Float16>": r"launch\1<BFloat16>",
    r"<Element, 128\b": "<Element, 64",
    # A hint for the compiler, which is a barrier too: nothing else may rely on it.
    r"hold_loads\(\) \{ __syncwarp\(\); \}": "hold_loads() {}",
}


def check_forward(kernels: Kernels) -> None:
    calls = ((64, 64, 1), (40, 128, 1), (17, 64, 1), (24, 64, 2), (17, 64, 2))
    for seed, (head_dim, rows, splits) in enumerate(calls):
        for dtype in (torch.bfloat16, torch.float32)[: 2 if rows == 64 else 1]:
            _, out, lse = _forward(kernels, seed, Call.of(small(dtype, head_dim)), rows, splits)
            assert_forward(dtype, f"head_dim {head_dim}", (out, lse), small_exact(dtype, head_dim)[0])
    _, out, lse = _forward(kernels, 5, Call.of(small(torch.bfloat16, 64, skip=1)))
    assert_forward(torch.bfloat16, "moved", (out, lse), small_exact(torch.bfloat16, 64)[0])


def _check_backward(kernels: Kernels) -> None:
    calls = [(head_dim, 0, torch.bfloat16) for head_dim in (64, 40, 17, 200)] + [(64, 1, torch.bfloat16)]
    for seed, (head_dim, skip, dtype) in enumerate([*calls, (17, 0, torch.float32)]):
        (out, lse), above, above_lse, expected = small_exact(dtype, head_dim)
        call = Call.of(small(dtype, head_dim, skip))
        _, grads = _backward(kernels, seed, call, Above(in_rows(out.to(dtype)), lse.float(), in_rows(above), above_lse))
        assert_gradients(dtype, f"head_dim {head_dim}", grads, expected)


CHECKS = {FORWARD: check_forward, BACKWARD: _check_backward}
# Of 256 channels only the gradient has a path of its own.
NARROW = EDITS | {r"<Element, 256\b": "<Element, 64"}
SWITCHES = {
    FORWARD: Switches(FORWARD, {FORWARD: FORWARD_MUTATIONS, SHARED: SHARED_MUTATIONS, TILES: TILES_MUTATIONS}, NARROW),
    BACKWARD: Switches(BACKWARD, {BACKWARD: BACKWARD_MUTATIONS, **DOTS, TILES: TILES_MUTATIONS}, EDITS),
}
PLACES = [
    pytest.param(source, place, id=f"{Path(source).stem}-{what}")
    for source, switches in SWITCHES.items()
    for place, what in enumerate(switches.places)
]


@pytest.mark.parametrize("source", list(CHECKS), ids=lambda source: Path(source).stem)
def test_source_without_a_mutation_passes(source: str) -> None:
    CHECKS[source](SWITCHES[source].kernels(None))


def test_large_products_of_long_rows_fused_as_by_nvcc() -> None:
    """Where the largest product stays, what was summed before must stay: errors of 1e-5 a tile would add up."""
    if " fma " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no fused multiply-add")
    kernels = SWITCHES[FORWARD].kernels(None, ("-O2", "-mfma", "-ffp-contract=fast"))
    q, k = (draw(1, 1, rows, 64, dtype=torch.float32, seed=rows) for rows in (16, 3000))
    q[..., 0] = k[..., 0] = 40.0  # 200 to each product
    v = torch.linspace(0, 1, 3000)[:, None].expand(1, 1, 3000, 64).contiguous()
    arguments = {"q": q, "k": k, "v": v, "causal": False, "return_lse": True}
    want = SPEC.reference(**SPEC.arguments(**battery.in_float64(Sample("", arguments)).arguments))
    _, out, lse = _forward(kernels, 0, Call.of(arguments))
    # Products of 200 have errors of 1e-5.
    battery.assert_near(out, want[0], SPEC.bounds[torch.float32]._replace(absolute=1e-5), "out")
    battery.assert_near(lse, want[1], SPEC.bounds[torch.float32], "lse")


@pytest.mark.parametrize("source, place", PLACES)
def test_mutation_is_caught(source: str, place: int) -> None:
    with pytest.raises((EmulationError, AssertionError)):
        CHECKS[source](SWITCHES[source].kernels(place))
