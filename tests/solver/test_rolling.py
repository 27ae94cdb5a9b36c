"""A cache that rolls: decoding a clip without end is decoding it at once, to rounding, however long it has become."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import starflow_ext
from starflow import Chunks, Flow, Guidance, Sequential, Window, decode
from starflow.solver import Conditions, Decoding, NotFiniteError, Precision, Schedule, SolveReport, Span, checked
from starflow.solver.rolling import rolling_frames

from ..flows import CASES, VIDEO, condition, latents, make_flow, null

ROLLING = CASES["video rolling"] | {"attention_frames": 2}
DEEP = make_flow(ROLLING | {"layers_per_block": (1, 1, 3)})
CLASSES = {"txt_size": 0, "txt_dim": 0, "cond_top_only": False, "text_embed": False, "num_classes": 4}
LOOSE = Window(size=8, tolerance=0.01, certificate=True)


def decoding(
    flow: Flow,
    shape: tuple[int, ...],
    frames: int,
    schedule: Schedule = LOOSE,
    weight: float = 0.0,
    precision: Precision = "float32",
    known: tuple[Tensor, ...] | None = None,
) -> Decoding:
    """A decoding in a cache of so many frames."""
    batch = shape[0]
    like = torch.empty(batch, *shape[2:], dtype=torch.promote_types(flow.blocks[-1].guess.dtype, torch.float32))
    conditions = Conditions(condition(flow, batch), null(flow, batch), Guidance(weight), schedule, precision=precision)
    behind = flow.config.attention_frames
    span = Span(frames, behind=behind)
    return Decoding(flow, (batch, *shape[2:]), checked(flow, like, conditions), span, known=known, trace=True)


def decoded(flow: Flow, z: Tensor, frames: int, **how: Any) -> tuple[Tensor, SolveReport]:
    """The clip, decoded in a cache of so many frames, and the report of the deep block."""
    made = decoding(flow, tuple(z.shape), frames, **how)
    made.push(z, more=False)
    grid = made.rest()[-1]
    assert made.reports[0] is not None
    return flow.from_grid(grid), made.reports[0]


@pytest.mark.parametrize("name", ["video rolling", "video rolling raster"])
@pytest.mark.parametrize("behind", [1, 2])
@pytest.mark.parametrize("schedule", [Sequential(), LOOSE, Window(40, 0.0), Chunks(4, 1e-6)])
@pytest.mark.parametrize("weight", [0.0, 0.8])
def test_rolled_is_one_long_decode(name: str, behind: int, schedule: Schedule, weight: float) -> None:
    flow = make_flow(CASES[name] | {"attention_frames": behind})
    z = latents(flow, frames=12, seed=4)
    long, expected = decoded(flow, z, 12 + behind, schedule=schedule, weight=weight)
    for frames in (behind + 1, behind + 4):
        rolled, report = decoded(flow, z, frames, schedule=schedule, weight=weight)
        torch.testing.assert_close(rolled, long, atol=1e-5, rtol=1e-5)
        counts = [(r.tokens, r.rows, r.sweeps, r.samples, r.window, len(r.accepted)) for r in (report, expected)]
        assert counts[0] == counts[1]
    with starflow_ext.reference_mode():
        plain, _ = decoded(flow, z, behind + 4, schedule=schedule, weight=weight)
    torch.testing.assert_close(rolled, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        CLASSES,
        {"txt_size": 0, "txt_dim": 0, "cond_top_only": False, "text_embed": False},
        {"num_heads": 2, "num_kv_heads": 1, "use_qk_norm": True, "hf_style_rope": True},
        {"attention_frames": 3, "top_order": "checkerboard"},
    ],
    ids=["classes", "no condition", "grouped", "checkerboard"],
)
def test_every_architecture_rolls(changes: dict[str, Any]) -> None:
    flow = make_flow(ROLLING | changes)
    z = latents(flow, frames=14)
    long, _ = decoded(flow, z, 20, schedule=Sequential())
    rolled, _ = decoded(flow, z, 4, schedule=Sequential())
    torch.testing.assert_close(rolled, long, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["two_bfloat16", "float16", "bfloat16", "int8"])
def test_every_precision_rolls(precision: Precision) -> None:
    z = latents(DEEP, frames=14)
    long, _ = decoded(DEEP, z, 20, schedule=Sequential(), precision=precision)
    rolled, _ = decoded(DEEP, z, 4, schedule=Sequential(), precision=precision)
    bound = 1e-5 if precision == "two_bfloat16" else 0.2 if precision == "bfloat16" else 1e-2
    torch.testing.assert_close(rolled, long, atol=bound, rtol=bound)


def test_float64_rolls() -> None:
    flow = make_flow(ROLLING).double()
    z = latents(flow, frames=14)
    long, _ = decoded(flow, z, 20, schedule=Sequential())
    rolled, _ = decoded(flow, z, 4, schedule=Sequential())
    # Rotations are tables of float32.
    torch.testing.assert_close(rolled, long, atol=1e-7, rtol=1e-7)


@torch.no_grad()
def test_late_frames_are_as_exact_as_the_first() -> None:
    z = torch.randn(1, 400, 2, 2, 2, generator=torch.Generator().manual_seed(5))
    rolled = decode(DEEP, z, condition(DEEP, 1), schedule=Sequential()).x
    exact = make_flow(ROLLING | {"layers_per_block": (1, 1, 3)}).double()
    y = condition(DEEP, 1)
    assert y is not None
    error = (exact.encode(rolled.double(), y.double()).z - z).abs().amax((0, 2, 3, 4))
    assert error[-100:].max() < 2 * error[:100].max() + 1e-6
    assert error.max() < 5e-6


@pytest.mark.parametrize("schedule", [LOOSE, Sequential()])
def test_bits_depend_neither_on_pieces_nor_on_the_batch(schedule: Schedule) -> None:
    z = latents(DEEP, batch=3, frames=15)
    made = decoding(DEEP, tuple(z.shape), 5, schedule, 0.7)
    parts = []
    for part in z.split([1, 4, 2, 8], 1):
        made.push(part, more=True)
        while (frames := made.pull(together=part.shape[1] == 4)) is not None:
            parts.append(frames)
    whole, _ = decoded(DEEP, z, 5, schedule=schedule, weight=0.7)
    assert torch.equal(torch.cat(parts, 1), whole)
    one = latents(DEEP, batch=3, frames=15)[:1]
    few = Conditions(condition(DEEP, 3)[:1], null(DEEP, 3)[:1], Guidance(0.7), schedule)  # type: ignore[index]
    alone = Decoding(DEEP, (1, *z.shape[2:]), few, Span(5, behind=2))
    alone.push(one, more=False)
    assert torch.equal(DEEP.from_grid(alone.rest()[-1]), whole[:1])


@pytest.mark.parametrize("given", [1, 4, 13])
@pytest.mark.parametrize("weight", [0.0, 0.8])
def test_given_frames_fill_the_cache(given: int, weight: float) -> None:
    """Any number of them, more than it holds too."""
    z, prefix = latents(DEEP, frames=given + 8), latents(DEEP, frames=given, seed=9)
    y, free = condition(DEEP), null(DEEP)
    for schedule in (LOOSE, Sequential()):
        clip = decode(DEEP, z, y, null=free, guidance=weight, prefix=prefix, schedule=schedule)
        assert torch.equal(clip.x[:, :given], prefix)
        known = DEEP.known(prefix, y, z.shape[2:])
        made = decoding(DEEP, tuple(z.shape), given + 12, schedule, weight, known=known)
        made.push(z[:, given:], more=False)
        torch.testing.assert_close(DEEP.from_grid(made.rest()[-1]), clip.x[:, given:], atol=1e-5, rtol=1e-5)
        report = clip.reports[0]
        assert report is not None
        assert report.tokens == 8 * 15
        if not weight:
            seen = DEEP.encode(clip.x.clone(), y).z[:, given:]
            torch.testing.assert_close(seen, z[:, given:], atol=0.05, rtol=0.05)


def test_the_certificate_is_the_distance_of_the_noise() -> None:
    """Of all frames, of which most were forgotten."""
    z = latents(DEEP, frames=20)
    clip = decode(DEEP, z, condition(DEEP), schedule=Window(8, 0.05, certificate=True))
    deep, *_ = clip.reports
    assert deep is not None
    seen, *_ = DEEP.solving_order()[0].encode(clip.latents[0].clone(), condition(DEEP), image=False)
    error = float((seen - DEEP.noise_grid(z)).detach().abs().max())
    assert deep.backward_error is not None
    assert deep.backward_error > 1e-3
    assert deep.backward_error == pytest.approx(error, abs=1e-5)
    exact = decode(DEEP, z, condition(DEEP), schedule=Window(8, 0.0, certificate=True)).reports[0]
    assert exact is not None
    assert exact.backward_error is not None
    assert exact.backward_error < 1e-5
    low = decode(DEEP, z, condition(DEEP), schedule=Window(8, 0.0, certificate=True), precision="bfloat16").reports[0]
    assert low is not None
    assert low.backward_error is not None
    assert low.backward_error > 1e-4


@pytest.mark.parametrize("weight", [0.0, 0.8])
def test_another_text_holds_from_the_next_frame_on(weight: float) -> None:
    """The past stays as it was encoded, also for the certificate."""
    z, other = latents(DEEP, frames=14), condition(DEEP, seed=7)
    results = []
    for frames, native in ((5, True), (20, True), (5, False)):
        with nullcontext() if native else starflow_ext.reference_mode():
            made = decoding(DEEP, tuple(z.shape), frames, Window(8, 0.0, certificate=True), weight)
            made.push(z, more=False)
            parts = [made.pull() for _ in range(6)]
            made.change(other)
            parts += [made.pull() for _ in range(8)]
            report = made.reports[0]
        assert report is not None
        assert report.backward_error is not None
        assert report.backward_error < 1e-5
        results.append(torch.cat([part for part in parts if part is not None], 1))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[0], results[2], atol=1e-4, rtol=1e-4)
    same, _ = decoded(DEEP, z, 5, schedule=Window(8, 0.0), weight=weight)
    assert torch.equal(results[0][:, :6], same[:, :6])
    assert (results[0][:, 6] - same[:, 6]).abs().max() > 1e-2


def _held() -> int:
    """Bytes of all dense tensors that are alive; those of other tests may be sparse."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) is Tensor and found.layout == torch.strided]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("reference", [False, True])
