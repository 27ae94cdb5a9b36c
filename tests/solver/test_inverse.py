"""`starflow.solve` inverts any causal affine function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import starflow
from starflow import Chunks, Sequential, Window
from starflow.model import to_sequence
from starflow.schedules import solver_text
from starflow.solver import BlockDecoder, NotFiniteError, Schedule, invert

from ..flows import VIDEO, condition, latents, make_flow

Function = Callable[[Tensor], tuple[Tensor, Tensor]]


def network(tokens: int, channels: int, *, order: Tensor | None = None, strength: float = 0.5) -> Function:
    """(batch, tokens, channels) to shift and scale of tokens by those before them: an average, mixed and bent."""
    generator = torch.Generator().manual_seed(tokens + channels)
    mix, bend = torch.randn(2, channels, channels, generator=generator, dtype=torch.float64).unbind()
    place = torch.arange(tokens) if order is None else order.argsort()
    earlier = place[None, :] < place[:, None]
    weights = torch.rand(tokens, tokens, generator=generator, dtype=torch.float64) * earlier
    weights = strength * weights / weights.sum(1, keepdim=True).clamp(min=1e-9)

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        seen = weights @ x
        return torch.sin(seen @ mix), torch.exp(0.3 * torch.tanh(seen @ bend))

    return fn


def residual(fn: Function, x: Tensor, z: Tensor) -> float:
    shift, scale = fn(x)
    return float(((x - shift) / scale - z).abs().max())


@pytest.mark.parametrize("schedule", [Sequential(), Window(), Window(size=3), Chunks(block=4, threshold=1e-30)])
def test_a_linear_autoregression_has_a_matrix_for_an_inverse(schedule: Schedule) -> None:
    matrix = torch.randn(9, 9, dtype=torch.float64).tril(-1) * 0.4
    shift, scale = torch.randn(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64) + 0.5
    z = torch.randn(4, 9, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(9, dtype=torch.float64) - matrix, (shift + scale * z).mT).mT
    if isinstance(schedule, Window):
        schedule = Window(schedule.size, tolerance=1e-9)
    x, report = starflow.solve(lambda x: (x @ matrix.mT + shift, scale.expand_as(x)), z, schedule=schedule)
    torch.testing.assert_close(x, exact, rtol=1e-7, atol=1e-7)
    assert report.tokens == 9
    assert report.sweeps <= 9 + len(report.passes) * 32


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 20),
    channels=st.integers(1, 3),
    batch=st.integers(1, 3),
    size=st.none() | st.integers(1, 24),
    frame=st.none() | st.integers(1, 20),
    windowed=st.booleans(),
    tolerance=st.sampled_from([0.0, 1e-8]),
    known=st.integers(0, 20),
)
def test_any_window_finds_the_inverse(
    tokens: int,
    channels: int,
    batch: int,
    size: int | None,
    frame: int | None,
    windowed: bool,
    tolerance: float,
    known: int,
) -> None:
    whole = network(tokens, channels)
    z = torch.randn(batch, tokens, channels, dtype=torch.float64)
    first = min(known, tokens)
    given_x = z[:, :first] + 1.0
    frontier = [0]

    def fn(x: Tensor, window: slice | None = None) -> tuple[Tensor, Tensor]:
        shift, scale = whole(x)
        if window is None:
            return shift, scale
        assert 0 <= window.start <= window.stop <= tokens
        frontier.append(window.start)
        return shift[:, window], scale[:, window]

    x, report = starflow.solve(
        fn,
        z,
        frame=None if frame is None else min(frame, tokens),
        windowed=windowed,
        known=given_x if first else None,
        schedule=Window(size, tolerance, certificate=True),
    )
    assert torch.equal(x[:, :first], given_x)
    shift, scale = whole(x)
    assert float(((x - shift) / scale - z)[:, first:].abs().amax() if first < tokens else 0.0) < 1e-6
    assert report.backward_error is not None
    assert report.backward_error < 1e-6
    assert report.tokens == tokens - first
    assert report.sweeps <= tokens - first


def test_fewer_sweeps_than_tokens_and_the_tolerance_bounds_the_error() -> None:
    fn = network(200, 2)
    z = torch.randn(2, 200, 2, dtype=torch.float64)
    for tolerance in (1e-2, 1e-4, 1e-6):
        x, report = starflow.solve(fn, z, schedule=Window(tolerance=tolerance))
        assert residual(fn, x, z) < 10 * tolerance
        assert report.sweeps < 30
        assert report.window == 200


def test_dependency_in_another_order() -> None:
    order = torch.randperm(12)
    fn = network(12, 2, order=order)
    z = torch.randn(3, 12, 2, dtype=torch.float64)
    x, _ = starflow.solve(fn, z, order=order, schedule=Window(4, tolerance=0.0))
    assert residual(fn, x, z) < 1e-9
    known = x[:, order[:5]]
    again, report = starflow.solve(fn, z, order=order, known=known, schedule=Window(4, tolerance=0.0))
    torch.testing.assert_close(again, x)
    assert report.tokens == 7
    wrong = torch.cat([order[:1], order[1:].flip(0)])
    for schedule in (Window(tolerance=1e-3), Window(4), Sequential()):
        with pytest.raises(
            ValueError, match=r"another shift or scale of token \d+ of sample \d though no token before it had changed"
        ):
            starflow.solve(fn, z, order=wrong, schedule=schedule)
    with pytest.raises(ValueError, match="another shift or scale of the first token"):
        starflow.solve(fn, z, order=order.flip(0))


@pytest.mark.parametrize("axis", [1, 2, 3, -1])
def test_any_axis_may_be_ordered(axis: int) -> None:
    z = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    tokens, channels = z.shape[axis], z[0].numel() // z.shape[axis]
    inner = network(tokens, channels)

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        moved = x.movedim(axis, 1)
        return tuple(part.reshape(moved.shape).movedim(1, axis) for part in inner(moved.flatten(2)))  # type: ignore[return-value]

    x, _ = starflow.solve(fn, z, axis=axis, schedule=Window(tolerance=0.0))
    assert x.shape == z.shape
    assert residual(fn, x, z) < 1e-9
    known = x.narrow(axis, 0, 2)
    again, _ = starflow.solve(fn, z, axis=axis, known=known, schedule=Window(tolerance=0.0))
    torch.testing.assert_close(again, x)


def test_a_window_reads_final_tokens_before_it() -> None:
    """With tolerance 0 what a windowed function is shown before its window never changes afterwards."""
    whole = network(16, 1)
    z = torch.randn(1, 16, 1, dtype=torch.float64)
    expected, _ = starflow.solve(whole, z, schedule=Sequential())
    widths = []

    def fn(x: Tensor, window: slice) -> tuple[Tensor, Tensor]:
        torch.testing.assert_close(x[:, : window.start], expected[:, : window.start])
        widths.append(window.stop - window.start)
        shift, scale = whole(x)
        return shift[:, window], scale[:, window]

    starflow.solve(fn, z, windowed=True, frame=5, schedule=Window(tolerance=0.0))
    assert max(widths) == 5


def test_a_block_of_a_flow_is_such_a_function() -> None:
    flow = make_flow(VIDEO | {"top_order": "spread"})
    z, y = latents(flow), condition(flow)
    block = flow._blocks()[-1]
    grid = flow.encode(z, y).latents[0]
    layout = block.layout(*grid.shape[1:4], y, image=False)
    assert block.conditioner is not None
    conditioner = block.conditioner
    noise = to_sequence(grid, layout.order)

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        terms = conditioner(x, y, layout)[0].terms()
        return terms.shift, terms.scale

    ours, _ = starflow.solve(fn, noise, schedule=Window(tolerance=0.0))
    theirs, _ = invert(BlockDecoder(block, layout, 2, y), noise, Sequential())
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_result_may_take_part_in_autograd() -> None:
    z = torch.randn(2, 5, requires_grad=True)
    x, _ = starflow.solve(lambda x: (torch.zeros_like(x), torch.ones_like(x)), z)
    assert torch.equal(x, z)
    weight = torch.ones(5, requires_grad=True)
    (weight * x).sum().backward()
    assert torch.equal(weight.grad, x.sum(0))  # type: ignore[arg-type]
    assert z.grad is None


def identity(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x), torch.ones_like(x)


Z = torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("fn", "z", "options", "message"),
    [
        (3, Z, {}, "fn is int, expected a function of x that returns shift and scale"),
        (identity, torch.zeros(4), {}, r"z has shape \[4\] and dtype float32, expected \(batch, ...\) with at least"),
        (identity, Z[:, :0], {}, r"z has shape \[2, 0, 3\] and dtype float32"),
        (identity, Z.half(), {}, r"dtype float16, expected \(batch, ...\) with at least one token, float32 or float64"),
        (identity, Z, {"axis": 0}, r"axis is 0, expected an axis of z \[2, 4, 3\] other than the first"),
        (identity, Z, {"axis": 3}, "axis is 3"),
        (identity, Z, {"axis": -3}, "axis is -3"),
        (identity, Z, {"frame": 5}, "frame is 5, expected 1 to the 4 tokens of z"),
        (
            identity,
            Z,
            {"order": torch.tensor([0, 1, 1, 3])},
            r"order has shape \[4\], expected a permutation of 0 .. 3",
        ),
        (identity, Z, {"order": torch.arange(3)}, r"order has shape \[3\]"),
        (identity, Z, {"order": torch.arange(4), "windowed": True}, "order is given with windowed"),
        (
            identity,
            Z,
            {"known": Z[:1, :2]},
            r"known has shape \[1, 2, 3\] and dtype float32, expected those of z, with",
        ),
        (identity, Z, {"known": Z[:, :2].double()}, "and dtype float64"),
        (identity, Z, {"known": torch.zeros(2, 5, 3)}, "with at most 4 tokens along axis 1"),
        (identity, Z, {"known": torch.zeros(2, 2)}, r"known has shape \[2, 2\]"),
        (identity, Z.numpy(), {}, r"z is a ndarray, expected a tensor \(torch.as_tensor\)"),
        (identity, [[0.0]], {}, "z is a list, expected a tensor"),
        (identity, Z.to_sparse(), {}, "z is sparse_coo, expected a dense tensor"),
        (identity, Z, {"order": [0, 1, 2, 3]}, "order is a list, expected a tensor"),
        (identity, Z, {"order": torch.arange(4.0)}, "order has dtype float32, expected an integer one"),
        (identity, Z, {"known": Z[:, :2].numpy()}, "known is a ndarray, expected a tensor"),
        (identity, Z, {"axis": 1.0}, r"axis is 1.0, expected an integer"),
        (identity, Z, {"frame": "2"}, "frame is '2', expected an integer or None"),
        (identity, Z, {"frame": True}, "frame is True, expected an integer or None"),
        (identity, Z, {"windowed": 1}, "windowed is 1, expected True or False"),
        (identity, Z, {"schedule": 3}, "schedule is 3, expected a Window, Chunks or Sequential, or a text"),
        (lambda x: x, Z, {}, r"fn returned Tensor, expected two tensors \(shift, scale\)"),
        (lambda x: (x, 1.0), Z, {}, "fn returned tuple, expected two tensors"),
        (lambda x: (x, x[:, 1:]), Z, {}, r"fn returned scale of shape \[2, 3, 3\], expected \[2, 4, 3\]"),
        (lambda x: (x, x - 1.0), Z, {}, "fn returned scale -1, expected numbers > 0"),
        (lambda x: (x + 1j, x), Z, {}, "fn returned shift in complex64, expected real numbers"),
        (
            lambda x, window: identity(x),
            Z,
            {"windowed": True, "frame": 2},
            r"shift of shape \[2, 4, 3\], expected \[2, 2",
        ),
    ],
)
def test_errors(fn, z: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^solve: .*{message}"):
        starflow.solve(fn, z, **options)


def test_a_schedule_may_be_its_text() -> None:
    z = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return F.pad(x[:, :-1], (0, 0, 1, 0)).tanh(), torch.ones_like(x)

    for schedule in (Window(2, 0.5), Sequential()):
        x, report = starflow.solve(fn, z, schedule=solver_text(schedule), axis=np.int64(1))
        expected, as_told = starflow.solve(fn, z, schedule=schedule)
        assert torch.equal(x, expected)
        assert report == as_told
    with pytest.raises(ValueError, match="solver is 'windows', expected \"sequential\""):
        starflow.solve(fn, z, schedule="windows")


def test_what_is_not_finite_is_named() -> None:
    with pytest.raises(NotFiniteError, match="the noise of token 2 of sample 1 is not finite"):
        starflow.solve(identity, Z.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan)))
    with pytest.raises(NotFiniteError, match="the solution of token 0 of sample 0 is not finite"):
        starflow.solve(lambda x: (torch.zeros_like(x), torch.full_like(x, torch.nan)), Z)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (0.9 * x, torch.ones_like(x)),
        lambda x: (0.5 * x.flip(1), torch.ones_like(x)),
        lambda x: (torch.zeros_like(x), 1 + x.abs().mean(1, keepdim=True).expand_as(x)),
        lambda x: (torch.zeros_like(x), torch.rand_like(x) + 0.1),
    ],
    ids=["itself", "backwards", "mean", "random"],
)
@pytest.mark.parametrize("schedule", [Window(), Window(1), Sequential()], ids=str)
def test_functions_that_are_not_causal_are_refused(fn: Function, schedule: Schedule) -> None:
    with pytest.raises(ValueError, match="solve: fn returned another shift or scale of the first token for another x"):
        starflow.solve(fn, torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)), schedule=schedule)


def test_a_function_that_looks_ahead_behind_its_first_token_is_refused() -> None:
    def ahead(x: Tensor) -> tuple[Tensor, Tensor]:  # token t reads token t + 1, but for the first and the last
        return 0.5 * F.pad(x[:, 2:], (1, 1)), torch.full_like(x, 0.5)

    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"another shift or scale of token \d of sample 0 though no token before"):
        starflow.solve(ahead, z)


@pytest.mark.parametrize("reused", [False, True])
def test_a_function_that_looks_ahead_in_one_sample_alone_is_refused(reused: bool) -> None:
    """Whichever sample it is, also where the function fills the same tensors at each call."""
    z = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    buffers = torch.zeros(3, 8), torch.zeros(3, 8)

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        shift = F.pad(0.5 * x[:, :-1], (1, 0))
        shift[2, 1:-1] = 0.5 * x[2, 2:]
        if not reused:
            return shift, torch.full_like(x, 0.5)
        buffers[0].copy_(shift)
        buffers[1].fill_(0.5)
        return buffers

    message = r"another shift or scale of token \d of sample 2 though no token before it had changed"
    with pytest.raises(ValueError, match=message):
        starflow.solve(fn, z)


def test_a_function_that_mixes_samples_is_refused() -> None:
    def mixed(x: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * F.pad(x.flip(0)[:, :-1], (1, 0)), torch.full_like(x, 0.5)

    z = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"depend on the tokens before it in the same sample"):
        starflow.solve(mixed, z)
