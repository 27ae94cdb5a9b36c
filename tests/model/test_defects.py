"""What goes wrong in the published code, and must not here; what other files test is not repeated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starflow import Chunks, Flow, Guidance, Sequential, Window, decode
from starflow.training.optim import cosine_lr

from ..flows import CASES, IMAGE, TARFLOW, VIDEO, condition, inputs, latents, make_flow, null

EXACT = Window(size=7, tolerance=0.0)


def round_trip(flow: Flow, z: Tensor, y: Tensor | None) -> None:
    x = decode(flow, z, y, schedule=EXACT).x.clone()
    torch.testing.assert_close(flow.encode(x, y).z, z, atol=1e-4, rtol=1e-4)


def test_learned_positions_work_in_both_directions() -> None:
    flow = make_flow(IMAGE | {"rope": False})
    round_trip(flow, latents(flow), None)


def test_an_identity_block_in_a_guided_video_with_given_frames() -> None:
    flow = make_flow(CASES["video identity"])
    z, y = inputs("video", flow)
    prefix = latents(flow, frames=1, seed=8)
    decoded = decode(flow, z, y, null=null(flow), guidance=1.5, prefix=prefix, schedule=EXACT)
    torch.testing.assert_close(decoded.x[:, :1], prefix, atol=1e-4, rtol=1e-4)
    encoded = flow.encode(z, y)
    assert torch.equal(encoded.latents[1], encoded.latents[2])
    assert encoded.log_det[1].shape == encoded.log_det[0].shape
    assert encoded.log_det[1].abs().max() == 0


def test_videos_without_text() -> None:
    flow = make_flow(CASES["video without text"])
    round_trip(flow, latents(flow), None)


def test_every_schedule_obeys_the_temperature_of_the_attention() -> None:
    flow = make_flow(VIDEO, spread=1.0)
    z, y = inputs("video", flow)
    plain = decode(flow, z, y, schedule=Sequential()).x
    warm = decode(flow, z, y, schedule=Sequential(), temperature=0.3).x
    assert (warm - plain).abs().max() > 1e-3
    torch.testing.assert_close(decode(flow, z, y, schedule=EXACT, temperature=0.3).x, warm, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("context", [None, 1, 2])
def test_token_by_token_goes_beyond_the_window(context: int | None) -> None:
    flow = make_flow(VIDEO | {"local_attn_window": 3})
    z, y = latents(flow, frames=5), condition(flow)
    exact = decode(flow, z, y, schedule=Sequential(), context_frames=context).x
    got = decode(flow, z, y, schedule=EXACT, context_frames=context).x
    torch.testing.assert_close(got, exact, atol=1e-4, rtol=1e-4)


def test_given_frames_without_a_start_token() -> None:
    """The token behind the prefix is right: decoding again what was decoded changes nothing."""
    flow = make_flow(VIDEO | {"sos": False})
    z, y = inputs("video", flow)
    x = decode(flow, z, y, schedule=EXACT).x
    again = decode(flow, z, y, prefix=x[:, :1].clone(), schedule=EXACT).x
    torch.testing.assert_close(again, x, atol=1e-4, rtol=1e-4)


def test_guidance_with_given_frames_where_all_blocks_read_text() -> None:
    flow = make_flow(CASES["video shallow blocks over time"])
    z, y = inputs("video", flow)
    prefix = latents(flow, frames=1, seed=8)
    decoded = decode(flow, z, y, null=null(flow), guidance=1.5, prefix=prefix, schedule=EXACT)
    torch.testing.assert_close(decoded.x[:, :1], prefix, atol=1e-4, rtol=1e-4)


def test_every_option_of_guidance_does_something() -> None:
    flow = make_flow(TARFLOW | {"num_classes": 4}, spread=1.0)
    z, y = latents(flow), torch.tensor([1, 2])
    kinds = [
        Guidance(0.7),
        Guidance(0.7, all_blocks=False),
        *(Guidance(0.7, kind="linear", **o) for o in ({}, {"parts": "a"}, {"parts": "b"}, {"annealed": True})),
        Guidance(0.7, kind="linear", temperature=0.5),
        Guidance(0.9, kind="linear", temperature=0.5),
    ]
    samples = [decode(flow, z, y, guidance=kind, schedule=EXACT).x for kind in kinds]
    for i, a in enumerate(samples):
        for b in samples[:i]:
            assert (a - b).abs().max() > 1e-4
    off = decode(flow, z, y, guidance=Guidance(0.7, kind="linear", parts=""), schedule=EXACT).x
    assert torch.equal(off, decode(flow, z, y, schedule=EXACT).x)


def test_decoding_twice_gives_the_same_bits() -> None:
    """No state stays in the model: neither caches, nor the shape of the last input."""
    flow = make_flow(VIDEO)
    z, y = inputs("video", flow)
    options = {"null": null(flow), "guidance": 1.5, "prefix": latents(flow, frames=1, seed=8), "schedule": EXACT}
    first = decode(flow, z, y, **options).x
    decode(flow, latents(flow, image=True), y, schedule=EXACT)
    flow.encode(latents(flow, frames=2)[..., :2], y)
    assert torch.equal(decode(flow, z, y, **options).x, first)


def test_long_clips_with_rounded_weights() -> None:
    flow = make_flow(VIDEO | {"local_attn_window": 3}).bfloat16()
    z, y = latents(flow, frames=5), condition(flow)
    decoded = decode(flow, z, y, null=null(flow), guidance=1.0, context_frames=1)
    assert decoded.x.dtype == torch.float32
    assert decoded.x.isfinite().all()


def test_the_state_holds_weights_and_what_is_tracked() -> None:
    flow = make_flow(VIDEO)
    buffers = {name.rpartition(".")[2] for name, _ in flow.named_buffers()}
    assert buffers == {"guess", "prior_variance"}
    parameters = sum(p.numel() for p in flow.parameters())
    assert sum(b.numel() for b in flow.buffers()) < 0.01 * parameters


def test_the_learning_rate_never_leaves_its_range_or_raises() -> None:
    rates = [cosine_lr(step, warmup=50, total=60, peak=1e-3, floor=1e-5) for step in range(200)]
    assert rates[0] == 1e-6
    assert max(rates) == rates[50] == 1e-3
    assert rates[51:61] == sorted(rates[51:61], reverse=True)
    assert rates[60:] == [1e-5] * 140
    assert cosine_lr(0, warmup=0, total=10, peak=1e-3, floor=1e-5) == 1e-3


def test_a_label_of_none_is_the_same_in_both_directions() -> None:
    """A negative label is the mean over classes, never the last class."""
    flow = make_flow(TARFLOW | {"num_classes": 4})
    z, none = latents(flow), torch.tensor([-1, -1])
    x = decode(flow, z, none, schedule=EXACT).x.clone()
    torch.testing.assert_close(flow.encode(x, none).z, z, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(flow.encode(x, None).z, z, atol=1e-4, rtol=1e-4)
    assert (flow.encode(x, torch.tensor([3, 3])).z - z).abs().max() > 1e-3


def test_a_process_needs_no_group() -> None:
    """Every schedule runs in one process, and the model never asks how many there are."""
    assert not torch.distributed.is_initialized()
    flow = make_flow(IMAGE)
    assert decode(flow, latents(flow), schedule=Window()).x.isfinite().all()


def test_orders_of_two_shapes_do_not_mix() -> None:
    flow = make_flow(VIDEO | {"top_order": "spread"})
    y = condition(flow)
    wide, tall = latents(flow), latents(flow).transpose(-1, -2).contiguous()
    first = flow.encode(wide, y).z
    flow.encode(tall, y)
    assert torch.equal(flow.encode(wide, y).z, first)


def test_chunks_are_short_up_to_the_second_frame() -> None:
    """15 tokens a frame, blocks of 5: 5 5 5 in the first frame and 5 at the start of the second, then up to 20."""
    flow = make_flow(VIDEO | {"layers_per_block": (1,)})
    z, y = latents(flow, batch=1), condition(flow, 1)
    report = decode(flow, z, y, schedule=Chunks(5, 1e-14, 50)).reports[0]
    assert report is not None
    assert len(report.passes) == 6
    assert [count for count in report.accepted if count] == [5, 5, 5, 5, 20, 5]
