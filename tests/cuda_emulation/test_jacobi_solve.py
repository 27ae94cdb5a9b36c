"""jacobi_solve on the emulated device, whole solves, against the rule in plain torch on the same sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from starflow_ext.jacobi_solve import SolveProgress, jacobi_solve_reference
from starflow_ext.sweep_block import BlockState

from ..ops.blocks import block, state_of
from .blocks import SOLVE, DeviceBlock, Options, Solved, solve, solve_kernels, sweep_kernels
from .emulator import SEEDS, EmulationError, Kernels, Mutation, assert_caught, mutations, some

WAYS = ("graph", "step", "loop")
TOKENS = 20


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return solve_kernels()


class Problem:
    """A block, noise for a batch of some of four samples, and solves of it that begin anew."""

    def __init__(
        self,
        options: Options,
        samples: Sequence[int] = (0, 1),
        tokens: int = TOKENS,
        *,
        sm90: bool = False,
        **kind: Any,
    ) -> None:
        self.sm90 = sm90
        self.options, self.batch, self.tokens = options, len(samples), tokens
        self.weights = block(kind, "float16")
        g = torch.Generator().manual_seed(8)
        chosen = torch.tensor(samples)
        self.z = torch.randn(4, tokens, 5, generator=g)[chosen]
        self.x = torch.randn(4, tokens + 1, 5, generator=g)[chosen]
        self.text = torch.randn(4, 2, self.weights.proj_in.weight.out_channels, generator=g)[chosen]
        self.caches = torch.cat([half * 4 + chosen for half in range(options.halves)])

    def state(self) -> BlockState:
        """With temperatures and conditions of their own for each sample and half."""
        state = state_of(self.weights, 4 * self.options.halves, self.tokens + 2, storage="float16")
        return state.select(self.caches)

    def device(self) -> DeviceBlock:
        return DeviceBlock.of(self.weights, self.state(), sm90=self.sm90)

    def progress(self) -> SolveProgress:
        out = self.weights.proj_out.weight.out_channels
        return SolveProgress.begin(self.x.clone(), self.options.first, halves=self.options.halves, out_channels=out)

    def given(self, kernels: Kernels, device: DeviceBlock) -> None:
        """What a window reads of tokens that are given, and of text."""
        first, o = self.options.first, self.options
        rows = o.halves * self.batch
        device.sweep(kernels, self.text.repeat(o.halves, 1, 1), torch.zeros(rows, dtype=torch.int64), text=True)
        if first > o.first_token:
            known = self.x[:, o.first_token : first].repeat(o.halves, 1, 1)
            device.sweep(kernels, known, torch.full((rows,), 2))

    def run(self, kernels: Kernels, *, most_sweeps: int = 64, **how: Any) -> tuple[SolveProgress, list[Solved]]:
        device, progress = self.device(), self.progress()
        self.given(sweep_kernels(), device)
        done: list[Solved] = []
        while int(progress.frontier.min()) < self.tokens:
            done.append(solve(kernels, device, progress, self.z, self.options, most_sweeps=most_sweeps, **how))
            assert done[-1].accepted, "a call without a sweep"
            if done[-1].bad[0] >= 0:
                break
        return progress, done

    def reference(self) -> tuple[SolveProgress, list[int]]:
        """The rule in plain torch on emulated sweeps of its own."""
        device, progress, o = self.device(), self.progress(), self.options
        self.given(sweep_kernels(), device)

        def sweep(rows: Tensor, start: Tensor, keep: Tensor) -> Tensor:
            return device.sweep(sweep_kernels(), rows, start, keep)[1]

        _, accepted, bad = jacobi_solve_reference(
            self.weights,
            device.state,
            progress,
            self.z,
            first=o.first,
            first_token=o.first_token,
            frame_tokens=o.frame_tokens,
            window=o.window,
            tolerance=o.tolerance,
            activation=o.activation,
            soft_clip=o.soft_clip,
            guidance=o.guidance,
            guided=o.guided,
            most_sweeps=64,
            sweep=sweep,
        )
        assert bad is None
        return progress, list(accepted)


CASES = {
    "plain": Options(),
    "sequential": Options(window=1, tolerance=0.0),
    "wider than the clip": Options(window=30, tolerance=0.05, activation="exp"),
    "guided": Options(guidance=0.8, window=5, first=3),
    "linear": Options(guidance=0.5, guided="ab", first=4, first_token=1),
    "annealed shift": Options(guidance=0.5, guided="b+", tolerance=0.05, frame_tokens=3),
    "short frames": Options(frame_tokens=2, window=9, tolerance=0.1),
    "unclipped": Options(soft_clip=0.0, first=0),
}


@pytest.mark.parametrize("name", CASES)
def test_solves_are_those_of_the_reference(name: str, kernels: Kernels) -> None:
    problem = Problem(CASES[name])
    expected, accepted = problem.reference()
    got, (done,) = problem.run(kernels)
    assert done.accepted == accepted
    assert not done.more
    assert done.bad == (-1, -1)
    assert torch.equal(got.frontier, expected.frontier)
    assert torch.equal(got.fresh, expected.fresh)
    # Of row 0 of x nobody says what it is.
    torch.testing.assert_close(got.x[:, 1:], expected.x[:, 1:], atol=2e-3, rtol=2e-3)
    first = problem.options.first
    torch.testing.assert_close(got.kept[:, :, first:], expected.kept[:, :, first:], atol=2e-3, rtol=2e-3)


def _equal(a: SolveProgress, b: SolveProgress) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("x", "frontier", "fresh", "kept"))


@pytest.mark.parametrize("name", ["plain", "linear"])
def test_every_way_of_repeating_is_the_same_to_the_last_bit(name: str, kernels: Kernels) -> None:
    problem = Problem(CASES[name])
    expected, (want,) = problem.run(kernels)
    for way in WAYS[1:]:
        got, (done,) = problem.run(kernels, repeat=way)
        assert _equal(got, expected)
        assert done.accepted == want.accepted


def test_any_window_at_tolerance_0_is_token_by_token_to_the_last_bit(kernels: Kernels) -> None:
    options = Options(tolerance=0.0, guidance=0.8)
    expected, _ = Problem(replace(options, window=1), tokens=12).run(kernels)
    for window in (2, 7, 11, 40):
        got, (done,) = Problem(replace(options, window=window), tokens=12).run(kernels)
        assert torch.equal(got.x, expected.x)
        assert done.accepted == [2] * 11


def test_on_sm_90a(kernels: Kernels) -> None:
    """By TMA and wgmma, whose tensor maps graphs keep: any window at tolerance 0 has the bits of one of 1."""
    kind = {"width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 128}
    results = []
    for way, window in (("loop", 1), ("graph", 4), ("step", 4)):
        options = Options(tolerance=0.0, guidance=0.8, window=window)
        progress, (done,) = Problem(options, tokens=6, sm90=True, **kind).run(kernels, repeat=way)
        assert done.report.products == 0
        assert done.report.group_products > 0
        assert done.accepted == [2] * 5
        results.append(progress.x)
    assert all(torch.equal(x, results[0]) for x in results)


def test_parts_of_a_window_give_the_same_bits(kernels: Kernels) -> None:
    problem = Problem(CASES["guided"], tokens=12)
    expected, _ = problem.run(kernels)
    for most_rows in (11, 3):
        assert _equal(problem.run(kernels, most_rows=most_rows)[0], expected)


def test_a_sample_does_not_depend_on_its_batch(kernels: Kernels) -> None:
    options = Options(tolerance=0.05)
    together, (done,) = Problem(options, range(4)).run(kernels)
    # Samples end at different times.
    assert min(done.accepted) < 4
    for samples in ([2], [3, 0, 1]):
        some, _ = Problem(options, samples).run(kernels)
        assert torch.equal(some.x, together.x[samples])


def _long(kernels: Kernels) -> list[Any]:
    """A window of more rows than a warp has lanes, of which the first 36 stand where they belong."""
    problem = Problem(Options(window=40, tolerance=2e-3, first=0), [2], tokens=40)
    solved, _ = problem.run(kernels)
    problem.x[:, 1:37] = solved.x[:, 1:37]
    problem.options = replace(problem.options, tolerance=0.2)
    again, done = problem.run(kernels)
    assert len(done) == 1
    assert done[0].accepted[:1] >= [36]
    return [again, done[0].accepted]


def test_a_window_of_more_rows_than_a_warp(kernels: Kernels) -> None:
    _long(kernels)


def test_a_solve_in_pieces_is_the_solve_at_once(kernels: Kernels) -> None:
    problem = Problem(Options(tolerance=0.05))
    expected, (whole,) = problem.run(kernels)
    got, parts = problem.run(kernels, most_sweeps=3)
    assert _equal(got, expected)
    assert [count for part in parts for count in part.accepted] == whole.accepted


def test_every_schedule_gives_the_same_bits(kernels: Kernels) -> None:
    problem = Problem(replace(CASES["linear"], tolerance=0.05), range(3), tokens=10)
    expected, _ = problem.run(kernels)
    for seed in SEEDS[1:]:
        assert _equal(problem.run(kernels, seed=seed)[0], expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_token_that_is_not_finite_ends_the_solve(way: str, kernels: Kernels) -> None:
    """The first of the batch that has one; the others have gone as far."""
    problem = Problem(Options(tolerance=0.0, window=1), range(3))
    problem.z[1, 6] = problem.z[2, 6] = torch.nan
    progress, (done,) = problem.run(kernels, repeat=way)
    assert done.bad == (1, 6)
    assert not done.more
    assert done.accepted == [3] * 6
    assert progress.x[:, 1:7].isfinite().all()


def test_a_wild_guess_is_replaced_by_its_noise(kernels: Kernels) -> None:
    problem = Problem(Options(tolerance=0.02))
    problem.x[:, 3:9] = torch.tensor([1e30, -1e30, torch.inf, torch.nan, 2e6])
    expected, accepted = problem.reference()
    got, (done,) = problem.run(kernels)
    assert done.accepted == accepted
    torch.testing.assert_close(got.x[:, 1:], expected.x[:, 1:], atol=2e-3, rtol=2e-3)


def test_more_samples_than_warps(kernels: Kernels) -> None:
    options = Options(tolerance=0.0, window=3)
    got, (done,) = Problem(options, [0, 1, 2, 3] * 4 + [0], tokens=5).run(kernels)
    expected, _ = Problem(options, range(4), tokens=5).run(kernels)
    assert done.accepted == [17] * 4
    for sample in range(17):
        assert torch.equal(got.x[sample], expected.x[sample % 4])


@pytest.mark.parametrize("way", WAYS)
def test_a_runtime_that_fails_is_an_error_and_leaves_nothing_behind(way: str, kernels: Kernels) -> None:
    problem = Problem(Options(tolerance=0.5), [0], tokens=3)
    runtime = kernels.runtime
    failed = 0
    while failed < 20:
        runtime.emulation_fail_call(failed + 1)
        with suppress(EmulationError):
            problem.run(kernels, repeat=way)
            break
        assert runtime.emulation_live_objects() == 0
        failed += 1
    runtime.emulation_fail_call(0)
    assert runtime.emulation_live_objects() == 0
    # Of the graph: stream, graph, handle, node, capture, its end, executable, launch, end of the stream.
    assert failed >= {"graph": 9, "step": 7, "loop": 2}[way]


def _outcomes(kernels: Kernels) -> list[Any]:
    """Solves that between them need every line of the rule."""
    # Samples 3 and 11 are one warp's, 6 another's.
    nan = Problem(Options(tolerance=0.0, window=1, first=0), [0, 1, 2, 3] * 4 + [0], tokens=4)
    nan.z[[3, 6, 11], 2] = torch.nan
    wild = Problem(Options(tolerance=0.05, window=4), [1], tokens=8)
    wild.x[:, 3:7] = torch.tensor([1e30, -1e30, torch.inf, torch.nan, 2e6])
    # The last row of a window is read by none: what it was is compared.
    last = Problem(Options(tolerance=1e9, window=4), [1], tokens=8)
    last.x[:, 5] = torch.nan
    # Where much is accepted, what was guessed is seen.
    frames = Options(frame_tokens=3, window=4, tolerance=3.0, first=2)
    guided = Options(guidance=0.8, activation="exp", frame_tokens=2, window=5, tolerance=3.0)
    problems = [
        (Problem(frames, range(3), tokens=12), "graph", 3),
        (Problem(guided, tokens=9), "step", 64),
        (Problem(replace(CASES["annealed shift"], first_token=1, tolerance=3.0), tokens=12), "loop", 4),
        # Sample 0 alone needs a sweep more than the others, of its own warp too.
        (Problem(Options(window=3, tolerance=0.5), [0] + [1] * 8, tokens=8), "graph", 64),
        (nan, "graph", 64),
        (wild, "graph", 64),
        (last, "graph", 64),
    ]
    found: list[Any] = _long(kernels)
    for problem, way, most_sweeps in problems:
        progress, done = problem.run(kernels, repeat=way, most_sweeps=most_sweeps)
        found += [progress, *((part.accepted, part.bad, part.more, part.report.launches) for part in done)]
    return found


@cache
def _expected() -> list[Any]:
    return _outcomes(solve_kernels())


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, SolveProgress):
        return bool(a == b)
    pairs = ((getattr(a, name), getattr(b, name)) for name in ("x", "frontier", "fresh", "kept"))
    return all(torch.equal(x.nan_to_num(nan=1e9), y.nan_to_num(nan=1e9)) for x, y in pairs)


MUTATIONS = [
    *mutations(
        SOLVE,
        {
            r"state\.frontier\[b\] < last \? state\.frontier\[b\] : last": "state.frontier[b]",
            r"if \(!row\.in\(turn\)\) return;": "",
            r"row\.i == 0 && lane\(\) == 0": "lane() == 0 && row.b == 0 && row.i == 0",
            r"frontier \+ shift;": "row.n;",
            r"row\.n >= state\.fresh\[row\.b\]": "true",
            r"turn\.kept\(1, row\.b, source\)": "turn.kept(0, row.b, source)",
            r"given = combined;": "",
            r"row\.i \+ 1 < turn\.window": "false",
            r"read && ": "",
            r" \|\| row\.n < turn\.state\.frontier\[row\.b\]": "",
            r"kept\[c\] = raw\[c\];": ";",
            r"    __syncwarp\(\);\n(?=\})": "",
            r"change = warp_largest\(change\);": "",
            r"if \(frontier >= state\.tokens\) continue;": "",
            r"frontier - turn\.first_token\(b\)": "0",
            r"turn\.window - skipped": "turn.window",
            r"settled = begin \+ ": "settled = ",
            r" && found\.bad_sample < 0": "",
            r"all\.bad_sample < 0 \|\| one\.bad_sample < all\.bad_sample": "true",
            r"found\.more \|\| frontier": "frontier",
            r"all\.more \|\| one\.more": "one.more",
            r"state\.fresh\[b\] = frontier \+ count;": ";",
            r"__syncthreads\(\);": "",
            r" && all\.bad_sample < 0": "",
            r"sweep \+ 1 < turn\.most_sweeps": "true",
            r"set_again\(again, more\);": "",
        },
    ),
    *mutations(
        "ops/jacobi_solve/jacobi_rule.h",
        {
            r"settled < count \? settled \+ 1 : count": "settled + 1",
            r"source < options\.first \? -1 : source": "source",
            r"/ options\.frame_tokens \+ 1": "/ options.frame_tokens + 2",
            r" && value > -wild": "",
            r"options\.affine\.activation == ScaleActivation::none \|\| c >= channels": "c < channels",
            r"guidance\.annealed \? ": "false ? ",
        },
    ),
    *mutations(
        "cuda/repeat.cuh",
        {
            r"value \? 1U : 0U": "1U",
            r"again\.in_node\) cudaGraph": "true) cudaGraph",
            r"own\.graph, 1, cudaGraphCondAssignDefault": "own.graph, 0, cudaGraphCondAssignDefault",
            r"step\(\[&\] \{ return ask\(more, answer, stream\); \}\);": "answer = 0;",
        },
    ),
]


@pytest.mark.parametrize("mutation", some(MUTATIONS), ids=str)
def test_mutation_is_caught(mutation: Mutation) -> None:
    expected = _expected()

    def check(kernels: Kernels) -> None:
        got = _outcomes(kernels)
        assert len(got) == len(expected)
        assert all(_same(a, b) for a, b in zip(got, expected, strict=True))

    assert_caught(SOLVE, mutation, check)
