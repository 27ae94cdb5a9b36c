"""Attention over the last frames: what a frame is told by is what it sees, and nothing of how long the clip is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from starflow import Flow, Window, decode
from starflow.config import ConfigError, FlowConfig

from ..flows import CASES, VIDEO, condition, latents, make_flow

ROLLING = CASES["video rolling"]


def scales_and_shifts(flow: Flow, x: Tensor, y: Tensor | None) -> Tensor:
    """What the deep block puts out for each token, (batch, frames, frame tokens, channels)."""
    affine = flow.encode(x, y).affines[-1]
    assert affine is not None
    return affine.raw.unflatten(1, (x.shape[1], -1))


@pytest.mark.parametrize("name", ["video rolling", "video rolling raster"])
@pytest.mark.parametrize("frames, layers", [(1, 1), (2, 1), (1, 2)])
def test_a_frame_is_the_same_wherever_in_a_clip_it_comes(name: str, frames: int, layers: int) -> None:
    options = CASES[name] | {"attention_frames": frames, "layers_per_block": (1, 1, layers)}
    flow = make_flow(options).double()
    x, y = latents(flow, frames=9), condition(flow)
    whole = scales_and_shifts(flow, x, y)
    # The first slot of a clip holds the start token in place of the token before, which each layer hands on over the
    # frames that it sees.
    reach = layers * frames + 1
    for cut in (2, 4):
        part = scales_and_shifts(flow, x[:, cut:], y)
        # Angles are float32: 1e-7 of one turn.
        torch.testing.assert_close(part[:, reach:], whole[:, cut + reach :], atol=1e-6, rtol=1e-6)
        assert (part[:, 0] - whole[:, cut]).abs().max() > 1e-3


@pytest.mark.parametrize("frames", [1, 2])
def test_every_layer_sees_its_own_frames_behind(frames: int) -> None:
    flow = make_flow(ROLLING | {"attention_frames": frames, "layers_per_block": (1, 1, 2)}).double()
    x, y = latents(flow, frames=8), condition(flow)
    before = scales_and_shifts(flow, x, y)
    changed = x.clone()
    changed[:, 1] += 1.0
    apart = (scales_and_shifts(flow, changed, y) - before).abs().amax((0, 2, 3))
    # A slot holds the token before its own, so the last token of frame 1 is seen as one of frame 2.
    last = 2 + 2 * frames
    assert apart[0] == 0
    assert (apart[1 : last + 1] > 1e-6).all()
    assert (apart[last + 1 :] == 0).all()


@pytest.mark.parametrize("previous", [0, 1, 2])
def test_a_token_is_told_what_stood_at_its_own_place(previous: int) -> None:
    """Without attention and MLP a token depends on the one before it, and on its place in so many frames."""
    flow = make_flow(ROLLING | {"attention_frames": 2, "previous_frames": previous}).double()
    block = flow.blocks[-1]
    for layer in block.conditioner.layers:
        for linear in (layer.attention.proj, layer.mlp.down):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    y = condition(flow, 1)
    layout = block.layout(4, 3, 5, y, image=False)
    x = torch.randn(1, 60, flow.config.token_channels, dtype=torch.float64, requires_grad=True)
    affine, _ = block.conditioner(x, y, layout)
    (gradient,) = torch.autograd.grad(affine.raw[0, 33].sum(), x)
    seen = set(gradient[0].abs().amax(-1).nonzero().flatten().tolist())
    assert seen == {32, *(33 - 15 * (frame + 1) for frame in range(previous))}


def test_an_image_of_a_flow_that_sees_frames_before_has_its_text() -> None:
    """An image has no frame before it, and is decoded by one window."""
    flow = make_flow(CASES["video rolling beside"])
    z, y = latents(flow, image=True), condition(flow)
    native = decode(flow, z, y, schedule=Window(4, 0.0)).x
    torch.testing.assert_close(flow.encode(native.clone(), y).z, z, atol=1e-4, rtol=1e-4)


def test_text_enters_without_a_place_in_time() -> None:
    flow = make_flow(ROLLING)
    assert flow.blocks[-1].conditioner.proj_text is None
    x, y = latents(flow), condition(flow)
    torch.testing.assert_close(flow.log_prob(x, y), flow.log_prob(x, y.flip(1)))
    assert (flow.log_prob(x, y) - flow.log_prob(x, y + 1)).abs().min() > 1e-3


@pytest.mark.parametrize("size", [1, 4, 15, 40])
def test_decoding_by_any_window_is_decoding_token_by_token(size: int) -> None:
    flow = make_flow(ROLLING | {"attention_frames": 2})
    z, y = latents(flow, frames=6, seed=4), condition(flow)
    one = decode(flow, z, y, schedule=Window(1, 0.0)).x
    torch.testing.assert_close(decode(flow, z, y, schedule=Window(size, 0.0)).x, one, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(flow.encode(one.clone(), y).z, z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_frames": 0}, r"flow\.attention_frames is 0, expected a number of frames >= 1, together with rope"),
        ({"local_attn_window": 4}, r"flow\.attention_frames is 1, expected .* without local_attn_window"),
        ({"sos": False}, r"flow\.attention_frames is 1, expected .* together with rope, sos"),
        ({"previous_frames": 2}, r"flow\.previous_frames is 2, expected 0 to attention_frames \(1\)"),
        ({"previous_frames": -1}, r"flow\.previous_frames is -1, expected 0 to attention_frames \(1\)"),
        ({"text_embed": False}, r"flow\.text_embed is False, expected True with attention_frames and text"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowConfig(**(VIDEO | {"text_embed": True, "attention_frames": 1} | changes))
