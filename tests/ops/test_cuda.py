"""The battery's values and gradients on a CUDA device, and the solver's ops there; skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import starflow_ext
from starflow_ext import ops
from starflow_ext._load import native
from starflow_ext._spec import Spec
from starflow_ext.jacobi_solve import SolveProgress, SweepCount

from . import battery
from .battery import (
    DIFFERENTIABLE,
    SPECS,
    assert_equal,
    assert_near,
    bound_of,
    inputs,
    outcome,
    plain,
    samples,
    samples_of,
)
from .blocks import BOUNDS, KINDS, TOKENS, block, solve, state_of, sweeps

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or torch without CUDA"),
]


@battery.with_dtypes(SPECS)
def test_value(spec: Spec, dtypes: tuple[torch.dtype, ...]) -> None:
    for sample, expected in zip(samples(spec, dtypes), battery.exact(spec.name, dtypes), strict=True):
        moved = spec.on_cuda(sample)
        for got, want in zip(outcome(spec, moved), expected, strict=True):
            assert got.is_cuda
            assert_near(got.cpu(), want, bound_of(spec, moved, got.dtype), sample.label)


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda spec: spec.name)
def test_gradient_is_that_of_the_cpu(spec: Spec) -> None:
    for sample in samples_of(spec, torch.float64):
        want, got = (battery.gradients(spec, call, torch.square) for call in (sample, spec.on_cuda(sample)))
        for name, gradient in got.items():
            torch.testing.assert_close(gradient.cpu(), want[name], rtol=1e-11, atol=1e-11)


@battery.with_dtypes(DIFFERENTIABLE)
def test_gradient_is_that_of_the_float64_reference(spec: Spec, dtypes: tuple[torch.dtype, ...]) -> None:
    """In the types that the kernels take; float64 above is plain torch for linear and block_attention."""
    for sample in samples(spec, dtypes):
        moved = spec.on_cuda(sample)
        if inputs(spec, moved):
            battery.assert_gradients_near(spec, dtypes, moved, sample)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_it_runs_on_the_current_stream(spec: Spec) -> None:
    sample = plain(spec)
    expected = outcome(spec, spec.on_cuda(sample))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = outcome(spec, spec.on_cuda(sample))
    stream.synchronize()
    assert_equal(got, expected)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_calls_are_captured_into_a_graph(spec: Spec) -> None:
    """Every op of one call; sweeps and solves read numbers on the host and refuse."""
    sample = spec.on_cuda(plain(spec))
    expected = outcome(spec, sample)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = outcome(spec, sample)
    for _ in range(2):
        for result in got:
            result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_it_runs_where_the_data_is(spec: Spec) -> None:
    """On the second device, while the first is the current one."""
    with torch.cuda.device(1):
        sample = spec.on_cuda(plain(spec))
        expected = outcome(spec, sample)
    got = outcome(spec, sample)
    assert all(result.device.index == 1 for result in got)
    assert_equal(got, expected)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_explain_tells_kernel_from_plain_torch(spec: Spec) -> None:
    runs = starflow_ext.explain(spec.name, **spec.on_cuda(plain(spec)).arguments).runs
    assert runs == ("cuda" if "cuda" in spec.variants else "torch")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("cache", ["float32", "float16", "bfloat16"])
def test_sweeps_are_those_of_the_reference(kind: str, storage: Any, cache: Any) -> None:
    weights = block(KINDS[kind], storage, "cuda")
    got = sweeps(weights, state_of(weights, 3, 90, storage=cache))
    with starflow_ext.reference_mode():
        expected = sweeps(weights, state_of(weights, 3, 90, storage=cache))
    bound = max(BOUNDS[storage], BOUNDS[cache])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=bound, rtol=bound)


@pytest.fixture(params=["graph", "step", "loop"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way of repeating sweeps."""
    native.set_repeat(str(request.param))
    yield str(request.param)
    native.set_repeat("")


def _solve(*arguments: Any, **options: Any) -> tuple[Tensor, list[SweepCount]]:
    return solve(block({}, "float16", "cuda"), *arguments, **options)


