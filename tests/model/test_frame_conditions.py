"""A vector for each frame: what it tells, and to which frames; in both directions, natively and in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import starflow_ext
from starflow import Flow, Guidance, Sequential, Window, decode
from starflow.config import ConfigError, FlowConfig
from starflow.solver import Schedule

from ..flows import VIDEO, condition, latents, make_flow, null

NO_TEXT = VIDEO | {"txt_size": 0, "txt_dim": 0, "cond_top_only": False, "frame_dim": 3}
CASES: dict[str, dict[str, Any]] = {
    "text": VIDEO | {"frame_dim": 3},
    "text summary": VIDEO | {"frame_dim": 3, "text_embed": True, "position_embed": True, "top_order": "spread"},
    "no text": NO_TEXT | {"top_order": "spread", "position_embed": True},
    "classes": NO_TEXT | {"num_classes": 4},
    "rolling": NO_TEXT | {"attention_frames": 2, "temporal_causal": 1, "position_embed": True},
    "rolling beside": NO_TEXT | {"attention_frames": 2, "temporal_causal": 1, "previous_frames": 2},
}
EXACT = Window(size=9, tolerance=0.0)


def vectors(batch: int = 2, frames: int = 3, seed: int = 6) -> Tensor:
    """Of each frame, (batch, frames, 3); the second sample has none in its second frame."""
    told = torch.randn(batch, frames, 3, generator=torch.Generator().manual_seed(seed))
    told[1, 1] = torch.nan
    return told


def raw(flow: Flow, x: Tensor, y: Tensor | None, told: Tensor | None) -> Tensor:
    """What the deep block puts out, (batch, frames, frame tokens, channels)."""
    affine = flow.encode(x, y, told).affines[-1]
    assert affine is not None
    return affine.raw.unflatten(1, (x.shape[1], -1))


@pytest.mark.parametrize("name", CASES)
def test_a_frame_depends_on_the_vectors_up_to_its_own(name: str) -> None:
    flow = make_flow(CASES[name])
    x, y, told = latents(flow, frames=5), condition(flow), vectors(frames=5)
    before = raw(flow, x, y, told)
    changed = told.clone()
    changed[:, 2] += 1.0
    apart = (raw(flow, x, y, changed) - before).abs().amax((0, 2, 3))
    assert (apart[:2] == 0).all()
    assert (apart[2:] > 1e-4).all()
    # Every token of the frame is told, the first one too.
    assert ((raw(flow, x, y, changed) - before)[:, 2].abs().amax(-1) > 1e-4).all()


def test_no_vector_is_not_a_vector_of_zeros() -> None:
    flow = make_flow(NO_TEXT)
    x = latents(flow)
    none = flow.log_prob(x)
    assert torch.equal(flow.log_prob(x, None, torch.full((2, 3, 3), torch.nan)), none)
    assert (flow.log_prob(x, None, torch.zeros(2, 3, 3)) - none).abs().min() > 1e-3


def test_the_likelihood_of_frames_is_that_of_clips_that_end_there() -> None:
    flow = make_flow(CASES["text"])
    x, y, told = latents(flow, frames=4), condition(flow), vectors(frames=4)
    frames = flow.log_prob(x, y, told, by="frame")
    torch.testing.assert_close(frames[:, :2].sum(1), flow.log_prob(x[:, :2], y, told[:, :2]), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weight", [0.0, 0.8])
def test_decoding_is_the_inverse_in_native_code_and_in_plain_torch(name: str, weight: float) -> None:
    flow = make_flow(CASES[name])
    z, y, told = latents(flow, frames=4), condition(flow), vectors(frames=4)

    def decoded(schedule: Schedule, **options: Any) -> Tensor:
        return decode(flow, z, y, told, null=null(flow), guidance=weight, schedule=schedule, **options).x

    one = decoded(Sequential())
    for size in (4, 15, 40):
        torch.testing.assert_close(decoded(Window(size, 0.0)), one, atol=1e-4, rtol=1e-4)
    with starflow_ext.reference_mode():
        torch.testing.assert_close(decoded(EXACT), one, atol=1e-4, rtol=1e-4)
    if not weight:
        torch.testing.assert_close(flow.encode(one.clone(), y, told).z, z, atol=1e-4, rtol=1e-4)
    other = decode(flow, z, y, vectors(frames=4, seed=7), null=null(flow), guidance=weight, schedule=EXACT).x
    assert (other - one).abs().max() > 1e-2


def test_given_frames_have_vectors_too() -> None:
    flow = make_flow(CASES["text summary"])
    z, y, told = latents(flow, frames=5), condition(flow), vectors(frames=5)
    whole = decode(flow, z, y, told, schedule=EXACT).x
    later = decode(flow, z, y, told, schedule=EXACT, prefix=whole[:, :2].clone()).x
    torch.testing.assert_close(later, whole, atol=1e-4, rtol=1e-4)
    changed = told.clone()
    changed[:, 0] += 1.0
    other = decode(flow, z, y, changed, schedule=EXACT, prefix=whole[:, :2].clone()).x
    assert (other[:, 2:] - whole[:, 2:]).abs().max() > 1e-4


@pytest.mark.parametrize("carried", [1, 2])
def test_a_window_that_slides_takes_the_vectors_of_its_frames_along(carried: int) -> None:
    flow = make_flow(CASES["no text"] | {"local_attn_window": 3})
    z, told = latents(flow, frames=6), vectors(frames=6)
    got = decode(flow, z, None, told, schedule=EXACT, context_frames=carried)
    # The deep block alone, window by window: what it put out before is given, with its vectors.
    deep = make_flow(CASES["no text"] | {"local_attn_window": 3})
    expected = decode(deep, z[:, :3], None, told[:, :3], schedule=EXACT).x
    while expected.shape[1] < 6:
        first = expected.shape[1] - carried
        clip, own = z[:, first : first + 3], told[:, first : first + 3]
        later = decode(deep, clip, None, own, schedule=EXACT, prefix=expected[:, first:].clone()).x
        expected = torch.cat([expected, later[:, carried:]], 1)
    torch.testing.assert_close(got.x, expected[:, :6], atol=1e-3, rtol=1e-3)


def test_guidance_is_by_the_vectors() -> None:
    flow = make_flow(NO_TEXT)
    z, told = latents(flow), vectors()
    none = torch.full_like(told, torch.nan)
    # Both halves of guidance are one where there is nothing to guide by.
    plain = decode(flow, z, None, none, schedule=EXACT).x
    torch.testing.assert_close(decode(flow, z, None, none, guidance=2.0, schedule=EXACT).x, plain, atol=1e-4, rtol=1e-4)
    guided = decode(flow, z, None, told, guidance=2.0, schedule=EXACT).x
    assert (guided - decode(flow, z, None, told, schedule=EXACT).x).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"guidance is 2\.0, expected 0 without anything to guide by"):
        decode(flow, z, guidance=Guidance(2.0))


def test_a_conditional_denoiser_reads_the_vectors() -> None:
    flow = make_flow(NO_TEXT | {"learnable_self_denoiser": True, "conditional_denoiser": True})
    x, told = latents(flow), vectors()
    assert flow.denoiser is not None
    plain = flow.denoiser(x)
    assert torch.equal(flow.denoiser(x, None, torch.full_like(told, torch.nan)), plain)
    told_so = flow.denoiser(x, None, told)
    assert (told_so - plain).abs().max() > 1e-3
    with torch.inference_mode():  # Packed weights.
        torch.testing.assert_close(flow.denoiser(x, None, told), told_so, atol=1e-5, rtol=1e-4)
    unconditional = make_flow(NO_TEXT | {"learnable_self_denoiser": True})
    assert unconditional.denoiser is not None
    assert torch.equal(unconditional.denoiser(x, None, told), unconditional.denoiser(x))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (torch.zeros(2, 3, 4), r"frame_conditions has shape \[2, 3, 4\], expected \[2, 3, 3\]"),
        (torch.zeros(2, 2, 3), r"frame_conditions has shape \[2, 2, 3\], expected \[2, 3, 3\]"),
        (torch.zeros(2, 3, 3, dtype=torch.int64), "frame_conditions has dtype int64, expected a float one"),
        (torch.full((2, 3, 3), torch.inf), "frame_conditions holds infinity or NaN, expected finite vectors"),
        (torch.tensor([torch.nan, 0.0, 0.0]).expand(2, 3, 3), "frame_conditions holds infinity or NaN, expected"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(told: Tensor, message: str) -> None:
    flow = make_flow(NO_TEXT)
    x = latents(flow)
    for call in (flow.encode, flow.log_prob, lambda *given: decode(flow, *given)):
        with pytest.raises(ValueError, match=message):
            call(x, None, told)


def test_a_flow_without_vectors_refuses_them() -> None:
    flow = make_flow(VIDEO)
    with pytest.raises(ValueError, match=r"frame_conditions is given, expected None .*frame_dim is 0"):
        flow.encode(latents(flow), condition(flow), vectors())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_dim": -1}, r"flow\.frame_dim is -1, expected an integer >= 0"),
        (
            {"temporal_causal": 0, "seq_order": "R2L"},
            r"flow\.temporal_causal is 0, expected a number > 0 with frame_dim",
        ),
        ({"sos": False}, r"flow\.sos is False, expected True with frame_dim"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowConfig(**(NO_TEXT | changes))
