"""Every schedule finds the same x; what a tolerance costs is measured by the backward error."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from starflow import Chunks, Flow, Guidance, Sequential, Window, decode
from starflow.model import to_sequence
from starflow.solver import BlockDecoder, NotFiniteError, Schedule, SolveReport, break_even, certify
from starflow.solver.loop import invert

from ..flows import CASES, IMAGE, TARFLOW, VIDEO, condition, inputs, latents, make_flow, null

MODELS = {
    "video": make_flow(VIDEO),
    "spread": make_flow(VIDEO | {"top_order": "spread"}),
    "shifted": make_flow(VIDEO | {"sos": False, "top_order": "spread"}),
    "over time": make_flow(CASES["video shallow blocks over time"]),
}


def decoder(flow: Flow, z: Tensor, guidance: Guidance | None = None) -> tuple[BlockDecoder, Tensor]:
    """A fresh decoder of the deep block, and the noise in its order."""
    block = flow._blocks()[-1]
    grid = flow.encode(z, condition(flow, len(z))).latents[0]
    y, free = condition(flow, len(z)), null(flow, len(z))
    layout = block.layout(*grid.shape[1:4], y, image=z.dim() == 4)
    return BlockDecoder(block, layout, len(z), y, free, guidance), to_sequence(grid, layout.order)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(MODELS)),
    size=st.integers(1, 50),
    batch=st.integers(1, 3),
    frames=st.integers(1, 3),
    known=st.integers(0, 2),
    weight=st.sampled_from([0.0, 1.5]),
)
def test_any_window_at_tolerance_zero_is_token_by_token(
    name: str, size: int, batch: int, frames: int, known: int, weight: float
) -> None:
    flow = MODELS[name]
    z = latents(flow, batch=batch, frames=frames)
    options = {
        "y": condition(flow, batch),
        "null": null(flow, batch),
        "guidance": weight,
        "prefix": latents(flow, batch=batch, frames=known, seed=9) if 0 < known < frames else None,
    }
    expected = decode(flow, z, schedule=Sequential(), **options)
    got = decode(flow, z, schedule=Window(size=size, tolerance=0.0), **options)
    torch.testing.assert_close(got.x, expected.x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"parts": "a"}, {"parts": "b"}, {"annealed": True}, {"temperature": 0.5}])
@pytest.mark.parametrize("name", ["tarflow classes", "tarflow with a start token", "tarflow shift only"])
def test_linear_guidance_by_any_schedule(name: str, options: dict) -> None:
    flow = make_flow(CASES[name] | {"num_classes": 5})
    z = latents(flow)
    y = torch.tensor([3, 1])
    guidance = Guidance(0.7, kind="linear", **options)
    results = [
        decode(flow, z, y, guidance=guidance, schedule=schedule).x
        for schedule in (Sequential(), Window(size=5, tolerance=0.0), Chunks(6, 0.0, 17))
    ]
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], atol=1e-4, rtol=1e-4)
    plain = decode(flow, z, y, schedule=Sequential()).x
    nothing = name == "tarflow shift only" and options == {"parts": "a"}  # there is no log-scale to extrapolate
    assert ((results[0] - plain).abs().max() < 1e-5) == nothing


def test_temperatures_multiply() -> None:
    """That of a call holds for both halves; that of the guidance for the unconditional half on top."""
    flow = make_flow(TARFLOW | {"num_classes": 5})
    z, y = latents(flow), torch.tensor([3, 1])

    def sample(temperature: float, own: float) -> Tensor:
        guidance = Guidance(0.7, kind="linear", temperature=own)
        return decode(flow, z, y, guidance=guidance, schedule=Sequential(), temperature=temperature).x

    assert not torch.equal(sample(0.5, 2.0), sample(1.0, 2.0))
    torch.testing.assert_close(sample(0.5, 1.0), sample(0.5, 1.0 + 1e-9), atol=1e-5, rtol=1e-5)


def test_one_token_with_annealed_guidance() -> None:
    flow = make_flow(TARFLOW | {"img_size": 2, "sos": True, "num_classes": 2})
    z, y = latents(flow), torch.tensor([0, 1])
    guidance = Guidance(1.0, kind="linear", annealed=True)
    assert decode(flow, z, y, guidance=guidance).x.isfinite().all()


@pytest.mark.parametrize("name", ["video", "spread"])
@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_tolerance_bounds_the_backward_error(name: str, weight: float) -> None:
    flow = MODELS[name]
    z = latents(flow)
    options = {"y": condition(flow), "null": null(flow), "guidance": weight}
    rows = []
    for tolerance in (0.1, 0.01, 0.001):
        decoded = decode(flow, z, schedule=Window(size=12, tolerance=tolerance, certificate=True), **options)
        assert decoded.backward_error is not None
        assert decoded.backward_error < 10 * tolerance
        rows.append(sum(report.rows for report in decoded.reports if report is not None))
    assert rows == sorted(rows)


@pytest.mark.parametrize("size", [4, 15, 45])
def test_every_sample_has_its_own_frontier(size: int) -> None:
    flow = MODELS["spread"]
    z, y = latents(flow, batch=4), condition(flow, 4)
    schedule = Window(size=size, tolerance=0.01)
    together = decode(flow, z, y, schedule=schedule).x
    for i in range(4):
        alone = decode(flow, z[i : i + 1], y[i : i + 1], schedule=schedule).x  # type: ignore[index]
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", [Sequential(), Chunks(5), Window(size=7), Window(size=100, tolerance=0.0)])
@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("known", [0, 4])
def test_reports_add_up(schedule: Schedule, name: str, known: int) -> None:
    model, z = decoder(MODELS[name], latents(MODELS[name]), Guidance(1.0))
    x, report = invert(model, z, schedule, z[:, :known] if known else None)
    assert torch.equal(x[:, :known], z[:, :known])
    assert report.samples == 2
    assert report.tokens == z.shape[1] - max(known, model.first_token)
    assert sum(report.accepted) == report.tokens * 2
    assert len(report.accepted) == report.sweeps
    assert 1 <= report.window <= report.tokens
    assert report.rows >= report.tokens * 2 * model.halves
    assert report.rows <= report.sweeps * report.window * 2 * model.halves
    assert report.evaluations_per_token == report.rows / (report.tokens * 2)
    assert (sum(report.passes) == report.sweeps) == isinstance(schedule, Chunks)
    both = report.then(SolveReport(tokens=1, rows=2, sweeps=3, samples=2, accepted=(2,), backward_error=0.5))
    assert (both.tokens, both.rows, both.sweeps) == (report.tokens + 1, report.rows + 2, report.sweeps + 3)
    assert both.backward_error == 0.5


def test_work_of_a_window() -> None:
    """Sweeps take a full window, narrower only where fewer tokens are left."""
    model, z = decoder(MODELS["video"], latents(MODELS["video"], batch=1))
    _, report = invert(model, z, Window(size=10, tolerance=0.0))
    left, rows = z.shape[1], 0
    for accepted in report.accepted:
        rows += min(10, left)
        left -= accepted
    assert report.rows == rows


@pytest.mark.parametrize("name", ["video", "shifted"])
@pytest.mark.parametrize("block", [1, 4, 64])
def test_chunks_with_a_tiny_threshold_are_token_by_token(name: str, block: int) -> None:
    flow = MODELS[name]
    z, y = inputs("video", flow)
    expected = decode(flow, z, y, schedule=Sequential()).x
    got = decode(flow, z, y, schedule=Chunks(block, 1e-14, 300)).x
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


SCHEDULES = [Sequential(), Chunks(4), Window(size=6), Window(size=6, tolerance=0.0)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_that_is_not_finite_is_named(schedule: Schedule) -> None:
    for value in (float("nan"), float("inf")):
        model, z = decoder(MODELS["video"], latents(MODELS["video"]))
        z[1, 5, 0] = value
        with pytest.raises(NotFiniteError, match="the noise of token 5 of sample 1 is not finite"):
            invert(model, z, schedule)
        known = z.clone()
        model, _ = decoder(MODELS["video"], latents(MODELS["video"]))
        with pytest.raises(NotFiniteError, match="the given data of token 5 of sample 1 is not finite"):
            invert(model, torch.zeros_like(z), schedule, known[:, :7])
        model, _ = decoder(MODELS["video"], latents(MODELS["video"]))
        invert(model, z, schedule, torch.zeros_like(z[:, :6]))  # noise of given tokens is not read


@pytest.mark.parametrize("schedule", [*SCHEDULES, Chunks(4, 0.0, 10**9)])
def test_weights_that_are_not_finite_end_the_solve_at_once(schedule: Schedule) -> None:
    flow = make_flow(IMAGE)
    if isinstance(schedule, Chunks) and schedule.max_iterations == 10**9:
        schedule = Chunks(4, 0.0, 50)
    flow._blocks()[-1].conditioner.proj_out.weight.data[0, 0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(NotFiniteError, match="the solution of token 0 of sample 0 is not finite"):
        decode(flow, latents(flow), schedule=schedule)


def test_a_token_in_the_middle_that_is_not_finite_is_the_one_named() -> None:
    """Learned positions: NaN at one of them enters with the token that is predicted there."""
    flow = make_flow(TARFLOW | {"sos": True, "layers_per_block": (1,)})
    block = flow._blocks()[-1]
    visited = block.layout(1, 4, 4, None, image=True).order
    block.conditioner.pos_embed.data[visited[9]] = float("nan")  # type: ignore[union-attr]
    for schedule in (Sequential(), Window(size=1), Chunks(1)):
        with pytest.raises(NotFiniteError, match="the solution of token 9 of sample 0 is not finite"):
            decode(flow, latents(flow), schedule=schedule)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38, 3.0])
@pytest.mark.parametrize("name", ["video", "shifted"])
def test_the_guess_does_not_decide_the_result(name: str, value: float) -> None:
    """Neither a good guess, nor one so wild that the network's answer to it is not finite."""
    options = VIDEO | {"soft_clip": 0.0, "sos": name == "video"}
    flow = make_flow(options)
    z, y = inputs("video", flow)
    expected = decode(flow, z, y, schedule=Sequential()).x
    for block in flow._blocks():
        block.guess.fill_(value)
    for size in (4, 40):
        got = decode(flow, z, y, schedule=Window(size=size, tolerance=0.0)).x
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_certificate_sees_a_corrupted_solution(name: str) -> None:
    flow = MODELS[name]
    model, z = decoder(flow, latents(flow), Guidance(0.8))
    x, _ = invert(model, z, Sequential())
    assert certify(model, x, z) < 1e-4
    wrong = x.clone()
    wrong[1, 20] += 0.01
    assert certify(model, wrong, z) > 1e-3
    assert certify(model, wrong, z, first=z.shape[1]) == 0.0
    # What was given has no noise of its own, whatever it is.
    given_x, report = invert(model, z, Window(size=5, tolerance=0.0, certificate=True), z[:, :7] + 1.0)
    assert report.backward_error is not None
    assert report.backward_error < 1e-4
    assert torch.equal(given_x[:, :7], z[:, :7] + 1.0)