def test_memory_is_flat(reference: bool) -> None:
    flow = make_flow(ROLLING | {"layers_per_block": (1, 1)})
    conditions = checked(flow, torch.empty(1, 2, 2, 2), Conditions(condition(flow, 1), None, Guidance(), LOOSE))
    frames = 60 if reference else 320
    with starflow_ext.reference_mode() if reference else nullcontext():
        made = Decoding(flow, (1, 2, 2, 2), conditions, Span(6, behind=2))
        held = []
        for frame in range(frames):
            made.push(torch.randn(1, 1, 2, 2, 2, generator=torch.Generator().manual_seed(frame)), more=True)
            made.pull()
            # The cache is as full at every fourth frame.
            if frame in (19, frames - 1):
                held.append(_held())
    assert held[1] <= held[0]
    report = made.reports[0]
    assert report is not None
    assert (report.tokens, report.accepted) == (4 * frames, ())


def test_a_token_that_is_not_finite_is_named_by_its_place_in_the_clip() -> None:
    z = latents(DEEP, frames=20)
    z[1, 17, 0, 0, 0] = float("nan")
    for schedule in (LOOSE, Sequential()):
        with pytest.raises(NotFiniteError, match=rf"noise of token {17 * 15} of sample 1"):
            decode(DEEP, z, condition(DEEP), schedule=schedule)
    prefix = latents(DEEP, frames=19)
    known = list(DEEP.known(prefix, condition(DEEP), (2, 3, 5)))
    known[2] = known[2].clone()
    known[2][1, 17, 1, 2, 0] = float("inf")
    made = decoding(DEEP, tuple(z.shape), 5, known=tuple(known))
    made.push(z[:, :1], more=False)
    with pytest.raises(NotFiniteError, match=r"given data of token 2[56]\d of sample 1"):
        made.pull()