@pytest.mark.parametrize("guidance", [0.0, 0.8])
@pytest.mark.parametrize("window", [1, 7, 30])
def test_solves_are_those_of_the_reference(window: int, guidance: float, way: str) -> None:
    got, (done,) = _solve(window, 0.02, guidance)
    with starflow_ext.reference_mode():
        expected, _ = _solve(window, 0.02, guidance)
    torch.testing.assert_close(got, expected, atol=5e-2, rtol=5e-2)
    assert done.bad is None
    assert sum(done.accepted) == 3 * (TOKENS - 1)
    assert done.rows == len(done.accepted) * (2 if guidance else 1) * 3 * min(window, TOKENS - 1)


def test_any_window_at_tolerance_0_is_token_by_token_to_the_last_bit(way: str) -> None:
    expected, _ = _solve(1, 0.0)
    for window in (2, 7, 40):
        assert torch.equal(_solve(window, 0.0)[0], expected)


def test_bits_do_not_depend_on_batch_pieces_or_way(way: str) -> None:
    got, (done,) = _solve(7, 0.05)
    pieces, counts = _solve(7, 0.05, most_sweeps=4)
    assert torch.equal(pieces, got)
    assert sum((count.accepted for count in counts), ()) == done.accepted
    assert torch.equal(_solve(7, 0.05, samples=1)[0], got[:1])
    native.set_repeat("loop")
    assert torch.equal(_solve(7, 0.05)[0], got)


def test_bits_do_not_depend_on_early_launches(way: str) -> None:
    """Programmatic dependent launches, as devices from compute capability 9.0 on have them, or none."""
    expected, _ = _solve(7, 0.05)
    native.set_early_launches(False)
    try:
        assert torch.equal(_solve(7, 0.05)[0], expected)
    finally:
        native.set_early_launches(True)


def test_the_solver_runs_on_the_current_stream(way: str) -> None:
    expected, _ = _solve(7, 0.05)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got, _ = _solve(7, 0.05)
    stream.synchronize()
    assert torch.equal(got, expected)


def test_calls_while_a_graph_is_captured_are_refused() -> None:
    weights = block({}, "float16", "cuda")
    state = state_of(weights, 2, 10)
    rows, start = torch.zeros(2, 4, 5, device="cuda"), torch.zeros(2, dtype=torch.int64)
    progress = SolveProgress.begin(torch.zeros(2, 9, 5, device="cuda"), 0, halves=1, out_channels=10)
    z = torch.zeros(2, 8, 5, device="cuda")
    options = {"first": 0, "first_token": 0, "frame_tokens": 4, "window": 4, "tolerance": 0.0}
    said = []
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        for call in (
            lambda: ops.jacobi_sweep(weights, state, rows, start),
            lambda: ops.jacobi_solve(weights, state, progress, z, **options),
        ):
            with pytest.raises(RuntimeError) as refusal:
                call()
            said.append(str(refusal.value).splitlines()[0])
    assert said == [
        "jacobi_sweep: stream is capturing a graph, expected one that is not: slots are checked by the host",
        "jacobi_solve: stream is capturing a graph, expected one that is not: the host reads how far it has come",
    ]
    ops.jacobi_sweep(weights, state, rows, start)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"product_input": "float32"}, 'product_input is "float32", expected "bfloat16" or "float16" on cuda:0'),
        ({"product_input": "bfloat16"}, "proj_in has dtype float16, expected bfloat16 like product_input"),
        (
            {"rows": torch.zeros(2, 4, 5)},
            "rows has shape [2, 4, 5] and dtype float32, expected (2, tokens, 5), float32, contiguous, on cuda:0",
        ),
        (
            {"start": torch.zeros(3, dtype=torch.int64)},
            "start has shape [3] and dtype int64, expected [2] int64 on cpu or cuda:0: one number a cache row",
        ),
    ],
)
def test_errors_of_the_sweep(change: dict[str, Any], message: str) -> None:
    weights = block({}, "float16", "cuda")
    call: dict[str, Any] = {"rows": torch.zeros(2, 4, 5).cuda(), "start": torch.zeros(2, dtype=torch.int64)} | change
    with pytest.raises(RuntimeError) as error:
        ops.jacobi_sweep(weights, state_of(weights, 2, 10), call.pop("rows"), call.pop("start"), **call)
    assert str(error.value).splitlines()[0] == f"jacobi_sweep: {message}"