# The module, whose name the face of its wing gives to the function.
BREAK_EVEN = importlib.import_module("starflow.solver.break_even")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STARFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(BREAK_EVEN, "_measured", {})
    return tmp_path / "cache" / "break_even.json"


def test_break_even_is_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = MODELS["video"]
    model, _ = decoder(flow, latents(flow))
    size = break_even(model, 2)
    (key,) = json.loads(cache.read_text())
    assert "cpu" in key or "threads" in key
    assert 1 <= size <= model.tokens
    cache.write_text(json.dumps({key: 12}))
    assert break_even(model, 2) == size  # known to this process
    monkeypatch.setattr(BREAK_EVEN, "_measured", {})
    assert break_even(model, 2) == 6
    assert break_even(model, 1) == 12
    assert break_even(model, 100) == 1
    guided, _ = decoder(flow, latents(flow), Guidance(1.0))
    assert break_even(guided, 1) == 6
    for damaged in ("{ broken", "[" * 100_000, *(json.dumps({key: value}) for value in ("x", None, -3, 1.5, [4]))):
        monkeypatch.setattr(BREAK_EVEN, "_measured", {})
        cache.write_text(damaged)
        assert break_even(model, 2) >= 1
        (again,) = json.loads(cache.read_text()).items()
        assert again[0] == key
        assert again[1] >= 1
    assert list(cache.parent.iterdir()) == [cache]


