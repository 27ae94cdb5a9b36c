"""jacobi_sweep and jacobi_solve against their references in plain torch, on packed blocks of every kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import starflow_ext
from starflow_ext import ops
from starflow_ext.jacobi_solve import SolveProgress
from starflow_ext.sweep_block import BlockState

from .blocks import BOUNDS, KINDS, block, state_of, sweeps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", list(BOUNDS))
def test_sweeps_are_those_of_the_reference(kind: str, storage: Any, isa: str) -> None:
    weights = block(KINDS[kind], storage)
    cache = storage if storage in ("float16", "bfloat16") else "float32"
    product_input = "bfloat16" if storage == "bfloat16" else "float32"
    got = sweeps(weights, state_of(weights, 3, 90, storage=cache), product_input)
    with starflow_ext.reference_mode():
        expected = sweeps(weights, state_of(weights, 3, 90, storage=cache))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=BOUNDS[storage], rtol=BOUNDS[storage])


@pytest.mark.parametrize("kind", ["plain", "one channel more"])
def test_tokens_of_a_frame_share_its_condition(kind: str, isa: str) -> None:
    weights = block(KINDS[kind])
    got = sweeps(weights, state_of(weights, 3, 90, condition_tokens=7))
    with starflow_ext.reference_mode():
        expected = sweeps(weights, state_of(weights, 3, 90, condition_tokens=7))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=BOUNDS["float32"], rtol=BOUNDS["float32"])
    # One row of conditions for all frames is the same row for each of them.
    shared, each = (state_of(weights, 3, 90, condition_tokens=tokens) for tokens in (0, 7))
    assert shared.condition is not None
    assert each.condition is not None
    each.condition.copy_(shared.condition[:, None].expand_as(each.condition))
    for a, b in zip(sweeps(weights, each), sweeps(weights, shared), strict=True):
        assert torch.equal(a, b)


def test_conditions_of_frames_have_a_row_for_each() -> None:
    weights = block({})
    state = state_of(weights, 3, 90, condition_tokens=7)
    assert state.condition is not None
    short = replace(state, condition=state.condition[:, 1:].contiguous())
    with pytest.raises(RuntimeError, match="jacobi_sweep: condition"):
        sweeps(weights, short)


@pytest.mark.parametrize("frame_tokens, behind", [(8, 1), (5, 0), (64, 1), (1, 3), (200, 2), (2**30, 2**30)])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_sweeps_over_the_last_frames_are_those_of_the_reference(
    storage: Any, frame_tokens: int, behind: int, isa: str
) -> None:
    """Windows of several frames, behind text, which every token sees."""
    weights = block({}, storage)

    def state() -> BlockState:
        return state_of(weights, 3, 90, storage=storage, frame_tokens=frame_tokens, frames_behind=behind)

    got = sweeps(weights, state(), "bfloat16" if storage == "bfloat16" else "float32")
    with starflow_ext.reference_mode():
        expected = sweeps(weights, state())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=BOUNDS[storage], rtol=BOUNDS[storage])


@pytest.mark.parametrize("behind", [0, 1, 3])
@pytest.mark.parametrize("frame_tokens, tokens", [(8, 40), (5, 10), (64, 64), (88, 88), (1, 7)])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_a_token_sees_all_of_its_frame_where_frames_are_whole(
    storage: Any, frame_tokens: int, tokens: int, behind: int, isa: str
) -> None:
    """The first frames, then those that are left; the last one may be cut off by the end of the caches."""
    weights = block({}, storage)
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 88, 5, generator=g)
    frames = {"frame_tokens": frame_tokens, "frames_behind": behind, "whole_frames": True}

    def run() -> list[torch.Tensor]:
        state = state_of(weights, 3, 88, 0, storage=storage, **frames)
        begin = torch.zeros(3, dtype=torch.int64)
        first = ops.jacobi_sweep(weights, state, rows[:, :tokens], begin)
        if tokens == 88:
            return [first]
        return [first, ops.jacobi_sweep(weights, state, rows[:, tokens : 2 * tokens], begin + tokens)]

    got = run()
    with starflow_ext.reference_mode():
        expected = run()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=BOUNDS[storage], rtol=BOUNDS[storage])


def test_windows_of_whole_frames_are_asked_for() -> None:
    weights = block({})
    state = state_of(weights, 1, 64, 0, frame_tokens=8, frames_behind=1, whole_frames=True)
    for start, tokens in ((0, 7), (4, 8), (8, 12)):
        with pytest.raises(
            RuntimeError,
            match=rf"^jacobi_sweep: start holds {start} for {tokens} tokens, expected whole frames of 8 tokens",
        ):
            ops.jacobi_sweep(weights, state, torch.randn(1, tokens, 5), torch.tensor([start]))
    endless = state_of(weights, 1, 64, 0, whole_frames=True)
    with pytest.raises(
        RuntimeError, match=r"^jacobi_sweep: whole_frames is 1, expected 0 without mask_frame_tokens, with"
    ):
        ops.jacobi_sweep(weights, endless, torch.randn(1, 8, 5), torch.tensor([0]))
    x = torch.zeros(1, 65, 5)
    progress = SolveProgress.begin(x, 1, halves=1, out_channels=10)
    options = {"first": 1, "first_token": 0, "frame_tokens": 8, "window": 8, "tolerance": 0.1}
    with pytest.raises(RuntimeError, match=r"^jacobi_solve: whole_frames is 1, expected 0: a token is solved from"):
        ops.jacobi_solve(weights, state, progress, x[:, 1:], **options)


def test_a_token_sees_the_last_frames_alone() -> None:
    """What is cached of frames further back may be anything."""
    weights = block({})
    rows = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(1))
    results = []
    for value in (0.0, 7.0):
        state = state_of(weights, 1, 64, 0, frame_tokens=8, frames_behind=2)
        state.keys.fill_(1.0)
        state.values.fill_(0.5)
        for layer in range(2):
            cache = state.layer_cache(layer, weights.head_dim)
            cache.keys[:, :, :16], cache.values[:, :, :16] = value, value
            state.store(layer, cache)
        results.append(ops.jacobi_sweep(weights, state, rows, torch.tensor([36])))
    assert torch.equal(*results)


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("count", [0, 1, 7, 32, 64, 90])
@pytest.mark.parametrize("layout", ["panels", "rows"])
def test_slots_that_are_forgotten_make_room_for_others(storage: Any, count: int, layout: Any) -> None:
    weights = block({})
    state = state_of(weights, 3, 90, 0, storage=storage)
    if layout == "rows":
        keys, values = torch.zeros(2, *state.keys.shape[:3], 90 * weights.head_dim, dtype=state.keys.dtype)
        state = replace(state, keys=keys, values=values, layout="rows")
    before = []
    for layer in range(2):
        cache = state.layer_cache(layer, weights.head_dim)
        for held in cache:
            held.copy_(torch.randn(held.shape, generator=torch.Generator().manual_seed(layer)))
        state.store(layer, cache)
        before.append([held.clone() for held in cache])
    state.forget(weights.head_dim, count)
    for layer, cached in enumerate(before):
        for held, was in zip(state.layer_cache(layer, weights.head_dim), cached, strict=True):
            assert torch.equal(held[:, :, : 90 - count], was[:, :, count:])


def test_what_cannot_be_forgotten() -> None:
    weights = block({})
    with pytest.raises(RuntimeError, match="jacobi_sweep: text_tokens is 2, expected 0 where slots are forgotten"):
        state_of(weights, 1, 9).forget(weights.head_dim, 4)
    with pytest.raises(RuntimeError, match="jacobi_sweep: count is 10, expected 0 to the 9 slots"):
        state_of(weights, 1, 9, 0).forget(weights.head_dim, 10)


@pytest.mark.parametrize("kind", ["plain", "whole tiles"])
def test_any_number_of_threads_gives_the_same_bits(kind: str, isa: str) -> None:
    """With few rows, which members share, and with many, of which each takes its own: 210, cut inside a window."""
    weights = block(KINDS[kind], "bfloat16")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(sweeps(weights, state_of(weights, 3, 90, storage="bfloat16"), "bfloat16"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_the_reference_takes_both_layouts_of_a_cache() -> None:
    """Of the CPU's kernels and of CUDA's; what is cached is the same."""
    weights = block({"qk": True})
    panels, rows = (state_of(weights, 3, 90) for _ in range(2))
    shape = (*rows.keys.shape[:3], rows.slots * weights.head_dim)
    rows = replace(rows, keys=torch.zeros(shape), values=torch.zeros(shape), layout="rows")
    with starflow_ext.reference_mode():
        expected, got = sweeps(weights, panels), sweeps(weights, rows)
    for a, b in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 3),
    window=st.integers(1, 30),
    first=st.integers(1, 4),
    guidance=st.sampled_from([(0.0, "gaussian"), (0.8, "gaussian"), (0.5, "ab"), (0.5, "b+")]),
    activation=st.sampled_from(["softplus", "exp"]),
    shifted=st.integers(0, 1),
    behind=st.sampled_from([None, 0, 1]),
)
def test_solves_are_those_of_the_reference(
    batch: int,
    window: int,
    first: int,
    guidance: tuple[float, str],
    activation: Any,
    shifted: int,
    behind: int | None,
) -> None:
    frames = {} if behind is None else {"frame_tokens": 8, "frames_behind": behind}
    weights = block({})
    halves, tokens = 2 if guidance[0] else 1, 24
    g = torch.Generator().manual_seed(8)
    z, x = torch.randn(batch, tokens, 5, generator=g), torch.randn(batch, tokens + 1, 5, generator=g)

    def run() -> list[Any]:
        state = state_of(weights, halves * batch, tokens + 2, **frames)
        progress = SolveProgress.begin(x.clone(), first, halves=halves, out_channels=10)
        counts = []
        while int(progress.frontier.min()) < tokens:
            counts.append(
                ops.jacobi_solve(
                    weights,
                    state,
                    progress,
                    z,
                    first=first,
                    first_token=shifted,
                    frame_tokens=8,
                    window=window,
                    tolerance=0.02,
                    activation=activation,
                    soft_clip=3.0,
                    guidance=guidance[0],
                    guided=guidance[1],
                    most_sweeps=5,
                )
            )
        sweeps, rows = sum(len(count.accepted) for count in counts), sum(count.rows for count in counts)
        return [progress.x, progress.frontier, progress.fresh, sweeps, rows]

    got = run()
    with starflow_ext.reference_mode():
        expected = run()
    torch.testing.assert_close(got[0][:, 1:], expected[0][:, 1:], atol=1e-2, rtol=1e-2)
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[2], expected[2])
    # A change next to the tolerance may fall on either side of it.
    assert abs(got[3] - expected[3]) <= 0.05 * expected[3] + 1
    # The rule in plain torch gives every sample as many rows, until all are done.
    assert got[4] <= 1.05 * expected[4] + halves * window


def test_a_part_on_another_device_is_refused() -> None:
    """Dispatched by the part on meta, the call would leave the caches as they are, in silence."""
    weights = block({})
    state = state_of(weights, 3, 90)
    rows = torch.zeros(3, 1, weights.proj_in.weight.shape[1])
    start = torch.zeros(3, dtype=torch.int64)
    for name, change in (("start", {"start": start.to("meta")}), ("rows", {"rows": rows.to("meta")})):
        with pytest.raises(RuntimeError, match=f"^jacobi_sweep: {name} is on meta, expected cpu like keys$"):
            ops.jacobi_sweep(weights, state, **{"rows": rows, "start": start, **change})


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    weights = block({})
    state = state_of(weights, 3, 90)
    state.temperature[2] = temperature
    rows = torch.zeros(3, 1, weights.proj_in.weight.shape[1])
    told = f"^jacobi_sweep: temperature holds {temperature:g}, expected finite numbers > 0$"
    with pytest.raises(RuntimeError, match=told):
        ops.jacobi_sweep(weights, state, rows, torch.zeros(3, dtype=torch.int64))


def test_a_nan_ends_the_solve() -> None:
    weights = block({})
    for reference in (False, True):
        z = torch.randn(2, 8, 5)
        z[1, 3] = float("nan")
        progress = SolveProgress.begin(torch.zeros(2, 9, 5), 0, halves=1, out_channels=10)
        options = {"first": 0, "first_token": 0, "frame_tokens": 4, "window": 4, "tolerance": 0.0}
        if reference:
            with starflow_ext.reference_mode():
                count = ops.jacobi_solve(weights, state_of(weights, 2, 10), progress, z, **options)
        else:
            count = ops.jacobi_solve(weights, state_of(weights, 2, 10), progress, z, **options)
        assert count.bad is not None
        assert count.bad[0] == 1


GUIDED = 'expected "gaussian", or "a", "b" or both, with "+" for a weight that grows along the clip'


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": 0}, "window is 0, expected at least 1"),
        ({"frame_tokens": 0}, "frame_tokens is 0, expected at least 1"),
        ({"first_token": -1}, "first_token is -1, expected at least 0"),
        ({"first_token": 2}, "first is 0, expected at least first_token, 2"),
        ({"tolerance": -1.0}, "tolerance is -1, expected a finite number >= 0"),
        ({"soft_clip": -1.0}, "soft_clip is -1, expected a finite number >= 0"),
        ({"soft_clip": float("nan")}, "soft_clip is nan, expected a finite number >= 0"),
        ({"activation": "relu"}, 'activation is "relu", expected "softplus", "exp" or "none"'),
        ({"product_input": "int4"}, 'product_input is "int4", expected "float32", "bfloat16" or "two_bfloat16"'),
        ({"guidance": 1.0, "guided": "banana"}, f'guided is "banana", {GUIDED}'),
        ({"guided": "+"}, f'guided is "+", {GUIDED}'),
        ({"activation": "none"}, 'proj_out has 10 channels, expected 5 for activation "none"'),
        ({"guidance": 1.0}, "keys has 2 cache rows, expected 4 for 2 samples"),
        ({"z": torch.zeros(2, 12, 5)}, "keys has 10 slots, expected at least 14"),
    ],
)
def test_errors_of_the_solver(change: dict[str, Any], message: str) -> None:
    weights = block({})
    call: dict[str, Any] = {"first": 0, "first_token": 0, "frame_tokens": 4, "window": 4, "tolerance": 0.0}
    z = change.get("z", torch.zeros(2, 8, 5))
    call |= {name: value for name, value in change.items() if name != "z"}
    progress = SolveProgress.begin(torch.zeros(2, z.shape[1] + 1, 5), 0, halves=1, out_channels=10)
    with pytest.raises(RuntimeError) as error:
        ops.jacobi_solve(weights, state_of(weights, 2, 10), progress, z, **call)
    said = str(error.value).splitlines()[0]
    assert said == f"jacobi_solve: {message}"
    # Of options the reference says the same; it does not look at the caches, nor at how products are taken.
    if message.partition(" ")[0] in ("proj_out", "keys", "product_input"):
        return
    with starflow_ext.reference_mode(), pytest.raises(RuntimeError) as error:
        ops.jacobi_solve(weights, state_of(weights, 2, 10), progress, z, **call)
    assert str(error.value) == said


def test_explain_names_the_level(isa: str) -> None:
    weights = block({})
    call = (weights, state_of(weights, 1, 8), torch.zeros(1, 1, 5), torch.zeros(1, dtype=torch.int64))
    assert starflow_ext.explain("jacobi_sweep", *call).runs == isa
    with starflow_ext.reference_mode():
        assert starflow_ext.explain("jacobi_sweep", *call).runs == "torch"