@pytest.mark.parametrize("frames, behind, context", [(3, 3, None), (3, 0, None), (4, 2, 3)])
def test_a_span_has_room_for_a_new_frame(frames: int, behind: int, context: int | None) -> None:
    with pytest.raises(ValueError, match=rf"attention_frames is {behind}, expected 1 to {frames - 1} for a cache"):
        Span(frames, context, behind=behind)


def test_a_weight_that_grows_along_the_clip_is_refused() -> None:
    z, guidance = latents(DEEP), Guidance(1.0, "linear", annealed=True)
    with pytest.raises(ValueError, match=r"guidance\.annealed is True, expected False with flow\.attention_frames"):
        decode(DEEP, z, condition(DEEP), null=null(DEEP), guidance=guidance)


@pytest.mark.parametrize(
    "behind, tokens, frames", [(6, 64, 12), (6, 36, 14), (1, 64, 5), (6, 15, 12), (1, 9, 5), (9, 256, 18)]
)
def test_frames_of_a_cache(behind: int, tokens: int, frames: int) -> None:
    """Half of them are forgotten together, or as many as move whole panels of keys where these are few."""
    assert rolling_frames(behind, tokens) == frames


def test_a_flow_with_windows_does_not_roll() -> None:
    flow = make_flow(VIDEO | {"local_attn_window": 3})
    span = Span(3, 2)
    assert span.endless
    assert not Span(3).endless
    assert Span.rolling(2, 15).endless
    assert decode(flow, latents(flow, frames=5), condition(flow)).x.shape[1] == 5