def test_break_even_without_a_writable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STARFLOW_CACHE", str(tmp_path / "file" / "below"))
    flow = MODELS["video"]
    model, z = decoder(flow, latents(flow))
    assert invert(model, z, Window())[0].isfinite().all()


def test_one_token_needs_no_measurement(cache: Path) -> None:
    flow = make_flow(IMAGE)
    z = torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(decode(flow, z).x, decode(flow, z, schedule=Sequential()).x)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(size=0), "window size is 0, expected an integer from 1 to 2147483647"),
        (lambda: Window(size=2.5), "window size is 2.5, expected an integer from 1"),  # type: ignore[arg-type]
        (lambda: Window(size=True), "window size is True, expected an integer from 1"),
        (lambda: Window(tolerance="0.1"), "tolerance is '0.1', expected a finite number"),  # type: ignore[arg-type]
        (lambda: Window(tolerance=-1.0), "tolerance is -1.0, expected a finite number >= 0"),
        (lambda: Window(tolerance=float("nan")), "tolerance is nan"),
        (lambda: Chunks(block=0), "block is 0, expected an integer from 1 to 2147483647"),
        (lambda: Chunks(max_iterations=0), "max_iterations is 0"),
        (lambda: Chunks(threshold=float("nan")), "threshold is nan, expected a finite number >= 0"),
        (lambda: Guidance(kind="cubic"), "kind is 'cubic', expected 'gaussian' or 'linear'"),  # type: ignore[arg-type]
        (lambda: Guidance(parts="ac"), "parts is 'ac', expected a subset of 'ab'"),
        (lambda: Guidance(temperature=0.0), "temperature is 0.0, expected a finite number > 0"),
        (lambda: Guidance(1.0, parts="a"), "parts is 'a', expected kind 'linear' together with it"),
        (lambda: Guidance(1.0, parts=""), "parts is '', expected kind 'linear' together with it"),
        (lambda: Guidance(1.0, annealed=True), "annealed is True, expected kind 'linear' together with it"),
        (lambda: Guidance(1.0, temperature=0.5), "temperature is 0.5, expected kind 'linear' together with it"),
        (lambda: Guidance("2"), "weight is '2', expected a finite number >= 0"),
        (lambda: Guidance(1.0, frames=1.5), "frames is 1.5, expected None or an integer >= 1"),
        (lambda: Guidance(float("inf")), "weight is inf, expected a finite number"),
    ],
)
def test_options_out_of_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_shapes_that_do_not_fit() -> None:
    model, z = decoder(MODELS["video"], latents(MODELS["video"]))
    with pytest.raises(ValueError, match=r"solve: z has shape \[2, 44, 2\], expected \(batch, 45, channels\)"):
        invert(model, z[:, 1:], Sequential())
    with pytest.raises(ValueError, match=r"solve: known has shape \[1, 3, 2\], expected at most \[2, 45, 2\]"):
        invert(model, z, Sequential(), z[:1, :3])
